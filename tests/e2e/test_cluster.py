"""From `kubectl apply` to a playable video in S3, on a real cluster with the installed operator."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from testcluster.process import until
from testcluster.s3 import S3Server
from videojob_api import names

MANIFESTS = Path(__file__).parents[2] / "manifests"
SAMPLES = MANIFESTS / "samples"
BUCKET = "videos"


@pytest.fixture(scope="module")
def s3(cluster, tiny_model) -> Iterator[S3Server]:
    """The store that the samples expect: port 7070, a bucket `videos`, the tiny model in it."""
    with S3Server(cluster.host_ip, port=7070) as server:
        server.bucket(BUCKET)
        client = server.client()
        for file in tiny_model.rglob("*"):
            if file.is_file():
                key = f"models/tiny-wan/{file.relative_to(tiny_model)}"
                client.upload_file(str(file), BUCKET, key)
        yield server


@pytest.fixture(scope="module")
def operator(cluster) -> Iterator[None]:
    """The operator, installed as the README says, with the images of the test cluster."""
    cluster.kubectl("apply", "--server-side", "--filename", str(MANIFESTS / "crd.yaml"))
    documents = list(yaml.safe_load_all((MANIFESTS / "install.yaml").read_text()))
    for document in documents:
        if document["kind"] == "Deployment":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            container["image"] = cluster.operator_image
            for variable in container["env"]:
                if variable["name"] == "VIDEOJOB_WORKER_IMAGE":
                    variable["value"] = cluster.worker_image
    cluster.apply(documents)
    cluster.kubectl(
        "wait", "--namespace=videojob-system", "--for=condition=Available", "deployment/videojob-operator",
        "--timeout=120s",
    )  # fmt: skip
    yield
    cluster.kubectl("delete", "namespace", "videojob-system", "--wait=false")


@pytest.fixture
def storage(cluster, namespace, s3) -> str:
    """The namespace with what the samples expect in it: Service `s3` and Secret `s3-credentials`."""
    cluster.apply(
        [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "s3", "namespace": namespace},
                "spec": {"clusterIP": "None", "ports": [{"port": 7070}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": "s3",
                    "namespace": namespace,
                    "labels": {"kubernetes.io/service-name": "s3"},
                },
                "addressType": "IPv4",
                "ports": [{"port": 7070}],
                "endpoints": [{"addresses": [s3.address]}],
            },
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "s3-credentials", "namespace": namespace},
                "stringData": {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key},
            },
        ]
    )
    return namespace


class Watched:
    """A VideoJob on the cluster, looked at with kubectl."""

    def __init__(self, cluster, namespace: str, document: dict) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.name = document["metadata"]["name"]
        cluster.apply({**document, "metadata": {**document["metadata"], "namespace": namespace}})

    def kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments)

    def get(self, kind: str, name: str) -> dict:
        return json.loads(self.kubectl("get", kind, name, "--output=json", "--ignore-not-found") or "{}")

    def list(self, kinds: str) -> list[dict]:
        selector = f"--selector={names.LABEL_VIDEOJOB}={self.name}"
        return json.loads(self.kubectl("get", kinds, selector, "--output=json"))["items"]

    @property
    def status(self) -> dict:
        return self.get("videojob", self.name).get("status", {})

    def until_phase(self, *phases: str, timeout_s: float = 240.0) -> dict:
        def reached() -> dict | None:
            status = self.status
            if status.get("phase") == "Failed" and "Failed" not in phases:
                pytest.fail(f"the VideoJob failed: {json.dumps(status, indent=1)}\n{self.logs}")
            return status if status.get("phase") in phases else None

        return until(reached, f"phase {phases} of {self.name}", timeout_s, every_s=0.3)

    @property
    def logs(self) -> str:
        return self.kubectl("logs", f"--selector={names.LABEL_VIDEOJOB}={self.name}", "--tail=40")


def sample(name: str, **spec) -> dict:
    document = yaml.safe_load((SAMPLES / name).read_text())
    return {**document, "spec": {**document["spec"], **spec}}


def frames(address: str) -> int:
    command = ["ffprobe", "-v", "error", "-count_frames", "-select_streams", "v", "-of", "json", "-show_streams"]
    done = subprocess.run([*command, address], capture_output=True, text=True, check=True)
    assert done.stderr == "", "every frame decodes"
    return int(json.loads(done.stdout)["streams"][0]["nb_read_frames"])


def conditions(status: dict) -> dict[str, str]:
    return {condition["type"]: condition["status"] for condition in status["conditions"]}


def test_the_minimal_sample_becomes_a_playable_video(cluster, operator, s3, storage):
    job = Watched(cluster, storage, sample("01-minimal.yaml"))
    status = job.until_phase("Succeeded")
    assert status["progress"]["percent"] == 100
    assert status["progress"]["framesReady"] == 150
    assert status["attempt"] == 1
    assert conditions(status)["Complete"] == "True"
    assert status["output"]["playlistURL"] == "http://s3:7070/videos/minimal/index.m3u8"
    folder = s3.root / BUCKET / "minimal"
    assert frames(str(folder / "video.mp4")) == 150
    assert frames(str(folder / "index.m3u8")) == 150
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sum(segment["frames"] for segment in manifest["segments"]) == 150
    columns = job.kubectl("get", "vj").splitlines()
    assert columns[0].split() == ["NAME", "PHASE", "PROGRESS", "ETA", "ATTEMPT", "AGE"]
    assert columns[1].split()[:2] == ["minimal", "Succeeded"]
    described = job.kubectl("describe", "vj", "minimal")
    assert "playlist URL" in described.lower() or "Playlist URL" in described
    (pod,) = job.list("pods")
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert not pod["spec"]["automountServiceAccountToken"]


def test_seconds_are_playable_long_before_the_end(cluster, operator, s3, storage):
    video = {"frames": 1201, "width": 128, "height": 80}
    document = sample("01-minimal.yaml", video=video)
    document["metadata"]["name"] = "long"
    document["spec"]["output"]["s3"]["prefix"] = "long"
    job = Watched(cluster, storage, document)

    def first_seconds() -> dict | None:
        progress = job.status.get("progress") or {}
        return progress if progress.get("segments", 0) > 0 else None

    seen = until(first_seconds, "the first segment in the status", 240, every_s=0.2)
    assert seen["blocksDone"] < seen["blocksTotal"] / 2
    playlist = (s3.root / BUCKET / "long" / "index.m3u8").read_text()
    assert "segments/00000.m4s" in playlist
    assert "#EXT-X-ENDLIST" not in playlist
    percents = [seen["percent"]]
    while job.until_phase("Rendering", "Succeeded")["phase"] != "Succeeded":
        percents.append(job.status["progress"]["percent"])
    assert percents == sorted(percents)
    assert len(set(percents)) > 3, "the progress is seen to climb"
    assert frames(str(s3.root / BUCKET / "long" / "video.mp4")) == 1201


def test_an_awkward_prompt_arrives_as_it_is(cluster, operator, s3, storage):
    prompt = ("\"double\" 'single' `tick` $(touch /tmp/pwned) ${HOME} %s \\n\nnew line\ttab 🦊 <b>;|&" * 150)[:10_000]
    document = sample("01-minimal.yaml", prompt=prompt, video={"frames": 9, "width": 64, "height": 48})
    document["metadata"]["name"] = "awkward"
    document["spec"]["output"]["s3"]["prefix"] = "awkward"
    job = Watched(cluster, storage, document)
    job.until_phase("Succeeded")
    (pod,) = job.list("pods")
    assert "pwned" not in json.dumps(pod)
    (mounted,) = job.list("configmaps")
    assert json.loads(mounted["data"][names.SPEC_FILE])["spec"]["prompt"] == prompt


def test_the_gpu_sample_asks_for_8_gpus_and_is_scheduled(cluster, operator, storage):
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "models", "namespace": storage},
            "spec": {
                "accessModes": ["ReadOnlyMany"],
                "resources": {"requests": {"storage": "1Gi"}},
                "storageClassName": "",
                "volumeName": f"models-{storage}",
            },
        }
    )
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"models-{storage}"},
            "spec": {
                "accessModes": ["ReadOnlyMany"],
                "capacity": {"storage": "1Gi"},
                "storageClassName": "",
                "hostPath": {"path": "/tmp"},
                "claimRef": {"name": "models", "namespace": storage},
            },
        }
    )
    job = Watched(cluster, storage, sample("02-eight-gpus.yaml"))

    def scheduled() -> dict | None:
        pods = job.list("pods")
        return pods[0] if pods and pods[0]["spec"].get("nodeName") else None

    pod = until(scheduled, "a node for the pod", 60)
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    status = job.until_phase("Failed")
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert failed["reason"] in ("InvalidSpec", "ModelNotFound"), (
        "there are no GPUs and no model behind the node's promise"
    )
    cluster.kubectl("delete", "persistentvolume", f"models-{storage}", "--wait=false")


def test_a_render_from_a_claim(cluster, operator, s3, storage, tiny_model):
    volume = f"tiny-{storage}"
    cluster.apply(
        [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": volume},
                "spec": {
                    "accessModes": ["ReadOnlyMany"],
                    "capacity": {"storage": "1Gi"},
                    "storageClassName": "",
                    "hostPath": {"path": str(Path(__file__).parents[2])},
                    "claimRef": {"name": "tiny", "namespace": storage},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "tiny", "namespace": storage},
                "spec": {
                    "accessModes": ["ReadOnlyMany"],
                    "resources": {"requests": {"storage": "1Gi"}},
                    "storageClassName": "",
                    "volumeName": volume,
                },
            },
        ]
    )
    source = {"persistentVolumeClaim": {"claimName": "tiny", "path": "not-a-model"}}
    document = sample("01-minimal.yaml", model={"source": source})
    document["metadata"]["name"] = "claim"
    job = Watched(cluster, storage, document)
    status = job.until_phase("Failed")
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "ModelNotFound", "the claim is mounted, and the folder is named that holds no model"
    assert "not-a-model" in failed["message"]
    assert len(job.list("jobs")) == 1, "a permanent reason makes no further attempt"
    cluster.kubectl("delete", "persistentvolume", volume, "--wait=false")


def test_deleting_a_videojob_leaves_nothing(cluster, operator, s3, storage):
    document = sample("01-minimal.yaml", video={"frames": 6000, "width": 64, "height": 48})
    document["metadata"]["name"] = "gone"
    document["spec"]["output"]["s3"]["prefix"] = "gone"
    job = Watched(cluster, storage, document)
    job.until_phase("Starting", "Rendering")
    job.kubectl("delete", "videojob", "gone", "--timeout=60s")
    until(lambda: not job.list("jobs,pods,configmaps,services"), "the end of everything it owned", 150)


def across(name: str, frames: int) -> dict:
    """Two nodes of two ranks each; the test cluster's nodes have few CPUs."""
    video = {"frames": frames, "width": 64, "height": 48}
    resources = {"cpu": "250m", "memory": "2Gi"}
    document = sample("01-minimal.yaml", video=video, nodes=2, ranksPerNode=2, resources=resources)
    document["metadata"]["name"] = name
    document["spec"]["output"]["s3"]["prefix"] = name
    return document


def test_two_nodes_render_one_video(cluster, operator, s3, storage):
    job = Watched(cluster, storage, across("two-nodes", 150))
    status = job.until_phase("Succeeded")
    assert status["attempt"] == 1
    assert status["progress"]["framesReady"] == 150
    assert frames(str(s3.root / BUCKET / "two-nodes" / "video.mp4")) == 150
    pods = sorted(job.list("pods"), key=lambda pod: pod["spec"]["hostname"])
    assert [pod["spec"]["hostname"] for pod in pods] == ["two-nodes-1-0", "two-nodes-1-1"]
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    first, second = (job.kubectl("logs", pod["metadata"]["name"]) for pod in pods)
    assert "rank 0 INFO holds layers 0 to 1" in first
    assert "rank 1 INFO holds layers 2 to 3" in first
    assert "rank 2 INFO holds layers 4 to 5" in second
    assert "rank 3 INFO holds layers 6 to 7" in second


KILL_RANKS = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    if b"\\0RANK=" in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
        os.kill(int(folder.name), signal.SIGKILL)
"""
HARM = {
    "the first pod is deleted": (0, ("delete", "pod", "{pod}", "--wait=false"), "PodLost"),
    "the second pod is deleted": (1, ("delete", "pod", "{pod}", "--wait=false"), "PodLost"),
    "the second pod's ranks are killed": (1, ("exec", "{pod}", "--", "python", "-c", KILL_RANKS), "RankKilled"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_pod_ends_the_attempt_and_the_next_one_succeeds(cluster, operator, s3, storage, harm):
    index, command, reason = HARM[harm]
    name = "harmed-" + "".join(word[0] for word in harm.split())
    job = Watched(cluster, storage, across(name, 1201))
    until(lambda: (job.status.get("progress") or {}).get("segments"), "the first segment", 240, every_s=0.2)
    (pod,) = (pod for pod in job.list("pods") if pod["spec"]["hostname"] == f"{name}-1-{index}")
    job.kubectl(*(word.format(pod=pod["metadata"]["name"]) if word == "{pod}" else word for word in command))

    def failed() -> str | None:
        conditions = {condition["type"]: condition for condition in job.status["conditions"]}
        message: str = conditions["Rendering"]["message"]
        return message if message.startswith("attempt 1 failed") else None

    message = until(failed, "the end of attempt 1", 60, every_s=0.2)
    assert message.startswith(f"attempt 1 failed, another follows; {reason}: ")
    status = job.until_phase("Succeeded")
    assert status["attempt"] == 2
    assert frames(str(s3.root / BUCKET / name / "video.mp4")) == 1201
