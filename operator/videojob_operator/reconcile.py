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
from .cluster import Cluster, ConflictError, ForbiddenError, GoneError, NameTakenError, RefusedError
from .failure import Verdict
from .settings import Settings
from .status import Observed, Why

log = logging.getLogger(__name__)

Object = dict[str, Any]

# Between two tries of a creation that the cluster does not allow now.
SHORTEST_PATIENCE_SECONDS = 5.0
LONGEST_PATIENCE_SECONDS = 60.0
WARNINGS = frozenset({Why.RETRYING, Why.NAME_TAKEN, Why.FORBIDDEN})  # reasons that are worth an event
HELD = {NameTakenError: Why.NAME_TAKEN, ForbiddenError: Why.FORBIDDEN}


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
            return self._look(raw)
        except GoneError:
            return None  # the VideoJob goes with its namespace
        except ConflictError:
            return 0.0

    def _look(self, raw: Object) -> float | None:
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
        jobs = _owned_by(metadata.uid, self._cluster.owned("Job", metadata.namespace, metadata.name))
        if not jobs:
            return self._start(raw, videojob, 1, ())
        newest = max(jobs, key=_attempt)
        pods = _owned_by(newest["metadata"]["uid"], self._cluster.owned("Pod", metadata.namespace, metadata.name))
        if _condition(newest, "Complete"):
            return Observed(_attempt(newest), pods, succeeded=True), None
        if _condition(newest, "Failed") or failure.lost(pods, self._clock()):
            return self._follow(raw, videojob, newest, pods)
        return self._watch(newest, pods), self._settings.poll_seconds

    def _follow(
        self, raw: Object, videojob: VideoJob, newest: Object, pods: Sequence[Object]
    ) -> tuple[Observed, float | None]:
        """What follows a failed attempt: the end, a pause or another attempt."""
        attempt = _attempt(newest)
        verdict = failure.verdict(pods, newest["spec"].get("completions", 1))
        counted = (*job.failures(newest), verdict.reason) if verdict.counts else job.failures(newest)
        final = failure.is_final(verdict, counted, self._settings.max_attempts)
        observed = Observed(attempt, pods, failed=verdict, final=final)
        if final:
            return observed, None
        left = self._backoff(newest)
        return (observed, left) if left > 0 else self._start(raw, videojob, attempt + 1, counted)

    def _start(
        self, raw: Object, videojob: VideoJob, attempt: int, failures: Sequence[str]
    ) -> tuple[Observed, float | None]:
        try:
            created = [self._cluster.create(each) for each in job.objects(videojob, attempt, self._settings, failures)]
        except (NameTakenError, ForbiddenError) as error:
            return Observed(attempt - 1, held=(HELD[type(error)], str(error))), self._patience(raw)
        except RefusedError as error:
            refused = Verdict(Why.REFUSED, str(error), permanent=True)
            return Observed(attempt - 1, failed=refused, final=True), None
        if created[-1]:
            name = names.job(videojob.metadata.name, attempt)
            self._cluster.event(raw, "Normal", "AttemptStarted", f"created Job {name}")
        return Observed(attempt), self._settings.poll_seconds

    def _watch(self, newest: Object, pods: Sequence[Object]) -> Observed:
        observed = Observed(_attempt(newest), pods)
        if not pods:
            metadata = newest["metadata"]
            return replace(observed, trouble=self._cluster.warning("Job", metadata["namespace"], metadata["name"]))
        first = next((pod for pod in pods if _is_first(pod)), pods[0])
        if first.get("status", {}).get("phase") != "Running":
            return observed
        return replace(observed, progress=self._cluster.progress(first))

    def _backoff(self, newest: Object) -> float:
        """Seconds until the next attempt is due; a Job that did not fail itself waited long enough for its pods."""
        failed = _condition(newest, "Failed")
        if failed is None:
            return 0.0
        wait = failure.backoff_seconds(_attempt(newest), self._settings.backoff_seconds)
        return wait - self._since(failed)

    def _patience(self, raw: Object) -> float:
        """As long as nothing has been rendering: so the pauses double, within bounds, and nothing is remembered."""
        waiting = (each for each in (raw.get("status") or {}).get("conditions") or () if each["type"] == "Rendering")
        elapsed = max(map(self._since, waiting), default=0.0)
        return min(LONGEST_PATIENCE_SECONDS, max(SHORTEST_PATIENCE_SECONDS, elapsed))

    def _since(self, condition: Object) -> float:
        return (self._clock() - datetime.fromisoformat(condition["lastTransitionTime"])).total_seconds()

    def _report(self, raw: Object, new: Object) -> None:
        previous = raw.get("status") or {}
        changes = status.patch(previous, new)
        if not changes:
            return
        metadata = raw["metadata"]
        self._cluster.patch_status(raw, changes)
        for kind, reason, message in _news(previous, new):
            log.info("%s/%s: %s: %s", metadata["namespace"], metadata["name"], reason, message)
            self._cluster.event(raw, kind, reason, message)


def _news(previous: Object, new: Object) -> list[tuple[str, str, str]]:
    """What is worth an event: transitions only."""
    news = []
    before, conditions = _by_type(previous), _by_type(new)
    rendering = conditions["Rendering"]
    segments, seen = ((each.get("progress") or {}).get("segments", 0) for each in (new, previous))
    if segments > 0 and seen == 0:
        news.append(("Normal", "FirstSegmentReady", f"playable while it renders: {new['output']['playlistURL']}"))
    if rendering["reason"] in WARNINGS and rendering["reason"] != before.get("Rendering", {}).get("reason"):
        news.append(("Warning", rendering["reason"], rendering["message"]))
    if new["phase"] != previous.get("phase"):
        if new["phase"] == Phase.RENDERING:
            news.append(("Normal", "Rendering", rendering["message"]))
        elif new["phase"] == Phase.SUCCEEDED:
            news.append(("Normal", "Succeeded", f"the whole video: {new['output']['videoURL']}"))
        elif new["phase"] == Phase.FAILED:
            reason = conditions["Failed"]["reason"]
            news.append(("Warning", "Failed", f"{reason}: {conditions['Failed']['message']}"))
    return news


def _by_type(of: Object) -> dict[str, Object]:
    return {condition["type"]: condition for condition in of.get("conditions") or ()}


def _attempt(found: Object) -> int:
    text = (found["metadata"].get("labels") or {}).get(names.LABEL_ATTEMPT, "0")
    return int(text) if text.isdecimal() else 0


def _owned_by(uid: str, found: Sequence[Object]) -> list[Object]:
    """What belongs to a VideoJob or Job of the same name that was deleted a moment ago is not ours."""

    def owned(each: Object) -> bool:
        return any(reference["uid"] == uid for reference in each["metadata"].get("ownerReferences") or ())

    return [each for each in found if owned(each)]


def _is_first(pod: Object) -> bool:
    return bool((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-completion-index") == "0")


def _condition(found: Object, kind: str) -> Object | None:
    for condition in found.get("status", {}).get("conditions") or ():
        if condition["type"] == kind and condition["status"] == "True":
            known: Object = condition
            return known
    return None
