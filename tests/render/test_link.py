"""What of the ring can be tried without one; the rest is in the end-to-end tests."""

from __future__ import annotations

from datetime import timedelta

import pytest

from videojob_worker.errors import PeerLostError
from videojob_worker.link import Pace


class Transfer:
    """Ends after it was asked so often."""

    def __init__(self, polls: float) -> None:
        self.polls = polls

    def is_completed(self) -> bool:
        self.polls -= 1
        return self.polls < 0


def test_a_process_waits_for_the_exchange_before_the_one_that_it_puts_in_line():
    pace, first, second = Pace(timedelta(seconds=60)), Transfer(3), Transfer(3)
    pace.keep([first])
    assert first.polls == 3, "one may be under way"
    pace.keep([second])
    assert first.polls < 0
    assert second.polls == 3


def test_an_exchange_that_never_ends_is_a_lost_peer():
    pace = Pace(timedelta(seconds=0.01))
    pace.keep([Transfer(float("inf"))])
    with pytest.raises(PeerLostError, match=r"no exchange with the neighbours ended for 0:00:00\.01"):
        pace.keep([])
