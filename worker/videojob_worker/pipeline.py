"""Carries out the schedule on one rank: receive, compute, send, tick by tick.

Composes ``schedule`` (what), ``wan`` (the layers), ``blocks`` (latents, first rank only) and ``link`` (the ring).
Knows nothing of files, storage or Kubernetes.

Shapes: B block latents, K context latents, F = B + K latents of every input, D inner dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from videojob_api.plan import Plan

from . import schedule
from .blocks import Blocks
from .conditions import Conditions
from .finite import Finite, check_contexts
from .link import Link
from .place import Place
from .schedule import Tick, Turn
from .wan import Surroundings, WanStage


class Ring:
    """One rank's place in the ring.

    Args:
        plan: how the video is cut.
        grid: latent rows and columns (h, w).
        stages: this rank's layers of each expert.
        conditions: contexts and time embeddings.
        link: to the neighbours.
        blocks: the queue of latents; on the first rank only.
        first_sweep: where to begin; the queue stands as the sweeps before left it.
        place: kept up to date, for whoever must say where this rank stands.

    Raises:
        NotFiniteError: the prompts became NaN or infinite in the text encoder.
    """

    def __init__(
        self,
        plan: Plan,
        grid: tuple[int, int],
        stages: Sequence[WanStage],
        conditions: Conditions,
        link: Link,
        blocks: Blocks | None,
        first_sweep: int = 0,
        place: Place | None = None,
    ) -> None:
        check_contexts(conditions.contexts)
        self._plan = plan
        self._stages = stages
        self._stage = stages[0]  # for what all experts share: sizes, and which end of the ring this is
        self._conditions = conditions
        self._link = link
        self._blocks = blocks
        self._first_sweep = first_sweep
        self._place = place or Place(link.rank)
        self._finite = Finite(self._stage.layers, is_first=self._stage.is_first)
        self._device = conditions.contexts.device
        self._grid = (plan.block_latents + plan.context_latents, *grid)
        self._tokens = self._stage.tokens(self._grid)
        self._rotary, self._next_rotary = self._stage.rotaries(self._grid, plan.context_latents)
        self._conditional: Tensor | None = None  # the last stage's prediction that waits for its counterpart

    @torch.inference_mode()
    def run(self, on_result: Callable[[Turn, Tensor | None], None], on_tick: Callable[[], None]) -> None:
        """Render all blocks, or what the sweeps before the first one left of them.

        Args:
            on_result: called on the first rank for every finished (block, step), with the block's clean latents
                (1, C, own latents, h, w) after its last step.
            on_tick: called on every rank before every tick; may raise to stop.

        Raises:
            PeerLostError: a neighbour vanished or did not answer in time.
            NotFiniteError: latents or hidden states became NaN or infinite in this stage.
        """
        plan, size = self._plan, self._link.size
        inbox: Tensor | None = None
        for tick in schedule.ticks(plan.blocks, plan.steps, self._conditions.branches, size, self._first_sweep):
            on_tick()
            turn = tick[self._link.rank]
            if turn is not None:
                self._place.doing = self._at(turn)
            outbox = None if turn is None else self._compute(turn, inbox)
            inbox = self._exchange(tick, outbox)
            returned = tick[-1]
            if self._blocks is not None and returned is not None and returned.completes:
                assert inbox is not None  # noqa: S101 - the schedule brings it
                on_result(returned, self._blocks.apply(returned.block, returned.step, inbox))
        self._finite.settle()
        self._place.doing = "while finishing"

    def _at(self, turn: Turn) -> str:
        """A turn for people, who count from 1."""
        block, step = f"block {turn.block + 1} of {self._plan.blocks}", f"step {turn.step + 1} of {self._plan.steps}"
        return f"at {block}, {step} (sweep {turn.block + turn.step + 1})"

    def _compute(self, turn: Turn, inbox: Tensor | None) -> Tensor | None:
        """A turn through this stage: its hidden states, or on the last stage its prediction once it is complete."""
        conditions = self._conditions
        expert = conditions.experts[turn.step]
        stage = self._stages[expert]
        entered: Tensor | None = inbox
        if stage.is_first:
            assert self._blocks is not None  # noqa: S101 - the first rank holds the latents
            entered = self._blocks.input(turn.block, turn.step)
        assert entered is not None  # noqa: S101 - the schedule brings it
        hidden = stage.embed(entered) if stage.is_first else entered
        context = conditions.context(expert, self._plan.scene(turn.block), turn.branch)
        step = slice(turn.step, turn.step + 1)
        through: Tensor = stage(hidden, context, conditions.projections[step], self._surroundings(turn))
        if not stage.is_last:
            self._finite.watch(self._at(turn), entered, through)
            return through
        prediction = stage.predict(through, conditions.embeddings[step], self._grid)
        self._finite.watch(self._at(turn), entered, prediction)
        return self._guide(turn, prediction[:, :, self._left(turn.block) :].contiguous())

    def _surroundings(self, turn: Turn) -> Surroundings:
        start = self._left(turn.block) * self._tokens
        length = self._plan.context_latents * self._tokens
        return Surroundings(
            rotary=self._rotary,
            next_rotary=self._next_rotary,
            branch=turn.branch,
            uses_next=turn.uses_next and self._lends(turn.step - 1),
            kept=slice(start, start + length) if turn.feeds_previous and self._lends(turn.step) else None,
        )

    def _lends(self, step: int) -> bool:
        """Whether a block at this step leaves keys and values to the block before, which is at the next step.

        Only to the same expert: another one's keys lie in another space.
        """
        experts = self._conditions.experts
        return self._plan.context_latents > 0 and experts[step] == experts[step + 1]

    def _left(self, block: int) -> int:
        """Latents of left context in the block's input."""
        return 0 if block == 0 else self._plan.context_latents

    def _guide(self, turn: Turn, prediction: Tensor) -> Tensor | None:
        """Classifier-free guidance: keeps the conditional prediction until the unconditional one is there."""
        guidance = self._conditions.guidance
        if guidance is None:
            return prediction
        if not turn.completes:
            self._conditional = prediction
            return None
        conditional, self._conditional = self._conditional, None
        assert conditional is not None  # noqa: S101 - the schedule puts it one turn ahead
        scale = guidance[self._conditions.experts[turn.step]]
        return prediction + scale * (conditional - prediction)

    def _exchange(self, tick: Tick, outbox: Tensor | None) -> Tensor | None:
        """Pass on what was computed at this tick; what the previous stage computed, where it computed anything."""
        if self._link.size == 1:
            return outbox
        before = (self._link.rank - 1) % self._link.size
        coming = tick[before]
        inbox = None
        if coming is not None and (before < self._link.size - 1 or coming.completes):
            inbox = self._buffer(coming, prediction=before == self._link.size - 1)
        self._link.exchange(outbox, inbox)
        return inbox

    def _buffer(self, turn: Turn, *, prediction: bool) -> Tensor:
        if prediction:
            shape: tuple[int, ...] = (1, self._channels, self._plan.own_latents(turn.block), *self._grid[1:])
            return torch.empty(shape, dtype=torch.float32, device=self._device)
        shape = (1, self._grid[0] * self._tokens, self._stage.inner_dim)
        return torch.empty(shape, dtype=self._conditions.contexts.dtype, device=self._device)

    @property
    def _channels(self) -> int:
        return int(self._stage.config.out_channels or self._stage.config.in_channels)
