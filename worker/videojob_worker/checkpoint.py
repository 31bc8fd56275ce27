"""A checkpoint as a file: the latents between two sweeps, what they belong to, and a checksum over all of it.

``keeper`` brings these files to storage and back. Knows nothing of storage, threads or ranks: bytes and values.

A file is one safetensors file. Its tensors are named ``<block>.latents``, ``<block>.<attribute>`` and, in lists,
``<block>.<attribute>.<index>``; its metadata hold one JSON document beside the SHA-256 of document and tensors. It does
not depend on the number of ranks, so another number may go on from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

import videojob_api.plan
from videojob_api.spec import Spec

from .blocks import BlockState, Snapshot

FORMAT = 1  # raise it with every change that an older reader would misread

Identity = Mapping[str, Any]  # what a checkpoint must have been made of to be of use; plain JSON


class InvalidCheckpointError(Exception):
    """A file is no checkpoint of this render; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A state to go on from."""

    snapshot: Snapshot
    attempt: int  # that wrote it
    clean: tuple[str, ...]  # SHA-256 of each clean block's latents object, from block 0


def identity(spec: Spec, *, model: str, dtype: str, grid: tuple[int, int]) -> Identity:
    """What this render's checkpoints are made of.

    Args:
        spec: what is rendered, its silence on sampling filled: defaults may change between two attempts.
        model: the model's fingerprint.
        dtype: the transformer's.
        grid: latent rows and columns.
    """
    plan = videojob_api.plan.plan(spec)
    return {
        "specDigest": spec.digest(),
        "model": model,
        "dtype": dtype,
        "frames": plan.frames,
        "blockLatents": plan.block_latents,
        "contextLatents": plan.context_latents,
        "steps": plan.steps,
        "grid": list(grid),
    }


def save(checkpoint: Checkpoint, of: Identity, file: Path) -> None:
    """Write a checkpoint whose tensors are on the CPU."""
    tensors: dict[str, Tensor] = {}
    blocks = {
        str(state.block): {
            "stepsDone": state.steps_done,
            "latents": _parked(state.latents, f"{state.block}.latents", tensors),
            "scheduler": {
                name: _parked(value, f"{state.block}.{name}", tensors) for name, value in state.scheduler.items()
            },
        }
        for state in checkpoint.snapshot.blocks
    }
    document = {
        "format": FORMAT,
        "identity": of,
        "attempt": checkpoint.attempt,
        "sweep": checkpoint.snapshot.sweep,
        "clean": checkpoint.clean,
        "blocks": blocks,
    }
    text = json.dumps(document)
    safetensors.torch.save_file(tensors, file, {"checkpoint": text, "sha256": _digest(text, tensors)})


def load(body: bytes, of: Identity) -> Checkpoint:
    """Read a checkpoint of this identity.

    Raises:
        InvalidCheckpointError: it is damaged, of another format or of something else.
    """
    try:
        metadata = _metadata(body)
        document = json.loads(metadata["checkpoint"])
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpointError(f"it is damaged: its header cannot be read: {error}") from error
    if version != FORMAT:
        raise InvalidCheckpointError(f"its format is {version}, and this program reads {FORMAT}")
    try:
        tensors = safetensors.torch.load(body)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidCheckpointError(f"it is damaged: {error}") from error
    if metadata.get("sha256") != _digest(metadata["checkpoint"], tensors):
        raise InvalidCheckpointError("it is damaged: its checksum is wrong")
    other = [name for name, value in of.items() if document["identity"].get(name) != value]
    if other:
        raise InvalidCheckpointError(f"it was made of something else: {', '.join(other)} differ")
    states = tuple(
        BlockState(
            block=int(number),
            steps_done=state["stepsDone"],
            latents=_fetched(state["latents"], tensors),
            scheduler={name: _fetched(value, tensors) for name, value in state["scheduler"].items()},
        )
        for number, state in document["blocks"].items()
    )
    return Checkpoint(Snapshot(document["sweep"], states), document["attempt"], tuple(document["clean"]))


def save_latents(latents: Tensor) -> bytes:
    """A block's clean latents, on the CPU, as a file."""
    return safetensors.torch.save({"latents": latents})


def load_latents(body: bytes, sha256: str) -> Tensor:
    """What ``save_latents`` wrote.

    Raises:
        InvalidCheckpointError: it is damaged.
    """
    if hashlib.sha256(body).hexdigest() != sha256:
        raise InvalidCheckpointError("it is damaged: its checksum is wrong")
    return safetensors.torch.load(body)["latents"]


def _parked(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON: tensors are put aside under a name, and lists and numbers stay."""
    if isinstance(value, Tensor):
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, list):
        return [_parked(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _fetched(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["tensor"]]
    return [_fetched(item, tensors) for item in value] if isinstance(value, list) else value


def _metadata(body: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of length, then a JSON document."""
    length = int.from_bytes(body[:8], "little")
    return dict(json.loads(body[8 : 8 + length])["__metadata__"])


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
