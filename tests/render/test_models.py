"""What a model is, read from its configuration files alone, and which ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from videojob_api.spec import Video
from videojob_worker import models
from videojob_worker.errors import InvalidSpecError, ModelInvalidError, ModelNotFoundError
from videojob_worker.models import Kind


@pytest.fixture
def folder(tiny_models, tmp_path):
    """Gives the configuration files of a tiny model, with changes; there are no weights."""

    def give(kind: str = Kind.WAN21, file: str = "model_index.json", **changes) -> Path:
        copy = tmp_path / "model"
        shutil.copytree(tiny_models(kind), copy, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**content, **changes}))
        return copy

    return give


@pytest.mark.parametrize(
    ("kind", "experts", "boundary", "channels", "latent_pixels"),
    [
        (Kind.WAN21, ["transformer"], None, 16, 8),
        (Kind.A14B, ["transformer", "transformer_2"], 875.0, 16, 8),
        (Kind.TI2V_5B, ["transformer"], None, 48, 16),
    ],
)
def test_each_kind_is_told_by_its_structure(folder, kind, experts, boundary, channels, latent_pixels):
    model = models.read(folder(kind))
    assert model.kind is kind
    assert [expert.name for expert in model.experts] == experts
    assert (model.boundary, model.channels, model.latent_pixels) == (boundary, channels, latent_pixels)
    assert (model.layers, model.width, model.patch) == (8, 24, (2, 2))


def test_the_first_expert_predicts_from_the_boundary_up(folder):
    two, one = models.read(folder(Kind.A14B)), models.read(folder())
    assert [two.expert(timestep) for timestep in (999, 876, 875, 874.9, 0)] == [0, 0, 0, 1, 1]
    assert [one.expert(timestep) for timestep in (999, 0)] == [0, 0]


@pytest.mark.parametrize(("kind", "grid"), [(Kind.WAN21, (60, 104)), (Kind.TI2V_5B, (30, 52))])
def test_the_grid_of_latents(folder, kind, grid):
    assert models.read(folder(kind)).grid(Video(width=832, height=480)) == grid


@pytest.mark.parametrize(
    ("kind", "size", "said"),
    [
        (Kind.TI2V_5B, {"width": 848}, "spec.video.width must be a multiple of 32 with this model, not 848"),
        (Kind.TI2V_5B, {"height": 720}, "spec.video.height must be a multiple of 32 with this model, not 720"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_named(folder, kind, size, said):
    with pytest.raises(InvalidSpecError, match=said):
        models.read(folder(kind)).grid(Video(**size))


REFUSED = {
    "image to video": ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}),
    "another pipeline": ("model_index.json", {"_class_name": "FluxPipeline"}),
    "another transformer": ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}),
    "36 channels": ("transformer/config.json", {"in_channels": 36}),
    "an image encoder": ("transformer/config.json", {"image_dim": 1280}),
    "another VAE": ("vae/config.json", {"_class_name": "AutoencoderKL"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rendered_with_is_refused_with_what_can(folder, case):
    file, changes = REFUSED[case]
    with pytest.raises(
        ModelInvalidError, match=r"Wan2.1 T2V \(1.3B, 14B\), Wan2.2 T2V-A14B and Wan2.2 TI2V-5B"
    ) as said:
        models.read(folder(file=file, **changes))
    named = changes.get("_class_name") or "starts from an image"
    assert named in str(said.value)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a FlowMatchEuler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "has prediction_type 'epsilon'; .*need 'f"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "has use_flow_sigmas False; .* need True"),
        ("vae/config.json", {"z_dim": 48}, "decodes 48 channels; the transformer has 16"),
        ("vae/config.json", {"scale_factor_temporal": 8}, "makes 8 frames of a latent"),
        ("transformer/config.json", {"patch_size": [2, 2, 2]}, "joins 2 latents in a token"),
        ("transformer_2/config.json", {"num_layers": 9}, "transformer and transformer_2 differ in size"),
    ],
)
def test_what_does_not_fit_together_is_named(folder, file, changes, said):
    with pytest.raises(ModelInvalidError, match=said):
        models.read(folder(Kind.A14B, file, **changes))


@pytest.mark.parametrize(
    "file", ["model_index.json", "transformer_2/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_a_file_that_is_missing_or_broken_is_named(folder, file):
    path = folder(Kind.A14B) / file
    path.write_text("{")
    with pytest.raises(ModelInvalidError, match=f"{file} is no JSON"):
        models.read(folder_of(path, file))
    path.write_text("[]")
    with pytest.raises(ModelInvalidError, match=f"{file} is no JSON object"):
        models.read(folder_of(path, file))
    path.unlink()
    with pytest.raises(ModelNotFoundError, match=f"has no {path.name}.*diffusers layout"):
        models.read(folder_of(path, file))


def folder_of(path: Path, file: str) -> Path:
    return Path(str(path).removesuffix(file))


def test_a_configuration_that_says_too_little_is_named(folder):
    path = folder() / "transformer" / "config.json"
    content = json.loads(path.read_text())
    del content["num_layers"]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelInvalidError, match="lacks num_layers"):
        models.read(path.parents[1])
