"""`videojob render` as a user runs it: real torchrun ranks, real files, looked at with ffprobe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

import oracle
from videojob_api import plan as plans
from videojob_api import validation

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"
VIDEOJOB = Path(sys.executable).with_name("videojob")
AWKWARD = "\"double\" 'single' `tick` $(touch pwned) ${HOME} %s \\n\nnew line\ttab 🦊 &lt; <b>;|&" * 120  # > 10,000


@dataclass(frozen=True)
class Kind:
    """What a render takes where the manifest is silent, and how the model is cut."""

    guidance: tuple[float, ...]
    flow_shift: float
    transformers: tuple[str, ...] = ("transformer",)
    boundary: float = 0.0
    latent_pixels: int = 8
    channels: int = 16


KINDS = {
    "wan2.1": Kind((5.0,), 3.0),
    "wan2.2-a14b": Kind((4.0, 3.0), 12.0, ("transformer", "transformer_2"), boundary=875.0),
    "wan2.2-ti2v-5b": Kind((5.0,), 5.0, latent_pixels=16, channels=48),
}


@dataclass
class Job:
    folder: Path
    model: Path
    document: dict
    kind: str = "wan2.1"

    @property
    def spec(self):
        return validation.read(self.document).spec

    def start(self, *options: str, **environment: str) -> subprocess.Popen:
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(self.document, allow_unicode=True))
        command = [VIDEOJOB, "render", path, "--model", self.model, "--work-dir", self.folder / "work", *options]
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def render(self, *options: str, **environment: str) -> tuple[int, str]:
        with self.start(*options, **environment) as child:
            out, err = child.communicate()
        return child.returncode, out + err

    @property
    def log(self) -> str:
        path = self.folder / "work" / self.document["metadata"]["name"] / "render.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def job(tiny_model, tmp_path):
    document = yaml.safe_load((SAMPLES / "00-local.yaml").read_text())
    spec = document["spec"]
    spec["prompt"] = AWKWARD[:10_000]
    spec["video"] = {"frames": 90, "width": 64, "height": 48}
    spec["sampling"] = {"steps": 4, "seed": 11}
    spec["dualParallel"] = {"blockLatents": 4, "contextLatents": 3}
    return Job(tmp_path, tiny_model, document)


def frames(path: Path) -> int:
    command = ["ffprobe", "-v", "error", "-count_frames", "-select_streams", "v", "-of", "json", "-show_streams"]
    done = subprocess.run([*command, path], capture_output=True, text=True, check=True)
    assert done.stderr == "", "every frame decodes"
    return int(json.loads(done.stdout)["streams"][0]["nb_read_frames"])


def expected(job: Job) -> torch.Tensor:
    spec, kind = job.spec, KINDS[job.kind]
    plan = plans.plan(spec)
    scheduler = UniPCMultistepScheduler.from_pretrained(job.model / "scheduler", flow_shift=kind.flow_shift)
    scheduler.set_timesteps(plan.steps)
    encoder = WanPipeline.from_pretrained(job.model, transformer=None, transformer_2=None, vae=None)
    with torch.inference_mode():
        positive, negative = encoder.encode_prompt(spec.prompt, spec.negative_prompt, max_sequence_length=512)
    problem = oracle.Problem(
        blocks=plan.blocks,
        size=plan.block_latents,
        context=plan.context_latents,
        steps=plan.steps,
        seed=spec.sampling.seed,
        guidance=kind.guidance,
        grid=(spec.video.height // kind.latent_pixels, spec.video.width // kind.latent_pixels),
        boundary=kind.boundary,
    )
    experts = [WanTransformer3DModel.from_pretrained(job.model / name).eval() for name in kind.transformers]
    latents = oracle.render(experts, scheduler, [positive] * plan.blocks, negative, problem)
    return latents[:, :, : plan.latents]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_torchrun_ranks_render_the_oracles_latents_bit_for_bit(job, ranks):
    code, said = job.render("--cpu-ranks", ranks, "--output-dir", "out", "--dump-latents", "latents.safetensors")
    assert code == 0, said + job.log
    latents = load_file(job.folder / "latents.safetensors")["latents"]
    assert latents.dtype == torch.float32
    assert latents.shape == (1, 16, 24, 6, 8)
    assert torch.equal(latents, expected(job))
    assert frames(job.folder / "out" / "video.mp4") == 90
    assert frames(job.folder / "out" / "index.m3u8") == 90
    assert str(job.folder / "out" / "video.mp4") in said
    assert not (job.folder / "pwned").exists()


@pytest.mark.parametrize("kind", ["wan2.2-a14b", "wan2.2-ti2v-5b"])
def test_the_models_of_wan22_render_the_oracles_latents_bit_for_bit(job, tiny_models, kind):
    job.kind, job.model = kind, tiny_models(kind)
    job.document["spec"]["video"] = {"frames": 90, "width": 96, "height": 64}
    job.document["spec"]["sampling"] = {"steps": 6, "seed": 11}
    code, said = job.render("--cpu-ranks", 3, "--output-dir", "out", "--dump-latents", "latents.safetensors")
    assert code == 0, said + job.log
    latents = load_file(job.folder / "latents.safetensors")["latents"]
    edge = KINDS[kind].latent_pixels
    assert latents.shape == (1, KINDS[kind].channels, 24, 64 // edge, 96 // edge)
    assert torch.equal(latents, expected(job))
    assert frames(job.folder / "out" / "video.mp4") == 90
    assert frames(job.folder / "out" / "index.m3u8") == 90


def test_scenes_render_one_after_another(job):
    spec = job.document["spec"]
    del spec["prompt"], spec["video"]["frames"]
    spec["scenes"] = [{"prompt": "a fox", "frames": 37}, {"prompt": 'a "boat" $(x)', "frames": 24}]
    code, said = job.render("--cpu-ranks", 2, "--output-dir", "out")
    assert code == 0, said + job.log
    assert frames(job.folder / "out" / "video.mp4") == 61


def test_a_missing_model_is_named_with_the_remedy(job):
    job.model = job.folder / "absent"
    code, said = job.render("--cpu-ranks", 1, "--output-dir", "out")
    assert code == 1
    assert "ModelNotFound" in said
    assert "videojob tiny-model" in said


def test_gpus_that_are_not_there_are_named_with_the_remedy(job):
    job.document["spec"] |= {"gpusPerNode": 2}
    del job.document["spec"]["ranksPerNode"]
    code, said = job.render("--output-dir", "out", CUDA_VISIBLE_DEVICES="")
    assert code == 1
    assert "InvalidSpec" in said
    assert "spec.gpusPerNode" in said


def test_more_ranks_than_layers_are_refused(job):
    code, said = job.render("--cpu-ranks", 9, "--output-dir", "out")
    assert code == 1
    assert "8 layers" in said


def until(condition, child: subprocess.Popen, patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert child.poll() is None, "the render ended too early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def worker_pids(child: subprocess.Popen) -> list[int]:
    """The ranks: grandchildren that torchrun started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    torchrun = {pid for pid, parent, _ in rows if parent == str(child.pid)}
    return [int(pid) for pid, parent, arguments in rows if parent in torchrun and "videojob_worker" in arguments]


@pytest.fixture
def long(job):
    job.document["spec"]["video"] = {"frames": 3000, "width": 64, "height": 48}
    return job


def test_a_killed_rank_ends_the_render_with_its_reason_and_leaves_a_playable_playlist(long):
    with long.start("--cpu-ranks", "3", "--output-dir", "out") as child:
        until(lambda: (long.folder / "out" / "segments" / "00001.m4s").exists(), child)
        os.kill(worker_pids(child)[-1], signal.SIGKILL)
        _, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "RankKilled: rank 2 was killed by SIGKILL" in err
    playlist = (long.folder / "out" / "index.m3u8").read_text()
    assert "#EXT-X-ENDLIST" not in playlist
    for line in playlist.splitlines():
        assert line.startswith("#") or not line or (long.folder / "out" / line).exists()


def test_an_interrupt_ends_all_ranks(long):
    with long.start("--cpu-ranks", "2", "--output-dir", "out") as child:
        until(lambda: (long.folder / "out" / "index.m3u8").exists(), child)
        ranks = worker_pids(child)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=120)
    assert len(ranks) == 2
    assert child.returncode != 0
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
