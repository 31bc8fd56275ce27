"""How latents are denoised: what the spec leaves open, filled by the kind of model, and the scheduler that does it.

``__main__`` resolves the spec once the model is known; ``blocks`` keeps one copy of the scheduler per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from videojob_api.progress import SamplingUsed
from videojob_api.spec import Spec, Video

from .errors import InvalidSpecError, ModelInvalidError
from .models import Kind, Model

PIXELS_480P = 832 * 480


@dataclass(frozen=True)
class Defaults:
    """What a kind of model was released for."""

    steps: int
    guidance_scale: float
    guidance_scale_2: float | None  # of the low-noise expert
    flow_shift: float  # up to 480p
    flow_shift_above: float


DEFAULTS = {
    Kind.WAN21: Defaults(50, 5.0, None, 3.0, 5.0),
    Kind.A14B: Defaults(40, 4.0, 3.0, 12.0, 12.0),
    Kind.TI2V_5B: Defaults(50, 5.0, None, 5.0, 5.0),
}


def resolve(spec: Spec, model: Model) -> Spec:
    """The spec with nothing of its sampling left open.

    Raises:
        InvalidSpecError: it guides an expert that the model does not have.
    """
    given, defaults = spec.sampling, DEFAULTS[model.kind]
    if given.guidance_scale_2 is not None and len(model.experts) == 1:
        raise InvalidSpecError(
            "spec.sampling.guidanceScale2 is for models with two transformers, and this one has one: remove it"
        )
    filled = {
        "steps": _either(given.steps, defaults.steps),
        "guidance_scale": _either(given.guidance_scale, defaults.guidance_scale),
        "guidance_scale_2": _either(given.guidance_scale_2, defaults.guidance_scale_2),
        "flow_shift": _either(given.flow_shift, _flow_shift(defaults, spec.video)),
    }
    return spec.model_copy(update={"sampling": given.model_copy(update=filled)})


def used(resolved: Spec) -> SamplingUsed:
    """What a resolved spec denoises with, for the record."""
    return SamplingUsed.model_validate(resolved.sampling.model_dump(exclude={"seed"}))


def guidance(resolved: Spec) -> tuple[float, ...] | None:
    """Each expert's scale; None where no expert has any guidance and so the unconditional pass can be left out.

    A scale below 1 means no guidance, as in diffusers, and not less than none.
    """
    sampling = resolved.sampling
    scales = [scale for scale in (sampling.guidance_scale, sampling.guidance_scale_2) if scale is not None]
    return tuple(max(1.0, scale) for scale in scales) if max(scales) > 1 else None


def load(model: Model, resolved: Spec, device: torch.device) -> Any:
    """UniPC with a resolved spec's steps and flow shift set.

    Raises:
        ModelInvalidError: the scheduler's configuration is broken.
    """
    sampling = resolved.sampling
    try:
        scheduler = UniPCMultistepScheduler.from_pretrained(
            model.folder, subfolder="scheduler", flow_shift=sampling.flow_shift, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelInvalidError(f"the scheduler in {model.folder} cannot be loaded: {error}") from error
    scheduler.set_timesteps(sampling.steps, device=device)
    return scheduler


def _either(given: float | None, default: float | None) -> float | None:
    return default if given is None else given


def _flow_shift(defaults: Defaults, video: Video) -> float:
    small = video.width * video.height <= PIXELS_480P
    return defaults.flow_shift if small else defaults.flow_shift_above
