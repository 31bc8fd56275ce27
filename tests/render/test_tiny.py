"""The tiny model is a Wan repository that stock diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from videojob_worker import tiny
from videojob_worker.models import Kind

SHARDS = "diffusion_pytorch_model-*.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", Kind)
def test_stock_diffusers_loads_it_and_renders(tiny_models, kind):
    pipeline = WanPipeline.from_pretrained(tiny_models(kind))
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a fox",
        height=32,
        width=64,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert frames.shape == (1, 5, 3, 32, 64)
    assert torch.isfinite(frames).all()


@pytest.mark.parametrize(
    ("kind", "transformer"), [(kind, "transformer") for kind in Kind] + [(Kind.A14B, "transformer_2")]
)
def test_a_transformer_lies_in_several_shards_with_an_index(tiny_models, kind, transformer):
    folder = tiny_models(kind) / transformer
    shards = {path.name for path in folder.glob(SHARDS)}
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(shards) > 2
    assert set(weight_map.values()) == shards
    assert {path.name for path in folder.iterdir()} == {*shards, INDEX, "config.json"}


def test_no_file_is_a_pickle(tiny_model):
    assert {Path(name).suffix for name in content(tiny_model)} <= {".json", ".safetensors", ".model", ".txt"}


def test_the_same_seed_gives_the_same_bytes(tiny_model, tmp_path):
    tiny.save(tmp_path / "again")
    assert content(tmp_path / "again") == content(tiny_model)


def test_two_experts_differ(tiny_models):
    folder = tiny_models(Kind.A14B)
    mine, other = content(folder / "transformer"), content(folder / "transformer_2")
    assert mine.keys() == other.keys()
    assert not [name for name in mine if name.endswith(".safetensors") and mine[name] == other[name]]


def test_another_seed_gives_other_weights_in_the_same_files(tiny_model, tmp_path):
    tiny.save(tmp_path / "other", seed=1)
    mine, other = content(tmp_path / "other"), content(tiny_model)
    assert mine.keys() == other.keys()
    assert not [name for name in mine if name.endswith(".safetensors") and mine[name] == other[name]]


def test_making_one_leaves_the_callers_randomness_alone(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tiny.save(tmp_path / "model", layers=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_has_as_many_layers_as_asked_for(tmp_path):
    tiny.save(tmp_path / "model", layers=3)
    assert json.loads((tmp_path / "model" / "transformer" / "config.json").read_text())["num_layers"] == 3
