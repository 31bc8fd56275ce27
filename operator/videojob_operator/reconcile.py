"""One look at one VideoJob: observe what exists, decide, act, report. Level-triggered: remembers nothing.

``keeper`` calls it; ``job``, ``failure`` and ``status`` decide; ``cluster`` acts. Whatever happens between two lines
here (a crash of the operator, say), the next look goes on from what exists: names are deterministic, so nothing is made
twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from videojob_api import names, validation
from videojob_api.spec import VideoJob
from videojob_api.status import Phase

from . import failure, job, status
from .cluster import Cluster, NameTakenError
from .settings import Settings
from .status import Observed, Why

log = logging.getLogger(__name__)

Object = dict[str, Any]


class Reconciler:
    """Looks after VideoJobs in a cluster.

    Args:
        cluster: where.
        settings: of the operator.
        clock: the time, with zone.
    """

    def __init__(
        self, cluster: Cluster, settings: Settings, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._clock = clock

    def __call__(self, namespace: str, name: str) -> float | None:
        """Take one look.

        Returns:
            Seconds until the next look is due even if nothing is heard; None: never.
        """
        raw = self._cluster.videojob(namespace, name)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            return None  # the garbage collector removes what it owns
        if (raw.get("status") or {}).get("phase") in (Phase.SUCCEEDED, Phase.FAILED):
            return None
        try:
            videojob = validation.read(raw)
        except validation.InvalidVideoJobError as error:
            self._report(raw, status.invalid(raw, Why.INVALID_SPEC, str(error), self._clock()))
            return None
        observed, wait = self._advance(raw, videojob)
        self._report(raw, status.status(raw, videojob, observed, self._clock()))
        return wait

    def _advance(self, raw: Object, videojob: VideoJob) -> tuple[Observed, float | None]:
        """See how the newest attempt is doing and start another where one is due."""
        metadata = videojob.metadata
        jobs = sorted(self._cluster.owned("Job", metadata.namespace, metadata.name), key=_attempt)
        jobs = [each for each in jobs if _owned_by(each, metadata.uid)]
        if not jobs:
            return self._start(raw, videojob, 1)
        pods = self._cluster.owned("Pod", metadata.namespace, metadata.name)
        attempt = _attempt(jobs[-1])
        own = [pod for pod in pods if _attempt(pod) == attempt]
        if _condition(jobs[-1], "Complete"):
            return Observed(attempt, own, succeeded=True), None
        failed = _condition(jobs[-1], "Failed")
        if failed is None:
            return self._watch(jobs[-1], attempt, own), self._settings.poll_seconds
        verdicts = [failure.verdict([pod for pod in pods if _attempt(pod) == _attempt(each)]) for each in jobs]
        final = verdicts[-1].permanent or sum(each.counts for each in verdicts) >= self._settings.max_attempts
        observed = Observed(attempt, own, failed=verdicts[-1], final=final)
        if final:
            return observed, None
        left = self._backoff(attempt, failed)
        return (observed, left) if left > 0 else self._start(raw, videojob, attempt + 1)

    def _start(self, raw: Object, videojob: VideoJob, attempt: int) -> tuple[Observed, float]:
        try:
            created = [self._cluster.create(each) for each in job.objects(videojob, attempt, self._settings)]
        except NameTakenError as error:
            return Observed(trouble=str(error)), 60.0
        if created[-1]:
            name = names.job(videojob.metadata.name, attempt)
            self._cluster.event(raw, "Normal", "AttemptStarted", f"created Job {name}")
        return Observed(attempt), self._settings.poll_seconds

    def _watch(self, newest: Object, attempt: int, pods: Sequence[Object]) -> Observed:
        observed = Observed(attempt, pods)
        if not pods:
            metadata = newest["metadata"]
            return replace(observed, trouble=self._cluster.warning("Job", metadata["namespace"], metadata["name"]))
        first = next((pod for pod in pods if _is_first(pod)), pods[0])
        if first.get("status", {}).get("phase") != "Running":
            return observed
        return replace(observed, progress=self._cluster.progress(first))

    def _backoff(self, attempt: int, failed: Object) -> float:
        """Seconds until the next attempt is due."""
        since = datetime.fromisoformat(failed["lastTransitionTime"])
        wait = failure.backoff_seconds(attempt, self._settings.backoff_seconds)
        return wait - (self._clock() - since).total_seconds()

    def _report(self, raw: Object, new: Object) -> None:
        previous = raw.get("status") or {}
        changes = status.patch(previous, new)
        if not changes:
            return
        metadata = raw["metadata"]
        self._cluster.patch_status(metadata["namespace"], metadata["name"], changes)
        for kind, reason, message in _news(previous, new):
            log.info("%s/%s: %s: %s", metadata["namespace"], metadata["name"], reason, message)
            self._cluster.event(raw, kind, reason, message)


def _news(previous: Object, new: Object) -> list[tuple[str, str, str]]:
    """What is worth an event: transitions only."""
    news = []
    conditions = {condition["type"]: condition for condition in new["conditions"]}
    progress = new.get("progress") or {}
    if progress.get("segments", 0) > 0 and not (previous.get("progress") or {}).get("segments"):
        news.append(("Normal", "FirstSegmentReady", f"playable while it renders: {new['output']['playlistURL']}"))
    rendering = conditions["Rendering"]
    if rendering["reason"] == Why.RETRYING and previous.get("phase") != new["phase"]:
        news.append(("Warning", "Retrying", rendering["message"]))
    if new["phase"] != previous.get("phase"):
        if new["phase"] == Phase.RENDERING:
            news.append(("Normal", "Rendering", rendering["message"]))
        elif new["phase"] == Phase.SUCCEEDED:
            news.append(("Normal", "Succeeded", f"the whole video: {new['output']['videoURL']}"))
        elif new["phase"] == Phase.FAILED:
            reason = conditions["Failed"]["reason"]
            news.append(("Warning", "Failed", f"{reason}: {conditions['Failed']['message']}"))
    return news


def _attempt(found: Object) -> int:
    text = (found["metadata"].get("labels") or {}).get(names.LABEL_ATTEMPT, "0")
    return int(text) if text.isdecimal() else 0


def _owned_by(found: Object, uid: str) -> bool:
    """A Job of a VideoJob of the same name that was deleted a moment ago is not ours."""
    return any(reference["uid"] == uid for reference in found["metadata"].get("ownerReferences") or ())


def _is_first(pod: Object) -> bool:
    return bool((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-completion-index") == "0")


def _condition(found: Object, kind: str) -> Object | None:
    for condition in found.get("status", {}).get("conditions") or ():
        if condition["type"] == kind and condition["status"] == "True":
            known: Object = condition
            return known
    return None
