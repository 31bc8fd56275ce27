"""An attempt as Kubernetes objects."""

from __future__ import annotations

import json

import pytest
import yaml

from videojob_api import names, validation
from videojob_operator import job
from videojob_operator.settings import Settings

from .builders import NAME, PROMPT, UID, videojob

CPU = {"gpusPerNode": 0, "ranksPerNode": 4}


def made(settings: Settings | None = None, attempt: int = 1, failures: tuple[str, ...] = (), **spec):
    """kind -> object."""
    objects = job.objects(videojob(**spec), attempt, settings or Settings(), failures)
    return {each["kind"]: each for each in objects}


def pod_spec(settings: Settings | None = None, **spec):
    return made(settings, **spec)["Job"]["spec"]["template"]["spec"]


def container(settings: Settings | None = None, **spec):
    (only,) = pod_spec(settings, **spec)["containers"]
    return only


def environment(**spec) -> dict:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container(**spec)["env"]}


def s3(**more) -> dict:
    return {"s3": {"bucket": "videos", **more}}


def test_the_job_comes_last_so_that_its_pods_find_everything():
    assert list(made()) == ["ConfigMap", "Job"]
    assert list(made(nodes=2)) == ["ConfigMap", "Service", "Job"]


def test_a_pod_asks_for_8_gpus_where_the_spec_is_silent():
    resources = container()["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "8"
    assert "--nproc-per-node=8" in container()["command"]
    assert environment()["VIDEOJOB_DEVICE"] == "cuda"


def test_another_vendors_gpus_are_a_setting():
    pod = pod_spec(Settings(gpu_resource="amd.com/gpu"), gpusPerNode=4)
    assert pod["containers"][0]["resources"]["limits"] == {"amd.com/gpu": "4"}
    assert pod["tolerations"][0]["key"] == "amd.com/gpu"


def test_a_gpu_pod_tolerates_the_taint_of_gpu_nodes():
    assert pod_spec()["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_a_cpu_pod_asks_for_no_gpu_and_tolerates_nothing():
    pod = pod_spec(**CPU)
    assert "tolerations" not in pod
    assert set(pod["containers"][0]["resources"]["limits"]) == {"memory"}
    assert "--nproc-per-node=4" in pod["containers"][0]["command"]
    assert environment(**CPU)["VIDEOJOB_DEVICE"] == "cpu"
    assert environment(**CPU)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("spec", [{}, CPU, {"nodes": 3}], ids=["gpu", "cpu", "nodes"])
def test_a_pod_meets_the_restricted_pod_security_standard(spec):
    pod = pod_spec(**spec)
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & set(pod)
    own = pod["containers"][0]["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert not {"privileged", "procMount", "runAsUser", "seLinuxOptions"} & set(own)
    assert all(set(each) - {"name"} <= {"configMap", "emptyDir", "persistentVolumeClaim"} for each in pod["volumes"])
    assert all("hostPort" not in port for port in pod["containers"][0]["ports"])


def test_a_pod_holds_no_credentials_of_the_cluster():
    assert pod_spec()["automountServiceAccountToken"] is False
    assert pod_spec()["enableServiceLinks"] is False


def test_only_scratch_space_can_be_written():
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    writable = {each["mountPath"] for each in container()["volumeMounts"] if not each.get("readOnly")}
    assert writable == {"/scratch", "/tmp", "/dev/shm"}
    caches = ("HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    assert all(environment()[each].startswith("/scratch") for each in caches)


def test_the_prompt_travels_in_the_config_map_alone():
    objects = made()
    document = json.loads(objects["ConfigMap"]["data"][names.SPEC_FILE])
    assert document["spec"]["prompt"] == PROMPT
    assert "paper boat" not in json.dumps(objects["Job"])
    assert objects["ConfigMap"]["immutable"] is True


def test_the_worker_reads_the_videojob_that_was_asked_for():
    document = json.loads(made()["ConfigMap"]["data"][names.SPEC_FILE])
    assert validation.read(document).spec == videojob().spec
    assert environment()["VIDEOJOB_SPEC"] == "/etc/videojob/videojob.json"


def test_shared_memory_is_memory_of_the_asked_size():
    def size(settings=None, **spec):
        volume = next(each for each in pod_spec(settings, **spec)["volumes"] if each["name"] == "shared-memory")
        assert volume["emptyDir"]["medium"] == "Memory"
        return volume["emptyDir"]["sizeLimit"]

    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container()["volumeMounts"]
    assert size() == "1Gi"
    assert size(Settings(shared_memory="2Gi")) == "2Gi"
    assert size(resources={"sharedMemory": "16Gi"}) == "16Gi"


def test_credentials_are_references_to_secrets():
    environ = environment(output=s3(credentialsSecret="keys"))
    assert environ["AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "keys", "key": "AWS_ACCESS_KEY_ID"}}
    assert environ["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "keys", "key": "AWS_SECRET_ACCESS_KEY"}}
    assert environ["AWS_SESSION_TOKEN"]["secretKeyRef"]["optional"] is True


def test_the_models_credentials_have_a_prefix_of_their_own():
    source = {"s3": {"bucket": "models", "credentialsSecret": "model-keys"}}
    environ = environment(model={"source": source}, output=s3(credentialsSecret="keys"))
    assert environ["MODEL_AWS_ACCESS_KEY_ID"]["secretKeyRef"] == {"name": "model-keys", "key": "AWS_ACCESS_KEY_ID"}
    assert environ["AWS_ACCESS_KEY_ID"]["secretKeyRef"]["name"] == "keys"


def test_a_gated_repositorys_token_is_a_reference_too():
    hub = {"repository": "Wan-AI/Wan", "revision": "0" * 40, "tokenSecret": "hub"}
    token = environment(model={"source": {"huggingFace": hub}})["HF_TOKEN"]
    assert token == {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}


def test_nothing_is_said_of_credentials_where_there_are_none():
    assert not [name for name in environment() if "AWS" in name or name == "HF_TOKEN"]


def test_a_cloud_identity_is_the_pods_service_account():
    assert pod_spec(output=s3(serviceAccountName="renderer"))["serviceAccountName"] == "renderer"
    assert "serviceAccountName" not in pod_spec()


def test_a_model_claim_is_mounted_read_only():
    claim = {"persistentVolumeClaim": {"claimName": "models", "path": "wan"}}
    pod = pod_spec(model={"source": claim})
    volume = {"name": "model", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}}
    assert volume in pod["volumes"]
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert "model" not in [each["name"] for each in pod_spec()["volumes"]]


def test_several_nodes_meet_under_the_first_pods_name():
    objects = made(nodes=2, attempt=3)
    service, pod = objects["Service"], objects["Job"]["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "boat-3"}
    assert pod["subdomain"] == service["metadata"]["name"] == "boat-3"
    command = pod["containers"][0]["command"]
    assert {"--nnodes=2", "--master-addr=boat-3-0.boat-3", "--max-restarts=0"} <= set(command)


def test_each_of_several_pods_knows_its_rank_and_has_a_node_of_its_own():
    pod = pod_spec(nodes=2)
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert environment(nodes=2)["PET_NODE_RANK"] == index
    (term,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert term["labelSelector"]["matchLabels"] == {"batch.kubernetes.io/job-name": "boat-1"}


def test_one_node_needs_neither_name_nor_rank():
    assert not {"subdomain", "affinity"} & set(pod_spec())
    assert "PET_NODE_RANK" not in environment()
    assert "--master-addr=127.0.0.1" in container()["command"]


def test_all_pods_start_together_and_none_is_replaced():
    spec = made(nodes=3)["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert spec["backoffLimit"] == 0
    assert spec["podReplacementPolicy"] == "Failed"
    assert pod_spec()["restartPolicy"] == "Never"


def test_one_pod_is_ready_when_its_worker_answers():
    assert container()["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": "progress"}
    assert {"name": "progress", "containerPort": 8080} in container()["ports"]


def test_several_pods_are_not_asked_since_only_the_first_answers():
    assert "readinessProbe" not in container(nodes=2)


def test_the_longest_names_fit_into_dns_labels():
    longest = "a" * 52
    objects = made(name=longest, nodes=64, attempt=999)
    assert all(len(each["metadata"]["name"]) <= 63 for each in objects.values())
    assert len(f"{objects['Job']['metadata']['name']}-63") <= 63, "a pod's host name"
    assert len(objects["Job"]["metadata"]["labels"][names.LABEL_VIDEOJOB]) <= 63


def test_everything_goes_with_its_videojob():
    for each in made(nodes=2).values():
        (owner,) = each["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("VideoJob", NAME, UID)
        assert owner["controller"] is True
        assert each["metadata"]["namespace"] == "studio"


def test_everything_is_labelled_with_its_videojob_and_attempt():
    objects = made(nodes=2, attempt=7)
    template = objects["Job"]["spec"]["template"]
    for each in (*objects.values(), template):
        labels = each["metadata"]["labels"]
        assert labels[names.LABEL_VIDEOJOB] == NAME
        assert labels[names.LABEL_ATTEMPT] == "7"
        assert labels[names.LABEL_MANAGED_BY] == names.MANAGED_BY


def test_a_worker_knows_its_attempt():
    (worker,) = made(attempt=7)["Job"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "VIDEOJOB_ATTEMPT", "value": "7"} in worker["env"]


def test_a_gpu_pod_requests_memory_but_is_not_limited_by_a_guess():
    resources = container(gpusPerNode=8)["resources"]
    assert resources["requests"]["memory"] == "16Gi"
    assert "memory" not in resources["limits"]


def test_a_cpu_pods_memory_is_limited():
    resources = container(Settings(memory="3Gi"), **CPU)["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == "3Gi"


@pytest.mark.parametrize("spec", [{}, CPU], ids=["gpu", "cpu"])
def test_what_the_spec_asks_for_is_requested_and_limited(spec):
    resources = container(resources={"memory": "200Gi", "cpu": "12"}, **spec)["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == "200Gi"
    assert resources["requests"]["cpu"] == "12"
    assert "cpu" not in resources["limits"], "a throttled rank holds up all others"


def test_cpu_is_requested_for_each_rank_and_a_little_for_each_gpu():
    assert container(gpusPerNode=8)["resources"]["requests"]["cpu"] == "800m"
    assert container(Settings(cpu_per_rank="500m"), **CPU)["resources"]["requests"]["cpu"] == "2000m"


@pytest.mark.parametrize(
    ("quantity", "factor", "product"),
    [
        ("1", 8, "8"),
        ("500m", 3, "1500m"),
        ("0.5", 4, "2"),
        ("1.5Gi", 3, "4.5Gi"),
        ("34359738368", 3, "103079215104"),
        ("10", 10, "100"),
    ],
)
def test_a_quantity_is_multiplied_exactly(quantity, factor, product):
    assert job.times(quantity, factor) == product


def test_a_job_remembers_why_earlier_attempts_failed():
    failures = ("Crashed", "OutOfMemory")
    assert job.failures(made(failures=failures)["Job"]) == failures
    assert job.failures(made()["Job"]) == ()
    assert job.failures({"metadata": {}}) == ()


def test_an_asked_to_stop_worker_has_time_to_upload():
    assert pod_spec()["terminationGracePeriodSeconds"] >= 60


def test_last_words_are_read_from_the_agreed_file():
    assert container()["terminationMessagePath"] == environment()["VIDEOJOB_LAST_WORDS"] == "/dev/termination-log"
    assert container()["terminationMessagePolicy"] == "File"


def test_the_objects_are_plain_yaml():
    assert yaml.safe_load(yaml.safe_dump(list(made(nodes=2).values()))) == list(made(nodes=2).values())
