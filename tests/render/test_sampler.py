"""What the spec leaves open, each kind of model fills; what it says, stands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from api_cases import document
from videojob_api import validation
from videojob_api.progress import SamplingUsed
from videojob_api.spec import Spec
from videojob_worker import models, sampler
from videojob_worker.errors import InvalidSpecError, ModelInvalidError
from videojob_worker.models import Kind

CPU = torch.device("cpu")


def spec(width: int = 832, height: int = 480, **sampling) -> Spec:
    changes = {"spec.video.width": width, "spec.video.height": height, "spec.sampling": sampling}
    return validation.read(document(changes)).spec


@pytest.fixture
def model(tiny_models):
    return lambda kind: models.read(tiny_models(kind))


@pytest.mark.parametrize(
    ("kind", "size", "steps", "guidance", "guidance_2", "shift"),
    [
        (Kind.WAN21, (832, 480), 50, 5, None, 3),
        (Kind.WAN21, (480, 832), 50, 5, None, 3),
        (Kind.WAN21, (832, 496), 50, 5, None, 5),
        (Kind.WAN21, (1280, 720), 50, 5, None, 5),
        (Kind.A14B, (832, 480), 40, 4, 3, 12),
        (Kind.A14B, (1280, 720), 40, 4, 3, 12),
        (Kind.TI2V_5B, (832, 480), 50, 5, None, 5),
        (Kind.TI2V_5B, (1280, 704), 50, 5, None, 5),
    ],
)
def test_each_kind_has_its_defaults(model, kind, size, steps, guidance, guidance_2, shift):
    resolved = sampler.resolve(spec(*size), model(kind))
    assert sampler.used(resolved) == SamplingUsed(
        steps=steps, guidance_scale=guidance, guidance_scale_2=guidance_2, flow_shift=shift
    )


def test_what_the_spec_says_stands(model):
    given = {"steps": 7, "guidanceScale": 0, "guidanceScale2": 1.5, "flowShift": 2.5, "seed": 9}
    asked = spec(**given)
    assert sampler.resolve(asked, model(Kind.A14B)) == asked


def test_nothing_but_the_sampling_is_filled_and_the_seed_stays(model):
    asked = spec(seed=9)
    resolved = sampler.resolve(asked, model(Kind.A14B))
    assert resolved.sampling.seed == 9
    assert resolved.model_copy(update={"sampling": asked.sampling}) == asked
    assert sampler.resolve(resolved, model(Kind.A14B)) == resolved


@pytest.mark.parametrize("kind", [Kind.WAN21, Kind.TI2V_5B])
def test_guidance_of_an_expert_that_is_not_there_is_refused(model, kind):
    with pytest.raises(InvalidSpecError, match=r"spec\.sampling\.guidanceScale2 .* remove it"):
        sampler.resolve(spec(guidanceScale2=3), model(kind))


@pytest.mark.parametrize(
    ("kind", "sampling", "guidance"),
    [
        (Kind.WAN21, {}, (5.0,)),
        (Kind.WAN21, {"guidanceScale": 1}, None),
        (Kind.WAN21, {"guidanceScale": 0}, None),
        (Kind.A14B, {}, (4.0, 3.0)),
        (Kind.A14B, {"guidanceScale": 1}, (1.0, 3.0)),
        (Kind.A14B, {"guidanceScale2": 0.5}, (4.0, 1.0)),
        (Kind.A14B, {"guidanceScale": 1, "guidanceScale2": 1}, None),
    ],
)
def test_guidance_is_left_out_where_no_expert_has_any(model, kind, sampling, guidance):
    known = model(kind)
    assert sampler.guidance(sampler.resolve(spec(**sampling), known)) == guidance


@pytest.mark.parametrize("shift", [3, 12.5])
def test_the_scheduler_has_the_specs_steps_and_shift_and_is_otherwise_the_models(model, shift):
    known = model(Kind.WAN21)
    scheduler = sampler.load(known, sampler.resolve(spec(steps=6, flowShift=shift), known), CPU)
    assert len(scheduler.timesteps) == 6
    assert (scheduler.config.flow_shift, scheduler.config.prediction_type) == (shift, "flow_prediction")
    assert scheduler.config.use_flow_sigmas
    linear = torch.linspace(1, 1 / 1000, 7)[:-1]
    expected = shift * linear / (1 + (shift - 1) * linear)
    assert torch.allclose(scheduler.sigmas[:-1], expected, atol=2e-3)


def test_26_of_40_steps_of_the_released_a14b_are_noisy(model):
    known = model(Kind.A14B)
    scheduler = sampler.load(known, sampler.resolve(spec(), known), CPU)
    experts = [known.expert(float(timestep)) for timestep in scheduler.timesteps]
    assert experts == [0] * 26 + [1] * 14


def test_a_scheduler_that_is_not_there_is_named(model, tmp_path):
    known = model(Kind.WAN21)
    with pytest.raises(ModelInvalidError, match=f"the scheduler in {tmp_path} cannot be loaded"):
        sampler.load(replace(known, folder=Path(tmp_path)), sampler.resolve(spec(), known), CPU)
