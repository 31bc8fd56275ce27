"""Generates the CustomResourceDefinition from the models in ``spec`` and ``status``.

``python -m videojob_api.crd`` prints it; ``make generate`` writes it into ``manifests/`` and a test fails on a
difference. Knows no client.
"""

from __future__ import annotations

import sys
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from . import names
from .spec import Rule, Spec, VideoJob
from .status import Status

COLUMNS = (
    ("Phase", "string", ".status.phase", "What the VideoJob is doing", 0),
    ("Progress", "string", ".status.progress.summary", "Percent, and clean blocks of all", 0),
    ("ETA", "string", ".status.progress.eta", "Time left at the pace so far", 0),
    ("Attempt", "integer", ".status.attempt", "The attempt at work, from 1", 0),
    ("Ready", "string", ".status.progress.ready", "Playable length", 1),
    ("Playlist", "string", ".status.output.playlistURL", "HLS playlist", 1),
    ("Age", "date", ".metadata.creationTimestamp", "", 0),
)


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition as one document."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": list(names.SHORT_NAMES),
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*column) for column in COLUMNS],
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _column(name: str, kind: str, path: str, description: str, priority: int) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    if description:
        column["description"] = description
    if priority:
        column["priority"] = priority
    return column


def _root() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "One long, continuous video, rendered on many GPUs by the DualParal method.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(Spec),
            "status": structural(Status),
        },
        "x-kubernetes-validations": [_validation(rule) for rule in VideoJob.rules],
    }


def structural(model: type[BaseModel]) -> dict[str, Any]:
    """The model as a structural schema: no references, no titles, no nulls, its rules as CEL validations."""
    document = model.model_json_schema(by_alias=True, schema_generator=_WithRules)
    schema = _plain(document, document.get("$defs", {}))
    assert isinstance(schema, dict)  # noqa: S101 - a model's schema is an object
    return schema


class _WithRules(GenerateJsonSchema):
    """Pydantic's JSON schema with each model's CEL rules at its place."""

    def model_schema(self, schema: Any) -> dict[str, Any]:
        built = super().model_schema(schema)
        rules = getattr(schema["cls"], "rules", ())
        if rules:
            built["x-kubernetes-validations"] = [_validation(rule) for rule in rules]
        return built


def _validation(rule: Rule) -> dict[str, Any]:
    place = {"fieldPath": rule.field} if rule.field and not rule.field.startswith(".metadata") else {}
    return {"rule": rule.cel, "message": rule.message, **place}


def _plain(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_plain(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[1]]
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return _plain({**target, **rest}, definitions)
    if "anyOf" in node:  # optional: the null alternative becomes "may be absent"
        (kept,) = [part for part in node["anyOf"] if part != {"type": "null"}]
        rest = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        return _plain({**kept, **rest}, definitions)
    dropped = {"title", "$defs", "additionalProperties"}
    plain = {
        key: {name: _plain(schema, definitions) for name, schema in value.items()}
        if key == "properties"
        else _plain(value, definitions)
        for key, value in node.items()
        if key not in dropped
    }
    return _kubernetes(plain)


def _kubernetes(node: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema 2020's words as OpenAPI 3.0's."""
    for bound, word in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in node:
            node[word], node[bound] = node[bound], True
    if node.get("type") == "integer":
        node["format"] = "int64"
    if node.get("type") == "object" and isinstance(node.get("default"), dict):
        node["default"] = {key: value for key, value in node["default"].items() if value is not None}
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def text() -> str:
    """The CustomResourceDefinition as YAML."""
    head = "# Generated by `make generate` from operator/videojob_api; do not edit.\n"
    return head + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    sys.stdout.write(text())
