"""State reaches storage in the background, in an order in which nothing relies on what is not there yet."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from videojob_api import names
from videojob_api.spec import VideoJob
from videojob_worker.blocks import BlockState, Snapshot
from videojob_worker.errors import AccessDeniedError, OutputConflictError, StorageError, StorageUnavailableError
from videojob_worker.keeper import Keeper
from videojob_worker.store import CLAIM, MemoryStore, Output, Stored

CPU = torch.device("cpu")
IDENTITY = {"specDigest": "d", "model": "m"}


def videojob() -> VideoJob:
    return VideoJob.model_validate(
        {
            "apiVersion": "videojob.dev/v1alpha1",
            "kind": "VideoJob",
            "metadata": {"name": "fox", "uid": "u-1"},
            "spec": {
                "prompt": "a fox",
                "video": {"frames": 43},
                "model": {"source": {"localPath": "/model"}},
                "output": {"s3": {"bucket": "videos"}},
            },
        }
    )


def latents(block: int) -> torch.Tensor:
    return torch.full((1, 2, 3, 2, 2), float(block))


def snapshot(sweep: int) -> Snapshot:
    return Snapshot(sweep, (BlockState(sweep, 1, torch.full((1, 2, 3, 2, 2), sweep + 0.5), {"_step_index": 1}),))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Slow(MemoryStore):
    """Stops before each write but the claim's until it is let go; remembers their order."""

    def __init__(self) -> None:
        super().__init__()
        self.going = threading.Semaphore(1000)
        self.wrote = threading.Semaphore(0)
        self.written: list[str] = []
        self.error: Exception | None = None

    def put(self, key: str, body: bytes, *, attempt: int, replaces: str | None = None) -> str:
        if key != CLAIM:
            assert self.going.acquire(timeout=60)
            if self.error is not None:
                raise self.error
            self.written.append(key)
        version = super().put(key, body, attempt=attempt, replaces=replaces)
        if key != CLAIM:
            self.wrote.release()
        return version

    def flip(self, key: str) -> None:
        body = bytearray(self.objects[key].body)
        body[-3] ^= 1
        self.objects[key] = Stored(bytes(body), self.objects[key].version)


class Rig:
    """Attempts of one job over one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Slow()
        self.clock = Clock()
        self._attempts = 0

    def keeper(self, every_s: float = 60, **options: object) -> Keeper:
        self._attempts += 1
        return Keeper(
            output=Output.take(self.store, videojob(), self._attempts),
            scratch=self.folder,
            every_s=every_s,
            device=CPU,
            clock=self.clock,
            **{"identity": IDENTITY, **options},
        )

    def left(self, *sweeps: int) -> None:
        """What an attempt leaves that wrote these sweeps' states, of which each made one block clean."""
        keeper = self.keeper(every_s=1)
        found = keeper.newest()
        done = len(found.clean) if found else 0
        with keeper:
            for block, sweep in enumerate(sweeps, done):
                keeper.keep(block, latents(block))
                self.clock.now += 1
                keeper.offer(snapshot(sweep))
                keeper.hurry()


@pytest.fixture
def rig(tmp_path) -> Rig:
    return Rig(tmp_path)


ZERO, ONE = names.CHECKPOINTS
CLEAN = [names.clean_latents(block) for block in range(9)]


# --- Writing


def test_clean_latents_are_written_at_once_and_before_the_state_that_relies_on_them(rig):
    with rig.keeper() as keeper:
        keeper.keep(0, latents(0))
        keeper.hurry()
        assert rig.store.written == [CLEAN[0]]
        rig.store.going = threading.Semaphore(0)
        keeper.keep(1, latents(1))
        keeper.keep(2, latents(2))
        rig.clock.now += 60
        keeper.offer(snapshot(5))
        rig.store.going.release(3)
        keeper.hurry()
    assert rig.store.written == [*CLEAN[:3], ZERO]


def test_the_state_is_written_when_the_time_has_passed_and_not_before(rig):
    with rig.keeper(every_s=60) as keeper:
        for sweep in range(1, 8):
            rig.clock.now += 25
            keeper.offer(snapshot(sweep))
            if sweep % 3 == 0:
                assert rig.store.wrote.acquire(timeout=60)
        assert rig.store.written == [ZERO, ONE]
        keeper.remove()


def test_no_offer_waits_for_a_slow_store_and_only_the_newest_state_is_written_next(rig):
    rig.store.going = threading.Semaphore(0)
    with rig.keeper(every_s=1) as keeper:
        for sweep in range(1, 8):
            rig.clock.now += 1
            keeper.offer(snapshot(sweep))
        rig.store.going.release(2)
    found = rig.keeper().newest()
    assert found.snapshot.sweep == 7
    assert len(rig.store.written) <= 2


@pytest.mark.parametrize("every_s", [0, 60])
@pytest.mark.parametrize("error", [SystemExit(1), RuntimeError("odd"), KeyboardInterrupt()])
def test_whatever_ends_the_render_the_newest_state_is_written(rig, every_s, error):
    def render() -> None:
        with rig.keeper(every_s) as keeper:
            for sweep in range(1, 4):
                keeper.offer(snapshot(sweep))
            raise error

    with pytest.raises(type(error)):
        render()
    assert rig.store.written == [ZERO]
    assert rig.keeper().newest().snapshot.sweep == 3
    assert list(rig.folder.iterdir()) == []


def test_a_state_is_not_written_twice(rig):
    with rig.keeper(0) as keeper:
        keeper.offer(snapshot(1))
        keeper.hurry()
        keeper.hurry()
    assert rig.store.written == [ZERO]


def test_nothing_is_tried_again_when_storage_is_what_failed(rig):
    def render() -> None:
        with rig.keeper(0) as keeper:
            keeper.offer(snapshot(1))
            raise StorageUnavailableError("the store is down")

    with pytest.raises(StorageUnavailableError):
        render()
    assert rig.store.written == []


def test_the_end_waits_only_so_long_for_the_last_state(rig, caplog):
    rig.store.going = threading.Semaphore(0)
    with rig.keeper(0, hurry_s=0.05) as keeper:
        keeper.offer(snapshot(1))
    assert "the last checkpoint is not in storage after" in caplog.text
    rig.store.going.release(9)


def test_a_failure_is_seen_at_the_next_tick_and_ends_every_wait(rig):
    rig.store.error = AccessDeniedError("the credentials ran out")
    with rig.keeper() as keeper:
        keeper.check()
        keeper.keep(0, latents(0))
        keeper.hurry()
        with pytest.raises(AccessDeniedError, match="ran out"):
            keeper.check()
        with pytest.raises(AccessDeniedError, match="ran out"):
            keeper.finish()


def test_an_older_attempt_that_is_still_alive_writes_no_more(rig):
    with rig.keeper() as older:
        older.offer(snapshot(1))
        older.hurry()
        rig.left(2)
        left = dict(rig.store.objects)
        older.offer(snapshot(9))
        older.hurry()
        older.keep(0, latents(7))
        older.hurry()
        with pytest.raises(OutputConflictError, match="attempt 1 has lost"):
            older.check()
    assert rig.store.objects == left


# --- Finding


def test_there_is_nothing_to_go_on_from_at_first(rig):
    assert rig.keeper().newest() is None
    assert rig.keeper().newest() is None


def test_the_newer_generation_wins_and_the_older_one_is_overwritten_next(rig):
    rig.left(4, 5, 6)
    assert rig.store.written == [CLEAN[0], ZERO, CLEAN[1], ONE, CLEAN[2], ZERO]
    rig.store.written.clear()
    keeper = rig.keeper()
    found = keeper.newest()
    assert (found.snapshot.sweep, found.attempt, len(found.clean)) == (6, 1, 3)
    assert [keeper.read(block)[0, 0, 0, 0, 0] for block in range(3)] == [0, 1, 2]
    rig.left(7)
    assert rig.store.written == [CLEAN[3], ONE]


def damage(store: Slow, key: str) -> None:
    store.flip(key)


def remove(store: Slow, key: str) -> None:
    del store.objects[key]


def cut(store: Slow, key: str) -> None:
    store.objects[key] = Stored(store.objects[key].body[:-100], store.objects[key].version)


@pytest.mark.parametrize("harm", [damage, remove, cut])
def test_without_the_newer_generation_the_older_one_is_used_and_stays_till_another_is_written(rig, harm, caplog):
    rig.left(4, 5)
    harm(rig.store, ONE)
    assert rig.keeper().newest().snapshot.sweep == 4
    assert (f"{ONE} is not used: it is damaged" in caplog.text) == (harm is not remove)
    rig.store.written.clear()
    rig.left(6)
    assert rig.store.written[-1] == ONE


@pytest.mark.parametrize("harm", [damage, remove, cut])
def test_a_generation_whose_latents_are_gone_is_not_used(rig, harm, caplog):
    rig.left(4, 5)
    harm(rig.store, CLEAN[1])
    assert rig.keeper().newest().snapshot.sweep == 4
    assert f"{ONE} is not used: {CLEAN[1]} is damaged or missing" in caplog.text


def test_with_no_generation_left_the_render_begins_at_the_beginning(rig):
    rig.left(4, 5)
    damage(rig.store, CLEAN[0])
    assert rig.keeper().newest() is None


def test_a_checkpoint_of_something_else_is_not_used_and_its_latents_are_replaced(rig, caplog):
    rig.left(4, 5)
    keeper = rig.keeper(identity={**IDENTITY, "model": "other"}, every_s=0)
    assert keeper.newest() is None
    assert f"{ONE} is not used: it was made of something else: model differ" in caplog.text
    with keeper:
        keeper.keep(0, latents(5))
        keeper.finish()
    assert rig.keeper().newest() is None, "the first one relies on latents that were replaced"


def test_latents_that_rot_after_they_were_looked_at_are_named_with_the_remedy(rig):
    rig.left(4)
    keeper = rig.keeper()
    keeper.newest()
    damage(rig.store, CLEAN[0])
    with pytest.raises(StorageError, match=r"00000.safetensors cannot be used: it is damaged.*remove checkpoint/"):
        keeper.read(0)


# --- The end


def test_after_the_manifest_nothing_is_left(rig):
    rig.left(4, 5)
    keeper = rig.keeper()
    keeper.newest()
    with keeper:
        keeper.keep(2, latents(2))
        keeper.offer(snapshot(6))
        keeper.finish()
        assert [float(keeper.read(block)[0, 0, 0, 0, 0]) for block in range(3)] == [0, 1, 2]
        keeper.remove()
    assert set(rig.store.objects) == {CLAIM}


def test_latents_of_every_block_can_be_read_when_it_has_finished(rig):

    with rig.keeper() as keeper:
        for block in range(9):
            keeper.keep(block, latents(block))
        keeper.finish()
        assert [float(keeper.read(block)[0, 0, 0, 0, 0]) for block in range(9)] == list(range(9))
        keeper.remove()
