"""VideoJob documents, right and wrong, which the local validator and the API server must judge alike."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = object()  # as a value: the field is removed

BUCKET = {"bucket": "videos"}
SCENES = [{"prompt": "A fox", "frames": 40}, {"prompt": "A hare", "frames": 60}]
REVISION = "0123456789abcdef0123456789abcdef01234567"

MINIMAL: dict[str, Any] = {
    "apiVersion": "videojob.dev/v1alpha1",
    "kind": "VideoJob",
    "metadata": {"name": "fox"},
    "spec": {
        "prompt": "A fox",
        "video": {"frames": 81},
        "model": {"source": {"localPath": "/models/wan"}},
        "output": {"s3": BUCKET},
    },
}
AS_SCENES = {"spec.prompt": ABSENT, "spec.video.frames": ABSENT, "spec.scenes": SCENES}

Changes = Mapping[str, Any]  # path of a field, dotted: its value


def document(changes: Changes | None = None) -> dict[str, Any]:
    """The minimal VideoJob with changes."""
    changed = copy.deepcopy(MINIMAL)
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = changed
        for name in parents:
            place = place.setdefault(name, {})
        if value is ABSENT:
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(value)
    return changed


@dataclass(frozen=True)
class Refused:
    """A wrong document: the field that is named and a part of what is said about it here."""

    changes: Changes
    field: str
    remedy: str

    def __str__(self) -> str:
        return _name(self.changes)


@dataclass(frozen=True)
class Accepted:
    """A right document."""

    changes: Changes

    def __str__(self) -> str:
        return _name(self.changes)


@dataclass(frozen=True)
class Update:
    """A change of a VideoJob that exists."""

    field: str
    changes: Changes
    before: Changes

    def __str__(self) -> str:
        return self.field if len(self.changes) == 1 else f"{self.field}-{len(self.changes)}"


def _name(changes: Changes) -> str:
    words = (
        f"{path.removeprefix('spec.')}={'absent' if value is ABSENT else repr(value)}"
        for path, value in changes.items()
    )
    return ascii(" ".join(words))[1:61]


def _wrong(path: str, value: Any, remedy: str, field: str | None = None) -> Refused:
    return Refused({path: value}, field or path, remedy)


NUMBERS = [
    _wrong("spec.video.frames", 0, "greater than or equal to 1"),
    _wrong("spec.video.frames", 1_000_001, "less than or equal to 1000000"),
    _wrong("spec.video.frames", 10**30, "less than or equal to 1000000"),
    _wrong("spec.video.width", 833, "multiple of 16"),
    _wrong("spec.video.width", 16, "greater than or equal to 32"),
    _wrong("spec.video.height", 4112, "less than or equal to 4096"),
    _wrong("spec.video.fps", 0, "greater than or equal to 1"),
    _wrong("spec.sampling.steps", 0, "greater than or equal to 1"),
    _wrong("spec.sampling.guidanceScale", -0.5, "greater than or equal to 0"),
    _wrong("spec.sampling.guidanceScale", 100.5, "less than or equal to 100"),
    _wrong("spec.sampling.guidanceScale2", -0.5, "greater than or equal to 0"),
    _wrong("spec.sampling.guidanceScale2", 100.5, "less than or equal to 100"),
    _wrong("spec.sampling.flowShift", 0, "greater than 0"),
    _wrong("spec.sampling.seed", -1, "greater than or equal to 0"),
    _wrong("spec.sampling.seed", 2**53, "less than or equal to 9007199254740991"),
    _wrong("spec.dualParallel.blockLatents", 65, "less than or equal to 64"),
    _wrong("spec.dualParallel.contextLatents", -1, "greater than or equal to 0"),
    _wrong("spec.checkpoint.everySeconds", -1, "greater than or equal to 0"),
    _wrong("spec.checkpoint.everySeconds", 86_401, "less than or equal to 86400"),
    _wrong("spec.nodes", 0, "greater than or equal to 1"),
    _wrong("spec.gpusPerNode", 17, "less than or equal to 16"),
    _wrong("spec.ranksPerNode", 0, "greater than or equal to 1"),
]

TYPES = [
    _wrong("spec.nodes", True, "valid integer, not True"),
    _wrong("spec.nodes", "2", "valid integer, not '2'"),
    _wrong("spec.nodes", 1.5, "valid integer, not 1.5"),
    _wrong("spec.video.frames", datetime.date(2024, 1, 31), "valid integer, not '2024-01-31'"),
    _wrong("spec.sampling.guidanceScale", "5", "valid number, not '5'"),
    _wrong("spec.sampling.guidanceScale", True, "valid number, not True"),
    _wrong("spec.prompt", 5, "valid string, not 5"),
    _wrong("spec.prompt", ["A fox"], "valid string, not ['A fox']"),
    _wrong("spec.resources.cpu", 4, "valid string, not 4"),
    _wrong("spec.video", "81 frames", "object, not '81 frames'"),
    _wrong("spec.video", [], "object, not []"),
    _wrong("spec.output.s3", "s3://videos", "object, not 's3://videos'"),
    Refused({**AS_SCENES, "spec.scenes": {"prompt": "A fox", "frames": 40}}, "spec.scenes", "valid array"),
    Refused({**AS_SCENES, "spec.scenes": [None]}, "spec.scenes[0]", "object, not None"),
    _wrong("spec", "A fox", "object, not 'A fox'"),
]

TEXTS = [
    _wrong("spec.prompt", "", "at least 1 character"),
    _wrong("spec.prompt", "x" * 20_001, "at most 20000 characters"),
    _wrong("spec.negativePrompt", "x" * 20_001, "at most 20000 characters"),
    _wrong("spec.output.s3.bucket", "ab", "at least 3 characters"),
    _wrong("spec.output.s3.bucket", "Videos", "match pattern"),
    _wrong("spec.output.s3.prefix", "/fox", "match pattern"),
    _wrong("spec.output.s3.prefix", "fox/", "match pattern"),
    _wrong("spec.output.s3.prefix", "a//b", "match pattern"),
    _wrong("spec.output.s3.prefix", "a b", "match pattern"),
    _wrong("spec.output.s3.prefix", "fox\n", "match pattern"),
    _wrong("spec.output.s3.endpoint", "s3:7070", "match pattern"),
    _wrong("spec.output.s3.endpoint", "ftp://s3", "match pattern"),
    _wrong("spec.output.s3.endpoint", "http://s3/\u00a0", "match pattern"),
    _wrong("spec.output.s3.region", "", "at least 1 character"),
    _wrong("spec.output.s3.addressingStyle", "dns", "'auto', 'path' or 'virtual', not 'dns'"),
    _wrong("spec.output.s3.credentialsSecret", "My_Secret", "match pattern"),
    _wrong("spec.output.s3.serviceAccountName", "-a", "match pattern"),
    _wrong("spec.resources.memory", "64 GB", "match pattern"),
    _wrong("spec.resources.sharedMemory", "-1Gi", "match pattern"),
    _wrong(
        "spec.model.source",
        {"huggingFace": {"repository": "Wan-AI/Wan", "revision": "main"}},
        "match pattern",
        "spec.model.source.huggingFace.revision",
    ),
    _wrong(
        "spec.model.source",
        {"huggingFace": {"repository": "Künstler/Wan", "revision": REVISION}},
        "match pattern",
        "spec.model.source.huggingFace.repository",
    ),
    _wrong(
        "spec.model.source",
        {"persistentVolumeClaim": {"claimName": "models", "path": "/wan"}},
        "match pattern",
        "spec.model.source.persistentVolumeClaim.path",
    ),
    _wrong("metadata.name", "n" * 53, "at most 52 characters"),
    _wrong("metadata.name", "8-foxes", "begins with a letter"),
    _wrong("metadata.name", "fox.jump", "lower-case DNS label"),
    _wrong("metadata.name", "fox-", "lower-case DNS label"),
    _wrong("metadata.name", "Fox", "lower-case DNS label"),
]

MEMBERS = [
    _wrong("spec", ABSENT, "required: add it"),
    _wrong("spec", None, "required: add it"),
    _wrong("spec.model", ABSENT, "required: add it"),
    _wrong("spec.model", {}, "required: add it", "spec.model.source"),
    _wrong("spec.output", None, "required: add it"),
    _wrong("spec.output", {}, "required: add it", "spec.output.s3"),
    _wrong("spec.output.s3", {"prefix": "fox"}, "required: add it", "spec.output.s3.bucket"),
    Refused({**AS_SCENES, "spec.scenes": []}, "spec.scenes", "at least 1 item"),
    Refused({**AS_SCENES, "spec.scenes": [SCENES[0]] * 257}, "spec.scenes", "at most 256 items"),
    Refused(
        {**AS_SCENES, "spec.scenes": [SCENES[0], {"prompt": "A hare"}]}, "spec.scenes[1].frames", "required: add it"
    ),
    _wrong("spec.steps", 50, "unknown field: remove it"),
    _wrong("spec.video.heigth", 480, "unknown field: remove it, or correct its spelling"),
    _wrong("spec.sampling.guidance_scale_2", 3, "unknown field: remove it, or correct its spelling"),
    _wrong("spec.negative_prompt", "blur", "unknown field: remove it, or correct its spelling"),
    _wrong("spec.unknown", None, "unknown field: remove it"),
    _wrong("sampling", {"steps": 20}, "unknown field: remove it, or correct its spelling or indentation"),
    Refused({**AS_SCENES, "spec.scenes": [{**SCENES[0], "fps": 8}]}, "spec.scenes[0].fps", "unknown field: remove it"),
]

RULES = [
    _wrong("spec.prompt", ABSENT, "give exactly one of prompt and scenes"),
    _wrong("spec.prompt", None, "give exactly one of prompt and scenes"),
    Refused(
        {"spec.scenes": SCENES, "spec.video.frames": ABSENT}, "spec.prompt", "give exactly one of prompt and scenes"
    ),
    _wrong("spec.video", ABSENT, "video.frames is required with prompt", "spec.video.frames"),
    Refused(
        {"spec.prompt": ABSENT, "spec.scenes": SCENES}, "spec.video.frames", "video.frames must be absent with scenes"
    ),
    _wrong("spec.ranksPerNode", 4, "set gpusPerNode to 0, or remove it"),
    _wrong("spec.dualParallel.contextLatents", 9, "contextLatents must not exceed blockLatents"),
    _wrong(
        "spec.dualParallel.blockLatents",
        4,
        "contextLatents must not exceed blockLatents",
        "spec.dualParallel.contextLatents",
    ),
    _wrong("spec.model.source", {}, "give exactly one of huggingFace"),
    _wrong("spec.model.source", {"localPath": "/wan", "s3": BUCKET}, "give exactly one of huggingFace"),
    _wrong(
        "spec.model.source",
        {"persistentVolumeClaim": {"claimName": "models", "path": "wan/../../etc"}},
        "path must stay inside the claim: remove '..'",
        "spec.model.source.persistentVolumeClaim.path",
    ),
    _wrong(
        "spec.output.s3",
        {**BUCKET, "credentialsSecret": "keys", "serviceAccountName": "renderer"},
        "give credentialsSecret or serviceAccountName, not both",
        "spec.output.s3.serviceAccountName",
    ),
]

REFUSED = [*NUMBERS, *TYPES, *TEXTS, *MEMBERS, *RULES]

ACCEPTED = [
    Accepted(changes)
    for changes in (
        {},
        AS_SCENES,
        {"spec.video.frames": 1},
        {"spec.video.frames": 1_000_000, "spec.video.width": 4096, "spec.video.height": 32},
        {"spec.nodes": 2.0, "spec.video.fps": 24.0},
        {"spec.sampling.guidanceScale": 4, "spec.sampling.flowShift": 0.001},
        {"spec.sampling": {"steps": 1000, "guidanceScale": 0, "guidanceScale2": 3.5}},
        {"spec.sampling": {"steps": None, "guidanceScale": None, "guidanceScale2": None, "flowShift": None}},
        {"spec.sampling.seed": 2**53 - 1},
        {"spec.sampling": None, "spec.scenes": None, "spec.resources": None},
        {"spec.video.width": None, "spec.output.s3.endpoint": None, "spec.output.s3.prefix": None},
        {"spec.dualParallel": {"blockLatents": 64, "contextLatents": 64}},
        {"spec.dualParallel": {"contextLatents": 0}},
        {"spec.checkpoint": {"everySeconds": 0}},
        {"spec.checkpoint": {"everySeconds": 86_400}},
        {"spec.gpusPerNode": 0, "spec.ranksPerNode": 64},
        {"spec.resources": {"cpu": "1500m", "memory": "1.5Ti", "sharedMemory": "8Gi"}},
        {"spec.prompt": "x" * 20_000},
        {"spec.prompt": "🦊" * 20_000},
        {"spec.prompt": datetime.date(2024, 1, 31)},
        {"spec.prompt": b"A fox"},
        {"spec.prompt": "'single' \"double\" $(HOME) `id`\n\ttwo lines, ünïcödé, 狐狸, 👩‍👧"},
        {"spec.output.s3": {"bucket": "my.videos", "prefix": "füchse/狐/a+b?c#d%e", "addressingStyle": "virtual"}},
        {"spec.output.s3": {"bucket": "videos", "prefix": "a\u00a0b", "endpoint": "https://s3.example:9000/root/"}},
        {"spec.output.s3": {"bucket": "videos", "serviceAccountName": "renderer", "region": "eu-west-1"}},
        {"spec.model.source": {"huggingFace": {"repository": "Wan-AI/Wan2.1_T2V", "revision": REVISION}}},
        {"spec.model.source": {"persistentVolumeClaim": {"claimName": "models", "path": "a..b/c"}}},
        {"spec.model.source": {"s3": {"bucket": "models", "credentialsSecret": "keys"}}},
        {"metadata.name": "n" * 52},
        {"metadata.name": "f"},
    )
]

IMMUTABLE = [
    Update("prompt", {"spec.prompt": "A hare"}, {}),
    Update("prompt", AS_SCENES, {}),
    Update("scenes", {"spec.scenes": [*SCENES, {"prompt": "An owl", "frames": 20}]}, AS_SCENES),
    Update("scenes", {"spec.scenes": ABSENT, "spec.prompt": "A fox", "spec.video.frames": 100}, AS_SCENES),
    Update("negativePrompt", {"spec.negativePrompt": "blur"}, {}),
    Update("video", {"spec.video.fps": 24}, {}),
    Update("model", {"spec.model.source.localPath": "/models/other"}, {}),
    Update("sampling", {"spec.sampling.seed": 1}, {}),
    Update("sampling", {"spec.sampling.steps": 50}, {}),
    Update("sampling", {"spec.sampling.steps": ABSENT}, {"spec.sampling.steps": 50}),
    Update("sampling", {"spec.sampling.guidanceScale2": 3}, {}),
    Update("dualParallel", {"spec.dualParallel.blockLatents": 16}, {}),
    Update("output", {"spec.output.s3.prefix": "elsewhere"}, {}),
    Update("output", {"spec.output.s3.credentialsSecret": "keys"}, {}),
]

MUTABLE = [
    Update("checkpoint", {"spec.checkpoint.everySeconds": 600}, {}),
    Update("nodes", {"spec.nodes": 2}, {}),
    Update("gpusPerNode", {"spec.gpusPerNode": 4}, {}),
    Update("ranksPerNode", {"spec.ranksPerNode": 4}, {"spec.gpusPerNode": 0}),
    Update("resources", {"spec.resources.memory": "64Gi"}, {}),
]
