"""Calls a function for each key whenever something was heard of it or its time has come; one call a key at a time.

``handlers`` wakes keys, ``reconcile`` is the function. Knows nothing of Kubernetes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

Key = tuple[str, str]  # namespace, name

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0


class Keeper:
    """Keeps every known key looked after.

    Args:
        look: called in a thread; returns the seconds until the next look, or None to forget the key.
        threads: looks at once.
        first_delay_seconds: before a look that failed is repeated; doubles up to a minute.
    """

    def __init__(
        self,
        look: Callable[[str, str], float | None],
        threads: int = 16,
        first_delay_seconds: float = FIRST_DELAY_SECONDS,
    ) -> None:
        self._look = look
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="look")
        self._first_delay = first_delay_seconds
        self._calls: dict[Key, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self, key: Key) -> None:
        """Something happened to this key: look soon. Call from the event loop."""
        if key in self._calls:
            self._calls[key].set()
            return
        self._calls[key] = asyncio.Event()
        task = asyncio.create_task(self._keep(key), name=f"keep {key}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def __contains__(self, key: Key) -> bool:
        """Whether the key is looked after."""
        return key in self._calls

    async def close(self) -> None:
        """Stop looking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)  # a look that hangs must not hang us

    async def _keep(self, key: Key) -> None:
        call, pause = self._calls[key], self._first_delay
        while True:
            call.clear()  # before the look: what is heard during it leads to another
            try:
                delay = await asyncio.get_running_loop().run_in_executor(self._pool, self._look, *key)
                pause = self._first_delay
            except Exception:  # a handler's shell: the key must stay looked after
                delay, pause = pause, min(LONGEST_DELAY_SECONDS, pause * 2)
                log.exception("%s/%s: the look failed, the next in %.0f s", *key, delay)
            if delay is None and not call.is_set():
                del self._calls[key]
                return
            if delay is not None:
                await self._wait(call, delay)

    async def _wait(self, call: asyncio.Event, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await call.wait()
        except TimeoutError:
            return
