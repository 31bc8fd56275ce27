"""VideoJobs, Jobs and Pods as the API server would hand them out, and a cluster in memory that holds them."""

# ruff: noqa: ARG002 - the twin's methods have the protocol's signatures

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from videojob_api import names, validation
from videojob_api.progress import LastWords, Outcome, Progress, Reason, SamplingUsed, Stage
from videojob_api.spec import VideoJob
from videojob_operator.cluster import ConflictError, NameTakenError
from videojob_operator.status import timestamp

Object = dict[str, Any]

NAMESPACE, NAME, UID = "studio", "boat", "uid-1"
START = datetime(2026, 1, 1, tzinfo=UTC)
PROMPT = "a paper boat, $(reboot) `ls` \"quoted\" 'single' 🦊"


def document(name: str = NAME, uid: str = UID, **spec: Any) -> Object:
    """A VideoJob of 90 frames in 6 blocks, as stored."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": NAMESPACE, "uid": uid, "generation": 1, "resourceVersion": "1"},
        "spec": {
            "prompt": PROMPT,
            "video": {"frames": 90},
            "model": {"source": {"localPath": "/models/wan"}},
            "sampling": {"steps": 5},
            "dualParallel": {"blockLatents": 4, "contextLatents": 3},
            "output": {"s3": {"bucket": "videos", "prefix": "boat"}},
            **spec,
        },
    }


def videojob(name: str = NAME, uid: str = UID, **spec: Any) -> VideoJob:
    return validation.read(document(name, uid, **spec))


def pod(phase: str = "Running", *, index: int = 0, attempt: int = 1, job_uid: str = "job-1", **status: Any) -> Object:
    """One pod of an attempt; further keywords go into its status."""
    job = names.job(NAME, attempt)
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"{job}-{index}-abcde",
            "namespace": NAMESPACE,
            "uid": f"pod-{attempt}-{index}",
            "labels": {
                names.LABEL_VIDEOJOB: NAME,
                names.LABEL_ATTEMPT: str(attempt),
                "batch.kubernetes.io/job-completion-index": str(index),
            },
            "ownerReferences": [{"kind": "Job", "name": job, "uid": job_uid, "controller": True}],
        },
        "status": {"phase": phase, "startTime": timestamp(START), **status},
    }


def container(name: str = names.CONTAINER, **state: Any) -> Object:
    return {"containerStatuses": [{"name": name, "state": state}]}


def ended(exit_code: int = 1, message: str = "", reason: str = "Error", **more: Any) -> Object:
    """A failed pod whose container ended so."""
    terminated = {"exitCode": exit_code, "reason": reason, "message": message}
    return pod("Failed", **container(terminated=terminated), **more)


def words(reason: Reason, *, retryable: bool = True, message: str = "why", outcome: Outcome = Outcome.FAILED) -> str:
    said = LastWords(outcome=outcome, reason=reason, message=message, retryable=retryable, attempt=1)
    return said.model_dump_json(by_alias=True)


def disrupted(reason: str, phase: str = "Failed", **more: Any) -> Object:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "said the cluster"}
    return pod(phase, conditions=[condition], **more)


def progress(turns: int = 15, segments: int = 0, stage: Stage = Stage.RENDERING, eta: float | None = 60.0) -> Progress:
    """Of the VideoJob above: 30 turns, 6 blocks, 90 frames."""
    return Progress(
        stage=stage,
        attempt=1,
        turns_done=turns,
        turns_total=30,
        blocks_done=segments,
        blocks_total=6,
        frames_ready=15 * segments,
        frames_total=90,
        segments_ready=segments,
        fps=16,
        eta_seconds=eta,
        sampling=SamplingUsed(steps=5, guidance_scale=4.0, guidance_scale_2=3.0, flow_shift=12.0),
        updated_at=timestamp(START),
    )


class Clock:
    """Stands still unless told to go."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def go(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class MemoryCluster:
    """``Cluster`` over a dict: what is created is there, and tests play the Job controller and the kubelet."""

    def __init__(self, clock: Clock) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.events: list[tuple[str, str, str]] = []
        self.said: Progress | None = None  # by the worker
        self.warned = ""
        self.refuse: dict[str, Exception] = {}  # kind -> what its creation raises
        self.calls: Counter[str] = Counter()
        self._clock = clock

    def videojob(self, namespace: str, name: str) -> Object | None:
        found = self.objects.get((names.KIND, name))
        return json.loads(json.dumps(found))

    def owned(self, kind: str, namespace: str, name: str) -> list[Object]:
        return [found for found in self.all(kind) if found["metadata"]["labels"][names.LABEL_VIDEOJOB] == name]

    def create(self, wanted: Object) -> bool:
        kind, metadata = wanted["kind"], wanted["metadata"]
        if kind in self.refuse:
            raise self.refuse[kind]
        existing = self.objects.get((kind, metadata["name"]))
        if existing is not None:
            if existing["metadata"]["ownerReferences"][0]["uid"] != metadata["ownerReferences"][0]["uid"]:
                raise NameTakenError(f"{kind} {metadata['name']} exists and belongs to someone else")
            return False
        self.calls[f"create {kind}"] += 1
        uid = f"{kind.lower()}-{metadata['labels'][names.LABEL_ATTEMPT]}"
        self.put({**wanted, "metadata": {**metadata, "uid": uid}})
        return True

    def patch_status(self, videojob: Object, changes: Object) -> None:
        self.calls["patch"] += 1
        stored = self.objects[names.KIND, videojob["metadata"]["name"]]
        if stored["metadata"]["resourceVersion"] != videojob["metadata"]["resourceVersion"]:
            raise ConflictError("the object has been modified")
        stored["status"] = merged(stored.get("status") or {}, changes)
        stored["metadata"]["resourceVersion"] += "1"

    def event(self, videojob: Object, kind: str, reason: str, message: str) -> None:
        self.events.append((kind, reason, message))

    def warning(self, kind: str, namespace: str, name: str) -> str:
        return self.warned

    def progress(self, pod: Object) -> Progress | None:
        self.calls["poll"] += 1
        return self.said

    # The rest is for tests.

    def put(self, made: Object) -> None:
        self.objects[made["kind"], made["metadata"]["name"]] = made

    def all(self, kind: str) -> list[Object]:
        return [found for (of, _), found in self.objects.items() if of == kind]

    def end(self, attempt: int, condition: str, *pods: Object) -> None:
        """The attempt's Job ends now, and these pods are left."""
        job = self.objects["Job", names.job(NAME, attempt)]
        self.run(*pods)
        moment = timestamp(self._clock())
        job["status"] = {"conditions": [{"type": condition, "status": "True", "lastTransitionTime": moment}]}

    def run(self, *pods: Object) -> None:
        for each in pods:
            self.put(each)

    @property
    def status(self) -> Object:
        found: Object = self.objects[names.KIND, NAME]["status"]
        return found

    def condition(self, kind: str) -> Object:
        return next(each for each in self.status["conditions"] if each["type"] == kind)


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386, word for word."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
