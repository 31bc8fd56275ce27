"""The VideoJob's spec: the one source of its schema, its rules and its defaults.

``crd`` turns these models into the CustomResourceDefinition, ``validation`` checks a document against them,
``plan`` counts with them. A rule that spans fields is written once, in CEL, and holds on the API server and in
``videojob validate`` alike.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """A rule over several fields, in CEL with the model as ``self``."""

    cel: str
    message: str
    field: str  # the path the error names, relative to the model: ".prompt"


class Model(BaseModel):
    """Base of all API models: frozen, camelCase outside, unknown fields refused, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()


# Patterns name their characters: `\w` and `\s` are ASCII on the API server and Unicode in pydantic.
Prompt = Annotated[str, Field(min_length=1, max_length=20_000)]
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Bucket = Annotated[str, Field(min_length=3, max_length=63, pattern=r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$")]
KeyPrefix = Annotated[str, Field(max_length=900, pattern=r"^([^/\x00-\x20\x7f]+(/[^/\x00-\x20\x7f]+)*)?$")]
Endpoint = Annotated[str, Field(max_length=2048, pattern=r"^https?://[!-.0-~]+(/[!-~]*)?$")]
Quantity = Annotated[str, Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]


class Scene(Model):
    """A stretch of the video with its own prompt."""

    prompt: Prompt
    """What the scene shows."""
    frames: Annotated[int, Field(ge=1, le=1_000_000)]
    """The scene's length in frames."""


class Video(Model):
    """The video to render."""

    frames: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The video's length in frames. Required with prompt; with scenes the length is the sum of theirs."""
    width: Annotated[int, Field(ge=32, le=4096, multiple_of=16)] = 832
    """Width in pixels, a multiple of 16."""
    height: Annotated[int, Field(ge=32, le=4096, multiple_of=16)] = 480
    """Height in pixels, a multiple of 16."""
    fps: Annotated[int, Field(ge=1, le=120)] = 16
    """Frames per second. Wan models are trained at 16, Wan2.2 TI2V-5B at 24."""


class HuggingFaceSource(Model):
    """A repository on the Hugging Face Hub."""

    repository: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$")]
    """The repository, as owner/name."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """The commit, 40 hexadecimal digits: a branch could change between two attempts."""
    token_secret: ObjectName | None = None
    """A Secret of this namespace whose key HF_TOKEN opens a gated repository."""


class ClaimSource(Model):
    """A folder of a PersistentVolumeClaim."""

    claim_name: ObjectName
    """The claim, in the VideoJob's namespace."""
    path: Annotated[str, Field(max_length=1024, pattern=r"^([^/]+(/[^/]+)*)?$")] = ""
    """The model's folder inside the claim; empty for its root."""

    rules = (
        Rule(
            "!self.path.split('/').exists(part, part == '..')",
            "path must stay inside the claim: remove '..'",
            ".path",
        ),
    )


class S3Location(Model):
    """A place in S3-compatible object storage and how to reach it."""

    bucket: Bucket
    """The bucket; it must exist."""
    prefix: KeyPrefix = ""
    """The folder inside the bucket, without a slash at either end."""
    endpoint: Endpoint | None = None
    """The server's URL; without it, AWS."""
    region: Annotated[str, Field(min_length=1, max_length=64)] = "us-east-1"
    """The region that requests are signed for."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """How the bucket is named in requests; auto uses the path where an endpoint is given."""
    credentials_secret: ObjectName | None = None
    """A Secret of this namespace with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if need be, AWS_SESSION_TOKEN."""

    def key(self, name: str) -> str:
        """The key of an object that is named relative to the prefix."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def url(self, name: str) -> str:
        """Where an object, named relative to the prefix, can be fetched by those who may."""
        server = (self.endpoint or f"https://s3.{self.region}.amazonaws.com").rstrip("/")
        key = quote(self.key(name))
        if self._bucket_in_path:
            return f"{server}/{self.bucket}/{key}"
        scheme, host_and_root = server.split("://", 1)
        return f"{scheme}://{self.bucket}.{host_and_root}/{key}"

    @property
    def _bucket_in_path(self) -> bool:
        """Certificates of AWS do not cover host names in which the bucket holds a dot."""
        if self.addressing_style == "auto":
            return self.endpoint is not None or "." in self.bucket
        return self.addressing_style == "path"


class S3Output(S3Location):
    """Where the video goes."""

    service_account_name: ObjectName | None = None
    """The ServiceAccount whose cloud identity (web identity, pod identity) may write, instead of a Secret."""

    rules = (
        Rule(
            "!(has(self.credentialsSecret) && has(self.serviceAccountName))",
            "give credentialsSecret or serviceAccountName, not both",
            ".serviceAccountName",
        ),
    )


class Source(Model):
    """Where the model's diffusers folder is; exactly one member is given."""

    hugging_face: HuggingFaceSource | None = None
    """A pinned repository on the Hugging Face Hub."""
    persistent_volume_claim: ClaimSource | None = None
    """A folder of a claim, mounted read-only."""
    s3: S3Location | None = None
    """A prefix in object storage."""
    local_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """A folder of the worker's image or, with `videojob render`, of this machine."""

    rules = (
        Rule(
            "[has(self.huggingFace), has(self.persistentVolumeClaim), has(self.s3), has(self.localPath)]"
            ".filter(given, given).size() == 1",
            "give exactly one of huggingFace, persistentVolumeClaim, s3 and localPath",
            "",
        ),
    )


class ModelReference(Model):
    """The diffusion model."""

    source: Source
    """Where its folder in the diffusers layout is."""


class Sampling(Model):
    """How the latents are denoised. Where silent, as the kind of model was released; the status says what was taken."""

    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Denoising steps of each block; without it 40 for Wan2.2 T2V-A14B and 50 for all others."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """Classifier-free guidance; without it 4 for Wan2.2 T2V-A14B and 5 for all others. At 1 or below there is none;
    then the unconditional pass is left out and the work halves."""
    guidance_scale_2: Annotated[float, Field(ge=0, le=100)] | None = None
    """Guidance of the low-noise expert, only for models that have one; without it 3 for Wan2.2 T2V-A14B."""
    flow_shift: Annotated[float, Field(gt=0, le=100)] | None = None
    """The schedule's shift. Without it, by the kind of model and never by its scheduler's file, which does not know
    the video's size: 12 for Wan2.2 T2V-A14B, 5 for Wan2.2 TI2V-5B, for Wan2.1 3 up to 480p (832 x 480 pixels) and 5
    above."""
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    """Seed of all noise. The same spec renders the same latents, whatever the number of GPUs."""


class DualParallel(Model):
    """How the video is cut into blocks (arXiv 2505.21070)."""

    block_latents: Annotated[int, Field(ge=1, le=64)] = 8
    """Latent frames in a block; a latent frame is 4 frames of video."""
    context_latents: Annotated[int, Field(ge=0, le=64)] = 8
    """Latent frames a block borrows from each neighbour; at most blockLatents. More is smoother and slower."""

    rules = (
        Rule(
            "self.contextLatents <= self.blockLatents",
            "contextLatents must not exceed blockLatents",
            ".contextLatents",
        ),
    )


class Checkpoint(Model):
    """How much work an interruption may cost."""

    every_seconds: Annotated[int, Field(ge=0, le=86_400)] = 60
    """Seconds of work after which the state is written to storage; 0 writes it only when the worker is stopped."""


class Resources(Model):
    """What each pod asks for beside its GPUs."""

    cpu: Quantity | None = None
    """CPU request."""
    memory: Quantity | None = None
    """Memory request and limit."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, which counts as memory."""


class Output(Model):
    """Where the finished video goes."""

    s3: S3Output
    """S3-compatible object storage."""


def _immutable(field: str, *, optional: bool = False) -> Rule:
    same = f"self.{field} == oldSelf.{field}"
    cel = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || {same})" if optional else same
    return Rule(cel, f"{field} is immutable: a render in progress depends on it; create another VideoJob", f".{field}")


class Spec(Model):
    """The desired render."""

    prompt: Prompt | None = None
    """What the video shows. Give prompt or scenes."""
    scenes: Annotated[tuple[Scene, ...], Field(min_length=1, max_length=256)] | None = None
    """What the video shows, one prompt after another."""
    negative_prompt: Annotated[str, Field(max_length=20_000)] = ""
    """What the video shall not show."""
    video: Video = Video()
    """Length, size and frame rate."""
    model: ModelReference
    """The diffusion model."""
    sampling: Sampling = Sampling()
    """Steps, guidance and seed."""
    dual_parallel: DualParallel = DualParallel()
    """Block and context length."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved. A change takes effect at the next attempt."""
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """Pods, each on its own node. A change takes effect at the next attempt."""
    gpus_per_node: Annotated[int, Field(ge=0, le=16)] = 8
    """GPUs, and so ranks, of each pod; 0 renders on CPUs."""
    ranks_per_node: Annotated[int, Field(ge=1, le=64)] | None = None
    """Ranks of each pod where gpusPerNode is 0 (then 1 by default); otherwise there is one rank a GPU."""
    resources: Resources = Resources()
    """CPU and memory of each pod; the operator's defaults where silent."""
    output: Output
    """Where the finished video goes."""

    rules = (
        Rule("has(self.prompt) != has(self.scenes)", "give exactly one of prompt and scenes", ".prompt"),
        Rule("!has(self.prompt) || has(self.video.frames)", "video.frames is required with prompt", ".video.frames"),
        Rule(
            "!has(self.scenes) || !has(self.video.frames)",
            "video.frames must be absent with scenes: the length is the sum of theirs",
            ".video.frames",
        ),
        Rule(
            "!has(self.ranksPerNode) || self.gpusPerNode == 0",
            "ranksPerNode is for CPU ranks: set gpusPerNode to 0, or remove it",
            ".ranksPerNode",
        ),
        _immutable("prompt", optional=True),
        _immutable("scenes", optional=True),
        _immutable("negativePrompt"),
        _immutable("video"),
        _immutable("model"),
        _immutable("sampling"),
        _immutable("dualParallel"),
        _immutable("output"),
    )

    @property
    def all_scenes(self) -> tuple[Scene, ...]:
        """The scenes; a single prompt is one scene."""
        if self.scenes is not None:
            return self.scenes
        assert self.prompt is not None  # noqa: S101 - the spec's rules
        assert self.video.frames is not None  # noqa: S101 - the spec's rules
        return (Scene(prompt=self.prompt, frames=self.video.frames),)

    @property
    def frames(self) -> int:
        """The video's length in frames."""
        return sum(scene.frames for scene in self.all_scenes)

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.gpus_per_node or self.ranks_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks

    def digest(self) -> str:
        """SHA-256 of what determines the video: not the machines, the place or the checkpoints."""
        elsewhere = {"checkpoint", "nodes", "gpus_per_node", "ranks_per_node", "resources", "output"}
        render = self.model_dump(mode="json", by_alias=True, exclude=elsewhere)
        return hashlib.sha256(json.dumps(render, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Metadata(BaseModel):
    """The part of the object's metadata that a render uses."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, Field(min_length=1)]
    namespace: str = "default"
    uid: str = ""
    generation: int = 0


class VideoJob(BaseModel):
    """A VideoJob as the worker and ``videojob render`` read it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    api_version: Literal["videojob.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["VideoJob"]
    metadata: Metadata
    spec: Spec

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.metadata.name.matches('^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$')",
            "metadata.name must be a lower-case DNS label of at most 52 characters that begins with a letter: "
            "Jobs and pods are named after it",
            ".metadata.name",
        ),
    )

    def document(self) -> dict[str, Any]:
        """The JSON document that the worker is given."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
