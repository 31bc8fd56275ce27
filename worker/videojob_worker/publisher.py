"""Brings finished blocks to storage in the background of the first rank while the next ones are denoised.

``__main__`` submits each block's clean latents; a thread sends them through ``decoder``, ``segments`` and a claimed
``store.Output``. Knows nothing of the ring, of the model or of S3.

**Order of writes.** A block's segment, then ``init.mp4`` (with block 0), then the playlist that names it; at the end
``video.mp4``, the closed playlist, ``manifest.json``. Whatever fails or dies between any two of them, the playlist
names only what is there, and a manifest means that all is.

**A newer attempt** may go on where an older one was. Then blocks before some ``finished`` one are not submitted:
their segments are taken from storage as far as the older attempt listed them, and the others are made of the latents
that ``keeper`` has kept. The decoder's state is too big to be kept; it is made again by decoding enough latents before
the first block to be published (``decoder.MEMORY_LATENTS``), whose frames are dropped.

Otherwise it renders anew and finds the segments of the older one. While its own come out identical, as they do
from the same spec, model and kind of machine, the playlist goes on naming all of the older ones, so viewers lose
nothing. With the first one that differs, the older playlist and manifest are void: the manifest is removed and the
playlist cut back to this attempt's own segments before anything is replaced, so no list ever mixes two attempts.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

import videojob_api.plan
from videojob_api import names
from videojob_api.spec import VideoJob

from . import segments
from .decoder import MEMORY_LATENTS
from .errors import NotFiniteError, RenderError
from .segments import H264, Frames, Segment
from .store import Output, sha256_of

log = logging.getLogger(__name__)

PACKAGES = ("videojob-operator", "torch", "diffusers", "transformers", "av")  # their versions shape the video


class Decoder(Protocol):
    """What ``decoder.StreamingDecoder`` does."""

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """The frames of the next latents, uint8 (f, H, W, 3) on the CPU, one item a latent."""
        ...

    def close(self) -> None:
        """Free its state."""
        ...


def _absent(block: int) -> Tensor:
    raise RenderError(f"the clean latents of block {block} were not kept")


class Publisher:
    """Publishes one video; a context manager. Entered, it takes over older lists; left early, it stops at once.

    Args:
        videojob: what is rendered.
        output: the prefix that this attempt has claimed.
        decoder: at the video's begin; closed in the end.
        scratch: a folder with room for twice the finished video.
        on_segment: called, in the publisher's thread, for each segment that the playlist names.
        codec: how to compress.
        waiting: clean blocks that may wait for the one in work; then ``submit`` blocks.
        grace_s: how long to wait, when left early, for the call that is under way.
        clock: seconds since the epoch.
        finished: blocks that were clean before this attempt began and will not be submitted.
        read: gives the clean latents of one of those.
    """

    def __init__(
        self,
        videojob: VideoJob,
        *,
        output: Output,
        decoder: Decoder,
        scratch: Path,
        on_segment: Callable[[Segment], None],
        codec: H264 = segments.DEFAULT,
        waiting: int = 2,
        grace_s: float = 10.0,
        clock: Callable[[], float] = time.time,
        finished: int = 0,
        read: Callable[[int], Tensor] = _absent,
    ) -> None:
        self._videojob = videojob
        self._plan = videojob_api.plan.cut(videojob.spec)
        self._output = output
        self._decoder = decoder
        self._scratch = scratch
        self._on_segment = on_segment
        self._codec = codec
        self._capacity = waiting
        self._grace_s = grace_s
        self._clock = clock
        self._finished = finished
        self._read = read
        self._began = clock()
        self._seconds = {"decode": 0.0, "encode": 0.0, "store": 0.0}
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        # Shared with the thread, under the lock:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, Tensor]] = deque()
        self._submitted = finished
        self._complete = self._stopping = False
        self._failure: BaseException | None = None
        # The thread's own until it has ended:
        self._init = b""
        self._entries: list[dict[str, Any]] = []
        self._inherited = (0, False)  # segments that an older attempt's playlist names, and whether it has ended
        self._playlist = ""

    def __enter__(self) -> Self:
        """Take over what an older attempt listed, and start.

        Raises:
            OutputConflictError: a newer attempt has taken over.
            StorageError: storage cannot be used.
        """
        self._inherit()
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="publisher-", dir=self._scratch)
        self._growing = Path(self._folder.name, "growing.mp4")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, block: int, latents: Tensor) -> None:
        """Hand over a clean block; waits while too many are waiting.

        Args:
            block: in order, from 0.
            latents: its wanted latents (1, C, plan.wanted_latents(block), h, w) on any device. Copied to the CPU here,
                so that the caller's stream has finished them and the GPU need not keep them.

        Raises:
            RenderError: publishing an earlier block failed.
            NotFiniteError: the latents are NaN or infinite.
            ValueError: the block is out of order or not of its length.
        """
        if block != self._submitted or latents.shape[2] != self._plan.wanted_latents(block):
            raise ValueError(f"block {block} of {latents.shape[2]} latents comes where block {self._submitted} is due")
        copy = latents.detach().to("cpu", torch.float32, copy=True)
        if not torch.isfinite(copy).all():
            raise NotFiniteError(f"block {block} is not finite (NaN or infinite): set VIDEOJOB_DTYPE to a wider type")
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._capacity or self._ended)
            self._raise_failure()
            self._waiting.append((block, copy))
            self._submitted += 1
            self._changed.notify_all()

    def check(self) -> None:
        """See whether all is well, without waiting.

        Raises:
            RenderError: publishing an earlier block failed.
        """
        with self._changed:
            self._raise_failure()

    def finish(self) -> None:
        """After the last block: wait for its segment, write the whole video, close the playlist, write the manifest.

        Raises:
            RenderError: anything could not be published.
            ValueError: blocks are missing.
        """
        if self._submitted != self._plan.blocks:
            raise ValueError(f"{self._submitted} of {self._plan.blocks} blocks were submitted")
        with self._changed:
            self._complete = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_failure()
        video = Path(self._folder.name, names.VIDEO)
        self._join(video)
        digest = sha256_of(video)
        with self._timed("store"):
            self._output.upload(names.VIDEO, video, digest, _say_how_far)
            self._list_segments(ended=True)
        manifest = json.dumps(self._manifest(video, digest), indent=1, ensure_ascii=False) + "\n"
        self._output.write(names.MANIFEST, manifest.encode())

    def close(self) -> None:
        """Stop, wherever it is: nothing is written any more but what is under way. May be called again."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._output.abort()
            self._thread.join(self._grace_s)
        if self._thread.is_alive():
            log.warning("the publisher's last call is not back after %.0f s; going without it", self._grace_s)
            return
        self._decoder.close()
        self._folder.cleanup()

    # In the caller's thread

    @property
    def _ended(self) -> bool:
        return self._stopping or self._failure is not None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._raise_if_stopping()

    def _inherit(self) -> None:
        """Take over what an older attempt listed, in this attempt's name, so that the older one can list no more."""
        if not self._output.inherited:
            return
        found = self._output.read(names.PLAYLIST)
        if found is None:
            return
        count, ended = segments.listed(found.body.decode(errors="replace"))
        self._inherited = (min(count, self._plan.blocks), ended)
        log.info("an older attempt left %d of %d segments", count, self._plan.blocks)
        self._list_segments()

    def _join(self, video: Path) -> None:
        with self._timed("encode"):
            frames = segments.remux(self._growing, video)
        if frames != self._plan.frames:
            raise RenderError(f"{names.VIDEO} has {frames} frames where {self._plan.frames} are due")

    # In the publisher's thread

    def _work(self) -> None:
        block = 0
        try:
            begin = self._recover()
            self._warm(begin)
            for block in range(begin, self._finished):
                self._publish(block, self._read(block))
            while (item := self._next()) is not None:
                block, latents = item
                self._publish(block, latents)
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            with self._changed:
                self._failure = _as_foreseen(error, block)
                self._changed.notify_all()

    def _recover(self) -> int:
        """Take over the finished blocks' segments that the older attempt listed; the first block to be published."""
        count = min(self._inherited[0], self._finished)
        found = self._output.read(names.INIT_SEGMENT) if count else None
        video = self._videojob.spec.video
        if found is None or found.body != segments.init(video.width, video.height, video.fps, self._codec):
            return 0  # nothing to take over, or another encoder made it
        for block in range(count):
            media = self._output.read(names.segment(block))
            if media is None:
                return block
            self._raise_if_stopping()
            frames, first_frame = self._plan.wanted_frames(block), self._plan.first_frame(block)
            self._append(Segment(block, first_frame, frames, video.fps, found.body, media.body))
        return count

    def _warm(self, begin: int) -> None:
        """Make the decoder's state anew, where the next block is not the video's first."""
        if begin in (0, self._plan.blocks):
            return
        first = self._plan.block_of(self._plan.first_latent(begin) - MEMORY_LATENTS)
        for block in range(first, begin):
            for _ in self._decoded(self._read(block)):
                pass

    def _next(self) -> tuple[int, Tensor] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._complete or self._stopping)
            if self._stopping or not self._waiting:
                return None
            item = self._waiting.popleft()
            self._changed.notify_all()
            return item

    def _publish(self, block: int, latents: Tensor) -> None:
        segment = self._encode(block, latents)
        if self._init not in (b"", segment.init):
            raise RenderError(f"segment {block} needs another {names.INIT_SEGMENT} than the first: the encoder changed")
        with self._timed("store"):
            self._disown(segment)
            self._output.write(names.segment(block), segment.media)
            if block == 0:
                self._output.write(names.INIT_SEGMENT, segment.init)
        self._append(segment)

    def _append(self, segment: Segment) -> None:
        """Take account of a segment that is in storage, and list it."""
        self._init = self._init or segment.init
        self._entries.append(_entry(segment))
        with self._timed("store"):
            self._list_segments()
        with self._growing.open("ab") as growing:
            growing.write(segment.media if segment.index else segment.init + segment.media)
        self._on_segment(segment)

    def _encode(self, block: int, latents: Tensor) -> Segment:
        fps, first_frame = self._videojob.spec.video.fps, self._plan.first_frame(block)
        decoding = self._seconds["decode"]
        with self._timed("encode"):
            frames = self._frames(block, latents)
            segment = segments.encode(frames, index=block, first_frame=first_frame, fps=fps, codec=self._codec)
        self._seconds["encode"] -= self._seconds["decode"] - decoding
        if segment.frames != self._plan.wanted_frames(block):
            raise RenderError(f"block {block} has {segment.frames} frames: this VAE does not make 4 frames of a latent")
        return segment

    def _frames(self, block: int, latents: Tensor) -> Iterator[Frames]:
        """The block's wanted frames, a latent's at a time; the last latent's surplus is cut."""
        missing = self._plan.wanted_frames(block)
        for frames in self._decoded(latents):
            yield frames[:missing].numpy()
            missing -= len(frames[:missing])

    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        """The latents' frames, a latent's at a time, until the publisher is closed."""
        for index in range(latents.shape[2]):
            self._raise_if_stopping()
            with self._timed("decode"):
                (frames,) = self._decoder.frames(latents[:, :, index : index + 1])
            yield frames

    def _raise_if_stopping(self) -> None:
        if self._stopping:
            raise RenderError("the publisher is closed")

    def _disown(self, segment: Segment) -> None:
        """Stop listing the older attempt's segments before the first one that differs is replaced."""
        if segment.index >= self._inherited[0]:
            return
        objects = {names.segment(segment.index): segment.media}
        if segment.index == 0:
            objects[names.INIT_SEGMENT] = segment.init
        if all(self._holds(key, body) for key, body in objects.items()):
            return
        log.info("segment %d differs from the older attempt's: all of them are replaced", segment.index)
        self._inherited = (0, False)
        self._output.remove(names.MANIFEST)
        self._list_segments()

    def _holds(self, key: str, body: bytes) -> bool:
        found = self._output.read(key)
        return found is not None and found.body == body

    # In either

    def _list_segments(self, *, ended: bool = False) -> None:
        """Bring the playlist up to date."""
        count, ended = max((len(self._entries), ended), self._inherited)
        plan = self._plan
        text = segments.playlist(
            [plan.wanted_frames(block) for block in range(count)],
            self._videojob.spec.video.fps,
            longest=max(plan.wanted_frames(block) for block in range(min(2, plan.blocks))),
            ended=ended,
            note=f"attempt={self._output.attempt} writer={self._output.writer}",
        )
        if text != self._playlist:
            self._output.write(names.PLAYLIST, text.encode())
            self._playlist = text

    def _timed(self, what: str) -> _Timer:
        return _Timer(self._seconds, what)

    def _manifest(self, video: Path, digest: str) -> dict[str, Any]:
        spec, about = self._videojob.spec, self._videojob.metadata
        now = self._clock()
        return {
            "videoJob": {"namespace": about.namespace, "name": about.name, "uid": about.uid},
            "attempt": self._output.attempt,
            "specDigest": spec.digest(),
            "video": {
                "object": names.VIDEO,
                "width": spec.video.width,
                "height": spec.video.height,
                "fps": spec.video.fps,
                "frames": self._plan.frames,
                "durationSeconds": self._plan.frames / spec.video.fps,
                "sizeBytes": video.stat().st_size,
                "sha256": digest,
            },
            "codec": {"encoder": self._codec.encoder, **asdict(self._codec)},
            "playlist": names.PLAYLIST,
            "init": {
                "object": names.INIT_SEGMENT,
                "sizeBytes": len(self._init),
                "sha256": segments.sha256(self._init),
            },
            "segments": self._entries,
            "totals": {
                "segments": len(self._entries),
                "segmentBytes": sum(entry["sizeBytes"] for entry in self._entries),
            },
            "timings": {
                "begin": _rfc3339(self._began),
                "end": _rfc3339(now),
                "seconds": round(now - self._began, 3),
                **{f"{what}Seconds": round(seconds, 3) for what, seconds in self._seconds.items()},
            },
            "versions": {package: metadata.version(package) for package in PACKAGES},
        }


class _Timer:
    """Adds the seconds of a ``with`` block to an account."""

    def __init__(self, account: dict[str, float], what: str) -> None:
        self._account = account
        self._what = what

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._account[self._what] += time.perf_counter() - self._begin


def _entry(segment: Segment) -> dict[str, Any]:
    """A segment's line in the manifest."""
    return {
        "object": names.segment(segment.index),
        "firstFrame": segment.first_frame,
        "frames": segment.frames,
        "durationSeconds": segment.duration_s,
        "sizeBytes": len(segment.media),
        "sha256": segments.sha256(segment.media),
    }


def _as_foreseen(error: BaseException, block: int) -> BaseException:
    """The error that the render loop gets: one with a reason of its own stays as it is."""
    if isinstance(error, RenderError | torch.OutOfMemoryError):
        return error
    wrapped = RenderError(f"block {block} cannot be published: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _say_how_far(done: int, total: int) -> None:
    log.info("%s: %d of %d MB are in storage", names.VIDEO, done // 10**6, total // 10**6)


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
