"""What every stage must know of prompts and timesteps: computed once on the first rank, then broadcast.

Every expert has its own text context and its own embedding of the timesteps that it predicts at.

``pipeline`` looks it up turn by turn. The text encoder lives only inside ``encode``; other stages hold neither it nor
the condition embedder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from .errors import ModelInvalidError
from .link import Link
from .wan import WanStage

log = logging.getLogger(__name__)

TEXT_TOKENS = 512  # the length Wan was trained with; shorter prompts are padded with zeros, longer ones cut


@dataclass(frozen=True)
class Conditions:
    """What all stages must know, computed once on the first rank and broadcast."""

    contexts: Tensor  # (experts, scenes + 1, text tokens, D), the unconditional one last
    embeddings: Tensor  # (steps, D), each of the expert that makes the step
    projections: Tensor  # (steps, 6, D), likewise
    experts: tuple[int, ...]  # of each step
    guidance: tuple[float, ...] | None  # each expert's scale; None without guidance

    @property
    def branches(self) -> int:
        """Passes of each (block, step): 2 with guidance."""
        return 1 if self.guidance is None else 2

    def context(self, expert: int, scene: int, branch: int) -> Tensor:
        """The cross-attention context of a turn, (1, text tokens, D)."""
        index = scene if branch == 0 else self.contexts.shape[1] - 1
        return self.contexts[expert, index : index + 1]


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
    tokens = len(encoder.tokenizer(prompt_clean(prompt), verbose=False).input_ids)
    if tokens > TEXT_TOKENS:
        log.warning(
            "the prompt that begins with %r has %d tokens, of which the model reads %d: its last %d are cut off",
            prompt[:40],
            tokens,
            TEXT_TOKENS,
            tokens - TEXT_TOKENS,
        )
    embeds, _ = encoder.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=device
    )
    assert isinstance(embeds, Tensor)  # noqa: S101 - diffusers is untyped
    return embeds


def compute(
    stages: Sequence[WanStage],
    embeds: Sequence[Tensor],
    timesteps: Tensor,
    experts: tuple[int, ...],
    guidance: tuple[float, ...] | None,
) -> Conditions:
    """The conditions, on the first rank.

    Afterwards the stages' condition embedders are dropped: nothing needs them any more.

    Args:
        stages: each expert's first layers.
        embeds: one embedding per scene, then the negative one.
        timesteps: (steps,).
        experts: the expert that makes each step.
        guidance: each expert's scale; None without guidance.
    """
    with torch.inference_mode():
        used = stages[: max(experts) + 1]
        contexts = torch.stack([torch.cat([stage.condition(embed) for embed in embeds]) for stage in used])
        times = [
            stages[expert].time(timestep[None], embeds[0]) for expert, timestep in zip(experts, timesteps, strict=True)
        ]
    for stage in stages:
        stage.drop("condition_embedder")
    embeddings, projections = (torch.cat(parts) for parts in zip(*times, strict=True))
    return Conditions(contexts, embeddings, projections, experts, guidance)


def share(
    link: Link,
    computed: Conditions | None,
    *,
    scenes: int,
    width: int,
    experts: tuple[int, ...],
    guidance: tuple[float, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Conditions:
    """The first rank's conditions on every rank. ``width`` is D, the model's inner dimension."""
    if computed is None:
        computed = Conditions(
            torch.empty((max(experts) + 1, scenes + 1, TEXT_TOKENS, width), dtype=dtype, device=device),
            torch.empty((len(experts), width), dtype=dtype, device=device),
            torch.empty((len(experts), 6, width), dtype=dtype, device=device),
            experts,
            guidance,
        )
    if link.size > 1:
        for tensor in (computed.contexts, computed.embeddings, computed.projections):
            link.broadcast(tensor)
    return computed
