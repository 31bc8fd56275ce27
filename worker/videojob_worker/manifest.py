"""Reads a manifest's YAML as kubectl does. ``cli`` validates what it reads. Knows nothing of VideoJobs."""

from __future__ import annotations

import re
from typing import Any

import yaml


class KubectlLoader(yaml.SafeLoader):
    """YAML as kubectl's parser reads it: PyYAML's, but dates and base-60 numbers stay strings and 1e3 is a number."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    odd = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    return {
        first: [(tag, pattern) for tag, pattern in found if tag not in odd]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


KubectlLoader.yaml_implicit_resolvers = _resolvers()
KubectlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
KubectlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def load(text: str) -> Any:
    """The one document in a text.

    Raises:
        yaml.YAMLError: it is no YAML, or holds several documents.
    """
    return yaml.load(text, Loader=KubectlLoader)  # noqa: S506 - a safe loader
