"""Where a rank stands: its layers, and what it is at. ``pipeline`` keeps it up to date; every last word begins with it.

Pure. Knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Place:
    """One rank's place in the ring and in the render."""

    rank: int
    shares: Sequence[range] = ()  # the layers of every rank, once they are known
    doing: str = "while loading"

    def name(self, rank: int) -> str:
        """A rank for people, with its layers."""
        if not self.shares:
            return f"rank {rank}"
        layers = self.shares[rank]
        return f"rank {rank} ({spell(layers)})"

    def __str__(self) -> str:
        return f"{self.name(self.rank)} {self.doing}"


def spell(layers: range) -> str:
    """Layers for people."""
    if len(layers) == 1:
        return f"layer {layers.start}"
    return f"layers {layers.start} to {layers.stop - 1}"
