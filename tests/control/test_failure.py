"""Why an attempt failed and what follows."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from videojob_api.progress import PERMANENT, Outcome, Reason
from videojob_api.status import Condition
from videojob_operator import failure
from videojob_operator.failure import Verdict
from videojob_operator.status import timestamp

from .builders import START, container, disrupted, ended, pod, words

CLUSTER, WORKER = False, True  # whose fault: only the worker's counts

TABLE = {
    "nothing is left": ([], "PodLost", CLUSTER),
    "the worker crashed": ([ended(message=words(Reason.CRASHED))], "Crashed", WORKER),
    "a rank was killed": ([ended(message=words(Reason.RANK_KILLED))], "RankKilled", WORKER),
    "a peer was lost": ([ended(message=words(Reason.PEER_LOST))], "PeerLost", WORKER),
    "GPU memory was short": ([ended(message=words(Reason.OUT_OF_MEMORY))], "OutOfMemory", WORKER),
    "storage was down": ([ended(message=words(Reason.STORAGE_UNAVAILABLE))], "StorageUnavailable", CLUSTER),
    "it was asked to stop": ([ended(message=words(Reason.TERMINATED))], "Terminated", CLUSTER),
    "its memory limit": ([ended(137, reason="OOMKilled")], "OOMKilled", WORKER),
    "its memory limit, seen by a peer": (
        [ended(message=words(Reason.PEER_LOST)), ended(137, reason="OOMKilled", index=1)],
        "OOMKilled",
        WORKER,
    ),
    "killed without a word": ([ended(137)], "Killed", CLUSTER),
    "stopped without a word": ([ended(143)], "Killed", CLUSTER),
    "ended without a word": ([ended(1)], "Crashed", WORKER),
    "never started": ([ended(128, "exec: python: not found", "StartError")], "Crashed", WORKER),
    "it said success and failed": (
        [ended(1, words(Reason.COMPLETED, outcome=Outcome.SUCCEEDED))],
        "Crashed",
        WORKER,
    ),
    "evicted by its node": ([pod("Failed", reason="Evicted", message="low on disk")], "Evicted", CLUSTER),
    "the node shut down": ([pod("Failed", reason="Terminated")], "Terminated", CLUSTER),
    "the node had no GPUs": ([pod("Failed", reason="OutOfnvidia.com/gpu")], "NodeFull", CLUSTER),
    "another vendor's": ([pod("Failed", reason="OutOfamd.com/gpu")], "NodeFull", CLUSTER),
    "preempted": ([disrupted("PreemptionByScheduler")], "PreemptionByScheduler", CLUSTER),
    "evicted through the API": ([disrupted("EvictionByEvictionAPI")], "EvictionByEvictionAPI", CLUSTER),
    "the node stopped answering": ([disrupted("DeletionByTaintManager", "Running")], "DeletionByTaintManager", CLUSTER),
    "the node is gone": ([disrupted("DeletionByPodGC")], "DeletionByPodGC", CLUSTER),
    "a disruption we do not know": ([disrupted("SomethingNew")], "SomethingNew", CLUSTER),
    "an evicted worker's last words": (
        [disrupted("EvictionByEvictionAPI", **container(terminated={"exitCode": 1, "message": words(Reason.CRASHED)}))],
        "EvictionByEvictionAPI",
        CLUSTER,
    ),
    "a lost node drags the others along": (
        [ended(message=words(Reason.PEER_LOST)), disrupted("DeletionByTaintManager", index=1)],
        "DeletionByTaintManager",
        CLUSTER,
    ),
    "a killed pod drags the others along": (
        [ended(message=words(Reason.PEER_LOST)), ended(137, index=1)],
        "Killed",
        CLUSTER,
    ),
    "one pod knows the cause": (
        [
            ended(message=words(Reason.TERMINATED)),
            ended(message=words(Reason.PEER_LOST), index=1),
            ended(message=words(Reason.RANK_KILLED), index=2),
        ],
        "RankKilled",
        WORKER,
    ),
    "a peer was lost, the others were stopped": (
        [ended(message=words(Reason.TERMINATED)), ended(message=words(Reason.PEER_LOST), index=1)],
        "PeerLost",
        WORKER,
    ),
    "another container's end is not the worker's": (
        [pod("Failed", **container("sidecar", terminated={"exitCode": 1, "message": ""}))],
        "PodLost",
        CLUSTER,
    ),
}


@pytest.mark.parametrize(("pods", "reason", "counts"), TABLE.values(), ids=list(TABLE))
def test_the_verdict_names_the_cause_and_whether_it_counts(pods, reason, counts):
    found = failure.verdict(pods, len(pods))
    assert (found.reason, found.counts, found.permanent) == (reason, counts, False)


@pytest.mark.parametrize(("pods", "reason", "counts"), TABLE.values(), ids=list(TABLE))
def test_every_verdict_can_be_a_condition(pods, reason, counts):
    found = failure.verdict(pods)
    pattern = next(each.pattern for each in Condition.model_fields["reason"].metadata if hasattr(each, "pattern"))
    assert re.fullmatch(pattern, found.reason)
    assert found.message


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("reason", sorted(PERMANENT))
def test_a_permanent_reason_outweighs_everything(reason, order):
    said = ended(message=words(reason, retryable=False), index=1)
    others = [disrupted("DeletionByPodGC"), ended(message=words(Reason.CRASHED), index=2), said]
    found = failure.verdict(others[::order], 3)
    assert (found.reason, found.permanent) == (reason, True)


def test_a_vanished_pod_explains_why_a_peer_was_lost():
    found = failure.verdict([ended(message=words(Reason.PEER_LOST))], expected=2)
    assert (found.reason, found.counts) == ("PodLost", False)


def test_what_the_runtime_said_is_passed_on():
    assert "python: not found" in failure.verdict([ended(128, "exec: python: not found", "StartError")]).message


def test_out_of_memory_says_what_helps():
    assert "raise spec.resources.memory" in failure.verdict([ended(137, reason="OOMKilled")]).message


def test_what_the_cluster_said_is_passed_on():
    assert failure.verdict([disrupted("PreemptionByScheduler")]).message == "said the cluster"
    assert failure.verdict([pod("Failed", reason="Evicted", message="low on disk")]).message == "low on disk"


def test_a_running_pod_has_no_last_words():
    assert failure.last_words(pod()) is None
    assert failure.terminated(pod(**container(running={}))) == {}


@pytest.mark.parametrize(
    ("newest", "counted", "final"),
    [
        (Verdict("InvalidSpec", "", permanent=True), ["InvalidSpec"], True),
        (Verdict("Crashed", ""), ["Crashed"], False),
        (Verdict("Crashed", ""), ["Crashed", "PeerLost", "Crashed"], True),
        (Verdict("Evicted", "", counts=False), ["Crashed", "Crashed"], False),
        (Verdict("OutOfMemory", ""), ["OutOfMemory"], False),
        (Verdict("OutOfMemory", ""), ["OutOfMemory", "OutOfMemory"], True),
        (Verdict("Crashed", ""), ["OutOfMemory", "Crashed"], False),
    ],
)
def test_the_end_is_a_permanent_reason_or_too_many_that_count(newest, counted, final):
    assert failure.is_final(newest, counted, max_attempts=3) is final


def test_the_pause_doubles_up_to_five_minutes():
    assert [failure.backoff_seconds(attempt, 10) for attempt in (1, 2, 3, 6, 7)] == [10, 20, 40, 300, 300]


def test_the_ten_thousandth_pause_is_no_longer_than_the_longest():
    assert failure.backoff_seconds(10_000, 10) == 300


def leaving(phase: str, seconds_ago: float):
    made = pod(phase)
    made["metadata"]["deletionTimestamp"] = timestamp(START - timedelta(seconds=seconds_ago))
    return made


@pytest.mark.parametrize(
    ("pods", "is_lost"),
    [
        ([], False),
        ([pod()], False),
        ([leaving("Running", -120)], False),
        ([leaving("Running", 30)], False),
        ([leaving("Running", 90)], True),
        ([pod(), leaving("Running", 90)], True),
        ([leaving("Failed", 90)], False),
    ],
    ids=["no pods", "runs", "has time", "just due", "overdue", "one of two", "ended"],
)
def test_a_pod_is_lost_when_its_node_does_not_confirm_its_end(pods, is_lost):
    assert failure.lost(pods, START) is is_lost
