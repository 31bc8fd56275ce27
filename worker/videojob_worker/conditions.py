"""What every stage must know of prompts and timesteps: computed once on the first rank, then broadcast.

``pipeline`` looks it up turn by turn. The text encoder lives only inside ``encode``; other stages hold neither it nor
the condition embedder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from .errors import ModelInvalidError
from .link import Link
from .wan import WanStage

TEXT_TOKENS = 512  # the length Wan was trained with; shorter prompts are padded with zeros, longer ones cut


@dataclass(frozen=True)
class Conditions:
    """What all stages must know, computed once on the first rank and broadcast.

    Without guidance there is no unconditional context and ``guidance_scale`` is None.
    """

    contexts: Tensor  # (scenes, text tokens, D), then the unconditional one: (scenes + 1, ...)
    embeddings: Tensor  # (steps, D)
    projections: Tensor  # (steps, 6, D)
    guidance_scale: float | None

    @property
    def branches(self) -> int:
        """Passes of each (block, step): 2 with guidance."""
        return 1 if self.guidance_scale is None else 2

    def context(self, scene: int, branch: int) -> Tensor:
        """The cross-attention context of a turn, (1, text tokens, D)."""
        index = scene if branch == 0 else self.contexts.shape[0] - 1
        return self.contexts[index : index + 1]


def encode(folder: Path, prompts: Sequence[str], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Each prompt's UMT5 embedding, (1, 512, text_dim); the encoder is freed on return.

    Raises:
        ModelInvalidError: the text encoder or tokenizer is missing or broken.
    """
    try:
        encoder = WanPipeline.from_pretrained(
            folder,
            transformer=None,
            transformer_2=None,
            vae=None,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelInvalidError(f"the text encoder in {folder} cannot be loaded: {error}") from error
    shared = encoder.text_encoder.shared.weight
    if shared.data_ptr() != encoder.text_encoder.encoder.embed_tokens.weight.data_ptr():
        raise ModelInvalidError("the text encoder's embeddings are not tied: use transformers 5.6 or newer")
    encoder.to(device)
    with torch.inference_mode():
        embeds = {prompt: _embed(encoder, prompt, device) for prompt in dict.fromkeys(prompts)}
    return [embeds[prompt] for prompt in prompts]


def _embed(encoder: WanPipeline, prompt: str, device: torch.device) -> Tensor:
    embeds, _ = encoder.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=device
    )
    assert isinstance(embeds, Tensor)  # noqa: S101 - diffusers is untyped
    return embeds


def compute(stage: WanStage, embeds: Sequence[Tensor], timesteps: Tensor, guidance_scale: float | None) -> Conditions:
    """The conditions, on the first stage. ``embeds`` holds one embedding per scene, then the negative one.

    Afterwards the stage's condition embedder is dropped: nothing needs it any more.
    """
    with torch.inference_mode():
        contexts = torch.cat([stage.condition(embed) for embed in embeds])
        times = [stage.time(timestep[None], embeds[0]) for timestep in timesteps]
    stage.drop("condition_embedder")
    embeddings, projections = (torch.cat(parts) for parts in zip(*times, strict=True))
    return Conditions(contexts, embeddings, projections, guidance_scale)


def share(
    link: Link,
    computed: Conditions | None,
    *,
    scenes: int,
    steps: int,
    width: int,
    guidance_scale: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Conditions:
    """The first rank's conditions on every rank. ``width`` is D, the model's inner dimension."""
    if computed is None:
        computed = Conditions(
            torch.empty((scenes + 1, TEXT_TOKENS, width), dtype=dtype, device=device),
            torch.empty((steps, width), dtype=dtype, device=device),
            torch.empty((steps, 6, width), dtype=dtype, device=device),
            guidance_scale,
        )
    if link.size > 1:
        for tensor in (computed.contexts, computed.embeddings, computed.projections):
            link.broadcast(tensor)
    return computed
