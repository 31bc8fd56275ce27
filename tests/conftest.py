"""Fixtures for all tests: the real cluster and S3 server, and a tiny model in the real format."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["testcluster.fixtures"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with random weights and 8 layers, as `videojob tiny-model` makes it."""
    from videojob_worker import tiny

    folder = tmp_path_factory.mktemp("model") / "tiny-wan"
    tiny.save(folder)
    return folder
