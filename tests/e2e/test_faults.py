"""Faults inside a render: what each leaves for the user to read, and that nothing hangs."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch

import nodes
from nodes import Render
from videojob_api.progress import LastWords, Reason
from videojob_worker import settings, tiny

HURT = """
import os, threading, time
from pathlib import Path
from videojob_worker import __main__ as worker
from videojob_worker import wan

class Hurt(wan.WanStage):
    turns = 0

    def forward(self, *arguments):
        Hurt.turns += 1
        if os.environ["RANK"] == "1" and Hurt.turns == 20:
            {deed}
        return super().forward(*arguments)

wan.WanStage = Hurt
worker.main()
"""
WHERE = r"\(layers . to .\) at block \d+ of \d+, step \d of 4 \(sweep \d+\)"


@pytest.fixture
def render(tiny_model, tmp_path) -> Render:
    return Render(tmp_path, tiny_model, frames=3000)


def hurt(render: Render, deed: str) -> LastWords:
    """The last words of four ranks of which rank 1 does that in its 20th turn."""
    script = render.folder / "hurt.py"
    script.write_text(HURT.format(deed=deed))
    render.worker = (str(script),)
    with render.start(1, 4) as (node,):
        assert node.wait(120) == 1
        return node.words


def test_a_rank_that_raises_names_the_error_and_where_it_was(render):
    words = hurt(render, "raise ArithmeticError('odd')")
    assert words.reason is Reason.CRASHED
    assert re.fullmatch(rf"rank 1 {WHERE}: ArithmeticError: odd", words.message)


def test_a_rank_out_of_memory_says_what_to_change(render):
    words = hurt(render, "raise MemoryError('2 GiB')")
    assert words.reason is Reason.OUT_OF_MEMORY
    assert re.match(rf"rank 1 {WHERE}: out of memory: raise spec.resources.memory, or use more nodes", words.message)


def test_a_killed_rank_is_named_with_what_its_neighbour_saw(render):
    words = hurt(render, "os.kill(os.getpid(), 9)")
    assert words.reason is Reason.RANK_KILLED
    assert words.message.startswith("rank 1 was killed by SIGKILL: where the node was out of memory, raise spec.")
    assert re.search(rf"\(rank [0-3] {WHERE}: lost rank", words.message)


@pytest.mark.parametrize("deed", ["os._exit(0)", "raise SystemExit(0)"])
def test_a_rank_that_ends_too_early_without_an_error_is_a_lost_peer(render, deed):
    words = hurt(render, deed)
    assert words.reason is Reason.PEER_LOST
    assert re.match(rf"rank [023] {WHERE}: (lost rank|rank 1 \(layers 2 to 3\) has failed)", words.message)


def test_a_stopped_rank_is_noticed_in_time_and_named(render):
    render.environment = {settings.ENV_PEER_TIMEOUT: "5"}
    with render.start(1, 4) as (node,):
        nodes.until(lambda: "block 2 of" in node.log, node)
        os.kill(node.ranks[1], signal.SIGSTOP)
        stopped = time.monotonic()
        nodes.until((node.folder / "words").exists, node)
        assert 3 < time.monotonic() - stopped < 15
        assert node.wait(60) == 1
        assert time.monotonic() - stopped < 5 + 5 + 30 + 5, "silence, the orderly end, torchrun's patience, slack"
    assert node.words.reason is Reason.PEER_LOST
    assert re.match(
        rf"rank [023] {WHERE}: rank 1 \(layers 2 to 3\) gives no sign of life for 5 s: the process or its node hangs",
        node.words.message,
    )
    assert node.words.retryable


def test_a_rank_that_is_slow_but_alive_is_no_lost_peer(render):
    render.frames = 60
    render.environment = {settings.ENV_PEER_TIMEOUT: "3"}
    script = render.folder / "slow.py"
    script.write_text(HURT.format(deed="time.sleep(10)"))
    render.worker = (str(script),)
    assert render.run(1, 4) == [0]


def test_a_rank_that_lives_but_never_answers_is_given_up_in_the_end(render):
    render.environment = {settings.ENV_STALL_TIMEOUT: "20"}
    words = hurt(render, "time.sleep(3600)")
    assert words.reason is Reason.PEER_LOST
    assert re.match(rf"rank [023] {WHERE}: lost rank [0-3] .*Timed out", words.message)


@pytest.fixture(params=[float("nan"), float("inf")], ids=str)
def broken(request, tmp_path) -> Path:
    """A model with one bad weight in layer 5."""
    folder = tmp_path / "broken"
    tiny.save(folder)
    for shard in (folder / "transformer").glob("*.safetensors"):
        weights = safetensors.torch.load_file(shard)
        if "blocks.5.ffn.net.2.weight" in weights:
            weights["blocks.5.ffn.net.2.weight"][0, 0] = request.param
            safetensors.torch.save_file(weights, shard, metadata={"format": "pt"})
            return folder
    raise AssertionError("no shard has layer 5")


def test_nan_and_infinity_name_the_layers_the_block_and_the_step(render, broken):
    render.model = broken
    with render.start(1, 4) as (node,):
        assert node.wait(120) == 1
    assert node.words.reason is Reason.NOT_FINITE
    assert not node.words.retryable
    assert node.words.message.startswith(
        "layers 4 to 5 gave NaN or infinity at block 1 of 187, step 1 of 4 (sweep 1): set VIDEOJOB_DTYPE"
    )
