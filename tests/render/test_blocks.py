"""The queue of latents and its noise."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from videojob_api.plan import Plan
from videojob_worker.blocks import Blocks, mapped, noise

PLAN = Plan(frames=90, block_latents=4, context_latents=3, steps=2)


def queue(plan: Plan = PLAN) -> Blocks:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(plan.steps)
    return Blocks(plan, scheduler, noise(plan, 2, 3, 5, seed=7), torch.device("cpu"))


def test_noise_is_a_function_of_seed_and_block_alone():
    first = list(noise(PLAN, 2, 3, 5, seed=7))
    torch.randn(100)  # the global generator plays no part
    assert all(torch.equal(a, b) for a, b in zip(first, noise(PLAN, 2, 3, 5, seed=7), strict=True))
    assert not torch.equal(first[0], next(noise(PLAN, 2, 3, 5, seed=8)))


def test_noise_is_the_first_blocks_reshuffled():
    first, *others = noise(PLAN, 2, 3, 5, seed=7)
    assert first.shape == (1, 2, 7, 3, 5)
    frames = {frame.numpy().tobytes() for frame in first[0].unbind(1)}
    for block in others:
        assert block.shape == (1, 2, 4, 3, 5)
        assert {frame.numpy().tobytes() for frame in block[0].unbind(1)} <= frames


def test_a_shorter_video_begins_with_the_same_noise():
    short = Plan(frames=30, block_latents=4, context_latents=3, steps=2)
    pairs = zip(noise(short, 2, 3, 5, seed=7), noise(PLAN, 2, 3, 5, seed=7), strict=False)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_context_noise_splits_cleanly():
    plan = Plan(frames=90, block_latents=4, context_latents=0, steps=2)
    assert {block.shape for block in noise(plan, 2, 3, 5, seed=7)} == {(1, 2, 4, 3, 5)}
    blocks = queue(plan)
    assert blocks.input(0, 0).shape[2] == 4


def test_the_left_context_is_the_neighbours_end_as_it_stands():
    blocks = queue()
    first = blocks.input(0, 0)
    assert first.shape[2] == 7
    blocks.apply(0, 0, torch.ones_like(first))
    stepped = blocks.input(0, 1)
    second = blocks.input(1, 0)
    assert torch.equal(second[:, :, :3], stepped[:, :, -3:])


def test_a_block_comes_clean_after_its_last_step_and_still_serves_as_context():
    blocks = queue()
    zeros = torch.zeros((1, 2, 7, 3, 5))
    blocks.input(0, 0)
    assert blocks.apply(0, 0, zeros) is None
    blocks.input(1, 0)
    clean = blocks.apply(0, 1, zeros)
    assert clean is not None
    blocks.apply(1, 0, zeros[:, :, :4])
    assert torch.equal(blocks.input(1, 1)[:, :, :3], clean[:, :, -3:])


def told(value: object) -> str:
    """A value as text, its tensors in full."""
    return repr(mapped(lambda tensor: tensor.numpy().tobytes(), value))


def step(blocks: Blocks, block: int, number: int) -> None:
    """One step with a prediction that depends on the input."""
    own = 7 if block == 0 else 4
    blocks.apply(block, number, blocks.input(block, number)[:, :, -own:].sin())


@pytest.mark.parametrize("solver", [{}, {"solver_order": 3}, {"lower_order_final": False}, {"disable_corrector": [1]}])
def test_everything_that_a_scheduler_carries_from_step_to_step_is_in_the_snapshot(solver):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **solver)
    scheduler.set_timesteps(6)
    fresh = copy.deepcopy(scheduler)
    plan = Plan(frames=25, block_latents=4, context_latents=3, steps=6)
    blocks = Blocks(plan, scheduler, noise(plan, 2, 3, 5, seed=7), torch.device("cpu"))
    for number in range(5):
        step(blocks, 0, number)
    stepped = vars(blocks._queue[0].scheduler)
    changed = {name for name, value in stepped.items() if told(value) != told(getattr(fresh, name, "absent"))}
    (state,) = blocks.snapshot(5).blocks
    assert changed - {"timestep_list"} <= set(state.scheduler)
    other = Blocks(plan, scheduler, noise(plan, 2, 3, 5, seed=7), torch.device("cpu"))
    other.restore(blocks.snapshot(5))
    step(blocks, 0, 5)
    step(other, 0, 5)
    assert torch.equal(blocks._queue[0].latents, other._queue[0].latents)


def test_a_snapshot_leaves_out_what_is_still_noise_and_stays_as_it_was():
    blocks = queue(Plan(frames=90, block_latents=4, context_latents=3, steps=3))
    step(blocks, 0, 0)
    blocks.input(1, 0)
    snapshot = blocks.snapshot(1)
    before = told(snapshot)
    assert [state.block for state in snapshot.blocks] == [0]
    step(blocks, 0, 1)
    assert told(snapshot) == before


def test_a_snapshot_in_the_middle_of_a_sweep_is_refused():
    blocks = queue(Plan(frames=90, block_latents=4, context_latents=3, steps=3))
    step(blocks, 0, 0)
    step(blocks, 1, 0)
    with pytest.raises(RuntimeError, match="block 0 is 1 steps clean where 2 steps were expected"):
        blocks.snapshot(2)


@pytest.mark.parametrize(("block", "step"), [(0, 1), (1, 0), (2, 0)])
def test_a_turn_out_of_order_is_refused(block, step):
    blocks = queue()
    with pytest.raises(RuntimeError, match="block"):
        blocks.input(block, step)


def test_a_left_neighbour_of_another_sweep_is_refused():
    blocks = queue()
    zeros = torch.zeros((1, 2, 7, 3, 5))
    blocks.input(0, 0)
    blocks.apply(0, 0, zeros)
    blocks.apply(0, 1, zeros)
    with pytest.raises(RuntimeError, match="block 0 is 2 steps clean where 1 steps were expected"):
        blocks.input(1, 0)
