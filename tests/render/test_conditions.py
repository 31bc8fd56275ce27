"""Prompts and timesteps are encoded once, as diffusers does it, and shared with every rank."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor
from transformers import UMT5EncoderModel

from videojob_worker import conditions, wan
from videojob_worker.conditions import Conditions
from videojob_worker.errors import ModelInvalidError
from videojob_worker.link import LocalLink

CPU = torch.device("cpu")
WIDTH = 24  # the tiny model's inner dimension
TIMESTEPS = torch.tensor([999, 500, 20])
PROMPTS = [
    "a fox",
    "",
    "  two   spaces\tand\nnew lines  ",
    "&lt;b&gt; &amp;amp; \"quotes\" 'and' `ticks` $(x) %s {y}",
    "ﬁne ｗｉｄｅ “curly” 🦊 日本語 e\u0301",
    "â€œmangledâ€\x9d",
    "long " * 1000,
]


def numbered(count: int, *shape: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32).view(-1, *(1 for _ in shape)).expand(count, *shape).contiguous()


EXPERTS = (0, 0, 1, 1)  # of each of 4 steps


def made(scenes: int = 3, guidance: tuple[float, ...] | None = (4.0, 3.0)) -> Conditions:
    contexts = numbered(2 * (scenes + 1), 512, WIDTH).unflatten(0, (2, -1))
    return Conditions(contexts, numbered(4, WIDTH), numbered(4, 6, WIDTH), EXPERTS, guidance)


@pytest.fixture
def first(tiny_model) -> wan.WanStage:
    return wan.load(tiny_model / "transformer", range(4), torch.float32, CPU)


# --- Looking them up


def test_every_scene_has_its_context_and_all_share_the_unconditional_one():
    shared = made(scenes=3)
    assert [int(shared.context(0, scene, 0)[0, 0, 0]) for scene in range(3)] == [0, 1, 2]
    assert [int(shared.context(0, scene, 1)[0, 0, 0]) for scene in range(3)] == [3, 3, 3]
    assert shared.context(0, 1, 0).shape == (1, 512, WIDTH)


def test_every_expert_has_contexts_of_its_own():
    shared = made(scenes=3)
    assert [int(shared.context(1, scene, 0)[0, 0, 0]) for scene in range(3)] == [4, 5, 6]
    assert int(shared.context(1, 0, 1)[0, 0, 0]) == 7


@pytest.mark.parametrize(("guidance", "branches"), [((5.0,), 2), (None, 1)])
def test_guidance_takes_a_second_pass(guidance, branches):
    assert made(guidance=guidance).branches == branches


# --- Sharing


def share(link: LocalLink, computed: Conditions | None) -> Conditions:
    return conditions.share(
        link, computed, scenes=3, width=WIDTH, experts=EXPERTS, guidance=(4.0, 3.0), dtype=torch.float32, device=CPU
    )


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_rank_gets_the_first_ones(ranks):
    got: dict[int, Conditions] = {}

    def rank(link: LocalLink) -> None:
        got[link.rank] = share(link, made() if link.rank == 0 else None)

    threads = [threading.Thread(target=rank, args=(link,)) for link in LocalLink.ring(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(ranks))
    for mine in got.values():
        assert torch.equal(mine.contexts, made().contexts)
        assert torch.equal(mine.embeddings, made().embeddings)
        assert torch.equal(mine.projections, made().projections)
        assert (mine.experts, mine.guidance) == (EXPERTS, (4.0, 3.0))


# --- Computing


def test_one_context_a_prompt_and_one_embedding_a_step(first):
    embeds = [torch.randn((1, 512, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    contexts = [first.condition(embed) for embed in embeds]
    computed = conditions.compute([first], embeds, TIMESTEPS, (0, 0, 0), (5.0,))
    assert torch.equal(computed.contexts, torch.cat(contexts)[None])
    assert computed.embeddings.shape == (3, WIDTH)
    assert computed.projections.shape == (3, 6, WIDTH)
    assert len(computed.embeddings.unique(dim=0)) == 3


def test_each_expert_embeds_the_prompts_and_the_timesteps_that_are_its_own(tiny_models):
    folder = tiny_models("wan2.2-a14b")
    high, low = (wan.load(folder / name, range(4), torch.float32, CPU) for name in ("transformer", "transformer_2"))
    embed = torch.randn((1, 512, 32), generator=torch.Generator().manual_seed(0))
    contexts = [stage.condition(embed) for stage in (high, low)]
    times = [stage.time(timestep[None], embed) for stage, timestep in zip((high, high, low), TIMESTEPS, strict=True)]
    computed = conditions.compute([high, low], [embed], TIMESTEPS, (0, 0, 1), (4.0, 3.0))
    assert torch.equal(computed.contexts, torch.stack(contexts))
    assert torch.equal(computed.embeddings, torch.cat([embedding for embedding, _ in times]))
    assert torch.equal(computed.projections, torch.cat([projection for _, projection in times]))
    assert high.condition_embedder is None
    assert low.condition_embedder is None


def test_of_an_expert_that_makes_no_step_there_are_no_conditions(tiny_models):
    folder = tiny_models("wan2.2-a14b")
    stages = [wan.load(folder / name, range(4), torch.float32, CPU) for name in ("transformer", "transformer_2")]
    computed = conditions.compute(stages, [torch.zeros((1, 512, 32))], TIMESTEPS, (0, 0, 0), (4.0, 3.0))
    shared = conditions.share(
        LocalLink.ring(1)[0],
        None,
        scenes=0,
        width=WIDTH,
        experts=computed.experts,
        guidance=computed.guidance,
        dtype=torch.float32,
        device=CPU,
    )
    assert computed.contexts.shape == shared.contexts.shape == (1, 1, 512, WIDTH)
    assert stages[1].condition_embedder is None


def test_the_condition_embedder_is_dropped(first):
    conditions.compute([first], [torch.zeros((1, 512, 32))], TIMESTEPS, (0, 0, 0), None)
    assert first.condition_embedder is None
    assert not [name for name, _ in first.named_parameters() if name.startswith("condition_embedder")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_of_the_dtype_that_the_other_ranks_expect(tiny_model, dtype):
    stage = wan.load(tiny_model / "transformer", range(4), dtype, CPU)
    embeds = [torch.zeros((1, 512, 32), dtype=dtype)]
    computed = conditions.compute([stage], embeds, TIMESTEPS, (0, 0, 0), (5.0,))
    assert {computed.contexts.dtype, computed.embeddings.dtype, computed.projections.dtype} == {dtype}


# --- Encoding


@pytest.fixture(scope="module")
def pipeline(tiny_model) -> WanPipeline:
    return WanPipeline.from_pretrained(tiny_model, transformer=None, vae=None)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_encoded_as_diffusers_does(prompt, pipeline, tiny_model):
    (mine,) = conditions.encode(tiny_model, [prompt], torch.float32, CPU)
    with torch.inference_mode():
        theirs, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    assert mine.shape == (1, 512, 32)
    assert torch.equal(mine, theirs)


def test_a_negative_prompt_is_encoded_as_diffusers_does(pipeline, tiny_model):
    _, mine = conditions.encode(tiny_model, ["a fox", "blurry, ugly"], torch.float32, CPU)
    with torch.inference_mode():
        _, theirs = pipeline.encode_prompt("a fox", "blurry, ugly", max_sequence_length=512)
    assert torch.equal(mine, theirs)


def test_embeddings_come_in_the_prompts_order(tiny_model):
    one, two, again = conditions.encode(tiny_model, ["a fox", "a boat", "a fox"], torch.float32, CPU)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def test_the_text_encoder_is_freed(tiny_model):
    gc.collect()
    before = sum(type(thing) is UMT5EncoderModel for thing in gc.get_objects())
    conditions.encode(tiny_model, ["a fox"], torch.float32, CPU)
    assert sum(type(thing) is UMT5EncoderModel for thing in gc.get_objects()) == before


def test_encoding_says_nothing_that_alarms(tiny_model, recwarn, caplog):
    conditions.encode(tiny_model, ["a fox"], torch.bfloat16, CPU)
    assert [str(warning.message) for warning in recwarn] == []
    assert caplog.text == ""


def test_a_prompt_that_the_model_cannot_read_whole_is_cut_and_said_to_be(tiny_model, caplog):
    conditions.encode(tiny_model, ["x" * 600], torch.float32, CPU)
    assert f"begins with '{'x' * 40}' has 602 tokens, of which the model reads 512: its last 90 are" in caplog.text


def test_a_missing_text_encoder_is_named(tmp_path):
    with pytest.raises(ModelInvalidError, match=f"the text encoder in {tmp_path} cannot be loaded"):
        conditions.encode(tmp_path, ["a fox"], torch.float32, CPU)
