"""The status that a VideoJob should show, as a function of what exists now. Pure.

``reconcile`` observes and has ``cluster`` patch the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from videojob_api import names
from videojob_api.plan import Cut, cut
from videojob_api.progress import Progress, Stage
from videojob_api.spec import S3Output, VideoJob
from videojob_api.status import ConditionType, Phase

from .failure import Verdict

Object = dict[str, Any]

LONGEST_MESSAGE = 4000  # of a condition; the API server's answers may quote a whole prompt


class Why(StrEnum):
    """Reasons of conditions that are the operator's own; others are the worker's (``videojob_api.progress.Reason``)."""

    VALID = "Valid"  # the spec makes sense
    INVALID_SPEC = "InvalidSpec"  # it does not; the message names every field
    NAME_TAKEN = "NameTaken"  # a Job or ConfigMap of that name belongs to someone else; tried again
    FORBIDDEN = "Forbidden"  # quota, policy or rights forbid the Job; tried again
    REFUSED = "Refused"  # the API server will never take the Job
    WAITING = "WaitingForPods"  # the Job exists, its pods do not run yet
    LOADING = "Loading"  # the pods run, the model is being loaded
    RENDERING = "Rendering"  # blocks are being denoised
    RETRYING = "Retrying"  # an attempt failed, another follows
    COMPLETED = "Completed"  # the whole video is in storage
    IN_PROGRESS = "InProgress"  # not yet
    ATTEMPTS_SPENT = "AttemptsSpent"  # the last allowed attempt failed


@dataclass(frozen=True)
class Observed:
    """What exists of a VideoJob's newest attempt."""

    attempt: int = 0  # 0: none yet
    pods: Sequence[Object] = ()
    progress: Progress | None = None  # if the worker answered
    succeeded: bool = False  # its Job is complete
    failed: Verdict | None = None  # its Job failed
    final: bool = False  # no further attempt will be made
    trouble: str = ""  # why there are no pods, where the cluster says so
    held: tuple[str, str] | None = None  # reason and message of what keeps the next attempt from being made


@dataclass(frozen=True)
class Words:
    """A phase and what is said of it."""

    phase: Phase
    reason: str
    message: str
    conditions: dict[ConditionType, tuple[str, str, str]] = field(default_factory=dict)


def invalid(videojob: Object, reason: Why, message: str, now: datetime) -> Object:
    """The status of a VideoJob that is refused."""
    words = _words(Phase.FAILED, reason, message, accepted=("False", reason, message))
    return _assemble(videojob, words, now, completion=now)


def status(raw: Object, videojob: VideoJob, observed: Observed, now: datetime) -> Object:
    """The whole ``.status``.

    Args:
        raw: the object as stored, with its previous status.
        videojob: the same, parsed.
        observed: its newest attempt.
        now: with time zone.
    """
    previous = raw.get("status") or {}
    rendered = previous.get("phase") == Phase.RENDERING and previous.get("attempt") == observed.attempt
    words = _judge(observed, rendered)
    ended = words.phase in (Phase.SUCCEEDED, Phase.FAILED)
    new = _assemble(raw, words, now, completion=now if ended else None)
    new["attempt"] = observed.attempt
    started = min(filter(None, map(_started, observed.pods)), default=None)
    if start := previous.get("startTime") or started:
        new["startTime"] = start
    new["output"] = output(videojob.spec.output.s3)
    if progress := _progress(previous, cut(videojob.spec), videojob, observed, words.phase, now):
        new["progress"] = progress
    if sampling := _sampling(previous, observed):
        new["sampling"] = sampling
    return new


def _judge(observed: Observed, rendered: bool) -> Words:
    """``rendered``: the attempt was seen rendering; a worker that misses one poll does not load the model again."""
    if observed.succeeded:
        return _words(Phase.SUCCEEDED, Why.COMPLETED, "the whole video is in storage")
    if observed.failed is not None and observed.final:
        if observed.failed.permanent:
            return _words(Phase.FAILED, observed.failed.reason, observed.failed.message)
        message = f"attempt {observed.attempt} was the last one allowed; {observed.failed.words}"
        return _words(Phase.FAILED, Why.ATTEMPTS_SPENT, message)
    if observed.failed is not None:
        message = f"attempt {observed.attempt} failed, another follows; {observed.failed.words}"
        return _words(Phase.PENDING, Why.RETRYING, message)
    if observed.held is not None:
        return _words(Phase.PENDING, *observed.held)
    if not observed.pods or not all(_runs(pod) for pod in observed.pods):
        return _words(Phase.PENDING, Why.WAITING, observed.trouble or obstacle(observed.pods))
    if not rendered and (observed.progress is None or observed.progress.stage is Stage.LOADING):
        return _words(Phase.STARTING, Why.LOADING, "the pods run, the model is being loaded")
    return _words(Phase.RENDERING, Why.RENDERING, "blocks are being denoised; finished segments are in storage")


def _words(phase: Phase, reason: str, message: str, accepted: tuple[str, str, str] | None = None) -> Words:
    complete, failed, rendering = phase is Phase.SUCCEEDED, phase is Phase.FAILED, phase is Phase.RENDERING
    end = reason if complete or failed else Why.IN_PROGRESS
    return Words(
        phase,
        reason,
        message,
        {
            ConditionType.ACCEPTED: accepted or ("True", Why.VALID, "the spec makes sense"),
            ConditionType.RENDERING: ("True" if rendering else "False", reason, message),
            ConditionType.COMPLETE: ("True" if complete else "False", end, message),
            ConditionType.FAILED: ("True" if failed else "False", end, message),
        },
    )


def _assemble(raw: Object, words: Words, now: datetime, completion: datetime | None) -> Object:
    previous = raw.get("status") or {}
    generation = raw.get("metadata", {}).get("generation", 0)
    new: Object = {
        "observedGeneration": generation,
        "phase": str(words.phase),
        "conditions": _conditions(previous.get("conditions") or (), words, generation, now),
    }
    if completion is not None:
        new["completionTime"] = previous.get("completionTime") or timestamp(completion)
    return new


def _conditions(previous: Sequence[Object], words: Words, generation: int, now: datetime) -> list[Object]:
    """``lastTransitionTime`` moves only when the condition's status changes."""
    before = {condition["type"]: condition for condition in previous}
    conditions: list[Object] = []
    for kind, (value, reason, message) in words.conditions.items():
        old = before.get(str(kind), {})
        moved = timestamp(now) if old.get("status") != value else old["lastTransitionTime"]
        conditions.append(
            {
                "type": str(kind),
                "status": value,
                "reason": str(reason),
                "message": message[:LONGEST_MESSAGE],
                "lastTransitionTime": moved,
                "observedGeneration": generation,
            }
        )
    return conditions


def _progress(
    previous: Object, counts: Cut, videojob: VideoJob, observed: Observed, phase: Phase, now: datetime
) -> Object | None:
    """The attempt's progress; what was last known of it while the worker does not answer."""
    fps = videojob.spec.video.fps
    if phase is Phase.SUCCEEDED:
        return _numbers(counts, fps, 100, counts.blocks, counts.frames, counts.blocks)
    progress = observed.progress
    if progress is None:
        same = previous.get("attempt") == observed.attempt and phase is not Phase.FAILED
        known: Object | None = previous.get("progress")
        return known if same or phase is Phase.FAILED else None
    numbers = _numbers(
        counts, fps, progress.percent, progress.blocks_done, progress.frames_ready, progress.segments_ready
    )
    if progress.eta_seconds is not None:
        left = timedelta(seconds=progress.eta_seconds)
        numbers |= {"eta": duration(progress.eta_seconds), "estimatedCompletionTime": timestamp(now + left)}
    return numbers


def _sampling(previous: Object, observed: Observed) -> Object | None:
    """What the worker denoises with; what was last known of it while the worker does not answer."""
    if observed.progress is not None and observed.progress.sampling is not None:
        return observed.progress.sampling.model_dump(mode="json", by_alias=True, exclude_none=True)
    known: Object | None = previous.get("sampling")
    return known


def _numbers(counts: Cut, fps: int, percent: int, blocks: int, frames: int, segments: int) -> Object:
    return {
        "percent": percent,
        "summary": f"{percent}% ({blocks}/{counts.blocks})",
        "blocksDone": blocks,
        "blocksTotal": counts.blocks,
        "framesReady": frames,
        "framesTotal": counts.frames,
        "segments": segments,
        "ready": duration(frames / fps),
        "eta": "",
    }


def output(s3: S3Output) -> Object:
    """Where to look."""
    return {
        "location": f"s3://{s3.bucket}/{s3.key('')}",
        "playlistURL": s3.url(names.PLAYLIST),
        "videoURL": s3.url(names.VIDEO),
        "manifestURL": s3.url(names.MANIFEST),
    }


def obstacle(pods: Sequence[Object]) -> str:
    """Why pods do not run yet, in the words of whoever holds them up."""
    for pod in pods:
        state = pod.get("status", {})
        for container in (*(state.get("initContainerStatuses") or ()), *(state.get("containerStatuses") or ())):
            waiting = container.get("state", {}).get("waiting") or {}
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return f"pod {pod['metadata']['name']}: {waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
        for condition in state.get("conditions") or ():
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return f"pod {pod['metadata']['name']} has no node yet: {condition.get('message', '')}".rstrip(": ")
    return "the pods are being created"


def _runs(pod: Object) -> bool:
    """Or did: what an ended pod means is for its Job to say."""
    return pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")


def _started(pod: Object) -> str | None:
    started: str | None = pod.get("status", {}).get("startTime") if _runs(pod) else None
    return started


def duration(seconds: float) -> str:
    """As kubectl prints durations: the two largest units."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest}s" if rest else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes}m" if minutes else f"{hours}h"
    return f"{hours // 24}d{hours % 24}h"


def timestamp(moment: datetime) -> str:
    """RFC 3339 in whole seconds, as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def patch(previous: Object, new: Object) -> Object:
    """The merge patch (RFC 7386) that turns one status into the other; empty if nothing changed."""
    changes: Object = {key: None for key in previous if key not in new}
    for key, value in new.items():
        old = previous.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := patch(old, value):
                changes[key] = inner
        elif value != old:
            changes[key] = value
    return changes
