"""One node: a containerd and a kubelet with folders, an address and a name of their own, and 8 GPUs in name.

The GPUs are an extended resource written into the node's status, which the scheduler and the kubelet count like any
other; no device stands behind them. Knows nothing of the control plane but a kubeconfig.
"""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testcluster import cgroups, images
from testcluster.api import Api
from testcluster.dns import DOMAIN
from testcluster.network import DNS_SERVICE_IP, Network
from testcluster.process import Daemon, until
from testcluster.sandbox import Sandbox
from testcluster.state import State

GPUS = 8
GPU = "nvidia.com/gpu"
GPU_PATCH_PATH = "/status/capacity/nvidia.com~1gpu"
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))

CONTAINERD = """\
version = 4
root = '{ram}/root'
state = '{ram}/state'
disabled_plugins = [
  'io.containerd.nri.v1.nri',
  'io.containerd.snapshotter.v1.blockfile',
  'io.containerd.snapshotter.v1.btrfs',
  'io.containerd.snapshotter.v1.devmapper',
  'io.containerd.snapshotter.v1.erofs',
  'io.containerd.snapshotter.v1.zfs',
  'io.containerd.tracing.processor.v1.otlp',
]

[plugins.'io.containerd.server.v1.grpc']
  address = '{ram}/containerd.sock'

[plugins.'io.containerd.server.v1.ttrpc']
  address = '{ram}/containerd.sock.ttrpc'

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{pause}'

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['{cni_plugins}']
  conf_dir = '{configuration}/cni'
  use_internal_loopback = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  base_runtime_spec = '{configuration}/base-specification.json'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = '{runc}'
  Root = '{ram}/runc'
  SystemdCgroup = false

[plugins.'io.containerd.internal.v1.opt']
  path = '{ram}/opt'

[plugins.'io.containerd.shim.v1.manager']
  socket_dir = '{ram}/s'
"""


@dataclass
class Node:
    """A node of one cluster; its steps are called in the order they stand here."""

    name: str
    index: int
    state: State
    network: Network
    sandbox: Sandbox
    binaries: Mapping[str, Path]

    def start_runtime(self, base_specification: str) -> None:
        """Start containerd."""
        cgroups.create(self._cgroup)
        (self._configuration / "cni").mkdir(parents=True)
        files = {
            "base-specification.json": base_specification,
            "cni/pods.conflist": self.network.cni(self.index, f"{self._ram}/addresses"),
            "containerd.toml": self._containerd(),
            "resolv.conf": "",
        }
        for name, text in files.items():
            (self._configuration / name).write_text(text)
        self._runtime = self._start("containerd", f"--config={self._configuration}/containerd.toml")

    def import_images(self, archive: Path) -> None:
        """Fill the image store, once containerd answers."""
        inside = Path(f"/proc/{self.sandbox.pid}/root{self._ram}/containerd.sock")
        until(inside.exists, f"containerd of {self.name}", 60.0, [self._runtime])
        ctr = [str(self.binaries["ctr"]), f"--address={self._ram}/containerd.sock", "--namespace=k8s.io"]
        self.sandbox.run([*ctr, "images", "import", str(archive)])

    def start_kubelet(self, kubeconfig: Path) -> None:
        """Start, or start again, the kubelet."""
        configuration = self._configuration / "kubelet.json"
        configuration.write_text(json.dumps(self._kubelet(), indent=2))
        self._kubelet_daemon = self._start(
            "kubelet",
            f"--config={configuration}",
            f"--kubeconfig={kubeconfig}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.network.node_ip(self.index)}",
            f"--root-dir={self._ram}/kubelet",
        )

    def wait_until_ready(self, api: Api) -> None:
        """Return when the node is Ready and its GPUs are allocatable."""
        daemons = [self._kubelet_daemon, self._runtime]
        until(lambda: _is_ready(api.get(self._path)), f"{self.name} is Ready", 120.0, daemons)
        until(lambda: self._offers_gpus(api), f"{self.name} offers GPUs", 60.0, daemons, every_s=0.2)

    def stop_kubelet(self) -> None:
        """Cut the node off: its containers run on, but nobody hears of them."""
        self._kubelet_daemon.kill()

    @property
    def _path(self) -> str:
        return f"/api/v1/nodes/{self.name}"

    @property
    def _ram(self) -> Path:
        return self.state.ram / self.name

    @property
    def _cgroup(self) -> str:
        return f"{self.state.cgroup}/{self.name}"

    @property
    def _configuration(self) -> Path:
        return self.state.folder / self.name

    def _start(self, program: str, *arguments: str) -> Daemon:
        log = self.state.logs / f"{self.name}-{program}.log"
        return self.sandbox.start(f"{program} of {self.name}", [str(self.binaries[program]), *arguments], log)

    def _offers_gpus(self, api: Api) -> bool:
        """Write the GPUs until they stay: a starting kubelet may reset what it finds."""
        node = api.get(self._path)
        if node and node["status"]["allocatable"].get(GPU) == str(GPUS):
            return True
        operation = {"op": "add", "path": GPU_PATCH_PATH, "value": str(GPUS)}
        try:
            api.patch(f"{self._path}/status", [operation])
        except urllib.error.HTTPError as error:
            if error.code != 409:  # the kubelet wrote at the same time
                raise
        return False

    def _containerd(self) -> str:
        plugins = next(folder for folder in CNI_FOLDERS if folder.exists())
        return CONTAINERD.format(
            ram=self._ram,
            configuration=self._configuration,
            pause=images.PAUSE,
            runc=self.binaries["runc"],
            cni_plugins=plugins,
        )

    def _kubelet(self) -> dict[str, Any]:
        address = self.network.node_ip(self.index)
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": address,
            "healthzBindAddress": address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.state.keys / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "clusterDNS": [DNS_SERVICE_IP],
            "clusterDomain": DOMAIN,
            "containerRuntimeEndpoint": f"unix://{self._ram}/containerd.sock",
            "resolvConf": str(self._configuration / "resolv.conf"),
            "podLogsDir": str(self.state.logs / "pods" / self.name),
            "volumePluginDir": f"{self._ram}/volume-plugins",
            "nodeStatusUpdateFrequency": "1s",
            "makeIPTablesUtilChains": False,
            **self._resources(),
        }

    def _resources(self) -> dict[str, Any]:
        """No share of this machine is reserved, and a full disk evicts nobody; works on both versions of cgroups."""
        return {
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "evictionHard": {},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }


def _is_ready(node: dict[str, Any] | None) -> bool:
    conditions = node["status"].get("conditions", []) if node else []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
