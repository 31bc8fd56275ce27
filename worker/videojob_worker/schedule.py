"""Which stage computes what at which tick: the static order of the whole render.

Counts with numbers from ``videojob_api.plan``; ``pipeline`` carries it out. Imports no torch: every rank computes the
same ticks, and a test can print and read them.

Sweep ``i`` admits block ``i`` and takes every block in the queue one step further, from the newest (noisiest) to the
oldest (cleanest), so block ``b`` makes step ``k`` in sweep ``b + k``. A turn may enter the first stage when the results
it is built from are back there: the block's own previous step, and the same step of the block before, whose last
latents are the left context "as they stood after the previous sweep" (arXiv 2505.21070, section 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One block at one step, for one branch of classifier-free guidance."""

    block: int
    step: int
    branch: int  # 0 conditional, 1 unconditional
    uses_next: bool  # attends to the next block's keys and values, left on the stage in this sweep
    feeds_previous: bool  # leaves its own for the block before, which follows in this sweep
    completes: bool  # the last branch: the prediction goes back to the first stage

    @property
    def sweep(self) -> int:
        """The sweep it belongs to."""
        return self.block + self.step

    @property
    def ends_sweep(self) -> bool:
        """Whether its result is the last one of its sweep: results come back in the order in which turns enter."""
        return self.completes and not self.feeds_previous


Tick = tuple[Turn | None, ...]  # what each stage computes, by stage


def turns(blocks: int, steps: int, branches: int, first_sweep: int = 0) -> Iterator[Turn]:
    """All turns, from a sweep on, in the order in which they enter the first stage."""
    for sweep in range(first_sweep, steps + blocks - 1):
        newest, oldest = min(sweep, blocks - 1), max(0, sweep - steps + 1)
        for block in range(newest, oldest - 1, -1):
            for branch in range(branches):
                yield Turn(
                    block=block,
                    step=sweep - block,
                    branch=branch,
                    uses_next=block < newest,
                    feeds_previous=block > oldest,
                    completes=branch == branches - 1,
                )


def starts(blocks: int, steps: int, branches: int, stages: int, first_sweep: int = 0) -> Iterator[tuple[int, Turn]]:
    """Each turn with the tick at which it enters the first stage; stage ``s`` computes it ``s`` ticks later.

    A prediction made by the last stage at tick ``t`` is back on the first stage for tick ``t + 1``.
    """
    tick = -1
    back: dict[int, int] = {}  # block -> the tick for which its newest result is on the first stage
    for turn in turns(blocks, steps, branches, first_sweep):
        tick = max(tick + 1, back.get(turn.block, 0), back.get(turn.block - 1, 0))
        if turn.completes:
            back[turn.block] = tick + stages
        yield tick, turn


def ticks(blocks: int, steps: int, branches: int, stages: int, first_sweep: int = 0) -> Iterator[Tick]:
    """What every stage computes, tick by tick; a sweep to begin at finds the results of all earlier ones in place."""
    line: deque[Turn | None] = deque([None] * stages, maxlen=stages)
    now = 0
    for start, turn in starts(blocks, steps, branches, stages, first_sweep):
        while now < start:
            line.appendleft(None)
            yield tuple(line)
            now += 1
        line.appendleft(turn)
        yield tuple(line)
        now += 1
    for _ in range(stages - 1):
        line.appendleft(None)
        yield tuple(line)


def busy(blocks: int, steps: int, branches: int, stages: int) -> float:
    """The share of stage-ticks at which a stage computes, 0 to 1."""
    *_, (last, _turn) = starts(blocks, steps, branches, stages)
    return blocks * steps * branches / (last + stages)
