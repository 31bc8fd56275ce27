"""The scheduler that denoises, as the model's repository configures it. ``blocks`` keeps one copy per block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from videojob_api.spec import Sampling

from .errors import ModelInvalidError


def load(folder: Path, sampling: Sampling, device: torch.device) -> Any:
    """UniPC with the spec's steps and flow shift set.

    Raises:
        ModelInvalidError: the scheduler's configuration is missing or broken.
    """
    try:
        scheduler = UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelInvalidError(f"the scheduler in {folder} cannot be loaded: {error}") from error
    if sampling.flow_shift is not None:
        scheduler = UniPCMultistepScheduler.from_config(scheduler.config, flow_shift=sampling.flow_shift)
    scheduler.set_timesteps(sampling.steps, device=device)
    return scheduler
