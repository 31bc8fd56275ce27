"""What a model is, told by its configuration files: its kind, its experts, its sizes. No weights are read.

``__main__`` asks before anything is loaded; ``sampler`` has the defaults of each kind. A model that this worker cannot
render with is refused here, with what it could.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from videojob_api.plan import FRAMES_PER_LATENT
from videojob_api.spec import Video

from .errors import InvalidSpecError, ModelInvalidError, ModelNotFoundError

SUPPORTED = "text-to-video models in the diffusers layout: Wan2.1 T2V (1.3B, 14B), Wan2.2 T2V-A14B and Wan2.2 TI2V-5B"
TI2V_CHANNELS = 48


class Kind(StrEnum):
    """The kinds of model, told apart by their structure: a smaller or tuned model of the same structure is the same."""

    WAN21 = "wan2.1"  # one transformer, 16 latent channels
    A14B = "wan2.2-a14b"  # two transformers, one for the noisy steps and one for the others
    TI2V_5B = "wan2.2-ti2v-5b"  # one transformer, 48 latent channels of 16 x 16 pixels


@dataclass(frozen=True)
class Model:
    """What every rank knows of the model before it loads its share."""

    folder: Path
    kind: Kind
    experts: tuple[Path, ...]  # the transformers' folders, the one for the noisiest steps first
    boundary: float | None  # the timestep at and above which the first expert predicts; None where there is but one
    layers: int  # of each expert
    channels: int
    width: int  # D, the inner dimension
    latent_pixels: int  # edge of the square of pixels that a latent pixel stands for
    patch: tuple[int, int]  # latent rows and columns of a token

    def expert(self, timestep: float) -> int:
        """Index of the expert that predicts at a timestep, as in diffusers' ``WanPipeline``."""
        return 0 if self.boundary is None or timestep >= self.boundary else 1

    def grid(self, video: Video) -> tuple[int, int]:
        """Latent rows and columns of a video.

        Raises:
            InvalidSpecError: its size cannot be divided into tokens.
        """
        sides = (("height", video.height, self.patch[0]), ("width", video.width, self.patch[1]))
        for field, pixels, patch in sides:
            multiple = self.latent_pixels * patch
            if pixels % multiple:
                raise InvalidSpecError(
                    f"spec.video.{field} must be a multiple of {multiple} with this model, not {pixels}"
                )
        return video.height // self.latent_pixels, video.width // self.latent_pixels


def read(folder: Path) -> Model:
    """The model of a folder in the diffusers layout.

    Raises:
        ModelNotFoundError: a configuration file is missing.
        ModelInvalidError: one is broken, or it is a model that this worker cannot render with.
    """
    index = read_json(folder / "model_index.json")
    _expect(folder, "is a", index.get("_class_name"), "WanPipeline")
    boundary_ratio = index.get("boundary_ratio")
    names = ("transformer",) if boundary_ratio is None else ("transformer", "transformer_2")
    configs = [_transformer(folder / name) for name in names]
    if len(configs) == 2 and not _same_sizes(configs):
        raise ModelInvalidError(f"{folder}: transformer and transformer_2 differ in size; one plan must fit both")
    config, vae = configs[0], _vae(folder / "vae", int(configs[0]["in_channels"]))
    scheduler = _scheduler(folder / "scheduler")
    return Model(
        folder=folder,
        kind=_kind(configs),
        experts=tuple(folder / name for name in names),
        boundary=None if boundary_ratio is None else boundary_ratio * scheduler.get("num_train_timesteps", 1000),
        layers=int(config["num_layers"]),
        channels=int(config["in_channels"]),
        width=int(config["num_attention_heads"]) * int(config["attention_head_dim"]),
        latent_pixels=int(vae.get("scale_factor_spatial", 8)),
        patch=(int(config["patch_size"][1]), int(config["patch_size"][2])),
    )


def read_json(file: Path) -> dict[str, Any]:
    """A configuration file's content.

    Raises:
        ModelNotFoundError, ModelInvalidError: it is not there, or holds no JSON object.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise ModelNotFoundError(
            f"{file.parent} has no {file.name}: spec.model.source must lead to a folder in the diffusers layout"
        ) from error
    except ValueError as error:
        raise ModelInvalidError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelInvalidError(f"{file} is no JSON object")
    return content


def read_transformer(folder: Path) -> dict[str, Any]:
    """A Wan transformer's configuration.

    Raises:
        ModelNotFoundError, ModelInvalidError: it is not there, is no JSON, or is of another class.
    """
    config = read_json(folder / "config.json")
    _expect(folder, "holds a", config.get("_class_name"), "WanTransformer3DModel")
    return config


def _transformer(folder: Path) -> dict[str, Any]:
    config = read_transformer(folder)
    absent = [key for key in ("num_layers", "in_channels", "num_attention_heads", "patch_size") if key not in config]
    if absent:
        raise ModelInvalidError(f"{folder / 'config.json'} lacks {absent[0]}")
    channels = (config["in_channels"], config.get("out_channels") or config["in_channels"])
    if channels[0] != channels[1] or config.get("image_dim") or config.get("added_kv_proj_dim"):
        raise ModelInvalidError(
            f"{folder} is a transformer that starts from an image ({channels[0]} channels in, {channels[1]} out); "
            f"this worker renders with {SUPPORTED}"
        )
    if config["patch_size"][0] != 1:
        raise ModelInvalidError(f"{folder} joins {config['patch_size'][0]} latents in a token; this worker expects 1")
    return config


def _same_sizes(configs: Sequence[dict[str, Any]]) -> bool:
    """Whether hidden states and contexts of all have the same shapes, and the layers the same shares."""
    keys = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "patch_size")
    return len({json.dumps([config.get(key) for key in keys]) for config in configs}) == 1


def _vae(folder: Path, channels: int) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    _expect(folder, "holds a", config.get("_class_name"), "AutoencoderKLWan")
    if config.get("z_dim", 16) != channels:
        raise ModelInvalidError(f"{folder} decodes {config.get('z_dim', 16)} channels; the transformer has {channels}")
    if config.get("scale_factor_temporal", 4) != FRAMES_PER_LATENT:
        raise ModelInvalidError(f"{folder} makes {config['scale_factor_temporal']} frames of a latent, not 4")
    return config


def _scheduler(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "scheduler_config.json")
    found = config.get("_class_name")
    if found != "UniPCMultistepScheduler":
        raise ModelInvalidError(
            f"{folder} configures a {found}; this worker samples with UniPCMultistepScheduler alone"
        )
    for key, expected in (("prediction_type", "flow_prediction"), ("use_flow_sigmas", True)):
        if config.get(key) != expected:
            raise ModelInvalidError(f"{folder} has {key} {config.get(key)!r}; Wan models need {expected!r}")
    return config


def _kind(configs: Sequence[dict[str, Any]]) -> Kind:
    if len(configs) == 2:
        return Kind.A14B
    return Kind.TI2V_5B if configs[0]["in_channels"] == TI2V_CHANNELS else Kind.WAN21


def _expect(folder: Path, verb: str, found: Any, expected: str) -> None:
    if found != expected:
        raise ModelInvalidError(f"{folder} {verb} {found}, not a {expected}; this worker renders with {SUPPORTED}")
