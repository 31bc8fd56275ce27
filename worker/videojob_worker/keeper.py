"""Keeps a render resumable: brings its state to storage in the background, and finds it again.

``__main__`` hands over every block that is clean and the state after every sweep, which costs the ring nothing: only
references change hands. A thread writes them through a claimed ``store.Output``. Knows nothing of frames or segments.

**What is written.** A clean block's latents once, at once (``checkpoint/latents/NNNNN.safetensors``). The state after
the newest sweep whenever ``every_s`` have passed, and when the worker ends before the video does: two generations
(``checkpoint/0.safetensors``, ``1``) are overwritten in turn, so that one is whole whatever happens to the other. A
generation names the latents that it relies on by their digests, and they are written before it. The video's segments
need not be there: ``publisher`` makes those that are missing from the latents.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from videojob_api import names

from . import checkpoint
from .blocks import Snapshot, mapped
from .checkpoint import Checkpoint, Identity, InvalidCheckpointError
from .errors import StorageError
from .store import Output, sha256_of

log = logging.getLogger(__name__)


class Keeper:
    """Keeps one attempt's state; a context manager. Left by an error or SIGTERM, it first writes the newest state.

    Args:
        output: the prefix that this attempt has claimed.
        identity: what this render's checkpoints are made of.
        scratch: a folder with room for one checkpoint.
        every_s: seconds between checkpoints; 0 for none but the last.
        device: where latents come from.
        hurry_s: how long to wait for the last one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        output: Output,
        identity: Identity,
        scratch: Path,
        every_s: float,
        device: torch.device,
        hurry_s: float = 80.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._output = output
        self._identity = identity
        self._scratch = scratch
        self._every_s = every_s
        self._hurry_s = hurry_s
        self._clock = clock
        self._copier = _Copier(device)
        self._thread = threading.Thread(target=self._work, name="keeper")  # no daemon: an exit waits for its last write
        self._generation = 0  # to be written next
        self._digests: list[str] = []  # of the latents in storage, by block
        # Shared with the thread, under the lock:
        self._changed = threading.Condition()
        self._clean: list[tuple[int, Tensor, Any]] = []  # not yet in storage
        self._newest: tuple[Snapshot, Any] | None = None  # of the last sweep, unless due
        self._due: tuple[Snapshot, Any] | None = None  # to be written
        self._busy = self._closing = False
        self._failure: BaseException | None = None

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that can be gone on from, None to begin at the beginning. To be called before entering.

        Raises:
            StorageError: storage cannot be used.
        """
        if not self._output.inherited:
            return None
        found = [(generation, self._read_generation(generation)) for generation in range(len(names.CHECKPOINTS))]
        valid = [(generation, one) for generation, one in found if one is not None]
        for generation, one in sorted(valid, key=lambda pair: pair[1].snapshot.sweep, reverse=True):
            lost = self._lost(one)
            if lost is None:
                self._generation = 1 - generation
                self._digests = list(one.clean)
                log.info("goes on at sweep %d, where attempt %d was", one.snapshot.sweep, one.attempt)
                return one
            log.warning("%s is not used: %s is damaged or missing", names.CHECKPOINTS[generation], lost)
        log.info("there is no checkpoint to go on from")
        return None

    def __enter__(self) -> Self:
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="keeper-", dir=self._scratch, ignore_cleanup_errors=True)
        self._began = self._clock()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            if not isinstance(error, StorageError):  # it would only wait for the same
                self._due = self._newest or self._due
            self._newest, self._closing = None, True
            self._changed.notify_all()
        self._thread.join(self._hurry_s)
        if self._thread.is_alive():
            log.warning("the last checkpoint is not in storage after %.0f s; going without it", self._hurry_s)
            self._output.abort()
        self._folder.cleanup()

    def keep(self, block: int, latents: Tensor) -> None:
        """Hand over a clean block's wanted latents, in order of the blocks."""
        with self._changed:
            self._clean.append((block, latents, self._copier.mark()))
            self._changed.notify_all()

    def offer(self, snapshot: Snapshot) -> None:
        """Hand over the state after a sweep, once all blocks that it made clean were kept."""
        now = self._clock()
        with self._changed:
            self._newest = (snapshot, self._copier.mark())
            if self._every_s and now - self._began >= self._every_s:
                self._began, self._due, self._newest = now, self._newest, None
                self._changed.notify_all()

    def check(self) -> None:
        """See whether all is well, without waiting.

        Raises:
            RenderError: something could not be written.
        """
        if self._failure is not None:
            raise self._failure

    def hurry(self) -> None:
        """Write the newest state now, and wait until it is in storage, or for ``hurry_s``. Call it from any thread."""
        with self._changed:
            self._due = self._newest or self._due
            self._newest = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle or self._failure is not None, self._hurry_s)

    def read(self, block: int) -> Tensor:
        """A clean block's latents from storage, where ``finish`` or ``newest`` has said that they are there.

        Raises:
            StorageError: they are not, or no longer, as they were written.
        """
        key = names.clean_latents(block)
        found = self._output.read(key)
        try:
            if found is None:
                raise InvalidCheckpointError("it is gone")
            return checkpoint.load_latents(found.body, self._digests[block])
        except InvalidCheckpointError as error:
            raise StorageError(
                f"{self._output.url(key)} cannot be used: {error}; remove checkpoint/ there to begin at the beginning"
            ) from error

    def finish(self) -> None:
        """After the last sweep: wait until all latents are in storage; no checkpoint is needed any more.

        Raises:
            RenderError: something could not be written.
        """
        with self._changed:
            self._due = None
            self._changed.wait_for(lambda: self._idle or self._failure is not None)
        self.check()

    def remove(self) -> None:
        """After the manifest: remove everything from storage.

        Raises:
            RenderError: something could not be removed.
        """
        with self._changed:
            self._newest = None
        for key in (*names.CHECKPOINTS, *map(names.clean_latents, range(len(self._digests)))):
            self._output.remove(key)

    # Finding

    def _read_generation(self, generation: int) -> Checkpoint | None:
        key = names.CHECKPOINTS[generation]
        found = self._output.read(key)
        if found is None:
            return None
        try:
            return checkpoint.load(found.body, self._identity)
        except InvalidCheckpointError as error:
            log.warning("%s is not used: %s", key, error)
            return None

    def _lost(self, one: Checkpoint) -> str | None:
        """The first object that the checkpoint relies on and that is not there."""
        keys = [names.clean_latents(block) for block in range(len(one.clean))]
        return next((key for key, at in zip(keys, one.clean, strict=True) if self._output.digest(key) != at), None)

    # In the thread

    @property
    def _idle(self) -> bool:
        return not (self._busy or self._clean or self._due)

    def _work(self) -> None:
        try:
            while self._write_next():
                pass
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            log.warning("no more checkpoints: %s: %s", type(error).__name__, error)
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _write_next(self) -> bool:
        """Wait for something to write, and write it; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._clean or self._due or self._closing)
            if self._idle:
                return False
            clean, self._clean = self._clean, []
            due, self._due = self._due, None
            self._busy = True
        for block, latents, mark in clean:
            self._write_latents(block, latents, mark)
        if due is not None:
            self._write_snapshot(*due)
        with self._changed:
            self._busy = False
            self._changed.notify_all()
        return True

    def _write_latents(self, block: int, latents: Tensor, mark: Any) -> None:
        with self._copier.after(mark):
            body = checkpoint.save_latents(self._copier.copy(latents))
        self._output.write(names.clean_latents(block), body)
        del self._digests[block:]
        self._digests.append(hashlib.sha256(body).hexdigest())

    def _write_snapshot(self, snapshot: Snapshot, mark: Any) -> None:
        begin = time.perf_counter()
        with self._copier.after(mark):
            snapshot = mapped(self._copier.copy, snapshot)
        file = Path(self._folder.name, "checkpoint")
        one = Checkpoint(snapshot, self._output.attempt, tuple(self._digests))
        checkpoint.save(one, self._identity, file)
        self._output.upload(names.CHECKPOINTS[self._generation], file, sha256_of(file))
        self._generation = 1 - self._generation
        megabytes, seconds = file.stat().st_size / 1e6, time.perf_counter() - begin
        log.info("the checkpoint of sweep %d is in storage: %.1f MB, %.2f s", snapshot.sweep, megabytes, seconds)


class _Copier:
    """Copies tensors to the CPU beside the ring: on a GPU, on a stream of its own, after what was queued at a mark."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        """Now, on the ring's stream."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        """Copies within wait for the mark; no other stream does."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            yield

    @staticmethod
    def copy(tensor: Tensor) -> Tensor:
        """On the CPU, complete on return."""
        return tensor.detach().to("cpu", copy=True).contiguous()


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
