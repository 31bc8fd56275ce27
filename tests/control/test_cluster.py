"""What the API server's and the worker's answers mean, over real HTTP to servers of a few lines."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from videojob_operator import job
from videojob_operator.cluster import (
    ConflictError,
    ForbiddenError,
    GoneError,
    KubernetesCluster,
    NameTakenError,
    RefusedError,
)
from videojob_operator.settings import Settings

from .builders import NAME, NAMESPACE, document, pod, progress, videojob

CONFIG_MAP = job.objects(videojob(), 1, Settings())[0]
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
VIDEOJOB = f"/apis/videojob.dev/v1alpha1/namespaces/{NAMESPACE}/videojobs/{NAME}"
EVENTS = f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events"


class Server:
    """Answers each (method, path) as told and keeps what was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: dict[tuple[str, str], tuple[int, object]] = {}
        self.asked: list[tuple[str, str, dict]] = []

    def refuse(self, method: str, path: str, code: int, message: str, *causes: str) -> None:
        details = {"causes": [{"reason": cause} for cause in causes]}
        self.answers[method, path] = (code, {"kind": "Status", "message": message, "code": code, "details": details})

    @property
    def bodies(self) -> list[dict]:
        return [body for _, _, body in self.asked]


@contextmanager
def serving() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            path = self.path.partition("?")[0]
            server.asked.append((self.command, self.path, json.loads(self.rfile.read(length) or "{}")))
            code, body = server.answers.get((self.command, path), (200, {}))
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            self.do_GET()

        def do_PATCH(self) -> None:
            self.do_GET()

        def log_message(self, *arguments: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def cluster(server) -> Iterator[KubernetesCluster]:
    configuration = client.Configuration()
    configuration.host = server.url
    configuration.retries = False
    with client.ApiClient(configuration) as api:
        yield KubernetesCluster(api, Settings(poll_through="proxy"))
        api.rest_client.pool_manager.clear()


@pytest.mark.parametrize(
    ("code", "causes", "error"),
    [
        (422, (), RefusedError),
        (413, (), RefusedError),
        (403, (), ForbiddenError),
        (400, (), ForbiddenError),
        (403, ("NamespaceTerminating",), GoneError),
        (404, (), GoneError),
    ],
)
def test_a_refused_creation_is_told_by_its_kind_with_the_servers_words(server, cluster, code, causes, error):
    server.refuse("POST", CONFIG_MAPS, code, "the server's words", *causes)
    with pytest.raises(error, match="ConfigMap boat-1: the server's words"):
        cluster.create(CONFIG_MAP)


def test_an_answer_in_other_words_is_passed_on(server, cluster):
    server.answers["POST", CONFIG_MAPS] = (413, b"too large, says a proxy")
    with pytest.raises(RefusedError, match="says a proxy"):
        cluster.create(CONFIG_MAP)


def test_a_server_in_trouble_is_not_mistaken_for_a_refusal(server, cluster):
    server.refuse("POST", CONFIG_MAPS, 500, "etcd is away")
    with pytest.raises(client.ApiException, match="etcd is away"):
        cluster.create(CONFIG_MAP)


def test_what_is_there_already_and_ours_is_not_made_again(server, cluster):
    assert cluster.create(CONFIG_MAP) is True
    server.refuse("POST", CONFIG_MAPS, 409, "already exists")
    server.answers["GET", f"{CONFIG_MAPS}/boat-1"] = (200, CONFIG_MAP)
    assert cluster.create(CONFIG_MAP) is False


@pytest.mark.parametrize("owners", [[], [{"uid": "another", "controller": True}]], ids=["nobody's", "another's"])
def test_what_is_there_already_and_not_ours_is_left_alone(server, cluster, owners):
    server.refuse("POST", CONFIG_MAPS, 409, "already exists")
    server.answers["GET", f"{CONFIG_MAPS}/boat-1"] = (200, {"metadata": {"ownerReferences": owners}})
    with pytest.raises(NameTakenError, match="name the VideoJob otherwise"):
        cluster.create(CONFIG_MAP)


def test_a_missing_videojob_is_none(server, cluster):
    server.refuse("GET", VIDEOJOB, 404, "not found")
    assert cluster.videojob(NAMESPACE, NAME) is None


def test_a_status_patch_holds_for_the_videojob_that_was_read(server, cluster):
    cluster.patch_status(document(), {"phase": "Pending"})
    ((method, path, body),) = server.asked
    assert (method, path) == ("PATCH", f"{VIDEOJOB}/status")
    assert body == {"metadata": {"resourceVersion": "1"}, "status": {"phase": "Pending"}}


def test_a_status_patch_for_a_changed_videojob_is_a_conflict(server, cluster):
    server.refuse("PATCH", f"{VIDEOJOB}/status", 409, "the object has been modified")
    with pytest.raises(ConflictError, match="has been modified"):
        cluster.patch_status(document(), {})


def test_a_status_patch_for_a_deleted_videojob_is_nothing(server, cluster):
    server.refuse("PATCH", f"{VIDEOJOB}/status", 404, "not found")
    cluster.patch_status(document(), {})


def test_an_event_regards_its_videojob(server, cluster):
    cluster.event(document(), "Normal", "Rendering", "blocks are being denoised")
    (event,) = server.bodies
    assert (event["type"], event["reason"], event["note"]) == ("Normal", "Rendering", "blocks are being denoised")
    assert event["regarding"]["uid"] == "uid-1"


def test_a_long_event_fits_whatever_its_characters(server, cluster):
    cluster.event(document(), "Warning", "Failed", "🦊" * 2000)
    (event,) = server.bodies
    assert 900 < len(event["note"].encode()) <= 1024


def test_an_event_that_is_not_taken_is_no_failure(server, cluster, caplog):
    server.refuse("POST", EVENTS, 403, "no events here")
    with caplog.at_level(logging.WARNING):
        cluster.event(document(), "Normal", "Rendering", "why")
    assert "studio/boat: event Rendering is not recorded" in caplog.text


def test_the_newest_warning_is_told(server, cluster):
    def warning(second: int, message: str):
        return {"metadata": {"creationTimestamp": f"2026-01-01T00:00:0{second}Z"}, "message": message}

    items = [warning(2, "newest"), warning(1, "older")]
    server.answers["GET", f"/api/v1/namespaces/{NAMESPACE}/events"] = (200, {"items": items})
    assert cluster.warning("Job", NAMESPACE, "boat-1") == "newest"
    server.answers.clear()
    server.answers["GET", f"/api/v1/namespaces/{NAMESPACE}/events"] = (200, {"items": []})
    assert cluster.warning("Job", NAMESPACE, "boat-1") == ""


PROXY = f"/api/v1/namespaces/{NAMESPACE}/pods/boat-1-0-abcde:8080/proxy/progress"


def test_progress_is_read_through_the_api_server(server, cluster):
    server.answers["GET", PROXY] = (200, progress().model_dump(mode="json", by_alias=True))
    assert cluster.progress(pod()) == progress()


@pytest.mark.parametrize("answer", [(503, {"message": "no endpoints"}), (200, {"stage": "Napping"}), (200, b"<html>")])
def test_a_worker_that_does_not_answer_sensibly_says_nothing(server, cluster, answer):
    server.answers["GET", PROXY] = answer
    assert cluster.progress(pod()) is None


def test_a_pod_without_an_address_says_nothing():
    cluster = KubernetesCluster(None, Settings(poll_through="pod"))
    assert cluster.progress(pod()) is None


INSTALL = Path(__file__).parents[2] / "manifests" / "install.yaml"


def test_the_installed_role_allows_exactly_what_is_asked(server, cluster):
    """Of the operator itself; kopf's watches come on top."""
    server.answers["GET", f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"] = (200, {"items": []})
    server.answers["GET", f"/api/v1/namespaces/{NAMESPACE}/pods"] = (200, {"items": []})
    server.answers["GET", f"/api/v1/namespaces/{NAMESPACE}/events"] = (200, {"items": []})
    cluster.videojob(NAMESPACE, NAME)
    cluster.owned("Job", NAMESPACE, NAME)
    cluster.owned("Pod", NAMESPACE, NAME)
    for each in job.objects(videojob(nodes=2), 1, Settings()):
        cluster.create(each)
    cluster.patch_status(document(), {})
    cluster.event(document(), "Normal", "Rendering", "why")
    cluster.warning("Job", NAMESPACE, "boat-1")
    documents = yaml.safe_load_all(INSTALL.read_text())
    (role,) = (each for each in documents if each["kind"] == "ClusterRole")
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {right(method, path) for method, path, _ in server.asked}
    assert asked <= allowed
    assert len(asked) == len(server.asked)
    assert not [each for each in allowed if "*" in each or each[1] == "secrets" or "delete" in each[2]]


def right(method: str, path: str) -> tuple[str, str, str]:
    """The (group, resource, verb) that a request needs."""
    parts = path.partition("?")[0].strip("/").split("/")
    group = "" if parts[0] == "api" else parts[1]
    rest = parts[parts.index("namespaces") + 2 :]
    resource = "/".join([rest[0], *rest[2:]])
    verb = {"POST": "create", "PATCH": "patch", "GET": "get" if len(rest) > 1 else "list"}[method]
    return group, resource, verb
