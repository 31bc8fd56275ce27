"""A stage holds its own layers of the real model and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from videojob_worker import topology, wan
from videojob_worker.errors import ModelInvalidError, ModelNotFoundError
from videojob_worker.wan import Surroundings

CPU = torch.device("cpu")


def load(folder: Path, layers: range) -> wan.WanStage:
    return wan.load(folder / "transformer", layers, torch.float32, CPU)


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_stages_in_a_row_equal_the_whole_model(tiny_model, stages):
    whole = WanTransformer3DModel.from_pretrained(tiny_model / "transformer").eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 16, 5, 6, 8), generator=generator)
    embeds = torch.randn((1, 12, 32), generator=generator)
    timestep = torch.tensor([700])
    rows = [load(tiny_model, share) for share in topology.shares(8, stages)]
    with torch.inference_mode():
        expected = whole(latents, timestep, embeds).sample
        hidden, context = rows[0].embed(latents), rows[0].condition(embeds)
        embedding, projection = rows[0].time(timestep, embeds)
        rotary, _ = rows[0].rotaries((5, 6, 8), after=0)
        around = Surroundings(rotary, rotary, branch=0, uses_next=False, kept=None)
        for stage in rows:
            hidden = stage(hidden, context, projection, around)
        predicted = rows[-1].predict(hidden, embedding, (5, 6, 8))
    assert torch.equal(predicted, expected)


def test_one_embedding_of_the_timestep_equals_one_a_token_as_the_pipeline_of_ti2v_gives(tiny_models):
    """But for rounding: a matrix of equal rows is multiplied in another order than one row."""
    folder = tiny_models("wan2.2-ti2v-5b")
    whole = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 48, 5, 6, 8), generator=generator)
    embeds = torch.randn((1, 12, 32), generator=generator)
    stage = load(folder, range(8))
    with torch.inference_mode():
        timestep = torch.tensor(700)
        tokens = (torch.ones((5, 6, 8))[:, ::2, ::2] * timestep).flatten()[None]  # as in WanPipeline.__call__
        expected = whole(latents, tokens, embeds).sample
        embedding, projection = stage.time(timestep[None], embeds)
        rotary, _ = stage.rotaries((5, 6, 8), after=0)
        around = Surroundings(rotary, rotary, branch=0, uses_next=False, kept=None)
        hidden = stage(stage.embed(latents), stage.condition(embeds), projection, around)
        predicted = stage.predict(hidden, embedding, (5, 6, 8))
    assert (predicted - expected).abs().max() < 5e-6 * expected.abs().max()


def test_the_stages_parameters_are_a_partition_of_the_models(tiny_model):
    whole = WanTransformer3DModel.from_pretrained(tiny_model / "transformer")
    held = [name for share in topology.shares(8, 3) for name, _ in load(tiny_model, share).named_parameters()]
    assert sorted(held) == sorted(name for name, _ in whole.named_parameters())


def test_a_stage_opens_only_the_shards_of_its_layers(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    index = json.loads((folder / "transformer" / wan.INDEX).read_text())
    needed = {file for key, file in index["weight_map"].items() if key.startswith(("blocks.3.", "blocks.4."))}
    for shard in (folder / "transformer").glob("*.safetensors"):
        if shard.name not in needed:
            shard.unlink()
    assert load(folder, range(3, 5)).layers == range(3, 5)
    with pytest.raises(ModelInvalidError, match="lacks the shard diffusion_pytorch_model-0000"):
        load(folder, range(3))


def test_a_truncated_shard_is_named(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for shard in (folder / "transformer").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ModelInvalidError, match="cannot be loaded"):
        load(folder, range(2))


def test_a_tensor_that_no_shard_holds_is_named(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "transformer" / wan.INDEX
    index = json.loads(path.read_text())
    del index["weight_map"]["blocks.1.ffn.net.0.proj.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ModelInvalidError, match=r"blocks\.1\.ffn\.net\.0\.proj\.weight"):
        load(folder, range(2))


def test_another_class_of_model_is_refused(tiny_model, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ModelInvalidError, match="holds a FluxTransformer2DModel"):
        load(tmp_path, range(1))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*diffusers layout"):
        load(tmp_path, range(1))


def test_half_precision_keeps_what_diffusers_keeps_in_float32(tiny_model):
    stage = wan.load(tiny_model / "transformer", range(8), torch.bfloat16, CPU)
    reference = WanTransformer3DModel.from_pretrained(tiny_model / "transformer", torch_dtype=torch.bfloat16)
    assert {n: p.dtype for n, p in stage.named_parameters()} == {n: p.dtype for n, p in reference.named_parameters()}
    assert stage.rope.freqs_cos.dtype == torch.float32
