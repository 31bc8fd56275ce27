"""Checks a VideoJob document as the API server would, and says everything that is wrong at once.

Looks at the document as the API server would store it: plain JSON, nulls dropped, defaults filled in. On that it
uses the models' types and bounds (``spec``) and evaluates the very CEL rules that the CustomResourceDefinition
carries. Transition rules (``oldSelf``) need a past and are left to the API server.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any

from cel_expr_python import cel
from pydantic import BaseModel, ValidationError

from .spec import Rule, VideoJob


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the field's path and what to do."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class InvalidVideoJobError(ValueError):
    """A document is no valid VideoJob; ``problems`` holds every reason found."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def read(document: object) -> VideoJob:
    """The VideoJob that a parsed YAML or JSON document holds.

    Raises:
        InvalidVideoJobError: with all problems at once.
    """
    found = problems(document)
    if found:
        raise InvalidVideoJobError(found)
    return _typed(_stored(document))


def problems(document: object) -> list[Problem]:
    """Everything wrong with a document: types and bounds in the document's order, then rules; empty if it is valid."""
    if not isinstance(document, Mapping):
        return [Problem("(document)", f"must be a mapping with apiVersion, kind, metadata and spec, not {document!r}")]
    stored = _stored(document)
    errors = _type_errors(stored)
    inner = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    found = [Problem(_path(error["loc"]), _message(error)) for error in errors if error["loc"] not in inner]
    seen = {problem.field for problem in found}
    return found + [problem for problem in _broken_rules(VideoJob, stored, "") if problem.field not in seen]


def _type_errors(stored: Mapping[str, Any]) -> list[Any]:
    try:
        _typed(stored)
    except ValidationError as error:
        return list(error.errors(include_url=False))
    return []


def _typed(stored: Mapping[str, Any]) -> VideoJob:
    return VideoJob.model_validate_json(json.dumps(stored), by_alias=True, by_name=False)


def _stored(document: object) -> Any:
    """The document as the API server stores it, without the status, which is not the user's."""
    plain = _plain(document)
    plain.pop("status", None)
    return _with_defaults(VideoJob, plain)


def _plain(value: object) -> Any:
    """As JSON: YAML also knows dates and keys that are no strings. A whole number is an integer, as on the server."""
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):  # PyYAML leaves a JSON document's \ud83d\ude00 as two halves of one character
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _path(loc: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return path.removeprefix(".") or "(document)"


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown field: remove it, or correct its spelling or indentation"
    if error["type"] == "missing":
        return "required: add it"
    value = repr(error["input"])
    return f"{error['msg']}, not {value if len(value) <= 60 else value[:57] + '...'}"


def _members(model: type[BaseModel]) -> Iterator[tuple[str, bool, type[BaseModel] | None, Any]]:
    """(alias, is a list, the nested model or None, default) of each field."""
    for name, info in model.model_fields.items():
        nested, many = _nested(info.annotation)
        default = info.get_default(call_default_factory=False) if not info.is_required() else None
        if isinstance(default, BaseModel):
            default = {}
        yield info.alias or name, many, nested, default


def _nested(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _nested(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union):
        return next((found for part in typing.get_args(annotation) if (found := _nested(part))[0]), (None, False))
    if origin is tuple:
        return _nested(typing.get_args(annotation)[0])[0], True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    return None, False


def _with_defaults(model: type[BaseModel], value: Any) -> Any:
    """The value without its nulls and with the model's defaults; what is no mapping stays as it is."""
    if not isinstance(value, Mapping):
        return value
    filled = dict(value)
    for alias, many, nested, default in _members(model):
        if filled.get(alias) is None:
            filled.pop(alias, None)
            if default is not None:
                filled[alias] = default
        if nested is not None and alias in filled:
            inner = filled[alias]
            each = many and isinstance(inner, list)
            filled[alias] = [_with_defaults(nested, item) for item in inner] if each else _with_defaults(nested, inner)
    return filled


def _broken_rules(model: type[BaseModel], value: Any, path: str) -> Iterator[Problem]:
    if not isinstance(value, Mapping):
        return
    for rule in getattr(model, "rules", ()):
        if "oldSelf" not in rule.cel and _is_false(rule, value):
            yield Problem((path + rule.field).removeprefix("."), rule.message)
    for alias, many, nested, _ in _members(model):
        if nested is None or alias not in value:
            continue
        if many and isinstance(value[alias], list):
            for index, item in enumerate(value[alias]):
                yield from _broken_rules(nested, item, f"{path}.{alias}[{index}]")
        else:
            yield from _broken_rules(nested, value[alias], f"{path}.{alias}")


@cache
def _program(expression: str) -> Any:
    environment = cel.NewEnv(variables={"self": cel.Type.DYN}, extensions=[_strings()])
    return environment.compile(expression)


def _strings() -> Any:
    from cel_expr_python.ext import ext_strings

    return ext_strings.ExtStrings()


def _is_false(rule: Rule, value: Mapping[str, Any]) -> bool:
    """Whether the rule is broken; a rule that cannot be evaluated concerns a field whose type is already refused."""
    return _program(rule.cel).eval(data={"self": value}).value() is False
