"""What a worker says of itself."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from videojob_api.plan import Cut
from videojob_api.progress import LastWords, Outcome, Progress, Reason, SamplingUsed, Stage
from videojob_worker import report
from videojob_worker.local import free_port

CUT = Cut(frames=90, block_latents=4, context_latents=3)
SAMPLING = SamplingUsed(steps=5, guidance_scale=5.0, flow_shift=3.0)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def reporter(clock):
    made = report.Reporter(CUT, fps=16, attempt=2, clock=clock)
    made.sampling(SAMPLING)
    return made


@pytest.fixture
def port():
    return free_port()


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read()


def test_nothing_is_promised_before_a_pace_is_known(reporter):
    progress = reporter.progress()
    assert (progress.stage, progress.percent, progress.eta_seconds) == (Stage.LOADING, 0, None)
    assert (progress.turns_total, progress.blocks_total, progress.attempt) == (30, 6, 2)


def test_before_the_model_is_known_blocks_are_counted_and_turns_are_not(clock):
    progress = report.Reporter(CUT, fps=16, attempt=1, clock=clock).progress()
    assert (progress.blocks_total, progress.turns_total, progress.sampling, progress.percent) == (6, None, None, 0)


def test_what_the_model_is_sampled_with_is_told(reporter):
    assert reporter.progress().sampling == SAMPLING


def test_the_eta_is_what_is_left_at_the_pace_so_far(reporter, clock):
    reporter.stage(Stage.RENDERING)
    for _ in range(10):
        clock.now += 2
        reporter.turn_done(block_done=False)
    assert reporter.progress().eta_seconds == 40
    clock.now += 5
    assert reporter.progress().eta_seconds == 35, "it counts down between two turns"
    clock.now += 500
    assert reporter.progress().eta_seconds == 0, "and never below zero"


def test_a_resumed_render_begins_where_the_older_one_was_and_counts_its_own_pace(reporter, clock):
    reporter.resumed(turns=24, blocks=3)
    progress = reporter.progress()
    assert (progress.turns_done, progress.blocks_done, progress.resumed_from_block) == (24, 3, 3)
    reporter.stage(Stage.RENDERING)
    assert reporter.progress().eta_seconds is None
    for _ in range(2):
        clock.now += 2
        reporter.turn_done(block_done=False)
    assert reporter.progress().eta_seconds == 8


def test_percent_is_100_only_when_everything_is_in_storage(reporter):
    reporter.stage(Stage.RENDERING)
    for turn in range(30):
        reporter.turn_done(block_done=turn % 5 == 4)
    for _ in range(6):
        reporter.segment_ready(15)
    assert reporter.progress().percent == 99
    reporter.stage(Stage.SUCCEEDED)
    assert reporter.progress().percent == 100


def test_progress_is_served_as_the_record(reporter, port):
    with report.serving(reporter, port):
        content_type, body = get(port, "/progress")
    assert content_type == "application/json"
    assert Progress.model_validate_json(body) == reporter.progress()
    assert "blocksTotal" in json.loads(body)


def test_metrics_follow_the_conventions(reporter, port):
    reporter.turn_done(block_done=True)
    reporter.segment_ready(25)
    with report.serving(reporter, port):
        _, body = get(port, "/metrics")
    lines = body.decode().splitlines()
    assert "videojob_turns_total 1.0" in lines
    assert "videojob_frames_total 25.0" in lines
    assert "# TYPE videojob_progress_ratio gauge" in lines


def test_health_answers_and_other_paths_say_what_there_is(reporter, port):
    with report.serving(reporter, port):
        assert get(port, "/healthz")[1] == b"ok\n"
        with pytest.raises(urllib.error.HTTPError, match="try /progress") as caught:
            get(port, "/other")
        caught.value.close()


def words(reason, message="why"):
    return report.last_words(Outcome.FAILED, reason, message, retryable=True, attempt=1)


def test_last_words_are_the_agreed_record(tmp_path):
    report.leave(words(Reason.CRASHED), tmp_path / "words")
    read = LastWords.model_validate_json((tmp_path / "words").read_text())
    assert (read.reason, read.message, read.attempt) == (Reason.CRASHED, "why", 1)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (Reason.PEER_LOST, Reason.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (Reason.OUT_OF_MEMORY, Reason.PEER_LOST, Reason.OUT_OF_MEMORY),
        (Reason.TERMINATED, Reason.PEER_LOST, Reason.PEER_LOST),
        (Reason.CRASHED, Reason.ACCESS_DENIED, Reason.CRASHED),
    ],
)
def test_a_rank_that_was_dragged_along_does_not_hide_the_cause(tmp_path, first, second, kept):
    for reason in (first, second):
        report.leave(words(reason), tmp_path / "words")
    assert LastWords.model_validate_json((tmp_path / "words").read_text()).reason == kept


def test_a_long_message_still_fits_a_termination_message(tmp_path):
    report.leave(words(Reason.CRASHED, "ü" * 50_000), tmp_path / "words")
    assert (tmp_path / "words").stat().st_size < 4096
    LastWords.model_validate_json((tmp_path / "words").read_text())
