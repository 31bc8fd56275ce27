"""The operator's environment."""

from __future__ import annotations

import pytest

from videojob_operator import settings
from videojob_operator.settings import Settings


def test_an_empty_environment_gives_the_defaults():
    assert settings.read({}) == Settings()


def test_an_empty_variable_counts_as_absent():
    assert settings.read({"VIDEOJOB_WORKER_IMAGE": "", "VIDEOJOB_POLL_SECONDS": ""}) == Settings()


def test_every_setting_is_a_variable():
    read = settings.read(
        {
            "VIDEOJOB_WORKER_IMAGE": "registry/videojob:1",
            "VIDEOJOB_IMAGE_PULL_POLICY": "Always",
            "VIDEOJOB_NAMESPACES": "studio, lab ,",
            "VIDEOJOB_POLL_SECONDS": "0.5",
            "VIDEOJOB_POLL_THROUGH": "proxy",
            "VIDEOJOB_MAX_ATTEMPTS": "7",
            "VIDEOJOB_BACKOFF_SECONDS": "30",
            "VIDEOJOB_GPU_RESOURCE": "amd.com/gpu",
            "VIDEOJOB_CPU_PER_RANK": "500m",
            "VIDEOJOB_CPU_PER_GPU": "250m",
            "VIDEOJOB_MEMORY": "8Gi",
            "VIDEOJOB_MEMORY_PER_GPU": "64G",
            "VIDEOJOB_SHARED_MEMORY": "2Gi",
            "VIDEOJOB_OPERATOR_PORT": "9000",
            "VIDEOJOB_LOG_FORMAT": "json",
        }
    )
    assert read == Settings(
        worker_image="registry/videojob:1",
        image_pull_policy="Always",
        namespaces=("studio", "lab"),
        poll_seconds=0.5,
        poll_through="proxy",
        max_attempts=7,
        backoff_seconds=30,
        gpu_resource="amd.com/gpu",
        cpu_per_rank="500m",
        cpu_per_gpu="250m",
        memory="8Gi",
        memory_per_gpu="64G",
        shared_memory="2Gi",
        port=9000,
        log_format="json",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("IMAGE_PULL_POLICY", "Sometimes"),
        ("NAMESPACES", "studio,Lab"),
        ("NAMESPACES", "team-*"),
        ("POLL_SECONDS", "soon"),
        ("POLL_SECONDS", "0"),
        ("POLL_SECONDS", "nan"),
        ("POLL_SECONDS", "inf"),
        ("POLL_THROUGH", "carrier pigeon"),
        ("MAX_ATTEMPTS", "0"),
        ("MAX_ATTEMPTS", "1.5"),
        ("MAX_ATTEMPTS", "-3"),
        ("BACKOFF_SECONDS", "-1"),
        ("GPU_RESOURCE", "gpu"),
        ("CPU_PER_RANK", "one"),
        ("MEMORY", "4 GB"),
        ("MEMORY_PER_GPU", "-2Gi"),
        ("SHARED_MEMORY", "1gi"),
        ("OPERATOR_PORT", "70000"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_nonsense_is_refused_by_the_variables_name(name, value):
    with pytest.raises(settings.SettingsError, match=f"VIDEOJOB_{name} must be"):
        settings.read({f"VIDEOJOB_{name}": value})
