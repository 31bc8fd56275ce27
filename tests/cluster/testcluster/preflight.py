"""Says what this machine lacks, and how to get it, before anything is built or started.

Knows the programs and packages that the other modules call, not what they do with them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from testcluster.node import CNI_FOLDERS

PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
COMPILER_PACKAGES = "gcc libc6-dev libseccomp-dev pkg-config"


class PreflightError(RuntimeError):
    """This machine cannot run a test cluster; the message lists every reason with its remedy."""


@dataclass(frozen=True)
class Machine:
    """What is asked of a machine; the defaults are this one."""

    user: int = field(default_factory=os.geteuid)
    which: Callable[[str], str | None] = shutil.which
    exists: Callable[[Path], bool] = Path.exists


def check(nodes: int, to_build: Callable[[], bool], machine: Machine | None = None) -> None:
    """Raise PreflightError where a cluster of so many nodes cannot boot here."""
    problems = list(_problems(nodes, to_build, machine or Machine()))
    if problems:
        raise PreflightError("the test cluster cannot boot here:\n" + "\n".join(f"- {line}" for line in problems))


def _problems(nodes: int, to_build: Callable[[], bool], machine: Machine) -> Iterator[str]:
    if machine.user != 0:
        yield "it needs namespaces and mounts: run as root, or set KUBECONFIG to use your own cluster"
    for program, package in PACKAGES.items():
        if machine.which(program) is None:
            yield f"`{program}` is missing: apt-get install {package}"
    if machine.which("gcc") is None and to_build():
        yield f"`gcc` is missing: apt-get install {COMPILER_PACKAGES}"
    plugins = [folder / "bridge" for folder in CNI_FOLDERS]
    if nodes and not any(machine.exists(plugin) for plugin in plugins):
        yield f"the network plugins are missing ({plugins[0]}): apt-get install containernetworking-plugins"
