"""Every name that two parts of the project must agree on, in one place.

Read by all modules; knows none of them.
"""

from __future__ import annotations

from typing import Final

GROUP: Final = "videojob.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "VideoJob"
PLURAL: Final = "videojobs"
SINGULAR: Final = "videojob"
SHORT_NAMES: Final = ("vj",)

# Labels on everything the operator makes for a VideoJob.
LABEL_VIDEOJOB: Final = f"{GROUP}/videojob"  # the VideoJob's name
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"  # the attempt's number, from 1
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "videojob-operator"

# Inside a worker pod.
CONTAINER: Final = "worker"
PROGRESS_PORT: Final = 8080  # /progress, /healthz, /metrics of the first rank
PROGRESS_PORT_NAME: Final = "progress"
MASTER_PORT: Final = 29500  # torchrun's static rendezvous
SPEC_DIR: Final = "/etc/videojob"  # the ConfigMap's mount
SPEC_FILE: Final = "videojob.json"  # its one key: the VideoJob as one JSON document
CLAIM_DIR: Final = "/models"  # a model claim's mount
SCRATCH_DIR: Final = "/scratch"  # an emptyDir: downloads, the video being remuxed
TERMINATION_LOG: Final = "/dev/termination-log"  # last words

# Environment of a worker, beside torchrun's own and the AWS SDK's.
ENV_SPEC: Final = "VIDEOJOB_SPEC"  # path of the VideoJob document
ENV_ATTEMPT: Final = "VIDEOJOB_ATTEMPT"
ENV_DEVICE: Final = "VIDEOJOB_DEVICE"  # cuda or cpu
ENV_PORT: Final = "VIDEOJOB_PORT"
ENV_SCRATCH: Final = "VIDEOJOB_SCRATCH"
ENV_LAST_WORDS: Final = "VIDEOJOB_LAST_WORDS"  # where last words are written

# Objects under the output prefix.
PLAYLIST: Final = "index.m3u8"
INIT_SEGMENT: Final = "init.mp4"
VIDEO: Final = "video.mp4"
MANIFEST: Final = "manifest.json"


CHECKPOINTS: Final = ("checkpoint/0.safetensors", "checkpoint/1.safetensors")  # two generations, written in turn


def clean_latents(block: int) -> str:
    """The object name of a block's clean latents, which are kept until the whole video is there."""
    return f"checkpoint/latents/{block:05d}.safetensors"


def segment(block: int) -> str:
    """The object name of a block's media segment, relative to the prefix."""
    return f"segments/{block:05d}.m4s"


def job(videojob: str, attempt: int) -> str:
    """The name of an attempt's Job, ConfigMap and Service."""
    return f"{videojob}-{attempt}"
