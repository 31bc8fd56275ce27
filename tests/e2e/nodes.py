"""Nodes on loopback: one launcher each, as the pods of a VideoJob start it, and ways to hurt them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from videojob_api import names
from videojob_api.progress import LastWords
from videojob_worker import local, settings


@dataclass
class Render:
    """A VideoJob for launchers on this machine.

    Args:
        folder: for all files.
        model: in the diffusers layout.
        frames: of the video; thousands last for minutes.
        environment: for all ranks.
        worker: what torchrun starts: a module, or a script that hurts itself.
    """

    folder: Path
    model: Path
    frames: int = 60
    environment: dict[str, str] = field(default_factory=dict)
    worker: tuple[str, ...] = ("-m", "videojob_worker")

    @property
    def document(self) -> dict:
        return {
            "apiVersion": "videojob.dev/v1alpha1",
            "kind": "VideoJob",
            "metadata": {"name": "fox"},
            "spec": {
                "prompt": "a fox",
                "video": {"frames": self.frames, "width": 64, "height": 48},
                "sampling": {"steps": 4, "seed": 11},
                "dualParallel": {"blockLatents": 4, "contextLatents": 3},
                "gpusPerNode": 0,
                "ranksPerNode": 1,
                "model": {"source": {"localPath": str(self.model)}},
                "output": {"s3": {"bucket": "videos"}},
            },
        }

    @property
    def latents(self) -> torch.Tensor:
        return load_file(self.folder / "latents.safetensors")["latents"]

    @contextmanager
    def start(self, nodes: int, ranks: int) -> Iterator[list[Node]]:
        """The launchers; on leaving, nothing of them is left."""
        spec = self.folder / "videojob.json"
        spec.write_text(json.dumps(self.document))
        port = local.free_port()
        started: list[Node] = []
        try:
            started += (self._node(index, nodes, ranks, port, spec) for index in range(nodes))
            yield started
        finally:
            for node in started:
                node.kill()

    def run(self, nodes: int, ranks: int) -> list[int]:
        """To the end; the exit codes by node."""
        with self.start(nodes, ranks) as started:
            return [node.wait(300) for node in started]

    def _node(self, index: int, nodes: int, ranks: int, port: int, spec: Path) -> Node:
        folder = self.folder / f"node-{index}"
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "videojob_worker.launch", f"--nnodes={nodes}", f"--node-rank={index}"]
        command += [f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command += ["--max-restarts=0", *self.worker]
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            names.ENV_SPEC: str(spec),
            names.ENV_DEVICE: "cpu",
            names.ENV_PORT: "0",
            names.ENV_SCRATCH: str(folder / "scratch"),
            names.ENV_LAST_WORDS: str(folder / "words"),
            settings.ENV_OUTPUT_DIR: str(self.folder / "out"),
            settings.ENV_DUMP_LATENTS: str(self.folder / "latents.safetensors"),
            **self.environment,
        }
        log = folder / "log"
        with log.open("wb") as file:
            child = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        return Node(folder, child)


@dataclass
class Node:
    """One launcher and its ranks, as a container has them."""

    folder: Path
    launcher: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def words(self) -> LastWords:
        return LastWords.model_validate_json((self.folder / "words").read_text())

    def wait(self, timeout_s: float) -> int:
        try:
            return self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"not ended after {timeout_s} s:\n{self.log[-3000:]}") from error

    @property
    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        mine, found = f"{names.ENV_LAST_WORDS}={self.folder / 'words'}".encode(), {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = environ.read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            rank = next((entry for entry in variables if entry.startswith(b"RANK=")), None)
            if mine in variables and rank is not None:
                found[int(rank.removeprefix(b"RANK="))] = int(environ.parent.name)
        return found

    def kill(self) -> None:
        """As a node dies: launcher and ranks at once."""
        for pid in (*self.ranks.values(), self.launcher.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.launcher.wait()


def until(condition: Callable[[], object], node: Node, patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert node.launcher.poll() is None, f"ended too early:\n{node.log[-3000:]}"
        assert time.monotonic() < deadline, f"waited in vain:\n{node.log[-3000:]}"
        time.sleep(0.05)
