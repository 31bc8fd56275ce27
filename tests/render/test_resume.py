"""A ring that goes on from any sweep's state with any number of ranks computes what an undisturbed one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ring
from videojob_api.plan import Plan
from videojob_worker import checkpoint
from videojob_worker.blocks import Snapshot, mapped
from videojob_worker.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = Plan(frames=74, block_latents=4, context_latents=3, steps=4)  # 5 blocks, the last one with surplus latents


def told(state: Snapshot) -> str:
    """A state as text, its tensors in full."""
    return repr(mapped(lambda tensor: tensor.numpy().tobytes(), state))


class Taking(dict):
    """Keeps states, and what they were when they were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[int, str] = {}

    def __setitem__(self, sweep: int, state: Snapshot) -> None:
        super().__setitem__(sweep, state)
        self.told[sweep] = told(state)


class Whole:
    """An undisturbed render: its blocks, and the state before every sweep."""

    def __init__(self, model: Path) -> None:
        rendering = ring.Rendering(model, PLAN, snapshots=Taking())
        self.blocks = rendering.blocks(3)
        self.states = rendering.snapshots


@pytest.fixture(scope="module")
def whole(tiny_model):
    return Whole(tiny_model)


def test_no_state_changes_after_it_was_taken(whole):
    assert sorted(whole.states) == list(range(1, PLAN.sweeps + 1))
    assert {sweep: told(state) for sweep, state in whole.states.items()} == whole.states.told


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("sweep", range(1, PLAN.sweeps + 1))
def test_the_remaining_latents_are_the_undisturbed_ones_bit_for_bit(whole, tiny_model, tmp_path, sweep, ranks):
    file = tmp_path / "checkpoint"
    checkpoint.save(Checkpoint(whole.states[sweep], 1, ()), {}, file)
    resumed = ring.Rendering(tiny_model, PLAN)
    blocks = resumed.blocks(ranks, checkpoint.load(file.read_bytes(), {}).snapshot)
    assert sorted(blocks) == list(range(PLAN.clean_before(sweep), PLAN.blocks))
    assert all(torch.equal(latents, whole.blocks[block]) for block, latents in blocks.items())
    assert len(resumed.order) == PLAN.turns - PLAN.turns_before(sweep)
    assert all(told(state) == whole.states.told[later] for later, state in resumed.snapshots.items())
