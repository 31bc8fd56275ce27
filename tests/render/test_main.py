"""A rank's life: what is found out before the model is loaded, and that every end leaves its reason in time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from videojob_api import names, validation
from videojob_api.progress import LastWords, Outcome, Reason
from videojob_worker import __main__ as worker
from videojob_worker import settings
from videojob_worker.errors import (
    BucketNotFoundError,
    InvalidSpecError,
    ModelInvalidError,
    ModelNotFoundError,
    OutputConflictError,
    PeerLostError,
)
from videojob_worker.local import free_port
from videojob_worker.place import Place
from videojob_worker.store import CLAIM, FolderStore, Output


@dataclass
class Job:
    """A render on the CPU and the environment of its ranks."""

    folder: Path
    model: Path
    frames: int = 21
    s3: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def document(self) -> dict:
        return {
            "apiVersion": "videojob.dev/v1alpha1",
            "kind": "VideoJob",
            "metadata": {"name": "fox"},
            "spec": {
                "prompt": "a fox",
                "video": {"frames": self.frames, "width": 64, "height": 48},
                "sampling": {"steps": 2, **self.sampling},
                "dualParallel": {"blockLatents": 2, "contextLatents": 1},
                "gpusPerNode": 0,
                "ranksPerNode": 2,
                "model": {"source": {"localPath": str(self.model)}},
                "output": {"s3": {"bucket": "videos", **self.s3}},
            },
        }

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def variables(self) -> dict[str, str]:
        path = self.folder / "videojob.json"
        path.write_text(json.dumps(self.document))
        return {
            names.ENV_SPEC: str(path),
            names.ENV_DEVICE: "cpu",
            names.ENV_PORT: "0",
            names.ENV_SCRATCH: str(self.folder / "scratch"),
            names.ENV_LAST_WORDS: str(self.folder / "words"),
            **({} if self.s3 else {settings.ENV_OUTPUT_DIR: str(self.output)}),
            **self.environment,
        }

    def render(self) -> str:
        """In this process."""
        config = settings.read(self.variables())
        return worker.render(config, worker.Ending(config))

    def start(self, *command: str) -> subprocess.Popen[str]:
        """As a process of its own, alone or under torchrun."""
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **self.variables()}
        arguments = [sys.executable, "-m", *(command or ("videojob_worker",))]
        return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)

    @property
    def words(self) -> LastWords:
        return LastWords.model_validate_json((self.folder / "words").read_text())


@pytest.fixture
def job(tiny_model, tmp_path) -> Job:
    return Job(tmp_path, tiny_model)


def take(job: Job, attempt: int) -> Output:
    return Output.take(FolderStore(job.output), validation.read(job.document), attempt)


def until(line: str, child: subprocess.Popen[str]) -> str:
    """What the process said until it said this."""
    said = ""
    while line not in said:
        heard = child.stderr.readline()
        assert heard, f"ended without {line!r}:\n{said}"
        said += heard
    return said


# --- Before the model is loaded


def test_a_prefix_of_another_job_is_found_out_before_the_model_is_loaded(job):
    take(job, 1)
    job.model, job.frames = job.folder / "absent", 22
    with pytest.raises(OutputConflictError, match="another spec"):
        job.render()


def test_a_missing_bucket_is_found_out_before_the_model_is_loaded(job, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    job.model, job.s3 = job.folder / "absent", {"endpoint": s3_server.endpoint}
    with pytest.raises(BucketNotFoundError, match="bucket videos"):
        job.render()


def test_a_job_that_failed_to_load_its_model_may_be_corrected(job):
    job.model = job.folder / "absent"
    with pytest.raises(ModelNotFoundError):
        job.render()
    assert not (job.output / CLAIM).exists()


def without_weights(job: Job, tiny: Path) -> Path:
    """The model, from which nothing can be loaded."""
    copy = shutil.copytree(tiny, job.folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    job.model = copy
    return copy


def test_guidance_of_an_expert_that_the_model_lacks_is_refused_before_it_is_loaded(job, tiny_model):
    without_weights(job, tiny_model)
    job.sampling = {"guidanceScale2": 3}
    with pytest.raises(InvalidSpecError, match=r"spec\.sampling\.guidanceScale2"):
        job.render()


def test_a_size_that_the_model_cannot_take_is_refused_before_it_is_loaded(job, tiny_models):
    without_weights(job, tiny_models("wan2.2-ti2v-5b"))
    with pytest.raises(InvalidSpecError, match=r"spec\.video\.height must be a multiple of 32 with this model, not 48"):
        job.render()


def test_a_model_that_starts_from_an_image_is_refused_before_it_is_loaded(job, tiny_model):
    config = without_weights(job, tiny_model) / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 36}))
    with pytest.raises(ModelInvalidError, match=r"36 channels in, 16 out.*text-to-video models"):
        job.render()


def test_a_document_that_cannot_be_read_is_named(job):
    job.environment = {names.ENV_SPEC: str(job.folder / "nowhere.json")}
    with pytest.raises(InvalidSpecError, match=r"nowhere.json cannot be read"):
        job.render()


# --- Last words


def test_the_first_reason_is_the_last_word(job):
    ending = worker.Ending(settings.read(job.variables()))
    ending.tell(Outcome.FAILED, Reason.MODEL_NOT_FOUND, "first")
    ending.tell(Outcome.FAILED, Reason.CRASHED, "second")
    assert (job.words.reason, job.words.message, job.words.retryable) == ("ModelNotFound", "first", False)


@pytest.mark.parametrize(
    ("error", "reason", "said"),
    [
        (torch.OutOfMemoryError("2 GiB"), "OutOfMemory", "rank 3 while loading: out of GPU memory: use more GPUs"),
        (MemoryError("2 GiB"), "OutOfMemory", "rank 3 while loading: out of memory: raise spec.resources.memory"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
            "OutOfMemory",
            "raise spec.resources.memory",
        ),
        (PeerLostError("lost rank 2"), "PeerLost", "rank 3 while loading: lost rank 2"),
        (KeyError("odd"), "Crashed", "rank 3 while loading: KeyError: 'odd'"),
        (ModelNotFoundError("no model there"), "ModelNotFound", "no model there"),
    ],
)
def test_an_error_becomes_a_reason_with_a_remedy(error, reason, said):
    given, message = worker.cause(error, Place(3))
    assert given == reason
    assert said in message


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(120)
        yield listening


def port(server: socket.socket) -> int:
    return server.getsockname()[1]


def torchruns(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_a_rank_that_waits_for_storage_ends_at_once_when_asked_to(job, silent):
    job.s3 = {"endpoint": f"http://127.0.0.1:{port(silent)}"}
    job.environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    with job.start() as child:
        connection, _ = silent.accept()
        with connection:
            connection.recv(1)
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=worker.GRACE_S - 3)
    assert child.returncode == 1
    assert (job.words.reason, job.words.retryable) == (Reason.TERMINATED, True)


def test_a_rank_that_waits_in_cpp_for_another_ends_in_time_when_asked_to(job, silent):
    job.environment = torchruns(rank=1, size=2, port=port(silent))
    with job.start() as child:
        pulse, _ = silent.accept()
        main, _ = silent.accept()
        with pulse, main:
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=worker.GRACE_S + 10)
    assert child.returncode == 1
    assert (job.words.reason, job.words.message) == (Reason.TERMINATED, "rank 1 was asked to stop (SIGTERM)")


@pytest.fixture
def alone(job) -> Job:
    """A long job, to be rendered by one rank."""
    job.frames = 3000
    job.environment = torchruns(rank=0, size=1, port=free_port())
    return job


def test_a_rank_that_is_asked_to_stop_tidies_up(alone):
    with alone.start() as child:
        until("block 3 of", child)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=worker.GRACE_S - 3)
    assert child.returncode == 1
    assert alone.words.reason is Reason.TERMINATED
    assert list((alone.folder / "scratch").iterdir()) == []


def test_a_rank_that_is_asked_to_stop_saves_its_last_whole_sweep_and_the_next_attempt_goes_on_there(alone):
    with alone.start() as child:
        said = until("block 3 of", child)
        child.send_signal(signal.SIGTERM)
        said += child.communicate(timeout=worker.GRACE_S - 3)[1]
    saved = int(re.findall(r"checkpoint of sweep (\d+) is in storage", said)[-1])
    assert saved >= int(re.findall(r"sweep (\d+) of \d+ is done", said)[-1])
    alone.environment |= {names.ENV_ATTEMPT: "2"}
    with alone.start() as child:
        until(f"goes on at sweep {saved}, where attempt 1 was", child)
        child.kill()
        child.communicate()


def test_the_last_act_comes_after_the_last_words_and_before_the_end_wherever_the_main_thread_is(job):
    script = f"""
import threading
from videojob_worker import __main__ as worker, settings
ending = worker.Ending(settings.read({job.variables()!r}))
ending.last_act = lambda: print("acts", ending._told, flush=True)
worker.GRACE_S = 0.1
ending.heed_sigterm()
worker.signal.signal(worker.signal.SIGTERM, lambda *_: None)  # as if the main thread never came back to Python
print("waits", flush=True)
threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "waits\n"
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=60)
    assert (out, child.returncode) == ("acts True\n", 1)
    assert job.words.reason is Reason.TERMINATED


def test_a_render_says_nothing_that_alarms(alone):
    alone.frames = 21
    with alone.start() as child:
        _, said = child.communicate()
    assert child.returncode == 0, said
    assert (alone.words.outcome, alone.words.reason) == (Outcome.SUCCEEDED, Reason.COMPLETED)
    assert "eprecat" not in said
    assert "arning" not in said


def test_a_failure_to_publish_is_the_reason_and_ends_all_ranks(job):
    job.frames = 3000
    launch = ("videojob_worker.launch", "--nproc-per-node=2", "--max-restarts=0")
    with job.start(
        *launch, "--master-addr=127.0.0.1", f"--master-port={free_port()}", "-m", "videojob_worker"
    ) as child:
        until("block 2 of", child)
        take(job, 2).write(names.PLAYLIST, b"#EXTM3U")
        child.communicate(timeout=120)
    assert child.returncode == 1
    assert job.words.reason is Reason.OUTPUT_CONFLICT
    assert "attempt 1 has lost" in job.words.message
