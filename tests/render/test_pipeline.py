"""The ring computes the method: equal bit for bit to the oracle and to itself with any number of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

import oracle
import ring
from videojob_api.plan import Plan
from videojob_worker.models import Kind

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = Plan(frames=90, block_latents=4, context_latents=3, steps=5)  # 6 blocks, the last one with surplus latents


def serial(rendering, **wrong):
    plan = rendering.plan
    known = rendering.known
    experts = [WanTransformer3DModel.from_pretrained(folder).eval() for folder in known.experts]
    *scenes, negative = rendering.embeds
    problem = oracle.Problem(
        blocks=plan.blocks,
        size=plan.block_latents,
        context=plan.context_latents,
        steps=plan.steps,
        seed=rendering.seed,
        guidance=rendering.guidance or (1.0, 1.0),
        grid=ring.GRID,
        boundary=known.boundary or 0.0,
    )
    prompts = [scenes[plan.scene(block)] for block in range(plan.blocks)]
    return oracle.render(experts, rendering.scheduler, prompts, negative, problem.wrong(**wrong))


@pytest.fixture(scope="module", params=list(Kind))
def rendering(tiny_models, request):
    return ring.Rendering(tiny_models(request.param), PLAN)


@pytest.fixture(scope="module")
def expected(rendering):
    return serial(rendering)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_equals_the_oracle_bit_for_bit(rendering, expected, ranks):
    assert torch.equal(rendering.latents(ranks), expected)


@pytest.mark.parametrize(
    "wrong", [{"left_sweep": 1}, {"right_block": 0}], ids=["left context one sweep late", "right context absent"]
)
def test_the_comparison_would_show_a_wrong_order(rendering, expected, wrong):
    assert (serial(rendering, **wrong) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "plan",
    [
        Plan(frames=1, block_latents=4, context_latents=3, steps=3),
        Plan(frames=60, block_latents=4, context_latents=0, steps=3),
        Plan(frames=60, block_latents=4, context_latents=4, steps=3),
        Plan(frames=60, block_latents=1, context_latents=1, steps=2),
        Plan(frames=40, block_latents=3, context_latents=1, steps=1),
        Plan(frames=90, block_latents=4, context_latents=3, steps=4, scene_ends=(37, 61, 90)),
    ],
    ids=["one block", "no context", "context as long as the block", "one latent a block", "one step", "scenes"],
)
def test_the_corners_equal_the_oracle_too(tiny_model, plan):
    rendering = ring.Rendering(tiny_model, plan)
    assert torch.equal(rendering.latents(3), serial(rendering))


@pytest.fixture(scope="module")
def two_experts(tiny_models):
    return ring.Rendering(tiny_models(Kind.A14B), PLAN)


@pytest.fixture(scope="module")
def right(two_experts):
    return serial(two_experts)


def test_blocks_stand_on_both_sides_of_the_boundary(two_experts):
    assert two_experts.experts == (0, 0, 1, 1, 1)
    assert two_experts.plan.blocks > 3, "some sweep takes several blocks through each expert"


@pytest.mark.parametrize(
    "wrong",
    [{"right_of_other": 1}, {"boundary": 700.0}, {"boundary": 0.0}, {"guidance": (5.0, 5.0)}],
    ids=["keys of the other expert", "boundary one step late", "one expert alone", "one guidance"],
)
def test_the_comparison_would_show_a_wrong_expert(two_experts, right, wrong):
    assert (serial(two_experts, **wrong) - right).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_may_leave_an_expert_idle(tiny_models, steps):
    rendering = ring.Rendering(tiny_models(Kind.A14B), replace(PLAN, steps=steps))
    assert torch.equal(rendering.latents(3), serial(rendering))


def test_without_guidance_there_is_one_pass(tiny_model):
    rendering = ring.Rendering(tiny_model, PLAN, guidance=None)
    latents = rendering.latents(2)
    assert torch.allclose(latents, serial(rendering), atol=1e-5), "guidance 1 is the conditional prediction"
    assert {turn.branch for turn in rendering.order} == {0}
    assert torch.equal(latents, rendering.latents(4))


def test_blocks_come_clean_in_order_and_early(tiny_model):
    rendering = ring.Rendering(tiny_model, Plan(frames=300, block_latents=4, context_latents=3, steps=3))
    rendering.latents(2)
    clean = [turn.block for turn in rendering.order if turn.step == 2]
    assert clean == list(range(rendering.plan.blocks))
    first = next(index for index, turn in enumerate(rendering.order) if turn.step == 2)
    assert first < len(rendering.order) / 4, "the first block is playable long before the last is begun"


class BrokenScheduler(UniPCMultistepScheduler):
    def step(self, *_args, **_kwargs):
        raise ValueError("the scheduler broke")


def test_a_stage_that_fails_does_not_leave_the_others_waiting(tiny_model):
    rendering = ring.Rendering(tiny_model, PLAN, timeout_s=0.5)
    rendering.scheduler = BrokenScheduler.from_config(rendering.scheduler.config)
    rendering.scheduler.set_timesteps(PLAN.steps)
    with pytest.raises(ValueError, match="the scheduler broke"):
        rendering.latents(3)
