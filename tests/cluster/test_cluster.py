"""What the test cluster promises to every other test."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from testcluster import preflight
from testcluster.access import Access, KubectlError
from testcluster.cluster import Cluster
from testcluster.process import DaemonError, until
from testcluster.s3 import S3Server
from testcluster.sandbox import Sandbox

GPU = "nvidia.com/gpu"
HERE = Path(__file__).resolve().parent
POD_S = 90.0

SERVE = "import http.server as h; h.HTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"
FETCH = """
import time, urllib.request
def fetch(deadline=time.monotonic() + 30):
    try:
        return urllib.request.urlopen("http://first.pods:8000", timeout=5).status
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.1)
        return fetch()
print("status", fetch())
"""
CALL_API = """
from kubernetes import client, config
config.load_incluster_config()
namespace = open("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read()
api = client.CoreV1Api()
print("pods", len(api.list_namespaced_pod(namespace).items))
try:
    api.list_namespaced_secret(namespace)
except client.ApiException as error:
    print("secrets", error.status)
"""
PUT = """
import boto3, os
client = boto3.client("s3")
client.put_object(Bucket=os.environ["BUCKET"], Key="from/a/pod", Body=b"hello")
"""
OWN_A_CLUSTER = """
import signal
from testcluster.cluster import Cluster
with Cluster(nodes=1) as cluster:
    print(cluster.kubeconfig.parent, flush=True)
    signal.pause()
"""


def pod_spec(access: Access, code: str, gpus: int = 0, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A pod of the restricted standard that runs Python code in the worker image."""
    container = {
        "name": "main",
        "image": access.worker_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", code],
        "env": [{"name": name, "value": value} for name, value in (environment or {}).items()],
        "resources": {"limits": {GPU: str(gpus)}} if gpus else {},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }


def pod(name: str, namespace: str, spec: dict[str, Any], labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def job(name: str, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    template = {"spec": spec}
    metadata = {"name": name, "namespace": namespace}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {"backoffLimit": 0, "template": template},
    }


def pods_of(access: Access, namespace: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(access.kubectl("get", "pods", f"-n={namespace}", "-o=json"))["items"]
    return items


def output_of(access: Access, namespace: str, name: str) -> str:
    """What the pod printed, once it has ended well."""

    def ended() -> str:
        phase = access.kubectl("get", "pod", name, f"-n={namespace}", "-o=jsonpath={.status.phase}")
        return phase if phase in ("Succeeded", "Failed") else ""

    phase = until(ended, f"the end of pod {name}", POD_S, every_s=0.2)
    output = access.kubectl("logs", name, f"-n={namespace}")
    assert phase == "Succeeded", output
    return output


def test_every_node_is_ready_and_offers_eight_gpus(own_cluster: Cluster) -> None:
    nodes = json.loads(own_cluster.kubectl("get", "nodes", "-o=json"))["items"]
    ready = {
        node["metadata"]["name"]: condition["status"]
        for node in nodes
        for condition in node["status"]["conditions"]
        if condition["type"] == "Ready"
    }
    assert ready == {"node-0": "True", "node-1": "True"}
    assert [node["status"]["allocatable"][GPU] for node in nodes] == ["8", "8"]


def test_a_restricted_job_with_eight_gpus_runs_torch_to_completion(own_cluster: Cluster, namespace: str) -> None:
    spec = pod_spec(own_cluster, "import os, torch; print(os.getuid(), torch.ones(3).sum().item())", gpus=8)
    own_cluster.apply(job("render", namespace, spec))
    own_cluster.kubectl("wait", "job/render", f"-n={namespace}", "--for=condition=Complete", f"--timeout={POD_S}s")
    assert own_cluster.kubectl("logs", "job/render", f"-n={namespace}") == "65532 3.0\n"


def test_a_third_job_of_eight_gpus_waits_for_one_of_two_nodes(own_cluster: Cluster, namespace: str) -> None:
    spec = pod_spec(own_cluster, "import signal; signal.pause()", gpus=8)
    own_cluster.apply([job(name, namespace, spec) for name in ("one", "two", "three")])

    def settled() -> list[dict[str, Any]]:
        pods = pods_of(own_cluster, namespace)
        running = [item for item in pods if item["status"]["phase"] == "Running"]
        return pods if len(running) == 2 else []

    pods = until(settled, "two running pods", POD_S, every_s=0.2)
    waiting = [item["status"] for item in pods if item["status"]["phase"] == "Pending"]
    assert {item["spec"].get("nodeName") for item in pods} == {"node-0", "node-1", None}
    assert "Insufficient nvidia.com/gpu" in waiting[0]["conditions"][0]["message"]


def test_a_pod_finds_another_by_its_headless_service(cluster: Access, namespace: str) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "pods", "namespace": namespace},
        "spec": {"clusterIP": "None", "selector": {"app": "pods"}, "publishNotReadyAddresses": True},
    }
    server = pod_spec(cluster, SERVE) | {"hostname": "first", "subdomain": "pods"}
    first = pod("first", namespace, server, labels={"app": "pods"})
    second = pod("second", namespace, pod_spec(cluster, FETCH))
    cluster.apply([service, first, second])
    assert output_of(cluster, namespace, "second") == "status 200\n"


def test_this_machine_reaches_a_pod(own_cluster: Cluster, namespace: str) -> None:
    own_cluster.apply(pod("server", namespace, pod_spec(own_cluster, SERVE)))
    own_cluster.kubectl("wait", "pod/server", f"-n={namespace}", "--for=condition=Ready", f"--timeout={POD_S}s")
    address = pods_of(own_cluster, namespace)[0]["status"]["podIP"]

    def served() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((address, 8000)) == 0

    until(served, "the pod's server", 20.0)


def test_a_pod_calls_the_api_with_the_rights_of_its_service_account(cluster: Access, namespace: str) -> None:
    cluster.kubectl("create", "role", "reader", f"-n={namespace}", "--verb=list", "--resource=pods")
    account = f"--serviceaccount={namespace}:default"
    cluster.kubectl("create", "rolebinding", "reader", f"-n={namespace}", "--role=reader", account)
    cluster.apply(pod("caller", namespace, pod_spec(cluster, CALL_API)))
    assert output_of(cluster, namespace, "caller") == "pods 1\nsecrets 403\n"


def test_a_privileged_pod_is_refused(cluster: Access, namespace: str) -> None:
    spec = pod_spec(cluster, "pass")
    spec["containers"][0]["securityContext"] = {"privileged": True}
    with pytest.raises(KubectlError, match='violates PodSecurity "restricted'):
        cluster.apply(pod("privileged", namespace, spec))


def test_a_pod_writes_to_the_object_store_of_this_machine(
    cluster: Access, cluster_s3: S3Server, namespace: str
) -> None:
    environment = cluster_s3.environment | {"BUCKET": cluster_s3.bucket()}
    cluster.apply(pod("writer", namespace, pod_spec(cluster, PUT, environment=environment)))
    output_of(cluster, namespace, "writer")
    assert (cluster_s3.root / environment["BUCKET"] / "from/a/pod").read_bytes() == b"hello"


def test_a_stopped_node_is_lost_and_a_started_one_comes_back(own_cluster: Cluster) -> None:
    def ready() -> str:
        path = '-o=jsonpath={.status.conditions[?(@.type=="Ready")].status}'
        return own_cluster.kubectl("get", "node", "node-1", path)

    own_cluster.stop_node("node-1")
    try:
        until(lambda: ready() == "Unknown", "node-1 is lost", 60.0, every_s=0.2)
    finally:
        own_cluster.start_node("node-1")
    assert ready() == "True"


def traces_of(folder: Path) -> list[str]:
    """What is left of the cluster with that folder: files, mounts, links, control groups, processes."""
    identity = folder.name.removeprefix("videojob-")
    links = [path.name for path in Path("/sys/class/net").iterdir() if path.name.endswith(identity)]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if identity in line]
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/*{identity}*")]
    folders = [str(folder)] if folder.exists() else []
    return [*folders, *links, *mounts, *groups, *processes_of(folder)]


def processes_of(folder: Path) -> list[str]:
    """The command lines of a cluster's daemons and containers, which name its folder or lie in its control groups."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            groups = (process / "cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if folder.name in command + groups:
            found.append(command)
    return found


@pytest.mark.cluster
def test_nothing_is_left_of_a_closed_cluster() -> None:
    with Cluster(nodes=1) as second:
        folder = second.kubeconfig.parent
        second.apply(pod("sleeper", "default", pod_spec(second, "import signal; signal.pause()")))
        second.kubectl("wait", "pod/sleeper", "--for=condition=Ready", f"--timeout={POD_S}s")
        running = processes_of(folder)
    assert any("kubelet" in command for command in running)
    assert any("containerd-shim" in command for command in running)
    assert any("signal.pause" in command for command in running)
    assert traces_of(folder) == []


@pytest.mark.cluster
def test_a_killed_owner_takes_its_daemons_along_and_the_next_boot_removes_the_rest() -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", OWN_A_CLUSTER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        assert processes_of(folder)
        owner.send_signal(signal.SIGKILL)
    until(lambda: not processes_of(folder), "the end of the daemons", 10.0)
    assert folder.exists()
    removed: list[str] = []
    with Cluster(nodes=0, progress=removed.append):
        assert traces_of(folder) == []
    assert removed[0].startswith("removed what the crashed cluster")


@pytest.mark.cluster
def test_a_daemon_that_does_not_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    sandbox = Sandbox({"PATH": os.environ["PATH"]})
    try:
        daemon = sandbox.start("etcd", ["sh", "-c", "echo too many open files; exit 3"], tmp_path / "log")
        with pytest.raises(DaemonError, match=r"(?s)etcd ended with exit code 3.*too many open.*What helps: raise"):
            until(lambda: False, "etcd", daemons=[daemon])
    finally:
        sandbox.close()


def test_a_machine_that_lacks_something_is_told_what_to_install() -> None:
    bare = preflight.Machine(user=1000, which=lambda _: None, exists=lambda _: False)
    with pytest.raises(preflight.PreflightError) as told:
        preflight.check(nodes=1, to_build=lambda: True, machine=bare)
    for remedy in ("run as root, or set KUBECONFIG", "iproute2", "containernetworking-plugins", "gcc"):
        assert remedy in str(told.value)
