"""The command line: what it refuses and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from videojob_worker import cli, manifest, models

SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"


@pytest.fixture
def run():
    return lambda *arguments, stdin=None: CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)


@pytest.fixture
def write_manifest(tmp_path):
    document = yaml.safe_load((SAMPLES / "00-local.yaml").read_text())
    path = tmp_path / "job.yaml"

    def write(**spec):
        path.write_text(yaml.safe_dump({**document, "spec": {**document["spec"], **spec}}))
        return path

    return write


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_sample_is_valid_and_summed_up(run, sample):
    result = run("validate", sample)
    assert result.exit_code == 0
    assert "blocks" in result.stdout


def test_all_problems_are_printed_at_once(run, write_manifest):
    path = write_manifest(
        scenes=[{"prompt": "", "frames": 0}],
        video={"frames": 1.5, "width": 100, "heigth": 80},
        dualParallel={"blockLatents": 2, "contextLatents": 3},
        ranksPerNode=2,
        gpusPerNode=8,
    )
    result = run("validate", path)
    assert result.exit_code == 1
    for field in (
        "spec.prompt",
        "spec.scenes[0].prompt",
        "spec.scenes[0].frames",
        "spec.video.frames",
        "spec.video.width",
        "spec.video.heigth: unknown field",
        "spec.dualParallel.contextLatents",
        "spec.ranksPerNode",
    ):
        assert field in result.stderr


def test_a_manifest_may_come_from_standard_input(run):
    assert run("validate", "-", stdin=(SAMPLES / "01-minimal.yaml").read_text()).exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is no YAML"), ("", "must be a mapping"), ("- 1", "must be a mapping"), ("kind: Pod", "kind")],
)
def test_what_is_no_videojob_is_called_so(run, text, message):
    result = run("validate", "-", stdin=text)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_missing_file_is_named(run, tmp_path):
    result = run("validate", tmp_path / "absent.yaml")
    assert result.exit_code == 1
    assert "absent.yaml cannot be read: No such file" in result.stderr


def test_without_an_s3_server_the_ways_out_are_named(run, write_manifest, monkeypatch, tmp_path):
    monkeypatch.delenv("VIDEOJOB_S3_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("render", write_manifest(), "--work-dir", tmp_path)
    assert result.exit_code == 1
    assert "--s3-endpoint" in result.stderr
    assert "--output-dir" in result.stderr


def test_a_claim_needs_a_folder_on_this_machine(run):
    result = run("render", SAMPLES / "02-eight-gpus.yaml")
    assert result.exit_code == 1
    assert "--model" in result.stderr


def test_a_tiny_model_has_the_layers_asked_for(run, tmp_path):
    assert run("tiny-model", tmp_path / "tiny", "--layers", 3).exit_code == 0
    assert '"num_layers": 3' in (tmp_path / "tiny" / "transformer" / "config.json").read_text()
    assert (tmp_path / "tiny" / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["wan2.2-a14b", "wan2.2-ti2v-5b"])
def test_a_tiny_model_is_of_the_kind_asked_for(run, tmp_path, kind):
    result = run("tiny-model", tmp_path / "tiny", "--layers", 1, "--kind", kind)
    assert f"a {kind} model with 1 layers" in result.stdout
    assert models.read(tmp_path / "tiny").kind == kind


def test_a_kind_that_is_none_is_refused_with_those_there_are(run, tmp_path):
    result = run("tiny-model", tmp_path / "tiny", "--kind", "wan3")
    assert result.exit_code == 2
    assert "wan2.2-ti2v-5b" in result.stderr


def test_a_summary_says_how_many_steps_or_who_knows(run, write_manifest):
    assert "8 steps each" in run("validate", write_manifest()).stdout
    assert "the model's default steps each" in run("validate", write_manifest(sampling={})).stdout


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1e3", 1000),
        ("0x10", 16),
        ("1_000", 1000),
        (".5", 0.5),
        ("1:21", "1:21"),
        ("2024-01-02", "2024-01-02"),
        ("2024-01-02T03:04:05Z", "2024-01-02T03:04:05Z"),
        ("~", None),
        ("'7'", "7"),
    ],
)
def test_yaml_is_read_as_kubectl_reads_it(text, read):
    assert manifest.load(f"value: {text}") == {"value": read}
