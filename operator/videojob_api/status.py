"""The VideoJob's status: its schema and its words.

``crd`` turns these models into the status schema; the operator's ``status`` fills them in, and nobody else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from .progress import SamplingUsed
from .spec import Model


class Phase(StrEnum):
    """One word for the column; conditions hold the truth."""

    PENDING = "Pending"  # accepted; a Job may exist, no pod is running yet
    STARTING = "Starting"  # the pods run; the model is being loaded
    RENDERING = "Rendering"  # blocks are being denoised, finished segments are in storage
    SUCCEEDED = "Succeeded"  # the whole video is in storage; the Job is kept
    FAILED = "Failed"  # no further attempt will be made; the condition says why


class ConditionType(StrEnum):
    """The conditions a VideoJob can have."""

    ACCEPTED = "Accepted"  # the spec makes sense and an attempt has been or will be made
    RENDERING = "Rendering"  # an attempt is at work
    COMPLETE = "Complete"  # the whole video is in storage
    FAILED = "Failed"  # no further attempt will be made


class Condition(Model):
    """A metav1.Condition."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    message: Annotated[str, Field(max_length=32768)]
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    observed_generation: Annotated[int, Field(ge=0)] = 0


class ProgressStatus(Model):
    """How far the render is."""

    percent: Annotated[int, Field(ge=0, le=100)]
    summary: str
    """For the column: percent and blocks."""
    blocks_done: int
    """Blocks whose latents are clean."""
    blocks_total: int
    frames_ready: int
    """Frames that can be played now."""
    frames_total: int
    segments: int
    """Segments in storage and named by the playlist."""
    ready: str
    """Playable length, as minutes and seconds."""
    eta: str = ""
    """Time left at the pace so far, as kubectl prints durations."""
    estimated_completion_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None


class OutputStatus(Model):
    """Where to look."""

    location: str
    """s3://bucket/prefix/"""
    playlist_url: str = Field(alias="playlistURL")
    """HLS playlist; playable as soon as the first segment is ready."""
    video_url: str = Field(alias="videoURL")
    """The whole video, once Complete."""
    manifest_url: str = Field(alias="manifestURL")
    """List of segments with checksums, once Complete."""


class Status(Model):
    """The observed render."""

    observed_generation: int = 0
    phase: Phase | None = None
    attempt: Annotated[int, Field(ge=0)] = 0
    """The attempt that is at work or was the last, from 1."""
    conditions: Annotated[
        tuple[Condition, ...],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = ()
    progress: ProgressStatus | None = None
    sampling: SamplingUsed | None = None
    """What the attempt denoises with, once it has read the model."""
    output: OutputStatus | None = None
    start_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None
    """When the first pod began to run."""
    completion_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None
    """When the VideoJob succeeded or failed for good."""
