"""What a worker says of itself: progress over HTTP while it lives, last words when it ends.

``__main__`` feeds a ``Reporter`` from the pipeline's and the publisher's callbacks; the operator and ``videojob
render`` poll ``/progress``. Knows neither.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError

from videojob_api.plan import Cut
from videojob_api.progress import LastWords, Outcome, Progress, Reason, SamplingUsed, Stage

# A rank that was merely dragged along must not hide the cause that another rank gave.
_WEIGHT = {Reason.TERMINATED: 0, Reason.PEER_LOST: 1}


class Reporter:
    """Counts what is done; safe to use from several threads.

    Args:
        cut: the totals, but for the steps.
        fps: frames per second.
        attempt: its number, from 1.
        clock: seconds since the epoch.
    """

    def __init__(self, cut: Cut, fps: int, attempt: int, clock: Callable[[], float]) -> None:
        self._cut = cut
        self._sampling: SamplingUsed | None = None
        self._fps = fps
        self._attempt = attempt
        self._clock = clock
        self._lock = threading.Lock()
        self._stage = Stage.LOADING
        self._turns = self._blocks = self._frames = self._segments = 0
        self._resumed_from: int | None = None
        self._turns_before = 0  # made by older attempts
        self._began: float | None = None
        self._changed = clock()

    def stage(self, stage: Stage) -> None:
        """The worker went on to another stage."""
        with self._change() as now:
            self._stage = stage
            if stage is Stage.RENDERING:
                self._began = now

    def sampling(self, used: SamplingUsed) -> None:
        """The model is known, and so how latents are denoised."""
        with self._change():
            self._sampling = used

    def resumed(self, turns: int, blocks: int) -> None:
        """An older attempt has made so many turns, and so many blocks clean."""
        with self._change():
            self._turns = self._turns_before = turns
            self._blocks = self._resumed_from = blocks

    def turn_done(self, *, block_done: bool) -> None:
        """A block made one step, its last one if ``block_done``."""
        with self._change():
            self._turns += 1
            self._blocks += block_done

    def segment_ready(self, frames: int) -> None:
        """A segment of this many frames is in storage and named by the playlist."""
        with self._change():
            self._segments += 1
            self._frames += frames

    def progress(self) -> Progress:
        """The record as it stands."""
        with self._lock:
            return Progress(
                stage=self._stage,
                attempt=self._attempt,
                turns_done=self._turns,
                turns_total=self._turns_total,
                blocks_done=self._blocks,
                blocks_total=self._cut.blocks,
                resumed_from_block=self._resumed_from,
                frames_ready=self._frames,
                frames_total=self._cut.frames,
                segments_ready=self._segments,
                fps=self._fps,
                eta_seconds=self._eta(),
                sampling=self._sampling,
                updated_at=datetime.fromtimestamp(self._changed, UTC).isoformat(timespec="milliseconds"),
            )

    @contextmanager
    def _change(self) -> Iterator[float]:
        with self._lock:
            self._changed = self._clock()
            yield self._changed

    @property
    def _turns_total(self) -> int | None:
        return None if self._sampling is None else self._sampling.steps * self._cut.blocks

    def _eta(self) -> float | None:
        total, done = self._turns_total, self._turns - self._turns_before
        if self._began is None or done == 0 or total is None:
            return None
        pace = (self._changed - self._began) / done
        return round(max(0.0, pace * (total - self._turns_before) - (self._clock() - self._began)), 1)


class _Metrics(Collector):
    """The progress record in Prometheus' words."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def collect(self) -> Iterator[Metric]:
        progress = self._reporter.progress()
        yield _counter("videojob_turns", "Block steps computed.", progress.turns_done)
        yield _counter("videojob_blocks", "Blocks whose latents are clean.", progress.blocks_done)
        yield _counter("videojob_frames", "Frames in storage.", progress.frames_ready)
        yield _counter("videojob_segments", "Segments in storage.", progress.segments_ready)
        yield GaugeMetricFamily("videojob_progress_ratio", "Share of the render that is done.", progress.percent / 100)
        if progress.eta_seconds is not None:
            yield GaugeMetricFamily("videojob_eta_seconds", "Time left at the pace so far.", progress.eta_seconds)


def _counter(name: str, documentation: str, value: int) -> Metric:
    return CounterMetricFamily(name, documentation, value)


@contextmanager
def serving(reporter: Reporter, port: int) -> Iterator[None]:
    """Serve ``/progress``, ``/healthz`` and ``/metrics`` on all addresses; port 0 serves nothing."""
    if port == 0:
        yield
        return
    registry = CollectorRegistry()
    registry.register(_Metrics(reporter))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/progress":
                self._answer("application/json", reporter.progress().model_dump_json(by_alias=True).encode())
            elif self.path == "/healthz":
                self._answer("text/plain", b"ok\n")
            elif self.path == "/metrics":
                self._answer("text/plain; version=0.0.4", generate_latest(registry))
            else:
                self.send_error(404, "try /progress, /healthz or /metrics")

        def _answer(self, content_type: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            """Polls are not worth a line each."""

    server = ThreadingHTTPServer(("", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def last_words(outcome: Outcome, reason: Reason, message: str, *, retryable: bool, attempt: int) -> LastWords:
    """The record, its message cut to what a termination message holds."""
    limit = 2000
    short = message if len(message.encode()) <= limit else message.encode()[: limit - 3].decode(errors="ignore") + "..."
    return LastWords(outcome=outcome, reason=reason, message=short, retryable=retryable, attempt=attempt)


def leave(words: LastWords, path: Path | None) -> None:
    """Write the last words, unless another rank of this node already gave a weightier reason."""
    if path is None:
        return
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if _weight(file.read()) < _WEIGHT.get(words.reason, 2):
            file.seek(0)
            file.truncate()
            file.write(words.model_dump_json(by_alias=True))


def _weight(written: str) -> int:
    try:
        return _WEIGHT.get(LastWords.model_validate_json(written).reason, 2)
    except ValidationError:
        return -1
