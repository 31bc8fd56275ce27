"""The control groups under which a cluster's containers are counted and limited, on both versions of cgroups.

One tree a cluster in every mounted hierarchy, so that it can be found and removed by name. Knows nothing of who lives
in it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testcluster.process import until


class CgroupError(RuntimeError):
    """The kernel refused a control group; the message holds the remedy."""


@dataclass(frozen=True)
class _Hierarchy:
    top: Path
    version: int


def create(path: str) -> None:
    """Make the group ``path`` (relative to the top) in every hierarchy, with all controllers that are there.

    Raises:
        CgroupError: this process may not.
    """
    try:
        for hierarchy in _hierarchies():
            (hierarchy.top / path).mkdir(parents=True)
            if hierarchy.version == 2:
                _enable_controllers(hierarchy.top, path)
    except OSError as error:
        raise CgroupError(
            f"cannot make control groups: {error}. Run on the machine itself; in a container, start it with "
            "`--privileged` and, with version 2, leave the top group without processes."
        ) from error


def remove(path: str) -> None:
    """Remove the group and all below it, in every hierarchy; none holds a process any more."""
    for hierarchy in _hierarchies():
        for group, _, _ in os.walk(hierarchy.top / path, topdown=False):
            # A group stays busy for a moment after its last process.
            until(functools.partial(_removed, Path(group)), f"removing the control group {group}", 10.0, every_s=0.01)


def _enable_controllers(top: Path, path: str) -> None:
    """Version 2 hands controllers down level by level."""
    for group in (top, *reversed([top / parent for parent in Path(path).parents][:-1])):
        controllers = (group / "cgroup.controllers").read_text().split()
        wanted = " ".join(f"+{controller}" for controller in controllers)
        (group / "cgroup.subtree_control").write_text(wanted)


def _hierarchies() -> Iterator[_Hierarchy]:
    versions = {"cgroup": 1, "cgroup2": 2}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, top, kind, *_ = line.split()
        if kind in versions:
            yield _Hierarchy(Path(top), versions[kind])


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
