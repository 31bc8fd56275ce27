"""The resource definition that users install."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from videojob_api import crd, names

FILE = Path(__file__).resolve().parents[2] / "manifests/crd.yaml"


@pytest.fixture(scope="module")
def version() -> dict[str, Any]:
    (only,) = yaml.safe_load(FILE.read_text())["spec"]["versions"]
    return only


@pytest.fixture(scope="module")
def root(version) -> dict[str, Any]:
    return version["schema"]["openAPIV3Schema"]


def schemas(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside, with the path of its field."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from schemas(inner, f"{path}.{name}")
    if "items" in schema:
        yield from schemas(schema["items"], f"{path}[]")


def test_the_file_is_what_the_models_generate():
    assert FILE.read_text() == crd.text(), "manifests/crd.yaml is stale: make generate"


def test_the_resource_has_the_agreed_names():
    definition = yaml.safe_load(FILE.read_text())
    assert definition["metadata"]["name"] == "videojobs.videojob.dev"
    assert definition["spec"]["names"] == {
        "kind": "VideoJob",
        "listKind": "VideoJobList",
        "plural": "videojobs",
        "singular": "videojob",
        "shortNames": ["vj"],
    }
    assert definition["spec"]["scope"] == "Namespaced"


def test_there_is_one_version_served_and_stored(version):
    assert (version["name"], version["served"], version["storage"]) == (names.VERSION, True, True)


def test_the_status_is_a_subresource(version):
    assert version["subresources"] == {"status": {}}


def test_kubectl_get_shows_these_columns_and_wide_these_more(version):
    columns = version["additionalPrinterColumns"]
    shown = [column["name"] for column in columns if column.get("priority", 0) == 0]
    assert shown == ["Phase", "Progress", "ETA", "Attempt", "Age"]
    assert [column["name"] for column in columns if column.get("priority", 0) > 0] == ["Ready", "Playlist"]


def test_every_column_shows_a_field_that_there_is(version, root):
    paths = {path for path, _ in schemas(root)}
    shown = {column["jsonPath"] for column in version["additionalPrinterColumns"]}
    assert shown - {".metadata.creationTimestamp"} <= paths


def test_the_schema_is_structural(root):
    for path, schema in schemas(root):
        foreign = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title", "examples", "prefixItems"} & set(
            schema
        )
        assert not foreign, path
        assert isinstance(schema.get("type"), str), path


def test_every_number_is_bounded_as_openapi_3_0_does(root):
    for path, schema in schemas(root):
        bounds = (schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum"))
        assert all(bound in (None, True) for bound in bounds), path


def test_every_field_of_the_spec_is_described(root):
    silent = [
        f"{path}.{name}"
        for path, schema in schemas(root["properties"]["spec"])
        for name, inner in schema.get("properties", {}).items()
        if not inner.get("description")
    ]
    assert silent == []


def test_no_default_holds_a_null(root):
    for path, schema in schemas(root):
        assert None not in [schema.get("default", 0), *dict(as_mapping(schema.get("default"))).values()], path


def as_mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def test_every_string_and_list_of_the_spec_is_bounded_so_that_rules_stay_cheap(root):
    for path, schema in schemas(root["properties"]["spec"]):
        if schema["type"] == "string":
            assert {"maxLength", "enum"} & set(schema) or schema.get("pattern", "").endswith("{40}$"), path
        if schema["type"] == "array":
            assert "maxItems" in schema, path


def test_what_a_user_must_give_is_a_model_and_an_output(root):
    assert root["required"] == ["spec"]
    assert root["properties"]["spec"]["required"] == ["model", "output"]


def test_conditions_are_merged_by_their_type(root):
    conditions = root["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]
