"""Blocks become a video in storage: in order, to the exact frame, and consistent whatever fails at any write."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from testcluster.s3 import S3Server
from videojob_api import names
from videojob_api import plan as plans
from videojob_api.spec import S3Location, VideoJob
from videojob_worker import segments
from videojob_worker.errors import (
    AccessDeniedError,
    NotFiniteError,
    OutputConflictError,
    RenderError,
    StorageUnavailableError,
)
from videojob_worker.publisher import Publisher
from videojob_worker.segments import H264, Segment
from videojob_worker.store import CLAIM, MemoryStore, Output, Patience, S3Store, Store

FRAMES = 43  # the last latent's 2 last frames are surplus
STEP = 10  # gray levels between two numbers in a picture
TILE = 32


def videojob(frames: int = FRAMES) -> VideoJob:
    return VideoJob.model_validate(
        {
            "apiVersion": "videojob.dev/v1alpha1",
            "kind": "VideoJob",
            "metadata": {"name": "fox", "namespace": "studio", "uid": "u-1"},
            "spec": {
                "prompt": "a fox",
                "video": {"frames": frames, "width": 3 * TILE, "height": TILE},
                "dualParallel": {"blockLatents": 3, "contextLatents": 2},
                "model": {"source": {"localPath": "/model"}},
                "output": {"s3": {"bucket": "videos"}},
            },
        }
    )


PLAN = plans.cut(videojob().spec)
ALL_WRITES = [
    names.segment(0),
    names.INIT_SEGMENT,
    names.PLAYLIST,
    *(key for block in range(1, PLAN.blocks) for key in (names.segment(block), names.PLAYLIST)),
    names.VIDEO,
    names.PLAYLIST,
    names.MANIFEST,
]


def latents(block: int, shade: int = 0) -> Tensor:
    """A block whose every latent says which it is."""
    numbers = torch.arange(PLAN.wanted_latents(block), dtype=torch.float32).expand(1, 1, -1)
    return torch.stack([torch.full_like(numbers, block), numbers, torch.full_like(numbers, shade)], 1).flatten(2, 3)[
        ..., None, None
    ]


class TellingDecoder:
    """Every frame is three gray tiles, which say block, latent and how many frames were decoded before."""

    def __init__(self, before_latent: Callable[[], object] = lambda: None) -> None:
        self.closed = False
        self._before_latent = before_latent
        self._decoded = 0

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        for latent in latents[0, :, :, 0, 0].T:
            self._before_latent()
            block, index, shade = latent.tolist()
            count = 4 if self._decoded else 1
            yield torch.stack([self._picture(block, index, self._decoded + frame, shade) for frame in range(count)])
            self._decoded += count

    def close(self) -> None:
        self.closed = True

    @staticmethod
    def _picture(block: float, latent: float, frame: int, shade: float) -> Tensor:
        levels = torch.tensor([block, latent, frame % 24]) * STEP + shade
        return levels.repeat_interleave(TILE)[None, :, None].expand(TILE, -1, 3).to(torch.uint8)


def told(video: bytes) -> list[tuple[int, ...]]:
    """What the frames of a video say."""
    with av.open(io.BytesIO(video)) as container:
        pictures = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    tiles = [picture.reshape(TILE, 3, TILE, 3).mean((0, 2, 3)) for picture in pictures]
    return [tuple(int(level) for level in np.round(tile / STEP)) for tile in tiles]


def expected(frames: int = FRAMES) -> list[tuple[int, ...]]:
    latent_of = [-(-frame // 4) for frame in range(frames)]
    block_of = [0 if latent < 5 else (latent - 2) // 3 for latent in latent_of]
    return [
        (block, latent - PLAN.first_latent(block), frame % 24)
        for frame, (latent, block) in enumerate(zip(latent_of, block_of, strict=True))
    ]


class Watched(MemoryStore):
    """Looks at everything as a viewer does, after each write; may fail at one, before or after it takes place."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[str, int]] = []  # each object, and how many segments were listed when it was written
        self.listed: list[int] = []  # how many were listed, after each write of the playlist
        self.fails_at: int | None = None
        self.fails_after = False
        self.error: Exception = StorageUnavailableError("the store is down")

    def put(self, key: str, body: bytes, *, attempt: int, replaces: str | None = None) -> str:
        fails = key != CLAIM and len(self.writes) == self.fails_at
        if fails and not self.fails_after:
            raise self.error
        before, _ = self.playlist
        version = super().put(key, body, attempt=attempt, replaces=replaces)
        if key != CLAIM:
            self.writes.append((key, before))
        self.look()
        if key == names.PLAYLIST:
            self.listed.append(self.playlist[0])
        if fails:
            raise self.error
        return version

    def delete(self, key: str, version: str) -> None:
        super().delete(key, version)
        self.look()

    @property
    def written(self) -> list[str]:
        return [key for key, _ in self.writes]

    def look(self) -> None:
        count, ended = self.playlist
        assert all(names.segment(block) in self.objects for block in range(count))
        assert count == 0 or names.INIT_SEGMENT in self.objects
        assert not ended or names.VIDEO in self.objects
        assert names.MANIFEST not in self.objects or ended

    @property
    def playlist(self) -> tuple[int, bool]:
        found = self.objects.get(names.PLAYLIST)
        return (0, False) if found is None else segments.listed(found.body.decode())


@dataclass
class Rig:
    """One attempt's publisher and what it reported."""

    store: Store
    scratch: Path
    attempt: int = 1
    waiting: int = 2
    grace_s: float = 60.0
    before_latent: Callable[[], object] = lambda: None
    finished: int = 0
    codec: H264 = segments.DEFAULT

    def __post_init__(self) -> None:
        self.ready: list[Segment] = []
        self._news = threading.Semaphore(0)
        self.decoder = TellingDecoder(self.before_latent)
        self.output = Output.take(self.store, videojob(), self.attempt)
        self.publisher = Publisher(
            videojob(),
            output=self.output,
            decoder=self.decoder,
            scratch=self.scratch,
            on_segment=self.on_segment,
            waiting=self.waiting,
            grace_s=self.grace_s,
            clock=lambda: 1_000_000.0,
            codec=self.codec,
            finished=self.finished,
            read=latents,
        )

    def publish(self, blocks: int = PLAN.blocks, shades: Mapping[int, int] = MappingProxyType({})) -> None:
        with self.publisher:
            for block in range(self.finished, blocks):
                self.publisher.submit(block, latents(block, shades.get(block, 0)))
            if blocks == PLAN.blocks:
                self.publisher.finish()
            else:
                self.wait(blocks)

    def submit_from(self, block: int, shade: int = 0) -> None:
        """All blocks from this one, and the end."""
        for index in range(block, PLAN.blocks):
            self.publisher.submit(index, latents(index, shade))
        self.publisher.finish()

    def on_segment(self, segment: Segment) -> None:
        self.ready.append(segment)
        self._news.release()

    def wait(self, segments: int) -> None:
        """Until so many more segments are listed."""
        for _ in range(segments):
            assert self._news.acquire(timeout=60)

    def wait_for_failure(self) -> None:
        """Until the publisher's thread has ended."""
        for thread in threading.enumerate():
            if thread.name == "publisher":
                thread.join(60)


@pytest.fixture
def rig(tmp_path) -> Callable[..., Rig]:
    return lambda store=None, **options: Rig(store or Watched(), tmp_path, **options)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Watched:
    store = Watched()
    Rig(store, tmp_path_factory.mktemp("scratch")).publish()
    return store


# --- What is written


def test_a_segment_comes_before_the_list_that_names_it_and_the_manifest_last(published):
    assert published.written == ALL_WRITES
    assert published.playlist == (PLAN.blocks, True)


def test_the_video_holds_exactly_the_frames_asked_for_in_order(published):
    assert told(published.objects[names.VIDEO].body) == expected()


def test_the_segments_in_a_row_hold_the_same_frames(published):
    keys = [names.INIT_SEGMENT, *(names.segment(block) for block in range(PLAN.blocks))]
    assert told(b"".join(published.objects[key].body for key in keys)) == expected()


def test_the_manifest_gives_every_objects_size_and_digest(published):
    manifest = json.loads(published.objects[names.MANIFEST].body)
    described = [*manifest["segments"], manifest["init"], manifest["video"]]
    assert len(described) == PLAN.blocks + 2
    for entry in described:
        body = published.objects[entry["object"]].body
        assert entry["sizeBytes"] == len(body)
        assert entry["sha256"] == hashlib.sha256(body).hexdigest()


def test_the_manifest_says_what_was_rendered(published):
    manifest = json.loads(published.objects[names.MANIFEST].body)
    assert manifest["videoJob"] == {"namespace": "studio", "name": "fox", "uid": "u-1"}
    assert manifest["attempt"] == 1
    assert manifest["specDigest"] == videojob().spec.digest()
    assert manifest["video"]["frames"] == sum(entry["frames"] for entry in manifest["segments"]) == FRAMES
    assert [entry["firstFrame"] for entry in manifest["segments"]] == [PLAN.first_frame(b) for b in range(PLAN.blocks)]


def test_every_listed_segment_is_reported(rig):
    one = rig()
    one.publish()
    assert [segment.index for segment in one.ready] == list(range(PLAN.blocks))
    assert sum(segment.frames for segment in one.ready) == FRAMES


def test_nothing_stays_in_the_scratch_folder(rig, tmp_path):
    one = rig()
    one.publish()
    assert list(tmp_path.iterdir()) == []
    assert one.decoder.closed


# --- What is refused


def test_latents_that_are_not_finite_are_refused_with_the_remedy(rig):
    broken = latents(0)
    broken[0, 0, 2] = float("nan")
    one = rig()
    with one.publisher, pytest.raises(NotFiniteError, match=r"block 0 is not finite.*VIDEOJOB_DTYPE"):
        one.publisher.submit(0, broken)
    assert one.store.written == []


@pytest.mark.parametrize(("block", "of"), [(1, 1), (0, 1)])
def test_a_block_out_of_order_or_of_the_wrong_length_is_refused(rig, block, of):
    one = rig()
    with one.publisher, pytest.raises(ValueError, match="where block 0 is due"):
        one.publisher.submit(block, latents(of))


def test_a_video_is_not_finished_while_blocks_are_missing(rig):
    one = rig()
    with one.publisher:
        one.publisher.submit(0, latents(0))
        with pytest.raises(ValueError, match=f"1 of {PLAN.blocks} blocks"):
            one.publisher.finish()
    assert names.VIDEO not in one.store.objects


# --- Waiting and stopping


def test_submit_waits_while_the_queue_is_full(rig):
    one = rig(waiting=1)
    with one.publisher:
        for block in range(PLAN.blocks):
            one.publisher.submit(block, latents(block))
            assert len(one.ready) >= block - 1  # one is in work, one waits
        one.publisher.finish()
    assert told(one.store.objects[names.VIDEO].body) == expected()


def test_closing_stops_in_the_middle_of_a_block(rig):
    going, reached = threading.Semaphore(2), threading.Semaphore(0)
    one = rig(before_latent=lambda: (reached.release(), going.acquire()))
    with one.publisher:
        one.publisher.submit(0, latents(0))
        for _ in range(3):
            reached.acquire()  # the third latent of five is being decoded
        threading.Thread(target=going.release).start()
    assert one.store.written == []
    assert one.decoder.closed
    with pytest.raises(RenderError, match="closed"):
        one.publisher.submit(1, latents(1))


def test_closing_does_not_wait_for_ever_for_a_call_that_does_not_return(rig, caplog):
    going, reached = threading.Semaphore(0), threading.Semaphore(0)
    one = rig(before_latent=lambda: (reached.release(), going.acquire()), grace_s=0.0)
    with one.publisher:
        one.publisher.submit(0, latents(0))
        reached.acquire()
    assert "going without it" in caplog.text
    assert not one.decoder.closed
    going.release(100)
    one.wait_for_failure()
    one.publisher.close()
    assert one.decoder.closed


def test_a_submit_that_waits_is_released_when_publishing_fails(rig):
    store = Watched()
    store.fails_at = 0
    one = rig(store, waiting=1)
    with one.publisher, pytest.raises(StorageUnavailableError, match="the store is down"):
        one.submit_from(0)


def test_a_failure_is_seen_before_the_next_block_is_clean(rig):
    store = Watched()
    store.fails_at = 0
    one = rig(store)
    with one.publisher:
        one.publisher.check()
        one.publisher.submit(0, latents(0))
        one.wait_for_failure()
        with pytest.raises(StorageUnavailableError, match="the store is down"):
            one.publisher.check()


def test_an_error_without_a_reason_names_the_block(rig):
    def fail() -> None:
        raise ArithmeticError("odd")

    one = rig(before_latent=fail)
    with one.publisher, pytest.raises(RenderError, match="block 0 cannot be published: ArithmeticError: odd"):
        one.submit_from(0)


# --- Failing at any write


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", range(len(ALL_WRITES)))
def test_whatever_write_fails_a_viewer_sees_a_whole_list_and_the_next_attempt_completes(rig, write, after):
    store = Watched()
    store.fails_at, store.fails_after, store.error = write, after, AccessDeniedError("the credentials ran out")
    with pytest.raises(AccessDeniedError, match="ran out"):
        rig(store).publish()
    assert store.written == ALL_WRITES[: write + after]
    store.look()
    store.fails_at = None
    rig(store, attempt=2).publish()
    assert store.listed == sorted(store.listed)
    assert told(store.objects[names.VIDEO].body) == expected()
    assert json.loads(store.objects[names.MANIFEST].body)["attempt"] == 2


# --- Attempts


@pytest.mark.parametrize("left", range(1, PLAN.blocks + 1))
def test_identical_segments_of_an_older_attempt_are_listed_all_the_time(rig, left):
    store = Watched()
    rig(store).publish(left)
    store.listed.clear()
    rig(store, attempt=2).publish()
    assert min(store.listed) == left
    assert {store.attempts[names.segment(block)] for block in range(left)} == {1}
    assert store.playlist == (PLAN.blocks, True)


@pytest.mark.parametrize("differs", range(PLAN.blocks))
def test_the_list_is_cut_before_a_segment_that_differs_is_replaced(rig, differs):
    store = Watched()
    rig(store).publish()
    store.writes.clear()
    rig(store, attempt=2).publish(shades={differs: 4})
    replaced = [(key, listed) for key, listed in store.writes if key.startswith("segments/")]
    assert replaced == [(names.segment(differs), differs)]
    assert store.playlist == (PLAN.blocks, True)
    assert json.loads(store.objects[names.MANIFEST].body)["attempt"] == 2


def test_a_video_of_two_attempts_is_the_newer_ones(rig):
    store = Watched()
    rig(store).publish(3, shades=dict.fromkeys(range(PLAN.blocks), 4))
    rig(store, attempt=2).publish()
    keys = [names.INIT_SEGMENT, *(names.segment(block) for block in range(PLAN.blocks))]
    assert told(b"".join(store.objects[key].body for key in keys)) == expected()
    assert told(store.objects[names.VIDEO].body) == expected()


def test_an_older_attempt_that_is_still_alive_is_fenced_out(rig):
    store = Watched()
    older = rig(store)
    with older.publisher:
        older.publisher.submit(0, latents(0))
        older.wait(1)
        rig(store, attempt=2).publish(2)
        left = dict(store.objects)
        with pytest.raises(OutputConflictError, match="attempt 1 has lost"):
            older.submit_from(1, shade=4)
    assert store.objects == left


def test_an_older_attempt_lists_nothing_more_once_a_newer_one_has_begun(rig):
    store = Watched()
    older = rig(store)
    with older.publisher:
        older.publisher.submit(0, latents(0))
        older.wait(1)
        with rig(store, attempt=2).publisher, pytest.raises(OutputConflictError, match="attempt 1 has lost"):
            older.submit_from(1)
    assert store.playlist == (1, False)


def test_an_older_attempt_that_comes_back_with_the_same_segments_lists_nothing_more(rig):
    store = Watched()
    older = rig(store)
    with older.publisher:
        rig(store, attempt=2).publish()
        left = dict(store.objects)
        older.publisher.submit(0, latents(0))
        older.wait_for_failure()
        with pytest.raises(OutputConflictError, match="attempt 1 has lost"):
            older.publisher.check()
    assert store.objects == left


# --- Going on where an older attempt was


@pytest.mark.parametrize("finished", range(PLAN.blocks + 1))
@pytest.mark.parametrize("left", range(PLAN.blocks + 1))
def test_a_resumed_attempt_goes_on_with_the_list_and_makes_no_segment_twice(rig, published, left, finished):
    store = Watched()
    rig(store).publish(left)
    store.writes.clear()
    decoded: list[None] = []
    one = rig(store, attempt=2, finished=finished, before_latent=lambda: decoded.append(None))
    one.publish()
    assert store.listed == sorted(store.listed)
    assert [key for key in store.written if key.startswith("segments/")] == [
        names.segment(block) for block in range(left, PLAN.blocks)
    ]
    assert [segment.index for segment in one.ready] == list(range(PLAN.blocks))
    assert len(decoded) == (0 if min(left, finished) == PLAN.blocks else PLAN.latents)
    left_out = {names.PLAYLIST, names.MANIFEST, CLAIM}
    assert {key: stored.body for key, stored in store.objects.items() if key not in left_out} == {
        key: stored.body for key, stored in published.objects.items() if key not in left_out
    }
    manifests = [json.loads(at.objects[names.MANIFEST].body) for at in (store, published)]
    assert manifests[0]["segments"] == manifests[1]["segments"]
    assert manifests[0]["totals"] == manifests[1]["totals"]
    assert store.playlist == (PLAN.blocks, True)


@pytest.mark.parametrize("lost", [names.INIT_SEGMENT, names.segment(0), names.segment(2)])
def test_an_object_that_was_lost_is_made_again_from_the_latents(rig, published, lost):
    store = MemoryStore()
    store.objects = dict(published.objects)
    del store.objects[lost]
    rig(store, attempt=2, finished=3).publish()
    for key in (*names_of_segments(), names.INIT_SEGMENT, names.VIDEO):
        assert store.objects[key].body == published.objects[key].body


def names_of_segments() -> list[str]:
    return [names.segment(block) for block in range(PLAN.blocks)]


def test_an_attempt_with_another_encoder_makes_all_segments_anew_from_the_latents(rig, published):
    store = Watched()
    rig(store).publish(3)
    rig(store, attempt=2, finished=3, codec=H264(preset="ultrafast", crf=30)).publish()
    assert told(store.objects[names.VIDEO].body) == expected()
    assert store.objects[names.INIT_SEGMENT].body != published.objects[names.INIT_SEGMENT].body
    assert {store.attempts[key] for key in names_of_segments()} == {2}


def test_stopping_while_the_older_attempts_segments_are_fetched_takes_no_time(rig):
    store = Watched()
    rig(store).publish(3)
    one = rig(store, attempt=2, finished=3)
    with one.publisher:
        pass
    assert one.decoder.closed


# --- The claim


def fail(*_after: object) -> None:
    raise AccessDeniedError("the model is not for everybody")


def test_an_attempt_that_fails_before_it_wrote_anything_leaves_the_prefix_free():
    store = MemoryStore()
    with pytest.raises(AccessDeniedError), Output.take(store, videojob(), 1):
        fail()
    assert store.objects == {}


def test_an_attempt_that_fails_later_keeps_the_prefix():
    store = MemoryStore()
    with pytest.raises(AccessDeniedError), Output.take(store, videojob(), 1) as output:
        fail(output.write("a", b"body"))
    assert sorted(store.objects) == [CLAIM, "a"]


def test_an_attempt_that_fails_keeps_what_an_older_one_claimed():
    store = MemoryStore()
    Output.take(store, videojob(), 1).write(names.PLAYLIST, b"#EXTM3U")
    with pytest.raises(AccessDeniedError), Output.take(store, videojob(), 2):
        fail()
    assert sorted(store.objects) == [CLAIM, names.PLAYLIST]


def test_an_attempt_that_fails_late_leaves_a_newer_ones_claim_alone():
    store = MemoryStore()
    with pytest.raises(AccessDeniedError), Output.take(store, videojob(), 1):
        fail(newer := Output.take(store, videojob(), 2))
    newer.check()


# --- A real server


def s3(server: S3Server, bucket: str) -> S3Store:
    location = S3Location(bucket=bucket, prefix="videos/fox", endpoint=server.endpoint)
    environ = {"TEST_AWS_ACCESS_KEY_ID": server.access_key, "TEST_AWS_SECRET_ACCESS_KEY": server.secret_key}
    return S3Store(location, env_prefix="TEST_", environ=environ, patience=Patience(first_s=0.02, longest_s=0.02))


@pytest.fixture
def own_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


def count_frames(path: Path) -> int:
    command = ["ffprobe", "-v", "error", "-count_frames", "-select_streams", "v", "-show_streams", "-of", "json"]
    done = subprocess.run([*command, path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return int(json.loads(done.stdout)["streams"][0]["nb_read_frames"])


def test_what_lies_in_s3_plays(rig, s3_server):
    bucket = s3_server.bucket()
    rig(s3(s3_server, bucket)).publish()
    folder = s3_server.root / bucket / "videos/fox"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {*ALL_WRITES, CLAIM}
    assert count_frames(folder / names.VIDEO) == count_frames(folder / names.PLAYLIST) == FRAMES
    assert told((folder / names.VIDEO).read_bytes()) == expected()


def test_two_attempts_in_s3_make_one_video(rig, s3_server):
    bucket = s3_server.bucket()
    rig(s3(s3_server, bucket)).publish(2)
    rig(s3(s3_server, bucket), attempt=2).publish(shades={1: 4})
    folder = s3_server.root / bucket / "videos/fox"
    assert count_frames(folder / names.VIDEO) == count_frames(folder / names.PLAYLIST) == FRAMES
    assert json.loads((folder / names.MANIFEST).read_text())["attempt"] == 2


def test_an_outage_of_storage_is_bridged(rig, own_server):
    bucket = own_server.bucket()
    one = rig(s3(own_server, bucket))
    with one.publisher:
        one.publisher.submit(0, latents(0))
        one.wait(1)
        own_server.stop()
        one.publisher.submit(1, latents(1))
        one.publisher.submit(2, latents(2))
        one.publisher.check()
        own_server.start()
        one.publisher.submit(3, latents(3))
        one.publisher.finish()
    assert count_frames(own_server.root / bucket / "videos/fox" / names.VIDEO) == FRAMES


def test_stopping_during_an_outage_takes_no_time(rig, own_server):
    bucket = own_server.bucket()
    location = S3Location(bucket=bucket, endpoint=own_server.endpoint)
    environ = {"TEST_AWS_ACCESS_KEY_ID": own_server.access_key, "TEST_AWS_SECRET_ACCESS_KEY": own_server.secret_key}
    one = rig(S3Store(location, env_prefix="TEST_", environ=environ, patience=Patience(first_s=3600, total_s=7200)))
    with one.publisher:
        one.publisher.submit(0, latents(0))
        one.wait(1)
        own_server.stop()
        one.publisher.submit(1, latents(1))
    assert one.decoder.closed
