"""A checkpoint comes back bit for bit, or is refused with its reason."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from videojob_api import validation
from videojob_worker import checkpoint
from videojob_worker.blocks import BlockState, Snapshot
from videojob_worker.checkpoint import Checkpoint, InvalidCheckpointError

IDENTITY = {"specDigest": "d" * 64, "model": "m", "grid": [3, 5]}


def state(block: int, steps_done: int) -> BlockState:
    generator = torch.Generator().manual_seed(block)
    one, two, three, four = torch.randn((4, 1, 2, 4, 3, 5), generator=generator)
    one[0, 0, 0, 0, :2] = torch.tensor([-0.0, 1e-42])
    scheduler = {
        "model_outputs": [None, two] if steps_done == 1 else [two, three],
        "last_sample": four,
        "lower_order_nums": steps_done,
        "this_order": 1,
        "_step_index": steps_done,
        "_begin_index": 0,
    }
    return BlockState(block, steps_done, one, scheduler if steps_done < 3 else {})


CHECKPOINT = Checkpoint(Snapshot(4, (state(1, 3), state(2, 2), state(3, 1))), attempt=2, clean=("a" * 64, "b" * 64))


@pytest.fixture(scope="module")
def body(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("checkpoint") / "file"
    checkpoint.save(CHECKPOINT, IDENTITY, file)
    return file.read_bytes()


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, list):
        return isinstance(other, list) and all(map(same, one, other)) and len(one) == len(other)
    return one == other


def test_what_was_saved_comes_back_bit_for_bit(body):
    found = checkpoint.load(body, IDENTITY)
    assert (found.snapshot.sweep, found.attempt, found.clean) == (4, 2, CHECKPOINT.clean)
    for one, other in zip(found.snapshot.blocks, CHECKPOINT.snapshot.blocks, strict=True):
        assert (one.block, one.steps_done) == (other.block, other.steps_done)
        assert same(one.latents, other.latents)
        assert one.scheduler.keys() == other.scheduler.keys()
        assert all(same(value, other.scheduler[name]) for name, value in one.scheduler.items())


def test_the_same_state_gives_the_same_document_and_digest(body, tmp_path):
    checkpoint.save(checkpoint.load(body, IDENTITY), IDENTITY, tmp_path / "again")
    again = (tmp_path / "again").read_bytes()
    assert checkpoint._metadata(again) == checkpoint._metadata(body), "safetensors orders the two by chance"


def test_a_file_that_was_cut_anywhere_is_refused(body):
    for length in [*range(0, len(body), 1024), *range(20), len(body) - 1]:
        with pytest.raises(InvalidCheckpointError, match="damaged"):
            checkpoint.load(body[:length], IDENTITY)


def test_a_file_with_a_flipped_bit_anywhere_is_refused_or_means_the_same(body):
    refused = 0
    for at in range(len(body)):
        flipped = bytearray(body)
        flipped[at] ^= 1 << at % 8
        try:
            found = checkpoint.load(bytes(flipped), IDENTITY)
        except InvalidCheckpointError:
            refused += 1
        else:  # a blank between two words became another one
            assert found.clean == CHECKPOINT.clean
            assert same(found.snapshot.blocks[2].latents, CHECKPOINT.snapshot.blocks[2].latents)
    assert refused > len(body) - 16


@pytest.mark.parametrize("field", IDENTITY)
def test_a_checkpoint_of_something_else_is_refused_with_what_differs(body, field):
    with pytest.raises(InvalidCheckpointError, match=f"something else: {field} differ"):
        checkpoint.load(body, {**IDENTITY, field: "other"})


def test_a_checkpoint_of_another_format_is_refused(monkeypatch, body):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(InvalidCheckpointError, match="its format is 1, and this program reads 2"):
        checkpoint.load(body, IDENTITY)


@pytest.mark.parametrize("strange", [b"", b"#EXTM3U", b"\xff" * 4096, (2).to_bytes(8, "little") + b"{}"])
def test_a_file_of_another_program_is_refused(strange):
    with pytest.raises(InvalidCheckpointError, match="header cannot be read"):
        checkpoint.load(strange, IDENTITY)


def test_latents_come_back_bit_for_bit_or_are_refused():
    latents = torch.randn((1, 16, 4, 3, 5))
    body = checkpoint.save_latents(latents)
    digest = hashlib.sha256(body).hexdigest()
    assert torch.equal(checkpoint.load_latents(body, digest), latents)
    with pytest.raises(InvalidCheckpointError, match="damaged"):
        checkpoint.load_latents(body[:-1], digest)


def test_the_identity_is_what_determines_the_latents():
    def of(dtype="float32", **spec) -> str:
        document = {
            "apiVersion": "videojob.dev/v1alpha1",
            "kind": "VideoJob",
            "metadata": {"name": "fox"},
            "spec": {
                "prompt": "a fox",
                "video": {"frames": 81},
                "model": {"source": {"localPath": "/m"}},
                "sampling": {"steps": 50},
                "output": {"s3": {"bucket": "videos"}},
                **spec,
            },
        }
        spec = validation.read(document).spec
        return json.dumps(checkpoint.identity(spec, model="m", dtype=dtype, grid=(60, 104)))

    assert of() == of(nodes=2) == of(checkpoint={"everySeconds": 5})
    assert len({of(), of(dtype="bfloat16"), of(prompt="a hare"), of(sampling={"steps": 20})}) == 4
