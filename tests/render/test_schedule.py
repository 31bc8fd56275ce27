"""The static order: who computes what when, and that nothing is computed before what it is made of is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videojob_worker import schedule

BLOCKS, STEPS, BRANCHES, STAGES = (
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 2),
    st.integers(1, 8),
)


def trace(blocks: int, steps: int, branches: int, stages: int, first_sweep: int = 0) -> list[str]:
    """Each tick as one line: block.step of every stage, ' for the unconditional branch, - for idle."""
    return [
        " ".join("-" if turn is None else f"{turn.block}.{turn.step}{chr(39) * turn.branch}" for turn in tick)
        for tick in schedule.ticks(blocks, steps, branches, stages, first_sweep)
    ]


def test_one_stage_sweeps_from_the_newest_block_to_the_oldest():
    assert trace(blocks=3, steps=2, branches=1, stages=1) == ["0.0", "1.0", "0.1", "2.0", "1.1", "2.1"]


def test_two_stages_overlap_the_branches():
    assert trace(blocks=2, steps=2, branches=2, stages=2) == [
        "0.0 -",
        "0.0' 0.0",
        "- 0.0'",
        "1.0 -",
        "1.0' 1.0",
        "0.1 1.0'",
        "0.1' 0.1",
        "- 0.1'",
        "1.1 -",
        "1.1' 1.1",
        "- 1.1'",
    ]


def test_a_long_queue_fills_the_ring():
    lines = trace(blocks=4, steps=4, branches=1, stages=3)
    assert lines[9:15] == ["3.0 0.2 1.1", "2.1 3.0 0.2", "1.2 2.1 3.0", "0.3 1.2 2.1", "3.1 0.3 1.2", "2.2 3.1 0.3"]


def test_a_resumed_render_begins_with_a_whole_sweep_and_goes_on_as_the_first_one():
    assert trace(blocks=3, steps=2, branches=1, stages=1, first_sweep=2) == ["2.0", "1.1", "2.1"]
    assert trace(blocks=4, steps=4, branches=1, stages=3, first_sweep=4)[:5] == [
        "3.1 - -",
        "2.2 3.1 -",
        "1.3 2.2 3.1",
        "- 1.3 2.2",
        "3.2 - 1.3",
    ]
    assert trace(blocks=2, steps=2, branches=2, stages=2, first_sweep=2) == ["1.1 -", "1.1' 1.1", "- 1.1'"]


@given(BLOCKS, STEPS, BRANCHES, STAGES, st.integers(0, 13))
def test_a_resumed_render_computes_the_turns_of_its_sweep_and_all_later_ones(blocks, steps, branches, stages, sweep):
    expected = [turn for turn in schedule.turns(blocks, steps, branches) if turn.sweep >= sweep]
    ticks = list(schedule.ticks(blocks, steps, branches, stages, sweep))
    for column in zip(*ticks, strict=True):
        assert [turn for turn in column if turn is not None] == expected


@given(BLOCKS, STEPS, BRANCHES)
def test_a_sweep_ends_once_and_with_its_last_result(blocks, steps, branches):
    turns = list(schedule.turns(blocks, steps, branches))
    ends = [index for index, turn in enumerate(turns) if turn.ends_sweep]
    assert [turns[index].sweep for index in ends] == list(range(blocks + steps - 1))
    assert all(turn.sweep > turns[end].sweep for end in ends for turn in turns[end + 1 :])


@given(BLOCKS, STEPS, BRANCHES, STAGES)
def test_every_turn_is_computed_once_by_every_stage_in_order(blocks, steps, branches, stages):
    expected = list(schedule.turns(blocks, steps, branches))
    assert len(set(expected)) == blocks * steps * branches
    columns = zip(*schedule.ticks(blocks, steps, branches, stages), strict=True)
    for column in columns:
        assert [turn for turn in column if turn is not None] == expected


@given(BLOCKS, STEPS, BRANCHES, STAGES)
def test_a_turn_enters_only_when_its_ingredients_are_back(blocks, steps, branches, stages):
    clean: dict[int, int] = dict.fromkeys(range(blocks), 0)  # steps whose result is on the first stage
    for tick in schedule.ticks(blocks, steps, branches, stages):
        entering, leaving = tick[0], tick[-1]
        if entering is not None:
            assert clean[entering.block] == entering.step
            if entering.block > 0:
                assert clean[entering.block - 1] == entering.step + 1, "the left context is one step cleaner"
        if leaving is not None and leaving.completes:
            clean[leaving.block] += 1
    assert all(done == steps for done in clean.values())


@given(BLOCKS, STEPS, BRANCHES)
def test_the_next_block_leaves_its_keys_just_before_they_are_used(blocks, steps, branches):
    kept: dict[int, tuple[int, int]] = {}
    for turn in schedule.turns(blocks, steps, branches):
        assert turn.uses_next == (turn.branch in kept)
        if turn.uses_next:
            assert kept.pop(turn.branch) == (turn.block + 1, turn.step - 1), "of the same sweep"
        if turn.feeds_previous:
            assert turn.branch not in kept
            kept[turn.branch] = (turn.block, turn.step)
    assert not kept, "nothing outlives its sweep"


@pytest.mark.parametrize(("blocks", "branches", "expected"), [(5, 1, 0.52), (5, 2, 0.86), (32, 1, 0.96), (32, 2, 0.99)])
def test_two_branches_halve_the_bubble(blocks, branches, expected):
    assert schedule.busy(blocks, steps=50, branches=branches, stages=8) == pytest.approx(expected, abs=0.01)
