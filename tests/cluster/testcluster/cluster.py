"""Boots a whole cluster, hands it to tests and takes it down again: composes all the other modules.

Everything runs in one sandbox, so taking down is one signal and a folder to remove. Booting is ordered for speed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from testcluster import build, dns, images, network, preflight, state
from testcluster.access import Access, ExistingCluster, kubectl_from_path
from testcluster.control_plane import ControlPlane
from testcluster.network import Network
from testcluster.node import Node
from testcluster.process import Progress
from testcluster.sandbox import Sandbox

KUBELET_SYSCTLS = {
    "kernel/keys/root_maxbytes": 25000000,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
}
KEPT_LOGS = "VIDEOJOB_CLUSTER_LOGS"


def _silent(_line: str) -> None:
    """Tell nobody."""


class Cluster(Access):
    """A cluster of its own: a context manager that boots on entry and leaves nothing behind on exit.

    Several may run at once, in one process or in many; each has a network of its own. A cluster ends with its process,
    however that ends, and the next boot removes what files are left then.

    Args:
        nodes: how many; each offers 8 `nvidia.com/gpu`. With 0 there is an API server and no place to run a pod.
        progress: is told each step.
        host_folders: further folders of this machine that all containers see, read-only, at ``images.inside`` of them.
    """

    def __init__(self, nodes: int = 2, progress: Progress = _silent, host_folders: Iterable[Path] = ()) -> None:
        if not 0 <= nodes <= network.MAX_NODES:
            raise ValueError(f"nodes is {nodes}, must lie between 0 and {network.MAX_NODES}")
        self.nodes = tuple(f"node-{index}" for index in range(nodes))
        self._progress = progress
        self._host_folders = tuple(host_folders)
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Boot.

        Raises:
            PreflightError: this machine cannot.
            BuildError: a component does not build.
            DaemonError: a component does not run.
        """
        preflight.check(len(self.nodes), to_build=lambda: any(build.missing()))
        started = time.monotonic()
        with contextlib.ExitStack() as unwinding:
            self._boot(unwinding)
            self._resources = unwinding.pop_all()
        self._progress(f"cluster ready in {time.monotonic() - started:.1f} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.close()

    @property
    def logs(self) -> Path:
        """One file a daemon, and ``pods/NODE`` with the containers' output."""
        return self._state.logs

    def stop_node(self, name: str) -> None:
        """Cut a node off by killing its kubelet: its containers run on, and after 20 s it is lost (NotReady)."""
        self._node(name).stop_kubelet()

    def start_node(self, name: str) -> None:
        """Bring a stopped node back; returns when it is Ready and offers its GPUs."""
        node = self._node(name)
        node.start_kubelet(self._control_plane.kubeconfig(f"system:node:{name}"))
        node.wait_until_ready(self._control_plane.admin)

    def _node(self, name: str) -> Node:
        return self._nodes[self.nodes.index(name)]

    def _boot(self, resources: contextlib.ExitStack) -> None:
        binaries = build.binaries()
        sandbox = self._claim(resources)
        kubectl = [str(binaries["kubectl"]), f"--cache-dir={self._state.folder}/kubectl-cache"]
        super().__init__(kubectl, self._state.kubeconfig, self._network.host_ip, images.WORKER, images.OPERATOR)
        self._control_plane = ControlPlane(self._state, self._network, sandbox, binaries, self.nodes)
        self._nodes = [
            Node(name, index, self._state, self._network, sandbox, binaries) for index, name in enumerate(self.nodes)
        ]
        with ThreadPoolExecutor() as pool:
            runtimes = pool.submit(self._start_runtimes, binaries)
            with self._step("control plane"):
                self._control_plane.boot()
            with self._step("container runtimes and images"):
                runtimes.result()
        if self.nodes:
            dns.start(self._state, self._network, sandbox, binaries)
        for node in self._nodes:
            node.start_kubelet(self._control_plane.kubeconfig(f"system:node:{node.name}"))
        for node in self._nodes:
            with self._step(f"{node.name} Ready"):
                node.wait_until_ready(self._control_plane.admin)
        self._control_plane.wait_for_default_service_account()

    def _claim(self, resources: contextlib.ExitStack) -> Sandbox:
        """Take a folder, namespaces and a subnet; from here on ``resources`` gives them back."""
        with state.exclusive():
            for identity in state.remove_leftovers():
                self._progress(f"removed what the crashed cluster {identity} left")
            self._state = state.create()
            resources.callback(self._remove_state)
            sandbox = Sandbox(_environment())
            resources.callback(sandbox.close)
            self._network = Network(network.free_subnet())
            network.connect(self._network, sandbox, self._state.link, len(self.nodes))
        sandbox.run(["sh", "-eu"], stdin=self._mounts())
        return sandbox

    def _mounts(self) -> str:
        """A shell script: what daemons write outside their folders stays in the sandbox, or need not be written."""
        ram, lib = self._state.ram, self._state.ram / "lib"
        lines = [
            f"mount -t tmpfs -o mode=755 tmpfs {ram}",
            f"mkdir -p {ram}/sysctls {lib}/upper {lib}/work",
            f"mount -t overlay -o lowerdir=/var/lib,upperdir={lib}/upper,workdir={lib}/work overlay /var/lib",
            "mount -t tmpfs -o mode=755 tmpfs /var/log",
        ]
        for number, (name, value) in enumerate(KUBELET_SYSCTLS.items()):
            file = f"{ram}/sysctls/{number}"
            lines += [f"echo {value} > {file}", f"mount --bind {file} /proc/sys/{name}"]
        lines += [f"mkdir {ram}/{name}" for name in self.nodes]
        return "\n".join(lines)

    def _start_runtimes(self, binaries: dict[str, Path]) -> None:
        """Start every containerd, then fill them all."""
        folders = images.host_folders(self._host_folders)
        specification = images.base_specification(binaries["ctr"], folders)
        for node in self._nodes:
            node.start_runtime(specification)
        archive = self._state.folder / "images.tar"
        archive.write_bytes(images.archive(binaries["pause"], folders))
        for node in self._nodes:
            node.import_images(archive)

    def _remove_state(self) -> None:
        kept = os.environ.get(KEPT_LOGS)
        if kept:
            shutil.copytree(self._state.logs, Path(kept) / self._state.identity)
        with state.exclusive():
            self._state.remove()

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._progress(f"{what} in {time.monotonic() - started:.1f} s")


def existing(environment: dict[str, str]) -> ExistingCluster:
    """The cluster that ``KUBECONFIG`` names, with the kubectl on the PATH, or else the built one."""
    return ExistingCluster(kubectl_from_path() or build.binaries()["kubectl"], environment)


def _environment() -> dict[str, str]:
    """What daemons see of the environment: no proxies, no settings of the user's."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
