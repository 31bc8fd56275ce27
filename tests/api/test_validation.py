"""What is said about a document before the API server sees it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from api_cases import ACCEPTED, AS_SCENES, IMMUTABLE, REFUSED, document
from videojob_api import spec, status, validation
from videojob_api.spec import Model, Rule, VideoJob

SAMPLES = sorted((Path(__file__).resolve().parents[2] / "manifests/samples").glob("*.yaml"))


def said(wrong: object) -> dict[str, str]:
    return {problem.field: problem.message for problem in validation.problems(wrong)}


def all_rules() -> Iterator[Rule]:
    for model in (VideoJob, *(each for each in vars(spec).values() if is_model(each))):
        yield from model.__dict__.get("rules", ())


def is_model(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Model) and value is not Model


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_wrong_value_is_refused_by_its_path_with_the_remedy(case):
    assert case.remedy in said(document(case.changes))[case.field]


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_a_right_value_is_accepted(case):
    assert said(document(case.changes)) == {}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_sample_is_valid(path):
    validation.read(yaml.safe_load(path.read_text()))


def test_all_problems_are_found_at_once():
    changes = {
        "metadata.name": "Fox",
        "spec.prompt": "",
        "spec.scenes": [{"frames": 0}],
        "spec.video": {"frames": 1.5, "width": 100, "heigth": 80},
        "spec.dualParallel": {"blockLatents": 2, "contextLatents": 3},
        "spec.ranksPerNode": 2,
        "spec.model.source.localPath": None,
    }
    assert list(said(document(changes))) == [
        "spec.prompt",
        "spec.scenes[0].prompt",
        "spec.scenes[0].frames",
        "spec.video.frames",
        "spec.video.width",
        "spec.video.heigth",
        "metadata.name",
        "spec.ranksPerNode",
        "spec.model.source",
        "spec.dualParallel.contextLatents",
    ]


def test_the_error_holds_every_problem_in_a_line_of_its_own():
    with pytest.raises(validation.InvalidVideoJobError) as caught:
        validation.read(document({"spec.nodes": 0, "spec.steps": 5}))
    lines = str(caught.value).splitlines()
    assert lines == [str(problem) for problem in caught.value.problems]
    assert [line.split(":")[0] for line in lines] == ["spec.nodes", "spec.steps"]


def test_a_field_of_a_wrong_type_is_named_once():
    assert list(said(document({"spec.prompt": 5, "spec.scenes": AS_SCENES["spec.scenes"]}))) == [
        "spec.prompt",
        "spec.video.frames",
    ]


@pytest.mark.parametrize("rule", [rule for rule in all_rules() if "oldSelf" not in rule.cel], ids=lambda rule: rule.cel)
def test_every_rule_has_a_case_that_breaks_it(rule):
    assert any(rule.message in said(document(case.changes)).values() for case in REFUSED)


def test_every_rule_about_changes_has_an_update_that_breaks_it():
    ruled = {rule.field.removeprefix(".") for rule in all_rules() if "oldSelf" in rule.cel}
    assert ruled == {update.field for update in IMMUTABLE}


def test_every_field_of_the_spec_is_immutable_but_those_about_machines():
    fields = {info.alias for info in spec.Spec.model_fields.values()}
    machines = {"checkpoint", "nodes", "gpusPerNode", "ranksPerNode", "resources"}
    assert {update.field for update in IMMUTABLE} == fields - machines


@pytest.mark.parametrize("update", IMMUTABLE, ids=str)
def test_a_change_of_an_immutable_field_passes_where_no_past_is_known(update):
    assert said(document({**update.before, **update.changes})) == {}


@pytest.mark.parametrize("wrong", [None, "kind: VideoJob", 5, [document()]], ids=repr)
def test_what_is_no_mapping_is_called_so(wrong):
    assert "must be a mapping with apiVersion, kind, metadata and spec" in said(wrong)["(document)"]


@pytest.mark.parametrize(
    ("path", "value", "remedy"),
    [
        ("kind", "Job", "'VideoJob', not 'Job'"),
        ("apiVersion", "videojob.dev/v1", "'videojob.dev/v1alpha1', not 'videojob.dev/v1'"),
        ("metadata", None, "required: add it"),
        ("metadata", {}, "required: add it"),
        ("metadata", "fox", "object, not 'fox'"),
        ("spec.sampling.guidanceScale", float("nan"), "not nan"),
        ("spec.sampling.guidanceScale", float("inf"), "less than or equal to 100, not inf"),
        ("spec.prompt", {"A fox", 5}, "valid string"),
        ("spec.options", {datetime.date(2024, 1, 31): 1}, "unknown field"),
        ("spec.options", {(1, 2): 1}, "unknown field"),
    ],
)
def test_what_no_server_is_ever_sent_is_refused_too(path, value, remedy):
    ((field, message),) = said(document({path: value})).items()
    assert field.startswith(path)
    assert remedy in message


@pytest.mark.parametrize("field", ["apiVersion", "kind"])
def test_a_document_that_kubectl_could_not_place_is_refused(field):
    unplaced = document()
    del unplaced[field]
    assert said(unplaced) == {field: "required: add it"}


def test_a_long_value_is_cut_in_the_message():
    message = said(document({"spec.output.s3.bucket": "B" * 500}))["spec.output.s3.bucket"]
    assert len(message) < 120


def test_the_object_that_the_server_stores_is_read_whatever_its_status_and_metadata():
    metadata = {"name": "fox", "namespace": "films", "uid": "u-1", "generation": 3, "managedFields": [{"manager": "x"}]}
    videojob = validation.read(document({"metadata": metadata, "status": {"phase": "Rendering"}}))
    assert (videojob.metadata.namespace, videojob.metadata.uid, videojob.metadata.generation) == ("films", "u-1", 3)


def test_an_emoji_escaped_as_json_does_is_read_by_a_yaml_parser():
    parsed = yaml.safe_load(json.dumps(document({"spec.prompt": "A 🦊"})))
    assert validation.read(parsed).spec.prompt == "A 🦊"


def test_half_a_character_is_replaced_as_the_server_does():
    assert validation.read(document({"spec.prompt": "A \ud83d fox"})).spec.prompt == "A \ufffd fox"


def test_the_document_given_is_left_as_it_was():
    given = document({"spec.sampling": None, "status": {"phase": "Pending"}})
    validation.read(given)
    assert given == document({"spec.sampling": None, "status": {"phase": "Pending"}})


def test_the_models_of_the_status_carry_no_rules():
    models = [each for each in vars(status).values() if isinstance(each, type) and issubclass(each, BaseModel)]
    assert not any(getattr(model, "rules", ()) for model in models)
