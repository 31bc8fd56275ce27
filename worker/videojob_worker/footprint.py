"""What each rank holds of a model: its layers and the bytes of their weights, without allocating any.

``python -m videojob_worker.footprint`` prints the tables of ``docs/models.md``, ``... DIR`` those of a model's folder.
Builds the stages of ``wan`` on the meta device. Weights only: activations, the next block's keys and values, and on the
first rank the text encoder and the VAE come on top.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import models, topology
from .wan import WanStage, dtype_of

RANKS = (1, 2, 4, 8)
_WAN = {"attention_head_dim": 128, "freq_dim": 256, "text_dim": 4096, "patch_size": (1, 2, 2)}
_14B = {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 16, "out_channels": 16}
_5B = {**_WAN, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
RELEASED: dict[str, Sequence[Mapping[str, Any]]] = {  # the configuration of each expert
    "Wan2.1 T2V 1.3B": [{**_14B, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}],
    "Wan2.1 T2V 14B": [_14B],
    "Wan2.2 T2V-A14B": [_14B, _14B],
    "Wan2.2 TI2V-5B": [_5B],
}


@dataclass(frozen=True)
class Share:
    """A rank's part of a model."""

    layers: range  # of each expert
    parameters: int  # of all experts
    size_bytes: int


def shares(experts: Sequence[Mapping[str, Any]], ranks: int, dtype: torch.dtype = torch.bfloat16) -> list[Share]:
    """Each rank's part.

    Args:
        experts: the configuration of each transformer.
        ranks: how many share it.
        dtype: of all weights but those that diffusers keeps in float32.

    Raises:
        InvalidSpecError: there are more ranks than layers.
    """
    return [share(experts, layers, dtype) for layers in topology.shares(int(experts[0]["num_layers"]), ranks)]


def share(experts: Sequence[Mapping[str, Any]], layers: range, dtype: torch.dtype) -> Share:
    """The part of the rank with these layers; else as ``shares``."""
    sizes = [
        (parameter.numel(), dtype_of(name, dtype).itemsize)
        for config in experts
        for name, parameter in _stage(config, layers).named_parameters()
    ]
    return Share(layers, sum(count for count, _ in sizes), sum(count * size for count, size in sizes))


def _stage(config: Mapping[str, Any], layers: range) -> WanStage:
    with torch.device("meta"):
        stage: WanStage = WanStage.from_config(dict(config), first_layer=layers.start, last_layer=layers.stop)
    return stage


def tables(released: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Two Markdown tables: the models, and what the fullest rank holds of each. GB are 10^9 bytes."""
    lines = ["| model | transformers | layers | parameters | weights in bfloat16 |", "|---|---|---|---|---|"]
    for name, experts in released.items():
        (whole,) = shares(experts, 1)
        sizes = f"{whole.parameters / 1e9:.2f}B | {_gigabytes(whole)}"
        lines.append(f"| {name} | {len(experts)} | {len(whole.layers)} | {sizes} |")
    lines += ["", f"| ranks | {' | '.join(released)} |", "|---" * (1 + len(released)) + "|"]
    lines += [f"| {ranks} | {' | '.join(_fullest(each, ranks) for each in released.values())} |" for ranks in RANKS]
    return "\n".join(lines) + "\n"


def _fullest(experts: Sequence[Mapping[str, Any]], ranks: int) -> str:
    if ranks > int(experts[0]["num_layers"]):
        return "more ranks than layers"
    parts = shares(experts, ranks)
    layers = " or ".join(str(count) for count in sorted({len(part.layers) for part in parts}))
    return f"{_gigabytes(max(parts, key=lambda part: part.size_bytes))}, {layers} layers"


def _gigabytes(share: Share) -> str:
    return f"{share.size_bytes / 1e9:.3g} GB"


def main(arguments: Sequence[str]) -> None:
    """Print the tables."""
    given: Mapping[str, Sequence[Mapping[str, Any]]] = RELEASED
    if arguments:
        model = models.read(Path(arguments[0]))
        given = {model.folder.name: [models.read_transformer(folder) for folder in model.experts]}
    sys.stdout.write(tables(given))


if __name__ == "__main__":
    main(sys.argv[1:])
