"""Why an attempt failed and what follows: the failure policy as a table. Pure.

Reads the worker's last words and what the kubelet and the Job controller say; ``reconcile`` acts on the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from videojob_api import names
from videojob_api.progress import LastWords, Outcome, Reason

Object = dict[str, Any]

LONGEST_BACKOFF_SECONDS = 300.0


@dataclass(frozen=True)
class Verdict:
    """On one failed attempt."""

    reason: str  # a condition's reason
    message: str
    permanent: bool = False  # another attempt would end the same
    counts: bool = True  # against the number of attempts; what the cluster did to the pod does not

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.reason}: {self.message}"


# Where nobody left last words, the pod's or container's reason decides; what is not listed is a crash.
INFRASTRUCTURE = {
    "Evicted": "the node evicted the pod",
    "Preempting": "a more important pod took the place",
    "Preempted": "a more important pod took the place",
    "NodeLost": "the node was lost",
    "NodeShutdown": "the node shut down",
    "Shutdown": "the node shut down",
    "Terminated": "the node shut down",
    "TerminationByKubelet": "the node ended the pod",
    "UnexpectedAdmissionError": "the node could not take the pod",
    "OutOfnvidia.com/gpu": "the node had no GPUs left",
    "OutOfcpu": "the node had no CPU left",
    "OutOfmemory": "the node had no memory left",
}
# Reasons that a worker gives although it was not its fault.
NOT_ITS_FAULT = frozenset({Reason.TERMINATED, Reason.STORAGE_UNAVAILABLE})


def verdict(pods: Sequence[Object]) -> Verdict:
    """On an attempt whose Job failed, from the pods that are left of it."""
    spoken = sorted((words for pod in pods if (words := last_words(pod)) is not None), key=_weight)
    if spoken and spoken[-1].outcome is Outcome.FAILED:
        words = spoken[-1]
        return Verdict(words.reason, words.message, not words.retryable, words.reason not in NOT_ITS_FAULT)
    for pod in pods:
        status = pod.get("status", {})
        reason = _disruption(status) or status.get("reason", "")
        if reason in INFRASTRUCTURE:
            message = status.get("message") or INFRASTRUCTURE[reason]
            return Verdict(reason.replace("/", "_").replace(".", "_"), message, counts=False)
    for pod in pods:
        ended = terminated(pod)
        if ended.get("reason") == "OOMKilled":
            return Verdict("OOMKilled", "the pod used more memory than its limit: raise spec.resources.memory")
        if ended.get("exitCode"):
            return Verdict(Reason.CRASHED, f"the worker ended with exit code {ended['exitCode']} and no last words")
    return Verdict("PodLost", "the pod vanished before it could say why", counts=False)


def _weight(words: LastWords) -> int:
    """A rank that was merely dragged along weighs less than the one that knows the cause."""
    return {Reason.TERMINATED: 0, Reason.PEER_LOST: 1}.get(words.reason, 2)


def _disruption(status: Object) -> str | None:
    """Why the control plane ended the pod, if it did."""
    for condition in status.get("conditions") or ():
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            by = str(condition.get("reason", ""))
            known = {"PreemptionByScheduler": "Preempted", "DeletionByTaintManager": "NodeLost"}
            return known.get(by, "Evicted" if "Eviction" in by else by)
    return None


def terminated(pod: Object) -> Object:
    """The worker container's end; empty while it runs."""
    for container in pod.get("status", {}).get("containerStatuses") or ():
        if container["name"] == names.CONTAINER:
            ended: Object = container.get("state", {}).get("terminated") or {}
            return ended
    return {}


def last_words(pod: Object) -> LastWords | None:
    """What the worker left in the pod's termination message."""
    try:
        return LastWords.model_validate_json(terminated(pod).get("message") or "")
    except ValidationError:
        return None


def backoff_seconds(attempt: int, first: float) -> float:
    """How long to wait after this attempt, from 1, failed."""
    return min(LONGEST_BACKOFF_SECONDS, first * 2.0 ** (attempt - 1))
