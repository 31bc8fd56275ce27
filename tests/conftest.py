"""Fixtures for all tests: the real cluster and S3 server, and a tiny model in the real format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session")
def tiny_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives such a repository of any kind of model."""
    from videojob_worker import tiny
    from videojob_worker.models import Kind

    made = {Kind.WAN21: tiny_model}

    def give(name: str) -> Path:
        kind = Kind(name)
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("model") / f"tiny-{kind}"
            tiny.save(made[kind], kind=kind)
        return made[kind]

    return give


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch in this process, as the ranks have: the number decides the last bits of a sum."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
