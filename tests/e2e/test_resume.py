"""`videojob render`, stopped or killed at any moment and run again, makes what an undisturbed run makes, bit for bit.

`VIDEOJOB_TEST_KILLS=50` kills that many times instead of 6; `docs/reliability.md` has the figures.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

KILLS = int(os.environ.get("VIDEOJOB_TEST_KILLS", "6"))
VIDEOJOB = Path(sys.executable).with_name("videojob")
EVERY_S = 2
SWEEP = re.compile(r"^(\S+ \S+) rank 0 INFO sweep (\d+) of \d+ is done", re.MULTILINE)
FROM_THE_BEGINNING = "there is no checkpoint to go on from"
RESUMED = re.compile(r"goes on at sweep (\d+)")


@dataclass
class Job:
    """A long, small render."""

    folder: Path
    model: Path
    frames: int
    bucket: str = "videos"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def log(self) -> str:
        path = self.folder / "work" / "long" / "render.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, ranks: int, *options: str) -> subprocess.Popen[str]:
        document = {
            "apiVersion": "videojob.dev/v1alpha1",
            "kind": "VideoJob",
            "metadata": {"name": "long"},
            "spec": {
                "prompt": "a fox",
                "video": {"frames": self.frames, "width": 64, "height": 48},
                "sampling": {"steps": 5, "seed": 3},
                "dualParallel": {"blockLatents": 4, "contextLatents": 3},
                "checkpoint": {"everySeconds": EVERY_S},
                "model": {"source": {"localPath": str(self.model)}},
                "output": {"s3": {"bucket": self.bucket, "prefix": "long"}},
            },
        }
        (self.folder / "work" / "long" / "render.log").unlink(missing_ok=True)
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(document))
        command = [VIDEOJOB, "render", path, "--work-dir", "work", "--cpu-ranks", ranks, *options]
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def render(self, ranks: int, *options: str) -> None:
        with self.start(ranks, *options) as child:
            _, err = child.communicate()
        assert child.returncode == 0, err + self.log


FOLDER = ("--output-dir", "out", "--dump-latents", "latents.safetensors")


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Job:
    """An undisturbed render."""
    job = Job(tmp_path_factory.mktemp("whole"), tiny_model, frames=1200)
    job.render(2, *FOLDER)
    return job


@pytest.fixture
def job(tiny_model, tmp_path) -> Job:
    return Job(tmp_path, tiny_model, frames=1200)


def same(job: Job, out: Path, whole: Job) -> int:
    """Compare what two renders made; the number of segments."""
    assert (job.folder / "latents.safetensors").read_bytes() == (whole.folder / "latents.safetensors").read_bytes()
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == sorted(str(path.relative_to(whole.out)) for path in whole.out.rglob("*") if path.is_file())
    for name in files:
        if name.endswith((".mp4", ".m4s")):
            assert (out / name).read_bytes() == (whole.out / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (out, whole.out)]
    for part in ("segments", "video", "init", "totals", "specDigest"):
        assert manifests[0][part] == manifests[1][part]
    segments = manifests[0]["segments"]
    assert listed(out) == [entry["object"] for entry in segments]
    assert not (out / "checkpoint").exists()
    return len(segments)


def listed(out: Path) -> list[str]:
    path = out / "index.m3u8"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line and not line.startswith("#")]


def worker_pids(child: subprocess.Popen[str]) -> list[int]:
    """The ranks that live: grandchildren that torchrun started."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in table.splitlines()[1:]]
    torchrun = {pid for pid, parent, *_ in rows if parent == str(child.pid)}
    return [
        int(pid)
        for pid, parent, state, command in rows
        if parent in torchrun and "videojob_worker" in command and not state.startswith("Z")
    ]


def torchrun_pids(child: subprocess.Popen[str]) -> list[int]:
    table = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()[1:]]
    return [int(pid) for pid, parent in rows if parent == str(child.pid)]


def until(job: Job, text: str, child: subprocess.Popen[str], patience_s: float = 180.0) -> None:
    deadline = time.monotonic() + patience_s
    while text not in job.log:
        assert child.poll() is None, "the render ended too early: " + job.log
        assert time.monotonic() < deadline, f"waited in vain for {text!r}: " + job.log
        time.sleep(0.02)


def test_an_interrupted_render_saves_its_last_whole_sweep_and_goes_on_with_another_number_of_ranks(job, whole):
    with job.start(2, *FOLDER) as child:
        until(job, "block 30 of", child)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=120)
    assert child.returncode != 0
    done = int(SWEEP.findall(job.log)[-1][1])
    before = listed(job.out)
    with job.start(3, *FOLDER) as child:
        until(job, "goes on at sweep", child)
        assert int(RESUMED.search(job.log)[1]) >= done, "no whole sweep is lost"
        child.communicate()
    assert child.returncode == 0, job.log
    assert len(before) > 0
    assert same(job, job.out, whole) == 75


def test_a_render_to_s3_goes_on_too(job, whole, s3_server):
    job.bucket = s3_server.bucket()
    job.environment = {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key}
    options = ("--s3-endpoint", s3_server.endpoint, "--dump-latents", "latents.safetensors")
    with job.start(2, *options) as child:
        until(job, "block 20 of", child)
        os.kill(worker_pids(child)[0], signal.SIGKILL)
        child.communicate(timeout=120)
    with job.start(2, *options) as child:
        until(job, "goes on at sweep", child)
        child.communicate()
    assert child.returncode == 0, job.log
    assert same(job, s3_server.root / job.bucket / "long", whole) == 75


def test_a_checkpoint_that_was_damaged_costs_the_work_since_the_older_one(job, whole):
    with job.start(2, *FOLDER) as child:
        until(job, "block 40 of", child)
        kill_all(child)
        child.communicate(timeout=120)
    for path in (job.out / "checkpoint").glob("[01].safetensors"):
        if path.stat().st_mtime_ns == max(one.stat().st_mtime_ns for one in path.parent.glob("[01].safetensors")):
            path.write_bytes(path.read_bytes()[:-7])
    job.render(1, *FOLDER)
    assert "is not used: it is damaged" in job.log
    assert "goes on at sweep" in job.log
    same(job, job.out, whole)


def kill_all(child: subprocess.Popen[str]) -> None:
    """As a node that loses its power."""
    child.send_signal(signal.SIGSTOP)
    for pid in (*torchrun_pids(child), *worker_pids(child)):
        os.kill(pid, signal.SIGKILL)
    child.kill()


# --- Killed again and again


@dataclass
class Watcher:
    """Looks at the playlist as a viewer would, all the time."""

    out: Path
    looks: int = 0
    wrong: list[str] = field(default_factory=list)

    def __enter__(self) -> Watcher:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        longest: list[str] = []
        while not self._stop.wait(0.02):
            now = listed(self.out)
            self.looks += 1
            if now[: len(longest)] != longest:
                self.wrong.append(f"the list went from {len(longest)} to {len(now)} segments")
            missing = [name for name in now if not (self.out / name).exists()]
            if missing or (now and not (self.out / "init.mp4").exists()):
                self.wrong.append(f"the list names {missing or 'init.mp4'}, not there")
            longest = now


@dataclass
class Losses:
    """The seconds of work that each kill has cost, told from the logs of the runs."""

    seconds: list[float] = field(default_factory=list)
    longest_sweep_s: float = 0.0
    resumed_at: list[int] = field(default_factory=list)  # the sweep at which each run went on
    _done: dict[int, float] = field(default_factory=dict)  # when each sweep was last completed
    _killed: tuple[float, float] | None = None  # when the run's first sweep was done, and when it was killed

    def read(self, log: str, killed_at: float | None) -> None:
        """Take account of a run, which shows where it went on after the kill before."""
        found = RESUMED.search(log)
        if found or FROM_THE_BEGINNING in log:
            self.resumed_at.append(int(found[1]) if found else 0)
        if self._killed is not None and (found or FROM_THE_BEGINNING in log):
            begun, at = self._killed
            kept = self._done.get(int(found[1]), begun) if found else begun
            self.seconds.append(max(0.0, at - max(kept, begun)))
            self._killed = None
        times = [self._note(at, int(number)) for at, number in SWEEP.findall(log)]
        self.longest_sweep_s = max([self.longest_sweep_s, *(later - earlier for earlier, later in pairwise(times))])
        if killed_at is not None and times:
            self._killed = (times[0], killed_at)

    def _note(self, at: str, number: int) -> float:
        self._done[number] = datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        return self._done[number]


def test_killed_again_and_again_it_still_makes_the_same_video(tiny_model, tmp_path_factory):
    frames = 60 * KILLS + 900
    whole = Job(tmp_path_factory.mktemp("whole"), tiny_model, frames)
    whole.render(2, *FOLDER)
    job = Job(tmp_path_factory.mktemp("killed"), tiny_model, frames)
    chance, losses, tally = random.Random(KILLS), Losses(), Counter()
    with Watcher(job.out) as watcher:
        while tally["runs"] < 3 * KILLS + 3:
            tally["runs"] += 1
            with job.start(chance.choice([1, 2, 3]), *FOLDER) as child:
                killed_at = kill_sometime(job, child, chance, tally) if tally["kills"] < KILLS else None
                _, err = child.communicate(timeout=600)
            losses.read(job.log, killed_at)
            tally["resumes"] += "goes on at sweep" in job.log
            if child.returncode == 0:
                break
            assert killed_at is not None, err + job.log
    tally["segments equal"] = same(job, job.out, whole)
    mean = sum(losses.seconds) / max(1, len(losses.seconds))
    print(f"\n{dict(tally)}")
    print(f"the playlist was looked at {watcher.looks} times; wrong: {len(watcher.wrong)}")
    print(f"work lost at {len(losses.seconds)} kills: mean {mean:.2f} s, most {max(losses.seconds, default=0):.2f} s")
    print(f"a checkpoint every {EVERY_S} s; the longest sweep took {losses.longest_sweep_s:.2f} s")
    assert watcher.wrong == []
    assert losses.resumed_at == sorted(losses.resumed_at), "no run goes back behind an earlier one"
    assert tally["kills"] == KILLS
    assert max(losses.seconds, default=0) <= EVERY_S + losses.longest_sweep_s + 1.0, "a second for the write"


def kill_sometime(job: Job, child: subprocess.Popen[str], chance: random.Random, tally: Counter[str]) -> float | None:
    """Kill one rank or all, while they load or at some moment of the first seconds of work; when that was."""
    if chance.random() < 0.2:
        while not worker_pids(child):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 5))
    else:
        until(job, "is done", child)
        time.sleep(chance.uniform(0, 2 * EVERY_S))
    ranks = worker_pids(child)
    if not ranks or child.poll() is not None:
        return None
    at = time.time()
    tally["kills"] += 1
    tally["kills while loading"] += "is done" not in job.log
    if chance.random() < 0.3:
        tally["kills of all processes"] += 1
        kill_all(child)
    else:
        rank = chance.randrange(len(ranks))
        tally["kills of the first rank" if rank == 0 else "kills of another rank"] += 1
        os.kill(ranks[rank], signal.SIGKILL)
    return at
