"""Runs a VideoJob on this machine: torchrun as a child, an S3 server where none is named, progress by polling.

``cli`` shows what this module yields. Speaks to the worker only through its contract: the document, the environment
and ``/progress``; so it imports no torch.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from videojob_api import names
from videojob_api.progress import LastWords, Progress
from videojob_api.spec import VideoJob

from .settings import ENV_DUMP_LATENTS, ENV_OUTPUT_DIR

ENV_S3_SERVER = "VIDEOJOB_S3_SERVER"  # path of the versitygw program


class LocalRunError(Exception):
    """The render could not be started or failed; the message says what to do."""


@dataclass(frozen=True)
class S3Server:
    """A running versitygw; objects are plain files under ``root``."""

    endpoint: str
    root: Path
    access_key: str
    secret_key: str


@contextmanager
def s3_server(root: Path, bucket: str) -> Iterator[S3Server]:
    """A versitygw on a free loopback port with the bucket in it, ended with the context.

    Raises:
        LocalRunError: the program is not there or does not answer.
    """
    program = os.environ.get(ENV_S3_SERVER) or shutil.which("versitygw")
    if program is None:
        raise LocalRunError(
            "no S3 endpoint is named and versitygw is not on PATH to start one: run `make demo`, which builds it, "
            "name a server with --s3-endpoint, or write to a folder with --output-dir"
        )
    root = root.resolve()
    (root / bucket).mkdir(parents=True, exist_ok=True)
    server = S3Server(f"http://127.0.0.1:{free_port()}", root, "local", secrets.token_hex(16))
    environment = {**os.environ, "ROOT_ACCESS_KEY": server.access_key, "ROOT_SECRET_KEY": server.secret_key}
    command = [program, "--port", server.endpoint.removeprefix("http://"), "posix", str(root)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            _answers(server.endpoint, child)
            yield server
        finally:
            child.terminate()


def _answers(endpoint: str, child: subprocess.Popen[bytes], patience_s: float = 15.0) -> None:
    host, port = endpoint.removeprefix("http://").split(":")
    deadline = time.monotonic() + patience_s
    while child.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)
    raise LocalRunError(f"versitygw does not answer on {endpoint}; is another program in its way?")


def free_port() -> int:
    """A port that nobody listens on now, below those that the kernel lends to connections, which come and go.

    Raises:
        LocalRunError: there is none.
    """
    try:
        lent = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        lent = 32768
    for _ in range(100):
        port = 10_000 + secrets.randbelow(max(1_000, lent - 10_000))
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise LocalRunError("100 ports that were tried are all taken: end some of the programs that listen")


@dataclass(frozen=True)
class Run:
    """A local render's inputs beside the VideoJob.

    Args:
        folder: for the document, the log and scratch files; made if missing.
        output_dir: write here instead of to object storage.
        dump_latents: write the clean latents here, too.
        server: the S3 server whose keys the worker shall use.
    """

    videojob: VideoJob
    folder: Path
    output_dir: Path | None = None
    dump_latents: Path | None = None
    server: S3Server | None = None

    @property
    def log(self) -> Path:
        """Everything the ranks printed."""
        return self.folder / "render.log"

    @property
    def last_words(self) -> Path:
        """Why the render ended."""
        return self.folder / "last-words.json"


def render(run: Run, poll_s: float = 0.25) -> Iterator[Progress]:
    """Render, yielding the progress record whenever it was polled.

    Raises:
        LocalRunError: the render failed, with its last words.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    run.last_words.unlink(missing_ok=True)
    document = run.folder / names.SPEC_FILE
    document.write_text(json.dumps(run.videojob.document(), ensure_ascii=False))
    port = free_port()
    with (
        run.log.open("wb") as log,
        subprocess.Popen(
            _command(run.videojob), env=_environment(run, document, port), stdout=log, stderr=log
        ) as child,
    ):
        try:
            while child.poll() is None:
                progress = _poll(port)
                if progress is not None:
                    yield progress
                time.sleep(poll_s)
        finally:
            child.terminate()
            child.wait()  # also after Ctrl-C, when leaving the context would not
    if child.returncode != 0:
        raise LocalRunError(_why(run))


def _command(videojob: VideoJob) -> list[str]:
    return [
        sys.executable,
        "-m",
        "videojob_worker.launch",
        "--nnodes=1",
        f"--nproc-per-node={videojob.spec.world_size}",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
        "--max-restarts=0",
        "-m",
        "videojob_worker",
    ]


def _environment(run: Run, document: Path, port: int) -> dict[str, str]:
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        names.ENV_SPEC: str(document),
        names.ENV_DEVICE: "cuda" if run.videojob.spec.gpus_per_node else "cpu",
        names.ENV_PORT: str(port),
        names.ENV_SCRATCH: str(run.folder / "scratch"),
        names.ENV_LAST_WORDS: str(run.last_words),
    }
    if run.output_dir is not None:
        environment[ENV_OUTPUT_DIR] = str(run.output_dir)
    if run.dump_latents is not None:
        environment[ENV_DUMP_LATENTS] = str(run.dump_latents)
    if run.server is not None:
        environment |= {"AWS_ACCESS_KEY_ID": run.server.access_key, "AWS_SECRET_ACCESS_KEY": run.server.secret_key}
    return environment


def _poll(port: int) -> Progress | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
            return Progress.model_validate_json(answer.read())
    except (OSError, urllib.error.URLError):  # not listening yet, or no longer
        return None


def _why(run: Run) -> str:
    try:
        words = LastWords.model_validate_json(run.last_words.read_text())
    except (OSError, ValidationError):
        tail = "\n".join(run.log.read_text(errors="replace").splitlines()[-15:])
        return f"the ranks ended without last words; the end of {run.log}:\n{tail}"
    return f"{words.reason}: {words.message}\nThe whole log is in {run.log}"
