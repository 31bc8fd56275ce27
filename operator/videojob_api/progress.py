"""What a worker says of itself: the progress record and the last words.

Written by the worker's ``report``, read by the operator's ``status``. Knows neither.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from .spec import Model


class Stage(StrEnum):
    """What the worker is doing."""

    LOADING = "Loading"  # reading the model, encoding the prompt
    RENDERING = "Rendering"  # blocks are being denoised; finished ones are written
    FINISHING = "Finishing"  # all latents are clean; the last segments and the whole video are written
    SUCCEEDED = "Succeeded"  # everything is in storage
    FAILED = "Failed"  # the last words say why


class SamplingUsed(Model):
    """How the latents are denoised: the spec's sampling, its silence filled by the kind of model."""

    steps: Annotated[int, Field(ge=1)]
    guidance_scale: float
    guidance_scale_2: float | None = None
    """Of the low-noise expert; absent where the model has none."""
    flow_shift: float


class Progress(Model):
    """The body of ``/progress``."""

    stage: Stage
    attempt: Annotated[int, Field(ge=1)]
    turns_done: Annotated[int, Field(ge=0)]
    """(block, step) pairs computed."""
    turns_total: Annotated[int, Field(ge=1)] | None = None
    """Absent until the model is known, and so the number of steps."""
    blocks_done: Annotated[int, Field(ge=0)]
    """Blocks whose latents are clean."""
    blocks_total: Annotated[int, Field(ge=1)]
    resumed_from_block: Annotated[int, Field(ge=0)] | None = None
    """The first block that this attempt had to make clean; absent where it began at the beginning."""
    frames_ready: Annotated[int, Field(ge=0)]
    """Frames in storage and named by the playlist."""
    frames_total: Annotated[int, Field(ge=1)]
    segments_ready: Annotated[int, Field(ge=0)]
    fps: Annotated[int, Field(ge=1)]
    eta_seconds: Annotated[float, Field(ge=0)] | None = None
    """Seconds until the end at the pace so far; absent until a pace is known."""
    sampling: SamplingUsed | None = None
    """Absent until the model is known."""
    updated_at: str
    """When this record last changed, RFC 3339."""

    @property
    def percent(self) -> int:
        """Whole percent, 100 only when everything is in storage."""
        if self.stage is Stage.SUCCEEDED:
            return 100
        if self.turns_total is None:
            return 0
        done = 0.98 * self.turns_done / self.turns_total + 0.02 * self.frames_ready / self.frames_total
        return min(99, int(100 * done))


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Reason(StrEnum):
    """Why an attempt ended; the worker's half of the failure table."""

    COMPLETED = "Completed"  # all is written
    INVALID_SPEC = "InvalidSpec"  # permanent: the model cannot render this spec
    MODEL_NOT_FOUND = "ModelNotFound"  # permanent: the source holds no such model
    MODEL_INVALID = "ModelInvalid"  # permanent: a file is missing, broken or of an unknown class
    ACCESS_DENIED = "AccessDenied"  # permanent: storage or hub refuse the credentials
    BUCKET_NOT_FOUND = "BucketNotFound"  # permanent: the bucket does not exist
    OUTPUT_CONFLICT = "OutputConflict"  # permanent: another render writes under the same prefix
    STORAGE_UNAVAILABLE = "StorageUnavailable"  # retryable: storage did not answer for minutes
    NOT_FINITE = "NotFinite"  # permanent: NaN or infinity in the latents, as it would be again
    OUT_OF_MEMORY = "OutOfMemory"  # retryable once: another neighbour may leave more
    RANK_KILLED = "RankKilled"  # retryable: a signal ended a rank, often for lack of memory
    PEER_LOST = "PeerLost"  # retryable: a rank vanished or stopped answering
    TERMINATED = "Terminated"  # retryable: asked to stop (eviction, preemption, suspend)
    CRASHED = "Crashed"  # retryable: an unforeseen error, its traceback in the log


PERMANENT = frozenset(
    {
        Reason.INVALID_SPEC,
        Reason.MODEL_NOT_FOUND,
        Reason.MODEL_INVALID,
        Reason.ACCESS_DENIED,
        Reason.BUCKET_NOT_FOUND,
        Reason.OUTPUT_CONFLICT,
        Reason.NOT_FINITE,
    }
)


class LastWords(Model):
    """What a worker leaves in its pod's termination message (at most 4096 bytes)."""

    outcome: Outcome
    reason: Reason
    message: Annotated[str, Field(max_length=2000)]
    retryable: bool
    attempt: Annotated[int, Field(ge=1)]
