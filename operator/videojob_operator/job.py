"""A VideoJob's attempt as Kubernetes objects: ConfigMap, Job and, for several nodes, a headless Service. Pure.

``reconcile`` has ``cluster`` create them. The prompt travels inside the ConfigMap alone: never in an argument, a
variable or a shell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

from videojob_api import names
from videojob_api.spec import S3Location, VideoJob

from .settings import Settings

ANNOTATION_FAILURES: Final = f"{names.GROUP}/failures"  # on a Job: why earlier attempts failed, those that count
USER = 65532  # the conventional "nonroot"
GRACE_SECONDS = 120  # enough to save the last whole sweep
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

Object = dict[str, Any]


def objects(videojob: VideoJob, attempt: int, settings: Settings, failures: Sequence[str] = ()) -> list[Object]:
    """Everything that an attempt needs, in the order of creation: the Job last, so that it finds the others.

    Args:
        videojob: what to render.
        attempt: its number, from 1.
        settings: defaults for what the spec leaves open.
        failures: reasons of the failed attempts that count; the Job remembers them when the pods are gone.
    """
    service = [_service(videojob, attempt)] if videojob.spec.nodes > 1 else []
    job = _job(videojob, attempt, settings)
    job["metadata"]["annotations"] = {ANNOTATION_FAILURES: ",".join(failures)}
    return [_config_map(videojob, attempt), *service, job]


def failures(job: Object) -> tuple[str, ...]:
    """The reasons that a Job was made with."""
    text = (job["metadata"].get("annotations") or {}).get(ANNOTATION_FAILURES, "")
    return tuple(filter(None, text.split(",")))


def labels(videojob: VideoJob, attempt: int) -> dict[str, str]:
    """Of everything that is made for an attempt."""
    return {
        "app.kubernetes.io/name": "videojob",
        "app.kubernetes.io/instance": videojob.metadata.name,
        "app.kubernetes.io/component": "worker",
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_VIDEOJOB: videojob.metadata.name,
        names.LABEL_ATTEMPT: str(attempt),
    }


def _metadata(videojob: VideoJob, attempt: int) -> Object:
    return {
        "name": names.job(videojob.metadata.name, attempt),
        "namespace": videojob.metadata.namespace,
        "labels": labels(videojob, attempt),
        "ownerReferences": [
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": videojob.metadata.name,
                "uid": videojob.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def _config_map(videojob: VideoJob, attempt: int) -> Object:
    document = json.dumps(videojob.document(), ensure_ascii=False, indent=1)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(videojob, attempt),
        "immutable": True,
        "data": {names.SPEC_FILE: document},
    }


def _service(videojob: VideoJob, attempt: int) -> Object:
    """Gives the first pod a name that the others find before it is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(videojob, attempt),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": names.job(videojob.metadata.name, attempt)},
            "ports": [{"name": "rendezvous", "port": names.MASTER_PORT}],
        },
    }


def _job(videojob: VideoJob, attempt: int, settings: Settings) -> Object:
    nodes = videojob.spec.nodes
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(videojob, attempt),
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 0,  # all ranks start together or not at all: a new attempt is a new Job
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {"labels": labels(videojob, attempt)},
                "spec": _pod(videojob, attempt, settings),
            },
        },
    }


def _pod(videojob: VideoJob, attempt: int, settings: Settings) -> Object:
    spec = videojob.spec
    name = names.job(videojob.metadata.name, attempt)
    pod: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(videojob, attempt, settings)],
        "volumes": _volumes(videojob, attempt, settings),
    }
    if spec.output.s3.service_account_name is not None:
        pod["serviceAccountName"] = spec.output.s3.service_account_name
    if spec.gpus_per_node:  # nodes with GPUs are commonly tainted to keep others away
        pod["tolerations"] = [{"key": settings.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    if spec.nodes > 1:
        pod |= {"subdomain": name, "affinity": _apart(name)}
    return pod


def _apart(name: str) -> Object:
    """Each pod on a node of its own."""
    term = {
        "labelSelector": {"matchLabels": {"batch.kubernetes.io/job-name": name}},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _container(videojob: VideoJob, attempt: int, settings: Settings) -> Object:
    mounts = [
        {"name": "spec", "mountPath": names.SPEC_DIR, "readOnly": True},
        {"name": "scratch", "mountPath": names.SCRATCH_DIR},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 - what NCCL and torch need
    ]
    if videojob.spec.model.source.persistent_volume_claim is not None:
        mounts.append({"name": "model", "mountPath": names.CLAIM_DIR, "readOnly": True})
    container: Object = {
        "name": names.CONTAINER,
        "image": settings.worker_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": _command(videojob, attempt),
        "env": _environment(videojob, attempt),
        "ports": [{"name": names.PROGRESS_PORT_NAME, "containerPort": names.PROGRESS_PORT}],
        "resources": _resources(videojob, settings),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "volumeMounts": mounts,
    }
    if videojob.spec.nodes == 1:  # the first rank alone answers, and all pods of a Job are alike
        check = {"path": "/healthz", "port": names.PROGRESS_PORT_NAME}
        container["readinessProbe"] = {"httpGet": check, "periodSeconds": 5, "timeoutSeconds": 5}
    return container


def _command(videojob: VideoJob, attempt: int) -> list[str]:
    name = names.job(videojob.metadata.name, attempt)
    first = "127.0.0.1" if videojob.spec.nodes == 1 else f"{name}-0.{name}"
    return [
        "python",
        "-m",
        "videojob_worker.launch",
        f"--nnodes={videojob.spec.nodes}",
        f"--nproc-per-node={videojob.spec.ranks}",
        f"--master-addr={first}",
        f"--master-port={names.MASTER_PORT}",
        "--max-restarts=0",
        "-m",
        "videojob_worker",
    ]


def _environment(videojob: VideoJob, attempt: int) -> list[Object]:
    scratch = names.SCRATCH_DIR
    plain = {
        names.ENV_SPEC: f"{names.SPEC_DIR}/{names.SPEC_FILE}",
        names.ENV_ATTEMPT: str(attempt),
        names.ENV_DEVICE: "cuda" if videojob.spec.gpus_per_node else "cpu",
        names.ENV_PORT: str(names.PROGRESS_PORT),
        names.ENV_SCRATCH: scratch,
        names.ENV_LAST_WORDS: names.TERMINATION_LOG,
        "HOME": scratch,
        "HF_HOME": f"{scratch}/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
        "CUDA_CACHE_PATH": f"{scratch}/cuda",
        "PYTHONUNBUFFERED": "1",
    }
    if videojob.spec.gpus_per_node == 0:
        plain["OMP_NUM_THREADS"] = "1"
    variables: list[Object] = [{"name": name, "value": value} for name, value in plain.items()]
    if videojob.spec.nodes > 1:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        variables.append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    source = videojob.spec.model.source
    variables += _keys(videojob.spec.output.s3, "")
    if source.s3 is not None:
        variables += _keys(source.s3, "MODEL_")
    if source.hugging_face is not None and source.hugging_face.token_secret is not None:
        variables.append(_secret("HF_TOKEN", source.hugging_face.token_secret, "HF_TOKEN"))
    return variables


def _keys(location: S3Location, prefix: str) -> list[Object]:
    if location.credentials_secret is None:
        return []
    return [
        _secret(prefix + key, location.credentials_secret, key, optional=key == "AWS_SESSION_TOKEN") for key in KEYS
    ]


def _secret(variable: str, secret: str, key: str, *, optional: bool = False) -> Object:
    reference: Object = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _resources(videojob: VideoJob, settings: Settings) -> Object:
    """A pod with GPUs asks for little else by default and is not limited: whoever has a node's GPUs has the node."""
    spec, gpus = videojob.spec, videojob.spec.gpus_per_node
    limit = spec.resources.memory or (None if gpus else settings.memory)
    cpu = times(settings.cpu_per_gpu, gpus) if gpus else times(settings.cpu_per_rank, spec.ranks)
    requests = {
        "cpu": spec.resources.cpu or cpu,
        "memory": limit or times(settings.memory_per_gpu, gpus),
    }
    limits = {"memory": limit} if limit else {}
    if gpus:
        requests[settings.gpu_resource] = limits[settings.gpu_resource] = str(gpus)
    return {"requests": requests, "limits": limits}


def times(quantity: str, factor: int) -> str:
    """A Kubernetes quantity, multiplied."""
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", quantity).groups()  # type: ignore[union-attr]
    return f"{(Decimal(number) * factor).normalize():f}{unit}"


def _volumes(videojob: VideoJob, attempt: int, settings: Settings) -> list[Object]:
    shared = videojob.spec.resources.shared_memory or settings.shared_memory
    volumes: list[Object] = [
        {"name": "spec", "configMap": {"name": names.job(videojob.metadata.name, attempt)}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared}},
    ]
    claim = videojob.spec.model.source.persistent_volume_claim
    if claim is not None:
        reference = {"claimName": claim.claim_name, "readOnly": True}
        volumes.append({"name": "model", "persistentVolumeClaim": reference})
    return volumes
