"""The operator's settings, read from the environment once, in ``__main__``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PREFIX = "VIDEOJOB_"

QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?"
NAMESPACE = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
RESOURCE = r"[a-z0-9.-]+/[A-Za-z0-9._-]+"


class SettingsError(ValueError):
    """A variable of the environment makes no sense; the message names it."""


@dataclass(frozen=True)
class Settings:
    """One operator's settings; each is the variable ``VIDEOJOB_<NAME>``."""

    worker_image: str = "videojob:0.1.0"
    """Image of worker pods."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Of worker pods."""
    namespaces: tuple[str, ...] = ()
    """Namespaces to watch, separated by commas; all where empty."""
    poll_seconds: float = 5.0
    """Between two looks at a worker's progress."""
    poll_through: Literal["pod", "proxy"] = "pod"
    """Ask the pod's address, or through the API server where the operator runs outside the cluster."""
    max_attempts: int = 3
    """Attempts that may fail by the worker's own fault; lost nodes and evictions do not count."""
    backoff_seconds: float = 10.0
    """Before the second attempt; doubles with each, up to five minutes."""
    gpu_resource: str = "nvidia.com/gpu"
    """The extended resource of a GPU."""
    cpu_per_rank: str = "1"
    """CPU request of a pod without GPUs for each of its ranks where the spec is silent."""
    cpu_per_gpu: str = "100m"
    """CPU request of a pod for each of its GPUs where the spec is silent: it has its node to itself anyhow."""
    memory: str = "4Gi"
    """Memory request and limit of a pod without GPUs where the spec is silent."""
    memory_per_gpu: str = "2Gi"
    """Memory request, without a limit, of a pod for each of its GPUs where the spec is silent."""
    shared_memory: str = "1Gi"
    """Size of /dev/shm where the spec is silent."""
    port: int = 8080
    """Of the operator's own /healthz."""
    log_format: Literal["plain", "json"] = "plain"
    """Of the operator's own log."""


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: a variable makes no sense.
    """
    default = Settings()
    return Settings(
        worker_image=_text(environ, "WORKER_IMAGE", default.worker_image),
        image_pull_policy=_choice(  # type: ignore[arg-type]
            environ, "IMAGE_PULL_POLICY", default.image_pull_policy, ("Always", "IfNotPresent", "Never")
        ),
        namespaces=_namespaces(environ),
        poll_seconds=_number(environ, "POLL_SECONDS", default.poll_seconds),
        poll_through=_choice(environ, "POLL_THROUGH", default.poll_through, ("pod", "proxy")),  # type: ignore[arg-type]
        max_attempts=_integer(environ, "MAX_ATTEMPTS", default.max_attempts, 1000),
        backoff_seconds=_number(environ, "BACKOFF_SECONDS", default.backoff_seconds),
        gpu_resource=_like(environ, "GPU_RESOURCE", default.gpu_resource, RESOURCE),
        cpu_per_rank=_like(environ, "CPU_PER_RANK", default.cpu_per_rank, QUANTITY),
        memory=_like(environ, "MEMORY", default.memory, QUANTITY),
        cpu_per_gpu=_like(environ, "CPU_PER_GPU", default.cpu_per_gpu, QUANTITY),
        memory_per_gpu=_like(environ, "MEMORY_PER_GPU", default.memory_per_gpu, QUANTITY),
        shared_memory=_like(environ, "SHARED_MEMORY", default.shared_memory, QUANTITY),
        port=_integer(environ, "OPERATOR_PORT", default.port, 65535),
        log_format=_choice(environ, "LOG_FORMAT", default.log_format, ("plain", "json")),  # type: ignore[arg-type]
    )


def _text(environ: Mapping[str, str], name: str, default: str) -> str:
    return environ.get(PREFIX + name) or default


def _like(environ: Mapping[str, str], name: str, default: str, pattern: str) -> str:
    value = _text(environ, name, default)
    if not re.fullmatch(pattern, value):
        raise SettingsError(f"{PREFIX}{name} must be like {default}, not {value!r}")
    return value


def _namespaces(environ: Mapping[str, str]) -> tuple[str, ...]:
    listed = tuple(filter(None, map(str.strip, _text(environ, "NAMESPACES", "").split(","))))
    for namespace in listed:
        if not re.fullmatch(NAMESPACE, namespace):
            raise SettingsError(f"{PREFIX}NAMESPACES must be names separated by commas; {namespace!r} is none")
    return listed


def _choice(environ: Mapping[str, str], name: str, default: str, choices: tuple[str, ...]) -> str:
    value = _text(environ, name, default)
    if value not in choices:
        raise SettingsError(f"{PREFIX}{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _integer(environ: Mapping[str, str], name: str, default: int, highest: int) -> int:
    text = _text(environ, name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= highest:
        raise SettingsError(f"{PREFIX}{name} must be an integer from 1 to {highest}, not {text!r}")
    return int(text)


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = _text(environ, name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise SettingsError(f"{PREFIX}{name} must be a number above 0, not {text!r}")
    return value
