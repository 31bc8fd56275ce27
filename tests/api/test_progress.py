"""What a worker may say of itself."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from videojob_api.progress import PERMANENT, LastWords, Outcome, Progress, Reason, Stage

BLOCKS, STEPS, FRAMES = 5, 20, 120


def progress(stage: Stage = Stage.RENDERING, turns: int = 0, frames: int = 0, **fields: object) -> Progress:
    values = {
        "stage": stage,
        "attempt": 1,
        "turns_done": turns,
        "turns_total": BLOCKS * STEPS,
        "blocks_done": turns // STEPS,
        "blocks_total": BLOCKS,
        "frames_ready": frames,
        "frames_total": FRAMES,
        "segments_ready": 0,
        "fps": 16,
        "updated_at": "2024-01-31T12:00:00Z",
    }
    return Progress.model_validate(values | fields)


@pytest.mark.parametrize(
    ("turns", "frames", "percent"),
    [(0, 0, 0), (1, 0, 0), (2, 0, 1), (50, 0, 49), (50, 60, 50), (100, 0, 98), (100, 60, 99), (100, 120, 99)],
)
def test_denoising_is_98_percent_of_the_way_and_writing_the_rest(turns, frames, percent):
    assert progress(turns=turns, frames=frames).percent == percent


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.SUCCEEDED])
def test_100_percent_means_that_everything_is_in_storage(stage):
    assert progress(stage, turns=100, frames=120).percent == 99
    assert progress(Stage.SUCCEEDED, turns=100, frames=120).percent == 100


@given(st.lists(st.integers(0, 100), min_size=2).map(sorted), st.lists(st.integers(0, 120), min_size=2).map(sorted))
def test_percent_never_goes_back(turns, frames):
    seen = [progress(turns=turn, frames=frame).percent for turn, frame in zip(turns, frames, strict=False)]
    assert seen == sorted(seen)
    assert all(0 <= percent <= 99 for percent in seen)


def test_the_record_is_camel_case_json():
    record = progress(turns=20, eta_seconds=1.5)
    sent = record.model_dump_json(by_alias=True)
    assert json.loads(sent)["turnsTotal"] == 100
    assert json.loads(sent)["etaSeconds"] == 1.5
    assert Progress.model_validate_json(sent) == record


@pytest.mark.parametrize(
    "wrong",
    [{"attempt": 0}, {"turns_total": 0}, {"frames_total": 0}, {"eta_seconds": -1.0}, {"stage": "Sleeping"}, {"x": 1}],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_refused(wrong):
    (field,) = wrong
    with pytest.raises(ValidationError, match=field):
        progress(**wrong)


def last_words(**fields: object) -> dict[str, object]:
    words = {"outcome": "Failed", "reason": "PeerLost", "message": "rank 3", "retryable": True, "attempt": 2}
    return words | fields


def test_last_words_are_these_five_members():
    words = LastWords.model_validate_json(json.dumps(last_words()))
    assert words == LastWords(
        outcome=Outcome.FAILED, reason=Reason.PEER_LOST, message="rank 3", retryable=True, attempt=2
    )
    assert json.loads(words.model_dump_json(by_alias=True)) == last_words()


@pytest.mark.parametrize(
    "wrong",
    [
        {"outcome": "Unknown"},
        {"reason": "Weather"},
        {"message": "x" * 2001},
        {"retryable": "yes"},
        {"attempt": 0},
        {"extra": 1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_last_words_that_nobody_agreed_on_are_refused(wrong):
    (field,) = wrong
    with pytest.raises(ValidationError, match=field):
        LastWords.model_validate_json(json.dumps(last_words(**wrong)))


ENDS_THE_RENDER = {
    Reason.COMPLETED: False,
    Reason.INVALID_SPEC: True,
    Reason.MODEL_NOT_FOUND: True,
    Reason.MODEL_INVALID: True,
    Reason.ACCESS_DENIED: True,
    Reason.BUCKET_NOT_FOUND: True,
    Reason.OUTPUT_CONFLICT: True,
    Reason.NOT_FINITE: True,
    Reason.STORAGE_UNAVAILABLE: False,
    Reason.OUT_OF_MEMORY: False,
    Reason.RANK_KILLED: False,
    Reason.PEER_LOST: False,
    Reason.TERMINATED: False,
    Reason.CRASHED: False,
}


@pytest.mark.parametrize("reason", Reason)
def test_another_attempt_is_pointless_for(reason):
    assert (reason in PERMANENT) == ENDS_THE_RENDER[reason]
