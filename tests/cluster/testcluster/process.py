"""Runs daemons, waits for what they promise, and says which one failed and why.

Knows nothing of Kubernetes; ``sandbox`` says in which namespaces a process starts, ``control_plane``, ``dns``, ``node``
and ``s3`` say what to run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[str], None]

GUARD = Path(__file__).resolve().with_name("guard.py")
LOG_LINES_SHOWN = 15
KNOWN_CAUSES = (
    ("too many open files", "raise the limit: `sysctl fs.inotify.max_user_instances=1024`"),
    ("no space left on device", "free disk space or memory; the cluster's data lies in /run"),
    ("cannot allocate memory", "free memory: an idle cluster with two nodes takes about 1 GB"),
    ("read-only file system", "give the container write access to /sys/fs/cgroup (`docker run --privileged`)"),
    ("operation not permitted", "run in a virtual machine, or in a container started with `--privileged`"),
)
KEEP_LOGS = "keep every log of the next run: set VIDEOJOB_CLUSTER_LOGS to a new folder's path"


class DaemonError(RuntimeError):
    """A daemon ended or did not become ready; the message names it, shows its last words and the remedy."""


@dataclass(frozen=True)
class Daemon:
    """A running process and the file that holds all it says."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise DaemonError where the daemon has ended."""
        code = self.process.poll()
        if code is not None:
            raise DaemonError(f"{self.name} ended with exit code {code}.\n{self.last_words()}")

    def last_words(self) -> str:
        text = self.log.read_text(errors="replace")
        lines = text.splitlines()[-LOG_LINES_SHOWN:]
        lowered = "\n".join(lines).lower()
        remedy = next((remedy for cause, remedy in KNOWN_CAUSES if cause in lowered), KEEP_LOGS)
        shown = "\n".join(f"  {line[:500]}" for line in lines)
        return f"The last lines of its log:\n{shown}\nWhat helps: {remedy}"

    def kill(self) -> None:
        """End the process at once and reap it; harmless where it has ended."""
        self.process.kill()
        self.process.wait()


def until(
    probe: Callable[[], T | None],
    what: str,
    timeout_s: float = 60.0,
    daemons: Iterable[Daemon] = (),
    every_s: float = 0.05,
) -> T:
    """Ask ``probe`` again and again until it answers something true, and return that.

    Raises:
        DaemonError: one of ``daemons`` ended meanwhile, or time ran out; then the first one's log is shown.
        TimeoutError: time ran out and there is no daemon to blame.
    """
    watched = tuple(daemons)
    deadline = time.monotonic() + timeout_s
    while True:
        answer = probe()
        if answer:
            return answer
        for daemon in watched:
            daemon.check()
        if time.monotonic() > deadline:
            break
        time.sleep(every_s)
    late = f"{what}: not within {timeout_s:.0f} s"
    if watched:
        raise DaemonError(f"{late}. {watched[0].name} runs.\n{watched[0].last_words()}")
    raise TimeoutError(late)


def guarded(command: Iterable[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in this machine's own namespaces that cannot outlive this process, however it ends."""
    owner = os.pidfd_open(os.getpid())
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                [*guard_command(owner), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=[owner],
                start_new_session=True,
            )
    finally:
        os.close(owner)


def guard_command(owner_pidfd: int) -> list[str]:
    return [sys.executable, "-I", "-S", str(GUARD), str(owner_pidfd)]
