"""A worker's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from videojob_worker import settings


def test_defaults_are_those_of_a_gpu_pod():
    read = settings.read({"VIDEOJOB_SPEC": "/etc/videojob/videojob.json", "RANK": "3", "WORLD_SIZE": "8"})
    assert (read.device, read.dtype, read.port, read.attempt) == ("cuda", "bfloat16", 8080, 1)
    assert (read.rank, read.world_size, read.output_dir) == (3, 8, None)
    assert read.spec == Path("/etc/videojob/videojob.json")


def test_cpu_ranks_compute_in_float32():
    assert settings.read({"VIDEOJOB_SPEC": "x", "VIDEOJOB_DEVICE": "cpu"}).dtype == "float32"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"VIDEOJOB_SPEC": "x", "VIDEOJOB_DEVICE": "tpu"},
        {"VIDEOJOB_SPEC": "x", "VIDEOJOB_ATTEMPT": "0"},
        {"VIDEOJOB_SPEC": "x", "VIDEOJOB_PORT": "http"},
        {"VIDEOJOB_SPEC": "x", "VIDEOJOB_DTYPE": "int8"},
    ],
)
def test_nonsense_is_refused_by_the_variables_name(environ):
    name = [*environ, "VIDEOJOB_SPEC"][1] if len(environ) > 1 else "VIDEOJOB_SPEC"
    with pytest.raises(settings.SettingsError, match=name):
        settings.read(environ)
