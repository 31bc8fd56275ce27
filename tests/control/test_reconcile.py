"""One look after another at a VideoJob, in a cluster in memory."""

from __future__ import annotations

import pytest

from videojob_api import names
from videojob_api.progress import Reason, Stage
from videojob_operator import job
from videojob_operator.cluster import ConflictError, ForbiddenError, GoneError, RefusedError
from videojob_operator.reconcile import Reconciler
from videojob_operator.settings import Settings
from videojob_operator.status import timestamp

from .builders import NAME, NAMESPACE, Clock, MemoryCluster, document, ended, pod, progress, videojob, words

SETTINGS = Settings(poll_seconds=5, max_attempts=3, backoff_seconds=10)
CRASH = words(Reason.CRASHED)


class World:
    """A cluster, its operator and its time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.cluster = MemoryCluster(self.clock)
        self.cluster.put(document())
        self.reconciler = Reconciler(self.cluster, SETTINGS, self.clock)

    def look(self) -> float | None:
        return self.reconciler(NAMESPACE, NAME)

    def start(self, *pods) -> None:
        self.look()
        self.cluster.run(*pods)
        self.look()

    def fail(self, attempt: int, *pods) -> None:
        """The attempt fails, and the next look comes when its pause is over."""
        self.cluster.end(attempt, "Failed", *pods)
        self.look()
        self.clock.go(300)
        self.look()

    @property
    def jobs(self) -> list[str]:
        return [each["metadata"]["name"] for each in self.cluster.all("Job")]

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason, _ in self.cluster.events]


@pytest.fixture
def world():
    return World()


def crashed(attempt: int):
    return ended(message=CRASH, attempt=attempt, job_uid=f"job-{attempt}")


def evicted(attempt: int):
    return pod("Failed", attempt=attempt, job_uid=f"job-{attempt}", reason="Evicted")


def test_the_first_look_makes_the_config_map_then_the_job(world):
    assert world.look() == SETTINGS.poll_seconds
    assert [kind for kind, _ in world.cluster.objects] == [names.KIND, "ConfigMap", "Job"]
    assert (world.cluster.status["phase"], world.cluster.status["attempt"]) == ("Pending", 1)
    assert world.reasons == ["AttemptStarted"]


def test_a_second_look_makes_nothing_again(world):
    world.look()
    world.look()
    assert world.cluster.calls["create Job"] == 1
    assert world.reasons == ["AttemptStarted"]


def test_an_operator_that_died_between_config_map_and_job_goes_on(world):
    world.cluster.create(job.objects(videojob(), 1, SETTINGS)[0])
    world.look()
    assert world.jobs == ["boat-1"]
    assert world.cluster.calls["create ConfigMap"] == 1


def test_an_operator_that_died_before_it_told_goes_on(world):
    for each in job.objects(videojob(), 1, SETTINGS):
        world.cluster.create(each)
    world.look()
    assert world.cluster.status["phase"] == "Pending"
    assert world.reasons == [], "what is there already is not made, and not announced, twice"


def test_nothing_is_patched_when_nothing_changed(world):
    world.cluster.said = progress(15, segments=1)
    world.start(pod())
    patches = world.cluster.calls["patch"]
    for _ in range(5):
        world.look()
    assert world.cluster.calls["patch"] == patches


def test_progress_flows_into_the_status(world):
    world.start(pod())
    assert world.cluster.status["phase"] == "Starting"
    world.cluster.said = progress(15, segments=2)
    world.look()
    assert world.cluster.status["phase"] == "Rendering"
    assert world.cluster.status["progress"]["framesReady"] == 30
    assert world.look() == SETTINGS.poll_seconds


def test_the_first_pod_of_several_is_asked(world):
    world.cluster.said = progress()
    world.start(pod("Pending"), pod(index=1))
    assert world.cluster.calls["poll"] == 0, "the first does not run yet, and the second never answers"


def test_the_first_segment_is_told_once(world):
    world.cluster.said = progress(5)
    world.start(pod())
    for segments in (1, 2, 3):
        world.cluster.said = progress(10, segments)
        world.look()
    assert world.reasons.count("FirstSegmentReady") == 1
    assert any("index.m3u8" in message for _, _, message in world.cluster.events)


def test_a_complete_job_is_a_success_and_is_forgotten(world):
    world.start(pod())
    world.cluster.end(1, "Complete", pod("Succeeded"))
    assert world.look() is None
    assert world.cluster.status["phase"] == "Succeeded"
    assert world.cluster.status["progress"]["percent"] == 100
    assert world.reasons[-1] == "Succeeded"


def test_an_ended_videojob_is_left_alone(world):
    world.start(pod())
    world.cluster.end(1, "Complete")
    world.look()
    patches = world.cluster.calls["patch"]
    assert world.look() is None
    assert world.cluster.calls["patch"] == patches


def test_the_next_attempt_waits_for_its_time(world):
    world.start(pod())
    world.cluster.end(1, "Failed", crashed(1))
    assert world.look() == 10
    assert world.cluster.condition("Rendering")["reason"] == "Retrying"
    world.clock.go(9)
    assert world.look() == 1
    assert world.jobs == ["boat-1"]
    world.clock.go(1)
    world.look()
    assert world.jobs == ["boat-1", "boat-2"]
    assert world.cluster.status["attempt"] == 2


def test_a_retry_is_told_once(world):
    world.start(pod())
    world.cluster.end(1, "Failed", crashed(1))
    for _ in range(3):
        world.look()
    assert world.reasons.count("Retrying") == 1


def test_a_pod_that_never_ran_is_retried_and_told_too(world):
    world.look()
    world.cluster.end(1, "Failed", pod("Failed", reason="OutOfcpu"))
    world.look()
    assert "Retrying" in world.reasons


def test_attempts_that_the_worker_failed_are_spent(world):
    world.look()
    for attempt in (1, 2, 3):
        world.fail(attempt, crashed(attempt))
    assert world.jobs == ["boat-1", "boat-2", "boat-3"]
    assert world.cluster.status["phase"] == "Failed"
    assert world.cluster.condition("Failed")["reason"] == "AttemptsSpent"
    assert "why" in world.cluster.condition("Failed")["message"]


def test_attempts_that_the_cluster_failed_do_not_count(world):
    world.look()
    for attempt in range(1, 8):
        world.fail(attempt, evicted(attempt))
    assert world.cluster.status["phase"] == "Pending"
    assert world.cluster.status["attempt"] == 8


def test_failures_count_even_when_their_pods_are_gone(world):
    world.look()
    for attempt in (1, 2, 3):
        world.fail(attempt, crashed(attempt))
        for key in [key for key in world.cluster.objects if key[0] == "Pod"]:
            del world.cluster.objects[key]
    assert world.cluster.status["phase"] == "Failed"
    assert world.jobs == ["boat-1", "boat-2", "boat-3"]


def test_out_of_gpu_memory_is_tried_once_more(world):
    world.look()
    for attempt in (1, 2):
        short = words(Reason.OUT_OF_MEMORY)
        world.fail(attempt, ended(message=short, attempt=attempt, job_uid=f"job-{attempt}"))
    assert world.cluster.status["phase"] == "Failed"
    assert world.jobs == ["boat-1", "boat-2"]


def test_a_permanent_reason_fails_at_once(world):
    world.start(pod())
    world.cluster.end(1, "Failed", ended(message=words(Reason.ACCESS_DENIED, retryable=False)))
    assert world.look() is None
    assert world.cluster.condition("Failed")["reason"] == "AccessDenied"
    assert world.jobs == ["boat-1"]
    assert world.reasons[-1] == "Failed"


def test_a_pod_whose_node_never_answers_does_not_hold_up_the_render(world):
    lost = pod()
    lost["metadata"]["deletionTimestamp"] = timestamp(world.clock())
    world.start(lost)
    assert world.jobs == ["boat-1"]
    world.clock.go(61)
    world.look()
    assert world.jobs == ["boat-1", "boat-2"]
    world.look()
    assert world.jobs == ["boat-1", "boat-2"]
    assert job.failures(world.cluster.all("Job")[-1]) == (), "a lost node does not count"


def test_a_videojob_that_does_not_exist_is_forgotten(world):
    del world.cluster.objects[names.KIND, NAME]
    assert world.look() is None
    assert world.jobs == []


def test_a_videojob_that_is_being_deleted_is_forgotten(world):
    world.cluster.objects[names.KIND, NAME]["metadata"]["deletionTimestamp"] = timestamp(world.clock())
    assert world.look() is None
    assert world.jobs == []


def test_an_invalid_spec_fails_and_names_the_field(world):
    world.cluster.put(document(ranksPerNode=4, nodes=0))
    assert world.look() is None
    failed = world.cluster.condition("Failed")
    assert failed["reason"] == "InvalidSpec"
    assert "spec.nodes" in failed["message"]
    assert "spec.ranksPerNode" in failed["message"]
    assert world.jobs == []


def test_what_is_refused_for_good_fails_with_the_servers_words(world):
    world.cluster.refuse["ConfigMap"] = RefusedError("Too long: may not be more than 1048576 bytes")
    assert world.look() is None
    failed = world.cluster.condition("Failed")
    assert (failed["status"], failed["reason"]) == ("True", "Refused")
    assert "1048576" in failed["message"]


def test_what_is_forbidden_now_waits_and_says_why(world):
    world.cluster.refuse["Job"] = ForbiddenError("exceeded quota")
    assert world.look() == 5
    assert (world.cluster.status["phase"], world.cluster.status["attempt"]) == ("Pending", 0)
    assert world.cluster.condition("Rendering")["reason"] == "Forbidden"
    assert world.cluster.condition("Rendering")["message"] == "exceeded quota"
    assert world.cluster.events == [("Warning", "Forbidden", "exceeded quota")]


def test_the_pauses_before_another_try_grow_up_to_a_minute(world):
    world.cluster.refuse["Job"] = ForbiddenError("exceeded quota")
    pauses = []
    for _ in range(7):
        pauses.append(world.look())
        world.clock.go(pauses[-1])
    assert pauses == [5, 5, 10, 20, 40, 60, 60]
    assert world.reasons == ["Forbidden"], "told once"


def test_what_is_allowed_again_goes_on(world):
    world.cluster.refuse["Job"] = ForbiddenError("exceeded quota")
    world.look()
    world.cluster.refuse.clear()
    world.look()
    assert world.jobs == ["boat-1"]
    assert world.cluster.condition("Rendering")["reason"] == "WaitingForPods"


def test_a_second_attempt_that_is_forbidden_does_not_hide_the_first(world):
    world.cluster.said = progress(15, segments=2)
    world.start(pod())
    world.cluster.refuse["Job"] = ForbiddenError("exceeded quota")
    world.fail(1, evicted(1))
    assert world.cluster.status["attempt"] == 1
    assert world.cluster.status["progress"]["framesReady"] == 30
    assert world.cluster.condition("Rendering")["reason"] == "Forbidden"


def test_a_name_that_is_taken_waits_and_says_so(world):
    world.cluster.create(job.objects(videojob(uid="another"), 1, SETTINGS)[0])
    assert world.look() == 5
    assert world.cluster.condition("Rendering")["reason"] == "NameTaken"
    assert "boat-1" in world.cluster.condition("Rendering")["message"]
    assert world.jobs == []


def test_the_job_of_an_earlier_videojob_of_that_name_is_not_ours(world):
    for each in job.objects(videojob(uid="earlier"), 1, SETTINGS):
        world.cluster.create(each)
    world.cluster.end(1, "Complete", pod("Succeeded"))
    world.look()
    assert world.cluster.status["phase"] == "Pending"
    assert world.cluster.condition("Rendering")["reason"] == "NameTaken"


def test_the_pods_of_an_earlier_videojob_of_that_name_are_not_ours(world):
    world.cluster.said = progress()
    world.start(pod(job_uid="earlier"))
    assert world.cluster.status["phase"] == "Pending"
    assert world.cluster.calls["poll"] == 0


def test_a_videojob_in_a_namespace_that_goes_is_forgotten(world):
    world.cluster.refuse["ConfigMap"] = GoneError("the namespace is being terminated")
    assert world.look() is None
    assert world.cluster.calls["patch"] == 0


class Replaced(MemoryCluster):
    """Whatever is read is replaced before the status is patched."""

    def patch_status(self, videojob, changes) -> None:  # noqa: ARG002 - the protocol's signature
        raise ConflictError("the object has been modified")


def test_a_videojob_that_changed_meanwhile_is_looked_at_again():
    clock = Clock()
    cluster = Replaced(clock)
    cluster.put(document())
    assert Reconciler(cluster, SETTINGS, clock)(NAMESPACE, NAME) == 0
    assert cluster.events[1:] == [], "what was not written is not announced"


def test_a_job_that_can_make_no_pods_says_why(world):
    world.cluster.warned = "pods are forbidden: exceeded quota"
    world.look()
    world.look()
    assert world.cluster.condition("Rendering")["message"] == "pods are forbidden: exceeded quota"


def test_a_change_of_machines_holds_from_the_next_attempt_on(world):
    world.start(pod())
    stored = world.cluster.objects[names.KIND, NAME]
    stored["spec"]["gpusPerNode"] = 4
    world.fail(1, evicted(1))
    first, second = world.cluster.all("Job")
    limits = [
        each["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for each in (first, second)
    ]
    assert limits == ["8", "4"]


def test_loading_is_not_rendering(world):
    world.cluster.said = progress(0, stage=Stage.LOADING, eta=None)
    world.start(pod())
    assert world.cluster.status["phase"] == "Starting"
    assert "Rendering" not in world.reasons
