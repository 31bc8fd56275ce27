"""Decodes, encodes and stores finished blocks in the background while the next ones are rendered.

The render loop submits clean latents; ``decoder``, ``segments`` and ``store`` do the work in one thread, in order:
segment, then playlist, and at the end the whole video, the closed playlist and the manifest. So a reader never sees a
playlist that names a missing segment. Knows nothing of ranks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import videojob_api.plan
from videojob_api import names
from videojob_api.spec import VideoJob

from . import segments
from .errors import OutputConflictError
from .segments import Entry, Segment
from .store import Changed, Store, put_once

OWNER = ".videojob.json"  # whose output this prefix is
PENDING = 2  # blocks that may wait to be decoded before rendering does


class Decoder(Protocol):
    """See ``decoder.StreamingDecoder``."""

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """The next latents as uint8 frames."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Publisher:
    """A context manager: entering claims the prefix and starts the thread, leaving ends it.

    Args:
        videojob: what is rendered.
        attempt: its number; a newer attempt takes over what an older one of the same render wrote.
        decoder: a stream that begins with the video.
        store: where everything goes.
        scratch: for the growing video.
        on_segment: called in the thread when a segment can be played.
    """

    def __init__(
        self,
        videojob: VideoJob,
        *,
        attempt: int,
        decoder: Decoder,
        store: Store,
        scratch: Path,
        on_segment: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        self._videojob = videojob
        self._plan = videojob_api.plan.plan(videojob.spec)
        self._attempt = attempt
        self._decoder = decoder
        self._store = store
        self._growing = scratch / "growing.mp4"
        self._on_segment = on_segment
        self._entries: list[Entry] = []
        self._init = b""
        self._playlist_version: str | None = None
        self._waiting: queue.Queue[tuple[int, Tensor] | None] = queue.Queue(maxsize=PENDING)
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self._began = time.time()

    def __enter__(self) -> Self:
        """Claim the prefix.

        Raises:
            OutputConflictError: another render's output is there, or a newer attempt has it.
        """
        self._growing.parent.mkdir(parents=True, exist_ok=True)
        self._growing.write_bytes(b"")
        self._claim()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._offer(None)
        self._thread.join()
        self._decoder.close()
        self._growing.unlink(missing_ok=True)

    def submit(self, block: int, latents: Tensor) -> None:
        """Hand over a block's wanted latents, (1, C, n, h, w), in order; waits while too many are pending.

        Raises:
            RenderError: publishing an earlier block failed.
        """
        if not self._offer((block, latents)):
            self._raise()

    def finish(self) -> None:
        """Wait for all blocks, then write the whole video, end the playlist and write the manifest.

        Raises:
            RenderError: publishing failed.
        """
        self._offer(None)
        self._thread.join()
        self._raise()
        video = self._growing.with_name(names.VIDEO)
        frames = segments.remux(self._growing, video)
        if frames != self._plan.frames:
            raise segments.EncodingError(f"the video has {frames} frames where {self._plan.frames} were asked for")
        self._store.upload(names.VIDEO, video)
        self._write_playlist(ended=True)
        self._write(names.MANIFEST, json.dumps(self._manifest(video), indent=2).encode())
        video.unlink()

    def _offer(self, item: tuple[int, Tensor] | None) -> bool:
        """Put into the queue unless the thread has ended."""
        while self._thread.is_alive():
            try:
                self._waiting.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while (item := self._waiting.get()) is not None and not self._stopping.is_set():
                self._publish(*item)
        except BaseException as error:  # noqa: BLE001 - raised again in the render loop
            self._failure = error

    def _publish(self, block: int, latents: Tensor) -> None:
        segment = segments.encode(
            self._frames(block, latents),
            index=block,
            first_frame=self._plan.first_frame(block),
            fps=self._videojob.spec.video.fps,
        )
        self._write_segment(segment)
        entry = Entry(block, segment.frames, segment.duration, len(segment.media), segment.sha256)
        self._entries.append(entry)
        self._write_playlist(ended=False)
        self._on_segment(entry)

    def _frames(self, block: int, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
        """Exactly the frames that belong into the video."""
        left = self._plan.wanted_frames(block)
        for frames in self._decoder.decode(latents):
            yield frames[:left].numpy()
            left -= min(left, frames.shape[0])

    def _write_segment(self, segment: Segment) -> None:
        if not self._init:
            self._init = segment.init
            put_once(self._store, names.INIT_SEGMENT, segment.init)
        elif segment.init != self._init:
            raise segments.EncodingError(f"the encoder's parameters changed at segment {segment.index}")
        put_once(self._store, names.segment(segment.index), segment.media)
        with self._growing.open("ab") as growing:
            growing.write((segment.init if segment.index == 0 else b"") + segment.media)

    def _write_playlist(self, *, ended: bool) -> None:
        longest = max(self._plan.wanted_frames(block) for block in range(min(2, self._plan.blocks)))
        fps = self._videojob.spec.video.fps
        text = segments.playlist(self._entries, longest=longest / fps, attempt=self._attempt, ended=ended)
        try:
            self._playlist_version = self._store.put(names.PLAYLIST, text.encode(), self._playlist_version)
        except Changed as error:
            raise OutputConflictError(
                f"{self._store.url(names.PLAYLIST)} was changed by another writer: a newer attempt has taken over"
            ) from error

    def _write(self, name: str, body: bytes) -> None:
        found = self._store.get(name)
        self._store.put(name, body, None if found is None else found[1])

    def _claim(self) -> None:
        """Say whose output this is, and take over what an older attempt of the same render wrote."""
        ours = {
            "uid": self._videojob.metadata.uid or self._videojob.metadata.name,
            "specDigest": self._videojob.spec.digest(),
            "attempt": self._attempt,
        }
        found = self._store.get(OWNER)
        if found is not None:
            self._compare(json.loads(found[0]), ours)
        try:
            self._store.put(OWNER, json.dumps(ours).encode(), None if found is None else found[1])
        except Changed as error:
            raise OutputConflictError(f"{self._store.url('')}: another writer claimed the prefix just now") from error
        playlist = self._store.get(names.PLAYLIST)
        self._playlist_version = None if playlist is None else playlist[1]

    def _compare(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        place = self._store.url("")
        if (theirs.get("uid"), theirs.get("specDigest")) != (ours["uid"], ours["specDigest"]):
            raise OutputConflictError(
                f"{place} holds the output of another render: choose another spec.output.s3.prefix, or empty this one"
            )
        if int(theirs.get("attempt", 0)) > self._attempt:
            raise OutputConflictError(f"{place} was taken over by attempt {theirs['attempt']}")

    def _manifest(self, video: Path) -> dict[str, Any]:
        spec = self._videojob.spec
        with video.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "name": self._videojob.metadata.name,
            "specDigest": spec.digest(),
            "attempt": self._attempt,
            "video": {
                "name": names.VIDEO,
                "frames": self._plan.frames,
                "fps": spec.video.fps,
                "width": spec.video.width,
                "height": spec.video.height,
                "codec": segments.CODEC,
                "sizeBytes": video.stat().st_size,
                "sha256": digest,
            },
            "playlist": names.PLAYLIST,
            "init": {"name": names.INIT_SEGMENT, "sha256": hashlib.sha256(self._init).hexdigest()},
            "segments": [
                {
                    "name": entry.uri,
                    "frames": entry.frames,
                    "durationSeconds": entry.duration,
                    "sizeBytes": entry.size_bytes,
                    "sha256": entry.sha256,
                }
                for entry in self._entries
            ],
            "seconds": round(time.time() - self._began, 3),
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("videojob-operator", "torch", "diffusers", "transformers", "av")
            },
        }
