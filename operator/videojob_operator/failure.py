"""Why an attempt failed and what follows: the failure policy as a table. Pure.

Reads the worker's last words and what the kubelet and the control plane say; ``reconcile`` acts on the verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from videojob_api import names
from videojob_api.progress import LastWords, Outcome, Reason

Object = dict[str, Any]

LONGEST_BACKOFF_SECONDS = 300.0
LOST_SECONDS = 60.0  # after a pod should have ended; a node that lives confirms the end in time


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


# A pod's reason, or that of its DisruptionTarget condition, where the cluster and not the worker ended it.
INFRASTRUCTURE = {
    "Evicted": "the node evicted the pod",
    "EvictionByEvictionAPI": "the pod was evicted",
    "Preempting": "a more important pod took the place",
    "PreemptionByScheduler": "a more important pod took the place",
    "NodeLost": "the node was lost",
    "DeletionByTaintManager": "the node stopped answering",
    "DeletionByPodGC": "the node is gone",
    "NodeShutdown": "the node shut down",
    "Shutdown": "the node shut down",
    "Terminated": "the node shut down",
    "TerminationByKubelet": "the node ended the pod",
    "UnexpectedAdmissionError": "the node could not take the pod",
}
LOST = Verdict("PodLost", "a pod vanished before it could say why", counts=False)
NOT_ITS_FAULT = frozenset({Reason.TERMINATED, Reason.STORAGE_UNAVAILABLE})  # reasons that do not count
DRAGGED_ALONG = frozenset({Reason.TERMINATED, Reason.PEER_LOST})  # reasons whose cause lies elsewhere
ONCE = frozenset({Reason.OUT_OF_MEMORY})  # reasons that may pass, but not twice
FROM_OUTSIDE = frozenset({137, 143})  # exit codes of SIGKILL and SIGTERM


def verdict(pods: Sequence[Object], expected: int = 1) -> Verdict:
    """On an attempt that failed.

    Args:
        pods: those that are left of it.
        expected: how many it had.
    """
    spoken = [words for pod in pods if (words := last_words(pod)) is not None and words.outcome is Outcome.FAILED]
    causes = [words for words in spoken if words.reason not in DRAGGED_ALONG]
    dragged = [words for words in spoken if words.reason in DRAGGED_ALONG]
    return (
        _first(_said(words) for words in causes if not words.retryable)
        or _first(map(_disrupted, pods))
        or _first(map(_said, causes))
        or _first(map(_out_of_memory, pods))
        or _first(map(_silent, pods))
        or (LOST if len(pods) < expected else None)
        or _first(_said(words) for words in dragged if words.reason == Reason.PEER_LOST)
        or _first(map(_said, dragged))
        or LOST
    )


def is_final(newest: Verdict, counted: Sequence[str], max_attempts: int) -> bool:
    """Whether no further attempt is made, from the reasons of all attempts that count, the newest included."""
    again = newest.reason in ONCE and counted.count(newest.reason) > 1
    return newest.permanent or again or len(counted) >= max_attempts


def lost(pods: Iterable[Object], now: datetime) -> bool:
    """Whether a pod should have ended long ago and its node does not confirm it."""
    return any(_overdue(pod, now) for pod in pods if pod.get("status", {}).get("phase") not in ("Failed", "Succeeded"))


def _overdue(pod: Object, now: datetime) -> bool:
    due = pod["metadata"].get("deletionTimestamp")
    return due is not None and (now - datetime.fromisoformat(due)).total_seconds() > LOST_SECONDS


def backoff_seconds(attempt: int, first: float) -> float:
    """How long to wait after this attempt, from 1, failed."""
    return min(LONGEST_BACKOFF_SECONDS, first * 2.0 ** min(attempt - 1, 64))


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


def _first(found: Iterable[Verdict | None]) -> Verdict | None:
    return next((each for each in found if each is not None), None)


def _said(words: LastWords) -> Verdict:
    return Verdict(words.reason, words.message, not words.retryable, words.reason not in NOT_ITS_FAULT)


def _disrupted(pod: Object) -> Verdict | None:
    """The cluster ended the pod."""
    status = pod.get("status", {})
    for condition in status.get("conditions") or ():
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            reason = str(condition.get("reason") or "DisruptionTarget")
            said = status.get("message") or condition.get("message") or INFRASTRUCTURE.get(reason, "the pod was ended")
            return Verdict(reason, said, counts=False)
    reason = str(status.get("reason", ""))
    if reason.startswith("OutOf"):  # OutOfcpu, OutOfnvidia.com/gpu: it was sent to a node that had none left
        return Verdict("NodeFull", status.get("message") or reason, counts=False)
    if reason in INFRASTRUCTURE:
        return Verdict(reason, status.get("message") or INFRASTRUCTURE[reason], counts=False)
    return None


def _out_of_memory(pod: Object) -> Verdict | None:
    if terminated(pod).get("reason") == "OOMKilled":
        return Verdict("OOMKilled", "the pod used more memory than its limit: raise spec.resources.memory")
    return None


def _silent(pod: Object) -> Verdict | None:
    """The worker ended without last words."""
    ended = terminated(pod)
    words = last_words(pod)
    if not ended.get("exitCode") or (words is not None and words.outcome is Outcome.FAILED):
        return None
    message = f"the worker ended with exit code {ended['exitCode']} and no last words"
    if ended["exitCode"] in FROM_OUTSIDE:
        return Verdict("Killed", message, counts=False)
    if words is None and ended.get("message"):  # the container runtime's, where nothing could be started
        message = f"{message}: {ended['message'][:500]}"
    return Verdict(Reason.CRASHED, message)
