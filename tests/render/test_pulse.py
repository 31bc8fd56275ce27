"""Signs of life: who is noticed, who is not, and what is said."""

from __future__ import annotations

import queue
import threading

import pytest

from videojob_worker.pulse import FAILED, LEFT, Pulse, Watch

SILENCE_S = 1.0
LONG_S = 20.0


class Counters:
    """A board in memory, as ``TCPStore`` counts; it can be made to fail or to hang."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.error: Exception | None = None
        self.answers = threading.Event()
        self.answers.set()
        self._lock = threading.Lock()

    def add(self, key: str, amount: int) -> int:
        self.answers.wait(LONG_S)
        if self.error is not None:
            raise self.error
        with self._lock:
            self.counts[key] = self.counts.get(key, 0) + amount
            return self.counts[key]


@pytest.fixture
def counters() -> Counters:
    return Counters()


class Heard:
    """What a pulse says is lost."""

    def __init__(self, counters: Counters, rank: int, size: int = 2) -> None:
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.pulse = Pulse(lambda: counters, rank, size, SILENCE_S, "rank {}".format, self.said.put)

    def first(self) -> str:
        return self.said.get(timeout=LONG_S)

    @property
    def nothing(self) -> bool:
        return self.said.empty()


def test_a_rank_that_stops_counting_is_lost_after_as_many_rounds_as_silence_allows():
    watch = Watch(3, 6.0)
    assert [watch.hears(count) for count in (1, 2, 3, 3, 3, 3)] == [None] * 6
    assert watch.hears(3).startswith("gives no sign of life for 6 s: the process or its node hangs")


def test_one_beat_in_time_begins_the_count_anew():
    watch = Watch(2, 4.0)
    assert [watch.hears(count) for count in (1, 1, 1, 2, 2, 2)] == [None] * 6


def test_a_rank_that_did_not_begin_is_awaited_elsewhere():
    watch = Watch(1, 2.0)
    assert [watch.hears(0) for _ in range(5)] == [None] * 5


def test_a_rank_that_left_is_never_lost_and_one_that_failed_is_at_once():
    watch = Watch(1, 2.0)
    assert [watch.hears(7 + LEFT) for _ in range(5)] == [None] * 5
    assert "has failed" in watch.hears(7 + FAILED)


def test_a_silent_rank_is_named_while_the_others_go_on(counters):
    counters.counts = {"pulse/2": 5}
    first, second = Heard(counters, 0, 3), Heard(counters, 1, 3)
    with first.pulse, second.pulse:
        assert first.first().startswith("rank 2 gives no sign of life")
        assert second.first().startswith("rank 2 gives no sign of life")
    assert first.nothing, "it is said once"


def test_a_rank_that_ends_well_tells_the_others_so(counters):
    first, second = Heard(counters, 0), Heard(counters, 1)
    with first.pulse:
        with second.pulse:
            pass
        assert counters.counts["pulse/1"] >= LEFT
        with pytest.raises(queue.Empty):
            first.said.get(timeout=3 * SILENCE_S)


def test_a_rank_that_ends_by_an_error_tells_the_others_so(counters):
    first, second = Heard(counters, 0), Heard(counters, 1)
    with first.pulse:
        with pytest.raises(KeyError), second.pulse:
            raise KeyError("odd")
        assert first.first() == "rank 1 has failed; its own last words, or its log, say why"


def test_a_board_that_fails_is_the_first_nodes_end(counters):
    heard = Heard(counters, 1)
    counters.error = RuntimeError("connection reset")
    with heard.pulse:
        assert heard.first().endswith("and that node with it: connection reset")


def test_a_board_that_hangs_is_noticed_too(counters):
    heard = Heard(counters, 1)
    counters.answers.clear()
    with heard.pulse:
        assert heard.first().startswith("the first node does not answer for 1 s")
        counters.answers.set()
