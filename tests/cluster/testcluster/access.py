"""What tests do with a cluster, whether they booted it or found it: kubectl, manifests, namespaces of their own.

``cluster`` makes one of these for the test cluster; `ExistingCluster` is the user's own (kind, k3d, minikube). Knows
nothing of how a cluster comes up.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from testcluster import images
from testcluster.process import until

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
PODS_GONE_S = 60.0


class KubectlError(RuntimeError):
    """kubectl failed; the message holds what it said."""


class UnsupportedError(RuntimeError):
    """The user's own cluster cannot do this; the message holds the remedy."""


class Access:
    """A running cluster.

    Args:
        kubectl: the program and its first arguments.
        kubeconfig: the administrator's.
        host_ip: the address at which pods reach servers that a test starts on this machine, where there is one.
        worker_image: the image that runs a render.
        operator_image: the image that runs the operator.
    """

    def __init__(
        self,
        kubectl: Sequence[str],
        kubeconfig: Path,
        host_ip: str | None,
        worker_image: str,
        operator_image: str,
    ) -> None:
        self._kubectl = kubectl
        self.kubeconfig = kubeconfig
        self._host_ip = host_ip
        self.worker_image = worker_image
        self.operator_image = operator_image

    @property
    def host_ip(self) -> str:
        """The address at which pods reach servers that a test starts on this machine.

        Raises:
            UnsupportedError: nobody said which it is in the user's own cluster.
        """
        if self._host_ip is None:
            raise UnsupportedError("set VIDEOJOB_TEST_HOST_IP to an address of this machine that pods can reach")
        return self._host_ip

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """What kubectl prints; with ``check=False`` also where it fails.

        Raises:
            KubectlError: kubectl failed and ``check`` is on.
        """
        environment = _without_proxies() | {"KUBECONFIG": str(self.kubeconfig)}
        done = subprocess.run(
            [*self._kubectl, *arguments], input=stdin, env=environment, capture_output=True, text=True, check=False
        )
        if check and done.returncode != 0:
            raise KubectlError(f"`kubectl {' '.join(arguments)}` failed: {done.stderr.strip()}")
        return done.stdout

    def apply(self, manifest: str | Mapping[str, Any] | list[Mapping[str, Any]]) -> None:
        """Apply a manifest: YAML or JSON text, one object, or a list of objects.

        Raises:
            KubectlError: the API server refused it.
        """
        if isinstance(manifest, list):
            manifest = {"apiVersion": "v1", "kind": "List", "items": manifest}
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        self.kubectl("apply", "--filename=-", stdin=text)

    @contextlib.contextmanager
    def namespace(self) -> Iterator[str]:
        """A fresh namespace that admits only pods of the restricted standard, deleted with all it holds afterwards."""
        name = f"test-{secrets.token_hex(4)}"
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}})
        try:
            self._wait_for_service_account(name)
            yield name
        finally:
            self._delete_namespace(name)

    def _wait_for_service_account(self, namespace: str) -> None:
        arguments = ("get", "serviceaccount", "default", f"--namespace={namespace}", "--ignore-not-found")
        until(lambda: self.kubectl(*arguments), f"the service account of namespace {namespace}", 60.0)

    def _delete_namespace(self, name: str) -> None:
        """Delete it first, so that controllers make no new pods; then hurry the pods, which may ignore SIGTERM.

        Returns when the pods are gone and their GPUs free; the namespace itself follows some seconds later.
        """
        self.kubectl("delete", "namespace", name, "--wait=false")
        self.kubectl("delete", "pods", "--all", f"--namespace={name}", "--grace-period=1", "--wait=false")
        arguments = ("get", "pods", f"--namespace={name}", "--output=name")
        until(lambda: not self.kubectl(*arguments), f"the end of the pods of namespace {name}", PODS_GONE_S)


class ExistingCluster(Access):
    """The user's own cluster, named by ``KUBECONFIG``.

    Images must have been loaded into it (``kind load docker-image``); their names come from
    ``VIDEOJOB_TEST_WORKER_IMAGE`` and ``VIDEOJOB_TEST_OPERATOR_IMAGE``. ``VIDEOJOB_TEST_HOST_IP`` is an address of
    this machine that its pods can reach (the gateway of the `kind` network).
    """

    def __init__(self, kubectl: Path, environment: Mapping[str, str]) -> None:
        super().__init__(
            kubectl=[str(kubectl)],
            kubeconfig=Path(environment["KUBECONFIG"].split(os.pathsep)[0]),
            host_ip=environment.get("VIDEOJOB_TEST_HOST_IP"),
            worker_image=environment.get("VIDEOJOB_TEST_WORKER_IMAGE", images.WORKER),
            operator_image=environment.get("VIDEOJOB_TEST_OPERATOR_IMAGE", images.OPERATOR),
        )

    def stop_node(self, name: str) -> None:
        raise UnsupportedError(f"cannot stop {name} of a cluster that is not the test's own: unset KUBECONFIG")

    def start_node(self, name: str) -> None:
        raise UnsupportedError(f"cannot start {name} of a cluster that is not the test's own: unset KUBECONFIG")


def kubectl_from_path() -> Path | None:
    found = shutil.which("kubectl")
    return Path(found) if found else None


def _without_proxies() -> dict[str, str]:
    """This process's environment; the API server is never behind a proxy."""
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
