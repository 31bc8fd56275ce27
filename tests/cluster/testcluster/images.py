"""Container images without a registry, written by hand as one OCI archive for ``ctr images import``.

``pause`` holds a single program. The images of worker and operator hold empty folders and links only: every container
gets this machine's system folders and the running Python environment mounted into them, read-only, through the base
specification that containerd fills in. So a test runs the code as it lies in the working tree, and torch is never
copied. Knows nothing of nodes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAUSE = "localhost/pause:test"
WORKER = "localhost/videojob-worker:test"
OPERATOR = "localhost/videojob-operator:test"

REPOSITORY = Path(__file__).resolve().parents[3]
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt")
SETTINGS = ("/etc/alternatives", "/etc/ca-certificates", "/etc/ld.so.cache", "/etc/ssl")
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnonroot:x:65532:65532:nonroot:/tmp:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnonroot:x:65532:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


COVERED = Path("/tmp")  # pods mount volumes of their own there
ELSEWHERE = Path("/host")


def inside(path: Path) -> Path:
    """Where a container finds a path of this machine: at the same place, unless a pod's own volume would cover it."""
    return ELSEWHERE / path.relative_to("/") if path.is_relative_to(COVERED) else path


@dataclass(frozen=True)
class HostFolders:
    """This machine's folders as containers see them: mounts at ``inside`` of them, and symbolic links made anew."""

    mounts: tuple[Path, ...]
    links: tuple[tuple[Path, Path], ...]


def host_folders(extra: Iterable[Path] = ()) -> HostFolders:
    """The system, the running Python environment, this repository and ``extra``; none twice, none inside another."""
    system = [Path(path) for path in (*SYSTEM, *SETTINGS) if os.path.lexists(path)]
    links = tuple((path, path.readlink()) for path in system if path.is_symlink())
    python = [Path(sys.prefix), Path(sys.base_prefix), REPOSITORY]
    wanted = {path for path in system if not path.is_symlink()} | {path.resolve() for path in (*python, *extra)}
    outermost = [path for path in wanted if not any(parent in wanted for parent in path.parents)]
    return HostFolders(tuple(sorted(outermost)), links)


def base_specification(ctr: Path, folders: HostFolders) -> str:
    """The runtime specification that every container starts from: containerd's own plus the host's folders."""
    default = subprocess.run([ctr, "oci", "spec"], capture_output=True, text=True, check=True).stdout
    specification: dict[str, Any] = json.loads(default)
    specification["process"].pop("rlimits")
    options = ["rbind", "ro", "nosuid", "nodev"]
    specification["mounts"] += [
        {"destination": str(inside(path)), "type": "bind", "source": str(path), "options": options}
        for path in folders.mounts
    ]
    return json.dumps(specification, indent=2)


def archive(pause: Path, folders: HostFolders) -> bytes:
    """All images as one OCI archive (a tar file)."""
    pause_image = _Image((PAUSE,), _pause_layer(pause), {"Entrypoint": ["/pause"]})
    python_image = _Image((WORKER, OPERATOR), _host_layer(folders), {"Env": _environment(), "WorkingDir": "/tmp"})
    blobs: dict[str, bytes] = {}
    manifests = [entry for image in (pause_image, python_image) for entry in image.add_to(blobs)]
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()}
    files |= {f"blobs/sha256/{digest}": content for digest, content in blobs.items()}
    return _tar([_file(name, content) for name, content in files.items()])


@dataclass(frozen=True)
class _Image:
    names: tuple[str, ...]
    layer: bytes
    config: dict[str, Any]

    def add_to(self, blobs: dict[str, bytes]) -> list[dict[str, Any]]:
        """Add the image's blobs by digest; return its entries for the index, one a name."""
        layer = _add(blobs, LAYER, self.layer)
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        document = {
            "architecture": machine,
            "os": "linux",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        }
        config = _add(blobs, CONFIG, json.dumps(document).encode())
        body = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}
        manifest = _add(blobs, MANIFEST, json.dumps(body).encode())
        return [manifest | {"annotations": {"io.containerd.image.name": name}} for name in self.names]


def _add(blobs: dict[str, bytes], media_type: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    blobs[digest] = content
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _environment() -> list[str]:
    system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    packages = ":".join(str(inside(REPOSITORY / folder)) for folder in ("operator", "worker"))
    return [
        f"PATH={inside(Path(sys.prefix))}/bin:{system}",
        f"PYTHONPATH={packages}",
        "HOME=/tmp",
        "LANG=C.UTF-8",
        "PYTHONDONTWRITEBYTECODE=1",
        "PYTHONUNBUFFERED=1",
    ]


def _pause_layer(pause: Path) -> bytes:
    return _tar([_file("pause", pause.read_bytes(), mode=0o755)])


def _host_layer(folders: HostFolders) -> bytes:
    """Empty mount points and links, so that a container's paths do not depend on who makes them."""
    points = {inside(path) for path in folders.mounts if path.is_dir()} | {Path("/tmp"), Path("/etc")}
    parents = {parent for path in folders.mounts for parent in inside(path).parents}
    entries = [_folder(path) for path in sorted(points | parents) if path != Path("/")]
    entries += [_file(str(inside(path))[1:], b"") for path in folders.mounts if not path.is_dir()]
    entries += [_link(path, target) for path, target in folders.links]
    entries += [_file(name, text.encode()) for name, text in ACCOUNTS.items()]
    return _tar(entries)


_Entry = tuple[tarfile.TarInfo, bytes]


def _tar(entries: Sequence[_Entry]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for information, content in entries:
            tar.addfile(information, io.BytesIO(content))
    return buffer.getvalue()


def _file(name: str, content: bytes, mode: int = 0o644) -> _Entry:
    information = tarfile.TarInfo(name)
    information.size, information.mode = len(content), mode
    return information, content


def _folder(path: Path) -> _Entry:
    information = tarfile.TarInfo(str(path)[1:])
    information.type, information.mode = tarfile.DIRTYPE, 0o1777 if path == Path("/tmp") else 0o755
    return information, b""


def _link(path: Path, target: Path) -> _Entry:
    information = tarfile.TarInfo(str(path)[1:])
    information.type, information.linkname = tarfile.SYMTYPE, str(target)
    return information, b""
