"""Lives exactly as long as its owner: process 1 of a cluster's namespaces, or the keeper of one command.

Run as a program of its own, ``guard.py OWNER_PIDFD [COMMAND ...]``; knows nothing of the package and imports only the
standard library. The kernel ends a process namespace with its process 1, so one ``SIGKILL`` of the owner, whatever
the owner had started, leaves no daemon, container or mount behind.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Sequence


def main(owner: int, command: Sequence[str]) -> None:
    """Return when the process behind the pidfd ``owner`` has ended, or the command has."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans that end up here are reaped by the kernel
    ends = select.poll()
    ends.register(owner, select.POLLIN)
    if command:
        ends.register(os.pidfd_open(_start(command)), select.POLLIN)
    print("ready", flush=True)
    ends.poll()


def _start(command: Sequence[str]) -> int:
    """Start the command so that it dies with this process."""
    dying = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    return os.posix_spawnp(dying[0], dying, os.environ, setsigdef=[signal.SIGCHLD])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
