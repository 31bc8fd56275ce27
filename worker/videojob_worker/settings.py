"""A worker's settings: how and where this process runs, read from the environment once. What to render is the spec.

``__main__`` reads them; the names are in ``videojob_api.names`` and torchrun's documentation.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from videojob_api import names

ENV_DTYPE = "VIDEOJOB_DTYPE"  # float32, bfloat16 or float16
ENV_OUTPUT_DIR = "VIDEOJOB_OUTPUT_DIR"  # a folder instead of spec.output
ENV_DUMP_LATENTS = "VIDEOJOB_DUMP_LATENTS"  # a safetensors file for the clean latents
ENV_PEER_TIMEOUT = "VIDEOJOB_PEER_TIMEOUT_SECONDS"
ENV_STALL_TIMEOUT = "VIDEOJOB_STALL_TIMEOUT_SECONDS"


class SettingsError(ValueError):
    """A variable of the environment is missing or makes no sense; the message names it."""


@dataclass(frozen=True)
class Settings:
    """One rank's settings."""

    spec: Path  # the VideoJob as JSON
    attempt: int  # from 1
    rank: int
    local_rank: int
    world_size: int
    device: Literal["cuda", "cpu"]
    dtype: Literal["float32", "bfloat16", "float16"]  # of the transformer; latents and scheduler stay float32
    port: int  # of /progress on the first rank; 0 serves nothing
    scratch: Path  # downloads and the growing video
    last_words: Path | None  # where the reason of the end goes
    output_dir: Path | None  # a folder instead of object storage
    dump_latents: Path | None
    peer_timeout_s: float  # how long another rank may give no sign of life
    stall_timeout_s: float  # how long a rank waits for one that lives: the longest load, compilation or outage


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: a variable is missing or makes no sense.
    """
    device = _choice(environ, names.ENV_DEVICE, "cuda", ("cuda", "cpu"))
    return Settings(
        spec=Path(_required(environ, names.ENV_SPEC)),
        attempt=_integer(environ, names.ENV_ATTEMPT, 1, at_least=1),
        rank=_integer(environ, "RANK", 0),
        local_rank=_integer(environ, "LOCAL_RANK", 0),
        world_size=_integer(environ, "WORLD_SIZE", 1, at_least=1),
        device="cuda" if device == "cuda" else "cpu",
        dtype=_choice(  # type: ignore[arg-type]
            environ, ENV_DTYPE, "bfloat16" if device == "cuda" else "float32", ("float32", "bfloat16", "float16")
        ),
        port=_integer(environ, names.ENV_PORT, names.PROGRESS_PORT),
        scratch=Path(environ.get(names.ENV_SCRATCH) or tempfile.gettempdir()),
        last_words=_path(environ, names.ENV_LAST_WORDS),
        output_dir=_path(environ, ENV_OUTPUT_DIR),
        dump_latents=_path(environ, ENV_DUMP_LATENTS),
        peer_timeout_s=_integer(environ, ENV_PEER_TIMEOUT, 120, at_least=1),
        stall_timeout_s=_integer(environ, ENV_STALL_TIMEOUT, 1800, at_least=1),
    )


def _required(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise SettingsError(f"set {name}: the path of the VideoJob document (`videojob render` does so)")
    return environ[name]


def _integer(environ: Mapping[str, str], name: str, default: int, at_least: int = 0) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < at_least:
        raise SettingsError(f"{name} must be an integer of at least {at_least}, not {text!r}")
    return int(text)


def _choice(environ: Mapping[str, str], name: str, default: str, choices: tuple[str, ...]) -> str:
    value = environ.get(name) or default
    if value not in choices:
        raise SettingsError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    return Path(environ[name]) if environ.get(name) else None
