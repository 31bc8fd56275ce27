"""What a VideoJob's status says."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videojob_api.progress import Stage
from videojob_api.status import Phase, Status
from videojob_operator import status
from videojob_operator.failure import Verdict
from videojob_operator.status import Observed, Why, duration

from .builders import START, container, document, merged, pod, progress, videojob

LATER = START + timedelta(minutes=5)
CRASH = Verdict("Crashed", "why")


def told(observed: Observed, previous=None, now=START, **spec):
    raw = document(**spec) | ({"status": previous} if previous else {})
    return status.status(raw, videojob(**spec), observed, now)


def conditions(of) -> dict:
    return {each["type"]: each for each in of["conditions"]}


WAITING = Observed(1)
LOADING = Observed(1, [pod()])
RENDERING = Observed(1, [pod()], progress())
RETRYING = Observed(1, failed=CRASH)
SPENT = Observed(3, failed=CRASH, final=True)
PERMANENT = Observed(1, failed=Verdict("AccessDenied", "no", permanent=True), final=True)
SUCCEEDED = Observed(1, [pod("Succeeded")], succeeded=True)
HELD = Observed(0, held=(Why.FORBIDDEN, "exceeded quota"))
ALL = [WAITING, LOADING, RENDERING, RETRYING, SPENT, PERMANENT, SUCCEEDED, HELD]


@pytest.mark.parametrize(
    ("observed", "phase", "reason"),
    [
        (WAITING, "Pending", "WaitingForPods"),
        (Observed(1, [pod("Pending")]), "Pending", "WaitingForPods"),
        (Observed(1, [pod(), pod("Pending", index=1)]), "Pending", "WaitingForPods"),
        (HELD, "Pending", "Forbidden"),
        (RETRYING, "Pending", "Retrying"),
        (LOADING, "Starting", "Loading"),
        (Observed(1, [pod()], progress(0, stage=Stage.LOADING)), "Starting", "Loading"),
        (RENDERING, "Rendering", "Rendering"),
        (Observed(1, [pod()], progress(30, stage=Stage.FINISHING)), "Rendering", "Rendering"),
        (SUCCEEDED, "Succeeded", "Completed"),
        (SPENT, "Failed", "AttemptsSpent"),
        (PERMANENT, "Failed", "AccessDenied"),
    ],
)
def test_the_phase_and_its_reason(observed, phase, reason):
    new = told(observed)
    assert new["phase"] == phase
    assert conditions(new)["Rendering"]["reason"] == reason


@pytest.mark.parametrize("observed", ALL)
def test_every_status_fits_its_schema(observed):
    Status.model_validate(_tuples(told(observed)))


def _tuples(new):
    return {**new, "phase": Phase(new["phase"]), "conditions": tuple(new["conditions"])}


@pytest.mark.parametrize(
    ("observed", "true"),
    [
        (WAITING, {"Accepted"}),
        (RENDERING, {"Accepted", "Rendering"}),
        (SUCCEEDED, {"Accepted", "Complete"}),
        (SPENT, {"Accepted", "Failed"}),
    ],
)
def test_the_conditions_that_hold(observed, true):
    found = conditions(told(observed))
    assert {kind for kind, each in found.items() if each["status"] == "True"} == true
    assert set(found) == {"Accepted", "Rendering", "Complete", "Failed"}


def test_an_invalid_spec_is_not_accepted():
    new = status.invalid(document(), Why.INVALID_SPEC, "spec.prompt: required", START)
    assert conditions(new)["Accepted"]["status"] == "False"
    assert conditions(new)["Failed"]["message"] == "spec.prompt: required"
    assert new["completionTime"] == "2026-01-01T00:00:00Z"


def test_a_transition_time_moves_with_its_conditions_status_alone():
    first = told(WAITING)
    second = told(LOADING, first, LATER)
    third = told(RENDERING, second, LATER)
    moved = {kind: each["lastTransitionTime"] for kind, each in conditions(third).items()}
    assert conditions(second)["Rendering"]["lastTransitionTime"] == status.timestamp(START), "only its reason changed"
    assert moved.pop("Rendering") == status.timestamp(LATER)
    assert set(moved.values()) == {status.timestamp(START)}


def test_the_generation_that_was_seen_is_told():
    raw = document()
    raw["metadata"]["generation"] = 4
    new = status.status(raw, videojob(), WAITING, START)
    assert new["observedGeneration"] == 4
    assert {each["observedGeneration"] for each in new["conditions"]} == {4}


def test_a_worker_that_misses_a_poll_is_still_rendering():
    before = told(RENDERING)
    after = told(replace(RENDERING, progress=None), before, LATER)
    assert after["phase"] == "Rendering"
    assert after["progress"] == before["progress"]


def test_what_the_worker_samples_with_is_told_and_stays():
    sampling = {"steps": 5, "guidanceScale": 4.0, "guidanceScale2": 3.0, "flowShift": 12.0}
    before = told(RENDERING)
    assert before["sampling"] == sampling
    for later in (SUCCEEDED, RETRYING, replace(RENDERING, progress=None)):
        assert told(later, before)["sampling"] == sampling
    assert "sampling" not in told(LOADING)


def test_a_new_attempt_loads_again():
    before = told(RENDERING)
    after = told(Observed(2, [pod(attempt=2)]), before)
    assert after["phase"] == "Starting"
    assert "progress" not in after


def test_a_pod_that_just_ended_does_not_look_unstarted():
    assert told(Observed(1, [pod("Failed")]), told(RENDERING))["phase"] == "Rendering"


def test_progress_is_counted_in_blocks_frames_and_segments():
    found = told(Observed(1, [pod()], progress(15, segments=2)))["progress"]
    assert found["summary"] == "49% (2/6)"
    assert (found["framesReady"], found["framesTotal"], found["segments"]) == (30, 90, 2)
    assert found["ready"] == "2s"
    assert found["eta"] == "60s"
    assert found["estimatedCompletionTime"] == "2026-01-01T00:01:00Z"


def test_nothing_is_estimated_without_a_pace():
    found = told(Observed(1, [pod()], progress(0, eta=None)))["progress"]
    assert found["eta"] == ""
    assert "estimatedCompletionTime" not in found


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=2))
def test_the_percentage_never_falls_while_the_work_grows(steps):
    turns, segments = (sorted(each) for each in zip(*steps, strict=True))
    percents = [
        told(Observed(1, [pod()], progress(*each)))["progress"]["percent"] for each in zip(turns, segments, strict=True)
    ]
    assert percents == sorted(percents)
    assert max(percents) < 100


def test_success_is_everything():
    found = told(SUCCEEDED, told(RENDERING))["progress"]
    assert found["summary"] == "100% (6/6)"
    assert (found["framesReady"], found["ready"], found["eta"]) == (90, "6s", "")


def test_a_failure_keeps_what_was_reached():
    before = told(Observed(1, [pod()], progress(20, segments=3)))
    assert told(PERMANENT, before)["progress"] == before["progress"]


def test_the_start_is_when_the_first_pod_ran_and_stays():
    new = told(LOADING, now=LATER)
    assert new["startTime"] == "2026-01-01T00:00:00Z"
    again = told(Observed(2, [pod(startTime="2026-01-02T00:00:00Z")]), new)
    assert again["startTime"] == "2026-01-01T00:00:00Z"
    assert "startTime" not in told(Observed(1, [pod("Pending")]))


def test_an_end_has_a_time():
    assert told(SUCCEEDED, now=LATER)["completionTime"] == "2026-01-01T00:05:00Z"
    assert "completionTime" not in told(RENDERING)


@pytest.mark.parametrize(
    ("s3", "location", "playlist"),
    [
        (
            {"bucket": "videos", "prefix": "a/b"},
            "s3://videos/a/b/",
            "https://videos.s3.us-east-1.amazonaws.com/a/b/index.m3u8",
        ),
        (
            {"bucket": "videos", "region": "eu-west-1"},
            "s3://videos/",
            "https://videos.s3.eu-west-1.amazonaws.com/index.m3u8",
        ),
        (
            {"bucket": "videos", "prefix": "boat", "endpoint": "http://s3:7070"},
            "s3://videos/boat/",
            "http://s3:7070/videos/boat/index.m3u8",
        ),
    ],
    ids=["AWS", "the bucket's root", "another server"],
)
def test_where_to_look(s3, location, playlist):
    found = told(WAITING, output={"s3": s3})["output"]
    assert (found["location"], found["playlistURL"]) == (location, playlist)
    assert found["videoURL"] == playlist.replace("index.m3u8", "video.mp4")
    assert found["manifestURL"] == playlist.replace("index.m3u8", "manifest.json")


def waiting(reason: str, message: str = "", **more):
    return pod("Pending", **container(waiting={"reason": reason, "message": message}), **more)


UNSCHEDULED = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes have enough nvidia.com/gpu"}


@pytest.mark.parametrize(
    ("pods", "said"),
    [
        ([], "the pods are being created"),
        ([waiting("ContainerCreating")], "the pods are being created"),
        ([waiting("ImagePullBackOff", "no such image")], "pod boat-1-0-abcde: ImagePullBackOff: no such image"),
        ([pod(), waiting("CreateContainerConfigError", index=1)], "pod boat-1-1-abcde: CreateContainerConfigError"),
        (
            [pod("Pending", conditions=[UNSCHEDULED])],
            "pod boat-1-0-abcde has no node yet: 0/3 nodes have enough nvidia.com/gpu",
        ),
        (
            [
                pod(
                    "Pending",
                    initContainerStatuses=[{"name": "mesh", "state": {"waiting": {"reason": "ErrImagePull"}}}],
                )
            ],
            "pod boat-1-0-abcde: ErrImagePull",
        ),
    ],
    ids=["no pods", "on its way", "image", "secret", "no node", "a sidecar's image"],
)
def test_pods_that_do_not_run_say_why(pods, said):
    assert status.obstacle(pods) == said
    assert conditions(told(Observed(1, pods)))["Rendering"]["message"] == said


def test_a_job_that_can_make_no_pods_says_why():
    said = conditions(told(Observed(1, trouble="exceeded quota: gpus")))["Rendering"]["message"]
    assert said == "exceeded quota: gpus"


def test_a_message_is_no_longer_than_one_can_read():
    new = told(Observed(0, held=(Why.FORBIDDEN, "x" * 100_000)))
    assert len(conditions(new)["Rendering"]["message"]) == 4000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.6, "60s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (3599, "59m59s"),
        (3600, "1h"),
        (3660, "1h1m"),
        (47 * 3600, "47h"),
        (48 * 3600, "2d0h"),
        (51 * 3600, "2d3h"),
    ],
)
def test_durations_are_written_as_kubectl_does(seconds, text):
    assert duration(seconds) == text


LEAVES = st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
INNER = st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3)
MEMBERS = st.dictionaries(st.sampled_from("abc"), LEAVES | INNER, max_size=3)
STATUSES = st.dictionaries(st.sampled_from("abcd"), LEAVES | MEMBERS, max_size=4)


@settings(deadline=None)  # the machine may be busy
@given(STATUSES, STATUSES)
def test_the_patch_turns_one_status_into_the_other(previous, new):
    assert merged(previous, status.patch(previous, new)) == new


@settings(deadline=None)  # the machine may be busy
@given(STATUSES)
def test_no_change_is_no_patch(same):
    assert status.patch(same, same) == {}


@pytest.mark.parametrize("before", ALL)
@pytest.mark.parametrize("after", ALL)
def test_any_status_can_follow_any_other_by_a_patch(before, after):
    previous = told(before)
    new = told(after, previous, LATER)
    assert merged(previous, status.patch(previous, new)) == new
