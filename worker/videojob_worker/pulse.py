"""Signs of life: every rank counts on a board that all share, and watches the others count.

A rank that waits for a neighbour cannot know whether that one computes, waits itself, bridges an outage of storage, or
hangs. So the bound on an exchange is long, and this is the short one: it notices a process that is stopped, a node that
is gone and a network that is cut, names the very rank, and needs no guess of how long a turn takes. A rank that fails
says so on its way out, since NCCL does not notice it. ``link`` has the board; ``__main__`` says what follows.

Silence is counted in own rounds, not by the clock: whoever was itself stopped for a while blames nobody for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

LEFT = 1 << 40  # added to a rank's count by its good end; no rank counts so far
FAILED = 1 << 41
FAREWELL_S = 2.0  # for the last count
EVERY_S = 2.0


class Board(Protocol):
    """Counters under names, shared by all ranks; ``torch.distributed.TCPStore`` is one."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter, which begins at 0; the new value."""
        ...


class Watch:
    """What is known of one other rank."""

    def __init__(self, patience: int, silence_s: float) -> None:
        self._patience = patience
        self._silence_s = silence_s
        self._count = 0
        self._missed = 0

    def hears(self, count: int) -> str | None:
        """What to say where that rank is lost, given its newest count."""
        if count >= FAILED:
            return "has failed; its own last words, or its log, say why"
        if count >= LEFT or count != self._count or count == 0:  # 0: it did not begin, and is awaited elsewhere
            self._count, self._missed = count, 0
            return None
        self._missed += 1
        return None if self._missed <= self._patience else f"gives no sign of life {_hangs(self._silence_s)}"


class Pulse:
    """Beats and watches while it is entered; left by an error, it tells the others.

    Args:
        board: makes the board, in this pulse's own thread, since the first node may be slow to answer.
        rank: of this process.
        size: of the ring.
        silence_s: how long another rank, or the board, may be silent.
        name: a rank for people.
        on_lost: called once, in a thread, with what to say; the process should end then.
    """

    def __init__(
        self,
        board: Callable[[], Board],
        rank: int,
        size: int,
        silence_s: float,
        name: Callable[[int], str],
        on_lost: Callable[[str], None],
    ) -> None:
        self._make_board = board
        self._rank = rank
        self._silence_s = silence_s
        self._name = name
        self._on_lost = on_lost
        self._every_s = min(EVERY_S, silence_s / 5)
        self._patience = round(silence_s / self._every_s)
        self._watched = {other: Watch(self._patience, silence_s) for other in range(size) if other != rank}
        self._rounds = 0
        self._last_count = LEFT
        self._stopping = threading.Event()
        self._lost = threading.Lock()  # taken once and for all
        self._beating = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._guarding = threading.Thread(target=self._guard, name="pulse-guard", daemon=True)

    def __enter__(self) -> Self:
        """Start."""
        self._beating.start()
        self._guarding.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop, and tell the others how it ended."""
        self._last_count = LEFT if kind is None else FAILED
        self._stopping.set()
        self._beating.join(FAREWELL_S)

    def _beat(self) -> None:
        try:
            board = self._make_board()
            while not self._stopping.wait(self._every_s if self._rounds else 0):
                self._round(board)
            board.add(_key(self._rank), self._last_count)
        except RuntimeError as error:  # all of torch.distributed's are
            if not self._stopping.is_set():
                self._lose(f"the first node's store is lost, and that node with it: {error}")

    def _round(self, board: Board) -> None:
        board.add(_key(self._rank), 1)
        for other, watch in self._watched.items():
            trouble = watch.hears(board.add(_key(other), 0))
            if trouble is not None:
                self._lose(f"{self._name(other)} {trouble}")
        self._rounds += 1

    def _guard(self) -> None:
        """The board itself may be silent, and a call to it has no bound."""
        seen, missed = -1, 0
        while not self._stopping.wait(self._every_s):
            seen, missed = (seen, missed + 1) if seen == self._rounds else (self._rounds, 0)
            if missed > self._patience:
                self._lose(f"the first node does not answer {_hangs(self._silence_s)}")

    def _lose(self, message: str) -> None:
        if self._lost.acquire(blocking=False):
            self._on_lost(message)


def _hangs(silence_s: float) -> str:
    return f"for {silence_s:.0f} s: the process or its node hangs, or the network between the nodes is cut"


def _key(rank: int) -> str:
    return f"pulse/{rank}"
