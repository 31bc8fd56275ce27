"""The operator's only way to Kubernetes, and to its workers' HTTP. Blocking; called in threads.

Hands out plain dicts, as the API server sends them. Knows nothing of what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import httpx
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from pydantic import ValidationError

from videojob_api import names
from videojob_api.progress import Progress

from .settings import Settings

Object = dict[str, Any]

TIMEOUT_SECONDS = 20.0


class NameTakenError(Exception):
    """An object of that name exists and belongs to someone else."""


class Cluster(Protocol):
    """What the operator does in a cluster."""

    def videojob(self, namespace: str, name: str) -> Object | None:
        """A VideoJob, None if it does not exist."""
        ...

    def owned(self, kind: str, namespace: str, name: str) -> list[Object]:
        """The Jobs or Pods that carry a VideoJob's label."""
        ...

    def create(self, wanted: Object) -> bool:
        """Create an object of ours; False if it exists already.

        Raises:
            NameTakenError: it exists and is not ours.
        """
        ...

    def patch_status(self, namespace: str, name: str, status: Object) -> None:
        """Replace a VideoJob's status."""
        ...

    def event(self, videojob: Object, kind: str, reason: str, message: str) -> None:
        """Say something where `kubectl describe` shows it."""
        ...

    def warning(self, kind: str, namespace: str, name: str) -> str:
        """The newest warning event about an object, empty if there is none."""
        ...

    def progress(self, pod: Object) -> Progress | None:
        """What the worker in this pod says, None if it does not answer."""
        ...


class KubernetesCluster:
    """A real cluster: in-cluster configuration, else the current kubeconfig."""

    PATHS = {"ConfigMap": "api/v1", "Service": "api/v1", "Job": "apis/batch/v1", "Pod": "api/v1"}  # noqa: RUF012

    def __init__(self, settings: Settings) -> None:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
        self._api = client.ApiClient()
        self._settings = settings
        self._http = httpx.Client(timeout=5.0, trust_env=False)

    def videojob(self, namespace: str, name: str) -> Object | None:
        """See ``Cluster``."""
        try:
            return self._call("GET", self._videojob(namespace, name))
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def owned(self, kind: str, namespace: str, name: str) -> list[Object]:
        """See ``Cluster``."""
        selector = [("labelSelector", f"{names.LABEL_VIDEOJOB}={name}")]
        answer = self._call("GET", self._collection(kind, namespace), query=selector)
        items: list[Object] = answer["items"]
        return items

    def create(self, wanted: Object) -> bool:
        """See ``Cluster``."""
        metadata = wanted["metadata"]
        path = self._collection(wanted["kind"], metadata["namespace"])
        try:
            self._call("POST", path, body=wanted)
        except ApiException as error:
            if error.status != 409:
                raise
            found = self._call("GET", f"{path}/{metadata['name']}")
            if _owner(found) != _owner(wanted):
                kind, name = wanted["kind"], metadata["name"]
                raise NameTakenError(
                    f"{kind} {name} exists and belongs to someone else: delete it, or name the VideoJob otherwise"
                ) from error
            return False
        return True

    def patch_status(self, namespace: str, name: str, status: Object) -> None:
        """See ``Cluster``."""
        try:
            self._call("PATCH", f"{self._videojob(namespace, name)}/status", body={"status": status})
        except ApiException as error:
            if error.status != 404:  # deleted meanwhile
                raise

    def event(self, videojob: Object, kind: str, reason: str, message: str) -> None:
        """See ``Cluster``."""
        metadata = videojob["metadata"]
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
            "regarding": {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "type": kind,
            "reason": reason,
            "note": message[:1000],
            "action": "Reconcile",
            "eventTime": now,
            "reportingController": f"{names.GROUP}/{names.MANAGED_BY}",
            "reportingInstance": names.MANAGED_BY,
        }
        self._call("POST", f"/apis/events.k8s.io/v1/namespaces/{metadata['namespace']}/events", body=body)

    def warning(self, kind: str, namespace: str, name: str) -> str:
        """See ``Cluster``."""
        selector = f"type=Warning,involvedObject.kind={kind},involvedObject.name={name}"
        answer = self._call("GET", f"/api/v1/namespaces/{namespace}/events", query=[("fieldSelector", selector)])
        newest = sorted(answer["items"], key=lambda event: event["metadata"]["creationTimestamp"])[-1:]
        return "".join(str(event.get("message", "")) for event in newest)

    def progress(self, pod: Object) -> Progress | None:
        """See ``Cluster``."""
        try:
            return Progress.model_validate_json(self._ask(pod))
        except (httpx.HTTPError, ApiException, ValidationError):  # not listening yet, no longer, or half ready
            return None

    def _ask(self, pod: Object) -> str:
        metadata = pod["metadata"]
        if self._settings.poll_through == "proxy":
            pods = self._collection("Pod", metadata["namespace"])
            return json.dumps(self._call("GET", f"{pods}/{metadata['name']}:{names.PROGRESS_PORT}/proxy/progress"))
        address = pod.get("status", {}).get("podIP", "")
        host = f"[{address}]" if ":" in address else address
        answer = self._http.get(f"http://{host}:{names.PROGRESS_PORT}/progress")
        return answer.raise_for_status().text

    def _videojob(self, namespace: str, name: str) -> str:
        return f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}/{name}"

    def _collection(self, kind: str, namespace: str) -> str:
        return f"/{self.PATHS[kind]}/namespaces/{namespace}/{kind.lower()}s"

    def _call(
        self, method: str, path: str, *, body: Object | None = None, query: Sequence[tuple[str, str]] = ()
    ) -> Object:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        answer = self._api.call_api(
            *self._api.param_serialize(
                method=method,
                resource_path=path,
                query_params=list(query),
                header_params={"Accept": "application/json", "Content-Type": kind},
                body=body,
                auth_settings=["BearerToken"],
            ),
            _request_timeout=TIMEOUT_SECONDS,
        )
        answer.read()
        if not 200 <= answer.status < 300:
            raise ApiException(http_resp=answer)
        parsed: Object = json.loads(answer.data)
        return parsed


def _owner(found: Object) -> str:
    references = found.get("metadata", {}).get("ownerReferences") or ()
    return next((str(reference["uid"]) for reference in references if reference.get("controller")), "")
