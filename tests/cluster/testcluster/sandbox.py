"""Process, mount and network namespaces that end together, at the latest with the process that made them.

All daemons and containers of a cluster run in here. Ending process 1 (``guard``) makes the kernel end every process
inside, and with the last one the mounts, the bridge and all pods' networks go. Knows nothing of what runs inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from testcluster.process import Daemon, guard_command

CLONE_NEWPID = 0x20000000  # <linux/sched.h>; the standard library has these calls from Python 3.12 on
_libc = ctypes.CDLL(None, use_errno=True)


class SandboxError(RuntimeError):
    """The kernel refused a namespace, or a command inside failed; the message holds its words."""


class Sandbox:
    """Namespaces on their own; `close` ends all that runs in them.

    Args:
        environment: what daemons and commands inside see, and nothing else.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._daemons: list[Daemon] = []
        self._first = _start_first_process()

    @property
    def pid(self) -> int:
        """Process 1 of the namespaces, as numbered outside."""
        return self._first.pid

    def start(self, name: str, command: Sequence[str], log: Path) -> Daemon:
        """Start a daemon inside; its output is appended to ``log``."""
        with log.open("ab") as output, _children_in(Path(f"/proc/{self.pid}/ns/pid")):
            process = subprocess.Popen(
                self._entering(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        daemon = Daemon(name, process, log)
        self._daemons.append(daemon)
        return daemon

    def run(self, command: Sequence[str], stdin: str = "") -> str:
        """The output of a short command inside.

        Raises:
            SandboxError: it failed.
        """
        done = subprocess.run(
            self._entering(command), input=stdin, env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SandboxError(f"`{' '.join(command)}` failed in the cluster's namespaces: {done.stderr}")
        return done.stdout

    def close(self) -> None:
        """End everything inside and wait until it is gone."""
        self._first.kill()
        for daemon in self._daemons:
            daemon.process.wait()
        self._first.wait()

    def _entering(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--mount", "--net", "--", *command]


def _start_first_process() -> subprocess.Popen[bytes]:
    owner = os.pidfd_open(os.getpid())
    unshare = ["unshare", "--mount", "--propagation=private", "--mount-proc", "--net", "--"]
    try:
        with _children_in(None):
            first = subprocess.Popen(
                [*unshare, *guard_command(owner)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[owner],
                start_new_session=True,
            )
    finally:
        os.close(owner)
    assert first.stdout is not None
    assert first.stderr is not None
    with first.stdout, first.stderr:
        if first.stdout.readline() != b"ready\n":
            raise SandboxError(
                f"cannot make the cluster's namespaces: {first.stderr.read().decode(errors='replace').strip()}\n"
                "Run on a machine or in a container that may (`docker run --privileged`)."
            )
    return first


@contextlib.contextmanager
def _children_in(namespace: Path | None) -> Iterator[None]:
    """Processes that this thread starts meanwhile live in that process namespace, or in a new one."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    try:
        if namespace is None:
            _call("unshare", CLONE_NEWPID)
        else:
            _join(namespace)
        try:
            yield
        finally:
            _call("setns", own, CLONE_NEWPID)
    finally:
        os.close(own)


def _join(namespace: Path) -> None:
    other = os.open(namespace, os.O_RDONLY)
    try:
        _call("setns", other, CLONE_NEWPID)
    finally:
        os.close(other)


def _call(function: str, *arguments: int) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise SandboxError(f"{function}: {os.strerror(number)}. Run as root on a machine that may make namespaces.")
