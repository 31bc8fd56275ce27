"""Several nodes render as one: two launchers on loopback, as two pods would start them."""

from __future__ import annotations

import re
import time

import pytest
import torch

import nodes
from nodes import Render
from videojob_api.progress import Reason


@pytest.fixture
def render(tiny_model, tmp_path) -> Render:
    return Render(tmp_path, tiny_model)


def layers_of(log: str) -> dict[int, str]:
    return {int(rank): layers for rank, layers in re.findall(r"rank (\d) INFO holds layers (\d to \d)", log)}


def test_two_nodes_render_the_latents_of_one_bit_for_bit(render):
    rendered = {}
    for count, ranks in ((1, 1), (1, 4), (2, 2)):
        assert render.run(count, ranks) == [0] * count, (render.folder / "node-0" / "log").read_text()
        rendered[count, ranks] = render.latents
    first, *others = rendered.values()
    assert first.abs().sum() > 0
    assert all(torch.equal(first, other) for other in others)


def test_ranks_of_a_node_are_neighbours_so_each_node_has_one_link_to_the_next(render):
    with render.start(2, 2) as (first, second):
        assert (first.wait(300), second.wait(300)) == (0, 0), first.log + second.log
    assert layers_of(first.log) == {0: "0 to 1", 1: "2 to 3"}
    assert layers_of(second.log) == {2: "4 to 5", 3: "6 to 7"}


def test_the_other_node_of_a_killed_one_ends_at_once_and_says_whom_it_lost(render):
    render.frames = 3000
    with render.start(2, 2) as (first, second):
        nodes.until(lambda: "block 2 of" in first.log, first)
        second.kill()
        killed = time.monotonic()
        assert first.wait(60) == 1
        assert time.monotonic() - killed < 30
    assert first.words.reason is Reason.PEER_LOST
    assert re.match(
        r"rank [01] \(layers . to .\) at block \d+ of \d+, step \d of 4 \(sweep \d+\): lost rank [23] \(layers ",
        first.words.message,
    )
    assert first.words.retryable


def test_the_other_node_of_a_killed_first_one_ends_at_once_too(render):
    render.frames = 3000
    with render.start(2, 2) as (first, second):
        nodes.until(lambda: "block 2 of" in first.log, first)
        first.kill()
        killed = time.monotonic()
        assert second.wait(60) == 1
        assert time.monotonic() - killed < 30
    assert second.words.reason is Reason.PEER_LOST
    assert second.words.message.startswith(("rank 2 (layers 4 to 5) at ", "rank 3 (layers 6 to 7) at "))
