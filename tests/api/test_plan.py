"""How a video is cut into blocks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_cases import AS_SCENES, document
from videojob_api import validation
from videojob_api.plan import Cut, Plan, cut, frames_of, latents_of, plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    block = draw(st.integers(1, 64))
    return Plan(
        frames=draw(st.integers(1, 20_000)),
        block_latents=block,
        context_latents=draw(st.integers(0, block)),
        steps=draw(st.integers(1, 1000)),
    )


def made(frames: int, block: int = 8, context: int = 8, steps: int = 50) -> Plan:
    return Plan(frames=frames, block_latents=block, context_latents=context, steps=steps)


@given(plans())
def test_the_counting_rules_hold(planned):
    latents = math.ceil((planned.frames - 1) / 4) + 1
    assert planned.latents == latents
    assert planned.blocks == max(1, math.ceil((latents - planned.context_latents) / planned.block_latents))
    assert planned.sweeps == planned.steps + planned.blocks - 1
    assert planned.turns == planned.steps * planned.blocks


@given(plans())
def test_the_frames_of_all_blocks_are_the_frames_asked_for(planned):
    assert sum(planned.wanted_frames(block) for block in range(planned.blocks)) == planned.frames


@given(plans())
def test_every_block_adds_to_the_video(planned):
    assert all(planned.wanted_frames(block) >= 1 for block in range(planned.blocks))


@given(plans())
def test_each_block_begins_where_the_one_before_ends(planned):
    latent = frame = 0
    for block in range(planned.blocks):
        assert (planned.first_latent(block), planned.first_frame(block)) == (latent, frame)
        latent += planned.own_latents(block)
        frame += planned.wanted_frames(block)


@given(plans())
def test_wanted_latents_tile_the_video_and_only_the_last_block_has_surplus(planned):
    wanted = [planned.wanted_latents(block) for block in range(planned.blocks)]
    own = [planned.own_latents(block) for block in range(planned.blocks)]
    assert sum(wanted) == planned.latents
    assert wanted[:-1] == own[:-1]
    assert 1 <= wanted[-1] <= own[-1]


@given(plans())
def test_a_latent_lies_in_one_block(planned):
    for block in range(min(planned.blocks, 50)):
        for latent in (planned.first_latent(block), planned.first_latent(block) + planned.own_latents(block) - 1):
            assert planned.block_of(latent) == block
    assert planned.block_of(-5) == 0


@given(plans(), st.integers(0, 200))
def test_a_sweep_takes_every_block_of_the_queue_one_step_further(planned, sweep):
    blocks = range(planned.blocks)
    queue = [block for block in blocks if 0 <= sweep - block < planned.steps]
    assert planned.turns_before(sweep + 1) - planned.turns_before(sweep) == len(queue)
    assert planned.clean_before(sweep) == sum(sweep - block >= planned.steps for block in blocks)
    assert planned.turns_before(planned.sweeps) == planned.turns


@given(plans())
def test_the_first_block_holds_the_context_more(planned):
    own = [planned.own_latents(block) for block in range(planned.blocks)]
    assert own[0] == planned.block_latents + planned.context_latents
    assert set(own[1:]) <= {planned.block_latents}


@given(st.integers(1, 10**6))
def test_latents_hold_the_frames_with_less_than_one_latent_to_spare(frames):
    assert frames_of(latents_of(frames) - 1) < frames <= frames_of(latents_of(frames))


@pytest.mark.parametrize(
    ("frames", "block", "context", "latents", "blocks"),
    [
        (1025, 8, 8, 257, 32),  # the paper's long video
        (1, 8, 8, 1, 1),
        (2, 8, 8, 2, 1),
        (5, 8, 8, 2, 1),
        (6, 8, 8, 3, 1),
        (61, 8, 8, 16, 1),  # exactly the first block's 8 + 8 latents
        (62, 8, 8, 17, 2),
        (81, 8, 8, 21, 2),
        (961, 8, 8, 241, 30),
        (150, 6, 4, 39, 6),
        (9, 1, 0, 3, 3),
        (9, 1, 1, 3, 2),
    ],
)
def test_counted_by_hand(frames, block, context, latents, blocks):
    planned = made(frames, block, context)
    assert (planned.latents, planned.blocks) == (latents, blocks)


def test_a_small_plan_written_out():
    planned = made(frames=40, block=4, context=2, steps=3)  # 11 latents: 6 + 4 + 1 of 4
    blocks = range(planned.blocks)
    assert [planned.own_latents(block) for block in blocks] == [6, 4, 4]
    assert [planned.wanted_latents(block) for block in blocks] == [6, 4, 1]
    assert [planned.first_latent(block) for block in blocks] == [0, 6, 10]
    assert [planned.first_frame(block) for block in blocks] == [0, 21, 37]
    assert [planned.wanted_frames(block) for block in blocks] == [21, 16, 3]
    assert (planned.sweeps, planned.turns) == (5, 9)


def scenes(*frames: int) -> Cut:
    asked = [{"prompt": f"Scene {index}", "frames": count} for index, count in enumerate(frames)]
    sizes = {"spec.dualParallel": {"blockLatents": 4, "contextLatents": 2}}
    return cut(validation.read(document(AS_SCENES | sizes | {"spec.scenes": asked})).spec)


@pytest.mark.parametrize(
    ("frames", "on"),
    [
        ((40,), [0, 0, 0]),
        ((21, 19), [0, 1, 1]),  # the second block begins at frame 21
        ((22, 18), [0, 0, 1]),  # and has its scene until its end
        ((10, 5, 25), [0, 2, 2]),  # a scene shorter than a block may never be on
        ((37, 3), [0, 0, 1]),
    ],
)
def test_the_scene_of_a_block_is_the_one_at_its_first_frame(frames, on):
    planned = scenes(*frames)
    assert [planned.scene(block) for block in range(planned.blocks)] == on


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_scenes_follow_in_their_order_and_the_first_block_shows_the_first(frames):
    planned = scenes(*frames)
    on = [planned.scene(block) for block in range(planned.blocks)]
    assert on[0] == 0
    assert on == sorted(on)
    assert planned.frames == sum(frames)


def test_the_plan_of_a_spec_takes_its_numbers():
    changes = {"spec.dualParallel": {"blockLatents": 6, "contextLatents": 4}, "spec.sampling.steps": 7}
    planned = plan(validation.read(document(changes)).spec)
    assert planned == Plan(frames=81, block_latents=6, context_latents=4, steps=7, scene_ends=(81,))


def test_blocks_are_counted_before_the_model_says_how_many_steps():
    spec = validation.read(document()).spec
    assert cut(spec) == Cut(frames=81, block_latents=8, context_latents=8, scene_ends=(81,))
    with pytest.raises(ValueError, match=r"sampling.steps is not known"):
        plan(spec)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"frames": 0}, "frames and block_latents must be at least 1"),
        ({"frames": 9, "block": 0, "context": 0}, "frames and block_latents must be at least 1"),
        ({"frames": 9, "steps": 0}, "steps must be at least 1"),
        ({"frames": 9, "context": 9}, "context_latents must lie between 0 and block_latents"),
        ({"frames": 9, "context": -1}, "context_latents must lie between 0 and block_latents"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        made(**wrong)
