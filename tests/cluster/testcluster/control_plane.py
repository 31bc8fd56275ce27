"""etcd, the API server, the controller manager and the scheduler: what each is told, and the order they start in.

All controllers and admission plugins are the defaults, so quotas, garbage collection and pod security act as in any
cluster. Differs from one only in time: a node is lost after seconds, not minutes. Knows nothing of nodes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from testcluster import pki
from testcluster.api import Api
from testcluster.network import API_SERVICE_IP, SERVICES, Network
from testcluster.process import Daemon, until
from testcluster.sandbox import Sandbox
from testcluster.state import State

NODE_LOST_S = 20  # no heartbeat for so long: NotReady
EVICTED_AFTER_S = 5  # and for so long after that: its pods are evicted
CONTROLLER_MANAGER = "system:kube-controller-manager"
SCHEDULER = "system:kube-scheduler"
ETCD = "http://127.0.0.1:2379"
ETCD_PEER = "http://127.0.0.1:2380"


@dataclass
class ControlPlane:
    """The control plane of one cluster; `boot` brings it up."""

    state: State
    network: Network
    sandbox: Sandbox
    binaries: Mapping[str, Path]
    node_names: tuple[str, ...] = ()
    _tokens: dict[str, str] = field(default_factory=dict)

    def boot(self) -> None:
        """Start everything and return once the API server is ready; the others find their way themselves."""
        self.keys = pki.create(self.state.keys, self._server_names())
        self._write_tokens()
        etcd = self._start("etcd", *self._etcd())
        self.api_server = self._start("kube-apiserver", *self._api_server())
        self.admin = self.api("admin")
        self.state.kubeconfig.write_text(self.admin.kubeconfig())
        daemons = (self.api_server, etcd)
        until(lambda: self.admin.text("/readyz"), "the API server's readiness", 120.0, daemons)
        self.controller_manager = self._start("kube-controller-manager", *self._controller_manager())
        self.scheduler = self._start("kube-scheduler", *self._scheduler())

    def wait_for_default_service_account(self) -> None:
        """Pods need it; its being there also shows that the controllers work."""
        path = "/api/v1/namespaces/default/serviceaccounts/default"
        until(lambda: self.admin.get(path), "the service account `default`", 60.0, [self.controller_manager])

    def api(self, user: str) -> Api:
        """The API server as seen by ``admin``, a component or ``system:node:NAME``."""
        return Api(self.network.api_ip, self.keys.authority, self._tokens[user])

    def kubeconfig(self, user: str) -> Path:
        """A file with the user's credentials, written where only root reads."""
        file = self.keys.folder / f"{user.replace(':', '-')}.kubeconfig"
        file.write_text(self.api(user).kubeconfig())
        return file

    def _start(self, name: str, *arguments: str) -> Daemon:
        return self.sandbox.start(name, [str(self.binaries[name]), *arguments], self.state.logs / f"{name}.log")

    def _server_names(self) -> list[str]:
        addresses = [f"IP:{ip}" for ip in (self.network.api_ip, API_SERVICE_IP, "127.0.0.1")]
        service = "kubernetes.default.svc"
        names = ["kubernetes", "kubernetes.default", service, f"{service}.cluster.local", "localhost"]
        return [*addresses, *(f"DNS:{name}" for name in names)]

    def _write_tokens(self) -> None:
        groups = {"admin": "system:masters", CONTROLLER_MANAGER: "", SCHEDULER: ""}
        groups |= {f"system:node:{name}": "system:nodes" for name in self.node_names}
        self._tokens |= {user: secrets.token_hex(16) for user in groups}
        lines = [f'{self._tokens[user]},{user},{user},"{group}"' for user, group in groups.items()]
        self._token_file.write_text("\n".join(lines) + "\n")

    @property
    def _token_file(self) -> Path:
        return self.state.keys / "tokens.csv"

    def _etcd(self) -> list[str]:
        return [
            f"--data-dir={self.state.ram}/etcd",
            "--unsafe-no-fsync",
            f"--listen-client-urls={ETCD}",
            f"--advertise-client-urls={ETCD}",
            f"--listen-peer-urls={ETCD_PEER}",
            f"--initial-advertise-peer-urls={ETCD_PEER}",
            f"--initial-cluster=default={ETCD_PEER}",
        ]

    def _api_server(self) -> list[str]:
        keys = self.keys
        return [
            f"--etcd-servers={ETCD}",
            f"--advertise-address={self.network.api_ip}",
            "--bind-address=0.0.0.0",
            "--secure-port=443",  # the port of the service, so that no address needs translation
            f"--service-cluster-ip-range={SERVICES}",
            f"--tls-cert-file={keys.certificate('apiserver')}",
            f"--tls-private-key-file={keys.key('apiserver')}",
            f"--client-ca-file={keys.authority}",
            f"--token-auth-file={self._token_file}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={keys.service_accounts}",
            f"--service-account-key-file={keys.service_accounts}",
            f"--kubelet-client-certificate={keys.certificate('kubelet-client')}",
            f"--kubelet-client-key={keys.key('kubelet-client')}",
            "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged",
            f"--default-not-ready-toleration-seconds={EVICTED_AFTER_S}",
            f"--default-unreachable-toleration-seconds={EVICTED_AFTER_S}",
        ]

    def _controller_manager(self) -> list[str]:
        keys = self.keys
        return [
            f"--kubeconfig={self.kubeconfig(CONTROLLER_MANAGER)}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=500",  # the default makes the controllers take 5 s to start
            "--kube-api-burst=1000",
            f"--flex-volume-plugin-dir={self.state.ram}/volume-plugins",
            f"--root-ca-file={keys.authority}",
            f"--service-account-private-key-file={keys.service_accounts}",
            f"--cluster-signing-cert-file={keys.authority}",
            f"--cluster-signing-key-file={keys.authority_key}",
            "--node-monitor-period=1s",
            f"--node-monitor-grace-period={NODE_LOST_S}s",
        ]

    def _scheduler(self) -> list[str]:
        return [f"--kubeconfig={self.kubeconfig(SCHEDULER)}", "--leader-elect=false", "--secure-port=0"]
