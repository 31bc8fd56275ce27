"""The operator's only way to Kubernetes, and to its workers' HTTP. Blocking; called in threads.

Hands out plain dicts, as the API server sends them. Knows nothing of what they mean. The API server's answers become
one of the errors below, or stay ``ApiException`` where only time can help:

    ClusterError
    ├── NameTakenError   an object of that name belongs to someone else
    ├── ForbiddenError   quota, policy or rights forbid it for now
    ├── RefusedError     it will never be taken as it is
    ├── GoneError        its namespace is going or gone
    └── ConflictError    it was changed or replaced since it was read
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import httpx
import urllib3.exceptions
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from videojob_api import names
from videojob_api.progress import Progress

from .settings import Settings

log = logging.getLogger(__name__)

Object = dict[str, Any]

TIMEOUT_SECONDS = 20.0
POLL_TIMEOUT_SECONDS = 5.0
EVENT_BYTES = 1000  # the API server takes 1024


class ClusterError(Exception):
    """The API server did not do what was asked; the message says why and what helps."""


class NameTakenError(ClusterError):
    """An object of that name exists and belongs to someone else."""


class ForbiddenError(ClusterError):
    """Quota, policy or rights forbid it; that may change without anyone touching the VideoJob."""


class RefusedError(ClusterError):
    """The API server will never take the object as it is."""


class GoneError(ClusterError):
    """The namespace is being deleted or does not exist any more."""


class ConflictError(ClusterError):
    """The VideoJob was changed since it was read, or another one took its name."""


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
            ForbiddenError: not now.
            RefusedError: never.
            GoneError: not in this namespace.
        """
        ...

    def patch_status(self, videojob: Object, changes: Object) -> None:
        """Apply a merge patch to the status of a VideoJob as it was read; nothing if it was deleted since.

        Raises:
            ConflictError: it is no longer what was read.
        """
        ...

    def event(self, videojob: Object, kind: str, reason: str, message: str) -> None:
        """Say something where `kubectl describe` shows it; best effort, never fails."""
        ...

    def warning(self, kind: str, namespace: str, name: str) -> str:
        """The newest warning event about an object, empty if there is none."""
        ...

    def progress(self, pod: Object) -> Progress | None:
        """What the worker in this pod says, None if it does not answer."""
        ...


def connect(settings: Settings) -> KubernetesCluster:
    """The cluster that this process runs in, else that of the current kubeconfig."""
    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()
    return KubernetesCluster(client.ApiClient(), settings)


class KubernetesCluster:
    """A real cluster, behind an API client."""

    PATHS = {"ConfigMap": "api/v1", "Service": "api/v1", "Job": "apis/batch/v1", "Pod": "api/v1"}  # noqa: RUF012

    def __init__(self, api: client.ApiClient, settings: Settings) -> None:
        self._api = api
        self._settings = settings
        self._http = httpx.Client(timeout=POLL_TIMEOUT_SECONDS, trust_env=False)

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
                _explain(error, wanted)
                raise
            if _owner(self._call("GET", f"{path}/{metadata['name']}")) != _owner(wanted):
                raise NameTakenError(
                    f"{wanted['kind']} {metadata['name']} exists and belongs to someone else: "
                    "delete it, or name the VideoJob otherwise"
                ) from error
            return False
        return True

    def patch_status(self, videojob: Object, changes: Object) -> None:
        """See ``Cluster``."""
        metadata = videojob["metadata"]
        # The version also tells a VideoJob from its successor of the same name; a uid would be overlooked here.
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": changes}
        try:
            self._call("PATCH", f"{self._videojob(metadata['namespace'], metadata['name'])}/status", body=body)
        except ApiException as error:
            if error.status == 409:
                raise ConflictError(_answer(error)) from error
            if error.status != 404:
                raise

    def event(self, videojob: Object, kind: str, reason: str, message: str) -> None:
        """See ``Cluster``."""
        metadata = videojob["metadata"]
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{time.time_ns():x}", "namespace": metadata["namespace"]},
            "regarding": {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "type": kind,
            "reason": reason,
            "note": message.encode()[:EVENT_BYTES].decode(errors="ignore"),
            "action": "Reconcile",
            "eventTime": now,
            "reportingController": f"{names.GROUP}/{names.MANAGED_BY}",
            "reportingInstance": names.MANAGED_BY,
        }
        try:
            self._call("POST", f"/apis/events.k8s.io/v1/namespaces/{metadata['namespace']}/events", body=body)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            log.warning("%s/%s: event %s is not recorded: %r", metadata["namespace"], metadata["name"], reason, error)

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
        except (httpx.HTTPError, ApiException, ValueError):  # not listening yet, no longer, or half ready
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


def _explain(error: ApiException, wanted: Object) -> None:
    """Raise what the answer to a creation means, if it is known."""
    said = f"the API server refuses {wanted['kind']} {wanted['metadata']['name']}: {_answer(error)}"
    if error.status == 404 or "NamespaceTerminating" in (error.body or ""):
        raise GoneError(said) from error
    if error.status in (400, 403):  # 400 is how some admission webhooks say no
        raise ForbiddenError(f"{said}; tried again until quota, policy or rights allow it") from error
    if error.status in (413, 422):
        raise RefusedError(f"{said}; create another VideoJob without what it objects to") from error


def _answer(error: ApiException) -> str:
    """The API server's own words."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.body or error.reason)


def _owner(found: Object) -> str:
    references = found.get("metadata", {}).get("ownerReferences") or ()
    return next((str(reference["uid"]) for reference in references if reference.get("controller")), "")
