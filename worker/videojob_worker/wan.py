"""A stage: a rank's share of the layers of diffusers' ``WanTransformer3DModel``, and its attention to the next block.

``pipeline`` feeds it hidden states. Knows nothing of ranks, ticks or schedulers.

Shapes: C channels, F latents of the input, K context latents, h x w latent rows and columns, T = tokens of one latent,
D = inner dimension, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import models
from .errors import ModelInvalidError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (1, tokens, 1, head_dim)


@dataclass(frozen=True)
class Surroundings:
    """What self-attention needs beside the hidden states; handed through diffusers' block as its ``rotary_emb``."""

    rotary: Rotary  # of the block's own input
    next_rotary: Rotary  # of the positions after it
    branch: int
    uses_next: bool
    kept: slice | None  # the tokens whose keys and values the block before will attend to


class NextBlockAttnProcessor(WanAttnProcessor):  # type: ignore[misc]
    """Self-attention that also sees the first context latents of the next block.

    Keys and values are kept after the norm and before the rotary embedding, and used exactly once, by the next turn of
    the same branch: attending to them equals one attention over the concatenation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Surroundings | None = None,
    ) -> Tensor:
        """Self-attention, (1, tokens, D) -> (1, tokens, D)."""
        if rotary_emb is None or encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this processor is for the self-attention of a stage")
        around = rotary_emb
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        keys, values = _rotate(key, around.rotary), value
        if around.uses_next:
            next_key, next_value = self._kept.pop(around.branch)
            keys = torch.cat((keys, _rotate(next_key, around.next_rotary)), dim=1)
            values = torch.cat((value, next_value), dim=1)
        if around.kept is not None:
            self._kept[around.branch] = (key[:, around.kept].clone(), value[:, around.kept].clone())
        attended = dispatch_attention_fn(
            _rotate(query, around.rotary), keys, values, backend=self._attention_backend
        ).flatten(2, 3)
        projected: Tensor = attn.to_out[0](attended.type_as(query))
        return projected


def _rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of interleaved pairs, (1, tokens, H, head_dim), as diffusers' ``WanAttnProcessor`` does it."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    cosines, sines = rotary[0][..., 0::2], rotary[1][..., 1::2]
    turned = torch.empty_like(states)
    turned[..., 0::2] = even * cosines - odd * sines
    turned[..., 1::2] = even * sines + odd * cosines
    return turned


class _Elsewhere(nn.Module):
    """Holds the place of a layer that another stage has, so that layers keep their numbers."""


class WanStage(WanTransformer3DModel):  # type: ignore[misc]
    """Layers ``first_layer`` to ``last_layer`` (exclusive) of a ``WanTransformer3DModel``.

    It has the parameters of these layers only, and the embeddings on the first stage and the projection on the
    last. The first stage is the one with layer 0.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        first_layer: int = 0,
        last_layer: int | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        self.layers = range(first_layer, num_layers if last_layer is None else last_layer)
        for layer in range(num_layers):
            if layer in self.layers:
                self.blocks[layer].attn1.set_processor(NextBlockAttnProcessor())
            else:
                self.blocks[layer] = _Elsewhere()
        if not self.is_first:
            self.drop("patch_embedding", "condition_embedder")
        if not self.is_last:
            self.drop("proj_out", "scale_shift_table")

    def drop(self, *members: str) -> None:
        """Free members that this stage does not have or no longer needs."""
        for member in members:
            setattr(self, member, None)

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds latents."""
        return 0 in self.layers

    @property
    def is_last(self) -> bool:
        """Whether this stage predicts noise."""
        return self.layers.stop == len(self.blocks)

    @property
    def inner_dim(self) -> int:
        """D, the width of hidden states."""
        return int(self.config.num_attention_heads * self.config.attention_head_dim)

    def embed(self, latents: Tensor) -> Tensor:
        """Latents (1, C, F, h, w) as hidden states (1, F * T, D). First stage only."""
        hidden: Tensor = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        return hidden.flatten(2).transpose(1, 2).contiguous()

    def condition(self, prompt_embeds: Tensor) -> Tensor:
        """Text embeddings (1, tokens, text_dim) as the context of cross-attention, (1, tokens, D). First stage only."""
        context: Tensor = self.condition_embedder.text_embedder(prompt_embeds)
        return context

    def time(self, timestep: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """A timestep (1,) as its embedding (1, D) and its projection (1, 6, D). First stage only."""
        embedding, projection, _, _ = self.condition_embedder(timestep, prompt_embeds)
        return embedding, projection.unflatten(1, (6, -1))

    def forward(self, hidden: Tensor, context: Tensor, projection: Tensor, around: Surroundings) -> Tensor:
        """Hidden states (1, F * T, D) through this stage's layers."""
        for layer in self.layers:
            hidden = self.blocks[layer](hidden, context, projection, around)
        return hidden

    def predict(self, hidden: Tensor, embedding: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Hidden states as the noise prediction (1, C, F, h, w) in float32; ``grid`` is (F, h, w). Last stage only."""
        shift, scale = (self.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
        hidden = (self.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        hidden = self.proj_out(hidden)
        time, height, width = self.config.patch_size
        patches = (grid[0] // time, grid[1] // height, grid[2] // width)
        folded = hidden.reshape(1, *patches, time, height, width, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return folded.flatten(6, 7).flatten(4, 5).flatten(2, 3).float()

    def rotaries(self, grid: tuple[int, int, int], after: int) -> tuple[Rotary, Rotary]:
        """Rotary embeddings of an input of ``grid`` (F, h, w) and of the ``after`` latents behind it."""
        frames, height, width = grid
        shape_only = torch.empty((1, 1, frames + after, height, width), device="meta")
        cosines, sines = self.rope(shape_only)
        own = frames * self.tokens(grid)
        return (cosines[:, :own], sines[:, :own]), (cosines[:, own:], sines[:, own:])

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """T, the tokens of one latent."""
        _, height, width = self.config.patch_size
        return int((grid[1] // height) * (grid[2] // width))


def load(folder: Path, layers: range, dtype: torch.dtype, device: torch.device) -> WanStage:
    """The stage with these layers, read from a diffusers transformer folder tensor by tensor.

    Only the byte ranges of the stage's own tensors are read, and the host holds one of them at a time.

    Args:
        folder: with ``config.json`` and safetensors, sharded with an index or not.
        layers: of the model.
        dtype: of all weights but those that diffusers keeps in float32.
        device: where the weights go.

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelInvalidError: a file is missing, broken, or holds another class of model.
    """
    config = models.read_transformer(folder)
    with init_empty_weights():
        stage: WanStage = WanStage.from_config(config, first_layer=layers.start, last_layer=layers.stop)
    shapes = {name: parameter.shape for name, parameter in stage.named_parameters()}
    weights: dict[str, Tensor] = {}
    for file, names in _by_shard(folder, shapes).items():
        for name, tensor in _tensors(file, names):
            if tensor.shape != shapes[name]:
                found, asked = tuple(tensor.shape), tuple(shapes[name])
                raise ModelInvalidError(f"{file}: {name} has the shape {found} where config.json asks for {asked}")
            weights[name] = tensor.to(device, dtype_of(name, dtype))  # on the CPU it may stay mapped
    stage.load_state_dict(weights, assign=True)
    ready: WanStage = stage.to(device).eval().requires_grad_(False)
    return ready


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor is held: float32 for those that diffusers keeps so, whatever the others' is."""
    kept = not set(WanStage._keep_in_fp32_modules).isdisjoint(name.split("."))
    return torch.float32 if kept else dtype


def _by_shard(folder: Path, names: Iterable[str]) -> dict[Path, list[str]]:
    """Which file holds which of these tensors."""
    index = folder / INDEX
    if index.exists():
        files = models.read_json(index).get("weight_map", {})
    else:
        files = dict.fromkeys(_keys(folder / WEIGHTS), WEIGHTS)
    absent = sorted(set(names) - set(files))
    if absent:
        raise ModelInvalidError(f"{folder} lacks {len(absent)} tensors, the first is {absent[0]}")
    found: dict[Path, list[str]] = {}
    for name in names:
        found.setdefault(folder / files[name], []).append(name)
    return found


def _keys(file: Path) -> list[str]:
    with _reading(file), safe_open(file, "pt") as shard:
        return list(shard.keys())


def _tensors(file: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, mapped and not yet read."""
    with _reading(file), safe_open(file, "pt") as shard:
        for name in names:
            yield name, shard.get_tensor(name)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ModelInvalidError(f"{file.parent} lacks the shard {file.name}: download it again") from error
    except (OSError, SafetensorError) as error:
        raise ModelInvalidError(f"{file} cannot be loaded, download it again: {error}") from error
