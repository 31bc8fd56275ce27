"""Who is looked at, and when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from videojob_operator.keeper import Keeper

KEY = ("studio", "boat")
LONG = 1000.0  # never, in a test


class Looks:
    """Answers with each given value in turn, the last one forever; raises those that are errors."""

    def __init__(self, *answers: float | Exception | None) -> None:
        self.answers = list(answers)
        self.keys: list[tuple[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.inside = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def __call__(self, namespace: str, name: str) -> float | None:
        with self._lock:
            self.keys.append((namespace, name))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.inside.set()
        self.gate.wait(10)
        with self._lock:
            self.at_once -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - looks run in threads
            await asyncio.sleep(0.001)


async def idle(keeper: Keeper) -> None:
    """As much time as any number of looks would need."""
    for _ in range(20):
        await asyncio.sleep(0.001)


def run(looks: Looks, scenario) -> None:
    async def play() -> None:
        keeper = Keeper(looks, threads=4, first_delay_seconds=0.001)
        try:
            await scenario(keeper)
        finally:
            looks.gate.set()
            await keeper.close()

    asyncio.run(play())


def test_a_key_is_looked_at_when_woken():
    looks = Looks(LONG)

    async def scenario(keeper):
        keeper.wake(KEY)
        await until(lambda: looks.keys == [KEY])

    run(looks, scenario)


def test_a_key_is_looked_at_again_when_its_time_has_come():
    looks = Looks(0.001, 0.001, LONG)

    async def scenario(keeper):
        keeper.wake(KEY)
        await until(lambda: len(looks.keys) == 3)

    run(looks, scenario)


def test_a_waiting_key_is_looked_at_at_once_when_woken():
    looks = Looks(LONG)

    async def scenario(keeper):
        keeper.wake(KEY)
        await until(lambda: len(looks.keys) == 1)
        await idle(keeper)
        keeper.wake(KEY)
        await until(lambda: len(looks.keys) == 2)

    run(looks, scenario)


@pytest.mark.parametrize("answer", [LONG, None], ids=["to wait", "to forget"])
def test_what_happens_during_a_look_leads_to_another(answer):
    looks = Looks(answer)
    looks.gate.clear()

    async def scenario(keeper):
        keeper.wake(KEY)
        await until(looks.inside.is_set)
        keeper.wake(KEY)
        looks.gate.set()
        await until(lambda: len(looks.keys) == 2)

    run(looks, scenario)


def test_a_flood_of_events_is_one_look_at_a_time_and_one_more():
    looks = Looks(LONG)
    looks.gate.clear()

    async def scenario(keeper):
        for _ in range(1000):
            keeper.wake(KEY)
        await until(looks.inside.is_set)
        for _ in range(1000):
            keeper.wake(KEY)
        looks.gate.set()
        await until(lambda: len(looks.keys) == 2)
        await idle(keeper)

    run(looks, scenario)
    assert len(looks.keys) == 2
    assert looks.most_at_once == 1


def test_several_keys_are_looked_at_at_once():
    looks = Looks(LONG)
    looks.gate.clear()

    async def scenario(keeper):
        for name in "abc":
            keeper.wake(("studio", name))
        await until(lambda: looks.most_at_once == 3)

    run(looks, scenario)


def test_a_key_without_a_next_look_is_forgotten():
    looks = Looks(None)

    async def scenario(keeper):
        keeper.wake(KEY)
        await until(lambda: len(looks.keys) == 1 and KEY not in keeper)
        await idle(keeper)

    run(looks, scenario)
    assert len(looks.keys) == 1


def test_a_forgotten_key_can_come_back():
    looks = Looks(None)

    async def scenario(keeper):
        keeper.wake(KEY)
        await until(lambda: len(looks.keys) == 1 and KEY not in keeper)
        keeper.wake(KEY)
        await until(lambda: len(looks.keys) == 2)

    run(looks, scenario)


def test_a_look_that_fails_is_repeated():
    looks = Looks(OSError("the API server is away"), OSError("still away"), LONG)

    async def scenario(keeper):
        keeper.wake(KEY)
        await until(lambda: len(looks.keys) == 3)

    run(looks, scenario)


def test_closing_does_not_wait_for_a_look_that_hangs():
    looks = Looks(LONG)
    looks.gate.clear()

    async def scenario():
        keeper = Keeper(looks, threads=1)
        keeper.wake(KEY)
        await until(looks.inside.is_set)
        async with asyncio.timeout(1):
            await keeper.close()
        assert looks.at_once == 1, "it still hangs"
        looks.gate.set()

    asyncio.run(scenario())


def test_closing_ends_all_looks():
    looks = Looks(0.001)

    async def scenario(keeper):
        keeper.wake(KEY)
        await until(lambda: len(looks.keys) > 1)
        await keeper.close()
        await until(lambda: looks.at_once == 0)
        seen = len(looks.keys)
        await idle(keeper)
        assert len(looks.keys) == seen

    run(looks, scenario)
