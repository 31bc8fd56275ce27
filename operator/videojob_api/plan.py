"""The arithmetic of a render: latents, blocks, frames, turns.

Reads ``spec``; the worker's ``schedule`` and ``segments`` and the operator's ``status`` count with it. No torch.

*latent* = one latent frame: 4 frames of video, but the first latent is 1. *block* = ``block_latents`` latents that
share a noise level; the first block holds ``context_latents`` more.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from .spec import Spec

FRAMES_PER_LATENT = 4  # temporal compression of the Wan VAEs


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a video of ``frames`` frames is cut into blocks."""

    frames: int
    block_latents: int
    context_latents: int
    scene_ends: tuple[int, ...] = ()  # the frame at which each scene ends; () is one scene

    def __post_init__(self) -> None:
        if self.frames < 1 or self.block_latents < 1:
            raise ValueError(f"frames and block_latents must be at least 1: {self}")
        if not 0 <= self.context_latents <= self.block_latents:
            raise ValueError(f"context_latents must lie between 0 and block_latents: {self}")

    @property
    def latents(self) -> int:
        """Latents that hold the frames asked for."""
        return latents_of(self.frames)

    @property
    def blocks(self) -> int:
        """Blocks to render; the last one may hold surplus latents, which are dropped."""
        return max(1, -(-(self.latents - self.context_latents) // self.block_latents))

    def own_latents(self, block: int) -> int:
        """Latents that belong to the block, surplus ones included."""
        return self.block_latents + (self.context_latents if block == 0 else 0)

    def first_latent(self, block: int) -> int:
        """Index in the video of the block's first own latent."""
        return 0 if block == 0 else self.context_latents + block * self.block_latents

    def block_of(self, latent: int) -> int:
        """The block that holds a latent of the video."""
        return max(0, (latent - self.context_latents) // self.block_latents)

    def wanted_latents(self, block: int) -> int:
        """Own latents that hold frames asked for: all but in the last block."""
        return min(self.own_latents(block), self.latents - self.first_latent(block))

    def first_frame(self, block: int) -> int:
        """Index in the video of the block's first frame."""
        return frames_of(self.first_latent(block))

    def wanted_frames(self, block: int) -> int:
        """Frames of the block that go into the video."""
        end = frames_of(self.first_latent(block) + self.wanted_latents(block))
        return min(end, self.frames) - self.first_frame(block)

    def scene(self, block: int) -> int:
        """Index of the scene that is on at the block's first frame."""
        first = self.first_frame(block)
        return next((index for index, end in enumerate(self.scene_ends) if first < end), 0)


@dataclass(frozen=True, kw_only=True)
class Plan(Cut):
    """A cut, and in how many steps each of its blocks is denoised."""

    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1: {self}")

    @property
    def sweeps(self) -> int:
        """Passes over the queue until the last block is clean."""
        return self.steps + self.blocks - 1

    @property
    def turns(self) -> int:
        """(block, step) pairs in all."""
        return self.steps * self.blocks

    def turns_before(self, sweep: int) -> int:
        """Turns of the sweeps before this one."""
        return sum(min(self.steps, max(0, sweep - block)) for block in range(self.blocks))

    def clean_before(self, sweep: int) -> int:
        """Blocks that the sweeps before this one made clean."""
        return min(self.blocks, max(0, sweep - self.steps + 1))


def latents_of(frames: int) -> int:
    """Latents needed for a number of frames."""
    return -(-(frames - 1) // FRAMES_PER_LATENT) + 1


def frames_of(latents: int) -> int:
    """Frames that a number of latents, from the video's begin, decode to."""
    return 0 if latents == 0 else 1 + FRAMES_PER_LATENT * (latents - 1)


def cut(spec: Spec) -> Cut:
    """How a spec's video is cut into blocks."""
    return Cut(
        frames=spec.frames,
        block_latents=spec.dual_parallel.block_latents,
        context_latents=spec.dual_parallel.context_latents,
        scene_ends=tuple(accumulate(scene.frames for scene in spec.all_scenes)),
    )


def plan(spec: Spec) -> Plan:
    """The plan of a spec that says in how many steps.

    Raises:
        ValueError: it leaves that to the model, which the worker alone knows.
    """
    steps = spec.sampling.steps
    if steps is None:
        raise ValueError("sampling.steps is not known before the model is")
    return Plan(**vars(cut(spec)), steps=steps)
