"""The blocks of latents in the queue, each with its own copy of the scheduler. Lives on the first rank.

``pipeline`` asks for a block's input and hands back the prediction. Knows nothing of stages, ranks or layers.

Shapes: C channels, B block latents, K context latents, h x w latent rows and columns. All float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from videojob_api.plan import Plan


def noise(plan: Plan, channels: int, height: int, width: int, seed: int) -> Iterator[Tensor]:
    """The initial noise of each block in order, (1, C, own latents, h, w), a function of the seed and the block alone.

    Every block reuses the noise of the first one, shuffled within the block and shifted by the context, so that
    neighbours stay alike (arXiv 2505.21070, section 3.3). Drawn on the CPU whatever the device.
    """
    size, context = plan.block_latents, plan.context_latents
    template = _randn((1, channels, size + context, height, width), seed)
    for block in range(plan.blocks):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + 1 + block))
        template = torch.cat((template[:, :, size:], template[:, :, :size][:, :, order]), dim=2)
        yield template.clone() if block == 0 else template[:, :, context:].clone()


def _randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


# What a diffusers scheduler carries from step to step; but `timestep_list`, which only a second solver would read.
_CARRIED = ("model_outputs", "last_sample", "lower_order_nums", "this_order", "_step_index", "_begin_index")


@dataclass(frozen=True)
class BlockState:
    """A block between two sweeps. Tensors are the queue's own, which replaces and never changes them."""

    block: int
    steps_done: int
    latents: Tensor  # (1, C, own latents, h, w)
    scheduler: Mapping[str, Any]  # the carried attributes: tensors, lists of tensors, numbers, None; {} once clean


@dataclass(frozen=True)
class Snapshot:
    """All that sweep ``sweep`` and later ones are computed from: every block that was admitted before it.

    The first one may be clean: it is the left context of the one behind it.
    """

    sweep: int
    blocks: tuple[BlockState, ...]


@dataclass
class Block:
    """A block's latents as they stand after ``steps_done`` steps."""

    latents: Tensor  # (1, C, own latents, h, w)
    scheduler: Any
    steps_done: int = 0


class Blocks:
    """The queue: from a block's admission until the block behind it is clean.

    Args:
        plan: how the video is cut.
        scheduler: a diffusers scheduler on which ``set_timesteps(plan.steps)`` was called; copied for every block.
        noises: the blocks' initial noise in order.
        device: where latents are kept.
    """

    def __init__(self, plan: Plan, scheduler: Any, noises: Iterator[Tensor], device: torch.device) -> None:
        self._plan = plan
        self._scheduler = scheduler
        self._noises = noises
        self._device = device
        self._queue: dict[int, Block] = {}
        self._admitted = 0

    def input(self, block: int, step: int) -> Tensor:
        """The model's input for a turn: left context, then the block's own latents, (1, C, B + K, h, w).

        Raises:
            RuntimeError: the turn comes out of order; latents are never built from a wrong state.
        """
        if step == 0 and block not in self._queue:
            self._admit(block)
        own = self._expect(block, step)
        if block == 0 or self._plan.context_latents == 0:
            return own.latents
        left = self._expect(block - 1, step + 1)
        return torch.cat((left.latents[:, :, -self._plan.context_latents :], own.latents), dim=2)

    def apply(self, block: int, step: int, prediction: Tensor) -> Tensor | None:
        """Take one step with the prediction for the block's own latents; the clean latents after the last step."""
        own = self._expect(block, step)
        timestep = own.scheduler.timesteps[step]
        (own.latents,) = own.scheduler.step(prediction, timestep, own.latents, return_dict=False)
        own.steps_done += 1
        if own.steps_done < self._plan.steps:
            return None
        self._queue.pop(block - 1, None)
        own.scheduler = None
        return own.latents

    def snapshot(self, sweep: int) -> Snapshot:
        """The state before a sweep, when all results of the one before were applied. Costs nothing: copies no tensor.

        A block that was admitted for the sweep itself is left out: it is still noise, a function of the seed.
        """
        states = tuple(_state(number, block) for number, block in sorted(self._queue.items()) if block.steps_done)
        for state in states:
            self._expect(state.block, min(sweep - state.block, self._plan.steps))
        return Snapshot(sweep, states)

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot, in a queue that has admitted nothing yet."""
        if self._admitted:
            raise RuntimeError(f"{self._admitted} blocks were admitted before the snapshot")
        moved: Snapshot = mapped(lambda tensor: tensor.to(self._device), snapshot)
        for state in moved.blocks:
            self._queue[state.block] = Block(state.latents, self._scheduler_of(state), state.steps_done)
        for _ in range(min(snapshot.sweep, self._plan.blocks)):
            next(self._noises)
            self._admitted += 1

    def _scheduler_of(self, state: BlockState) -> Any:
        if state.steps_done == self._plan.steps:
            return None
        scheduler = copy.deepcopy(self._scheduler)
        for name, value in state.scheduler.items():
            setattr(scheduler, name, value)
        return scheduler

    def _admit(self, block: int) -> None:
        if block != self._admitted:
            raise RuntimeError(f"block {block} cannot be admitted after {self._admitted} blocks")
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_begin_index(0)
        self._queue[block] = Block(next(self._noises).to(self._device), scheduler)
        self._admitted += 1

    def _expect(self, block: int, steps_done: int) -> Block:
        found = self._queue.get(block)
        if found is None or found.steps_done != steps_done:
            state = "not in the queue" if found is None else f"{found.steps_done} steps clean"
            raise RuntimeError(f"block {block} is {state} where {steps_done} steps were expected")
        return found


def _state(number: int, block: Block) -> BlockState:
    carried = {} if block.scheduler is None else vars(block.scheduler)
    scheduler = {name: mapped(lambda tensor: tensor, carried[name]) for name in _CARRIED if name in carried}
    return BlockState(number, block.steps_done, block.latents, scheduler)


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with all tensors in it changed; containers become others."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(change, item) for item in value)
    if isinstance(value, Mapping):
        return {name: mapped(change, item) for name, item in value.items()}
    if isinstance(value, Snapshot):
        return replace(value, blocks=mapped(change, value.blocks))
    if isinstance(value, BlockState):
        return replace(value, latents=change(value.latents), scheduler=mapped(change, value.scheduler))
    return value
