"""What each rank would hold of the released models, counted without allocating it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from videojob_worker import footprint, models, topology, wan
from videojob_worker.errors import InvalidSpecError

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "transformers", "billions"),
    [
        ("Wan2.1 T2V 1.3B", 1, 1.42),
        ("Wan2.1 T2V 14B", 1, 14.29),
        ("Wan2.2 T2V-A14B", 2, 28.58),
        ("Wan2.2 TI2V-5B", 1, 5.00),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_hold_the_known_number_of_parameters_together(name, transformers, billions, ranks):
    experts = footprint.RELEASED[name]
    parts = footprint.shares(experts, ranks)
    assert len(experts) == transformers
    assert round(sum(part.parameters for part in parts) / 1e9, 2) == billions
    assert [part.layers for part in parts] == topology.shares(experts[0]["num_layers"], ranks)
    most, least = max(part.size_bytes for part in parts), min(part.size_bytes for part in parts)
    assert least > 0.7 * most, "no rank carries much more than another"


@pytest.mark.parametrize(
    ("name", "millions"), [("Wan2.1 T2V 1.3B", "46.4"), ("Wan2.1 T2V 14B", "351"), ("Wan2.2 TI2V-5B", "164")]
)
def test_a_rank_in_the_middle_holds_its_layers_alone(name, millions):
    middle = footprint.shares(footprint.RELEASED[name], 4)[1]
    assert f"{middle.parameters / len(middle.layers) / 1e6:.3g}" == millions


@pytest.mark.parametrize("layers", [range(8), range(3), range(3, 6), range(6, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_counted_is_what_is_loaded(tiny_model, layers, dtype):
    folder = tiny_model / "transformer"
    loaded = list(wan.load(folder, layers, dtype, CPU).parameters())
    counted = footprint.share([models.read_transformer(folder)], layers, dtype)
    assert counted.parameters == sum(parameter.numel() for parameter in loaded)
    assert counted.size_bytes == sum(parameter.numel() * parameter.element_size() for parameter in loaded)


def test_a_rank_holds_its_layers_of_both_experts(tiny_model):
    config = models.read_transformer(tiny_model / "transformer")
    for one, both in zip(footprint.shares([config], 3), footprint.shares([config, config], 3), strict=True):
        assert (both.layers, both.size_bytes) == (one.layers, 2 * one.size_bytes)


def test_more_ranks_than_layers_are_refused(tiny_model):
    with pytest.raises(InvalidSpecError, match="8 layers"):
        footprint.shares([models.read_transformer(tiny_model / "transformer")], 9)


def test_the_documented_tables_are_these(capsys):
    footprint.main([])
    assert capsys.readouterr().out in DOCS.read_text()


def test_a_models_folder_can_be_asked_about(tiny_models, capsys):
    footprint.main([str(tiny_models("wan2.2-a14b"))])
    assert "| tiny-wan2.2-a14b | 2 | 8 |" in capsys.readouterr().out
