"""The folder of one cluster under /run, and what a crashed run left behind.

Every trace that can outlive a cluster's processes bears its identity: the folder, the control groups and the link into
its network. So a later run finds them by name and removes those whose owner is dead. Knows nothing of what the files
mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testcluster import cgroups

RUN = Path("/run")
PREFIX = "videojob-"
LINK_PREFIX = "vj"


@dataclass(frozen=True)
class State:
    """Where one cluster keeps its files. Short paths: containerd's sockets have 64 digits and must fit 107 bytes."""

    identity: str

    @property
    def folder(self) -> Path:
        return RUN / f"{PREFIX}{self.identity}"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.folder / "kubeconfig"

    @property
    def ram(self) -> Path:
        """Data of daemons and pods: an in-memory file system that only the cluster's own mount namespace sees."""
        return self.folder / "ram"

    @property
    def link(self) -> str:
        """The host's network interface that leads to the cluster."""
        return f"{LINK_PREFIX}{self.identity}"

    @property
    def cgroup(self) -> str:
        """The control group of all containers, relative to the top."""
        return f"{PREFIX}{self.identity}"

    def remove(self) -> None:
        """Remove every trace, once no process of the cluster is left."""
        subprocess.run(["ip", "link", "delete", self.link], capture_output=True, check=False)
        cgroups.remove(self.cgroup)
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One boot at a time chooses names and addresses on this machine."""
    lock = os.open(RUN, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def create() -> State:
    """A new cluster's folders, marked as this process's own. Call it under `exclusive`."""
    state = State(secrets.token_hex(3))
    state.folder.mkdir(mode=0o755)
    owner = {"pid": os.getpid(), "started": _started(os.getpid())}
    (state.folder / "owner").write_text(json.dumps(owner))
    for folder in (state.logs, state.keys, state.ram):
        folder.mkdir()
    state.keys.chmod(0o700)
    return state


def remove_leftovers() -> list[str]:
    """Remove what clusters of dead processes left, and name them. Call it under `exclusive`."""
    left = [State(folder.name.removeprefix(PREFIX)) for folder in RUN.glob(f"{PREFIX}??????")]
    dead = [state for state in left if not _owner_lives(state)]
    for state in dead:
        state.remove()
    return [state.identity for state in dead]


def _owner_lives(state: State) -> bool:
    try:
        owner = json.loads((state.folder / "owner").read_text())
    except FileNotFoundError:
        return False
    started: str = owner["started"]
    return _started(owner["pid"]) == started


def _started(pid: int) -> str | None:
    """When the process began, in clock ticks since boot: tells a process from a later one of the same number."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return after_name.split()[19]
