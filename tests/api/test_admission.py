"""What a real API server makes of VideoJobs: it must judge as the local validator does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_cases import ACCEPTED, AS_SCENES, IMMUTABLE, MUTABLE, REFUSED, document
from testcluster.access import Access, KubectlError
from testcluster.process import until
from videojob_api import validation

pytestmark = pytest.mark.cluster

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
CRD = MANIFESTS / "crd.yaml"
SETTLED_S = 30.0


class Server:
    """The API server with the resource installed, seen from one namespace."""

    def __init__(self, cluster: Access, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._cluster.kubectl(*arguments, f"--namespace={self._namespace}", stdin=stdin)

    def apply(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Apply it and give the object back as the server holds it."""
        return self._send("apply", manifest)

    def try_out(self, manifest: dict[str, Any], validate: str = "strict") -> dict[str, Any]:
        """What would be stored. `create` sends the manifest as it is, where `apply` drops nulls first."""
        return self._send("create", manifest, "--dry-run=server", f"--validate={validate}")

    def _send(self, verb: str, manifest: dict[str, Any], *arguments: str) -> dict[str, Any]:
        text = yaml.safe_dump(manifest)  # as users write it: dates are dates
        stored: dict[str, Any] = json.loads(self.kubectl(verb, "--filename=-", "--output=json", *arguments, stdin=text))
        return stored

    def get(self, name: str) -> dict[str, Any]:
        stored: dict[str, Any] = json.loads(self.kubectl("get", "videojob", name, "--output=json"))
        return stored

    def patch_status(self, name: str, patch: dict[str, Any]) -> None:
        self.kubectl("patch", "videojob", name, "--subresource=status", "--type=merge", f"--patch={json.dumps(patch)}")


@pytest.fixture(scope="module")
def installed(cluster: Access) -> Access:
    cluster.kubectl("apply", "--server-side", f"--filename={CRD}")
    cluster.kubectl("wait", "--for=condition=Established", f"--filename={CRD}", f"--timeout={SETTLED_S}s")
    until(lambda: cluster.kubectl("get", "videojobs", "--output=json", check=False), "the resource", SETTLED_S)
    return cluster


@pytest.fixture(scope="module")
def server(installed: Access) -> Iterator[Server]:
    """One namespace for all tests of this file; each gives its VideoJob a name of its own."""
    with installed.namespace() as name:
        yield Server(installed, name)


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return itertools.count(1)


@pytest.fixture
def name(numbers: Iterator[int]) -> str:
    """A name that no other test gives."""
    return f"fox-{next(numbers)}"


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_what_is_accepted_is_stored_with_the_defaults_that_are_known_here(server, case):
    manifest = document(case.changes)
    assert server.try_out(manifest)["spec"] == validation.read(manifest).document()["spec"]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_refused_here_is_refused_there_by_the_same_path(server, case):
    with pytest.raises(KubectlError) as refused:
        server.try_out(document(case.changes))
    assert case.field in str(refused.value)


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("samples/*.yaml")), ids=lambda path: path.name)
def test_a_sample_is_stored_as_it_is_read_here(server, path):
    manifest = yaml.safe_load(path.read_text())
    assert server.try_out(manifest)["spec"] == validation.read(manifest).document()["spec"]


@pytest.mark.parametrize("update", IMMUTABLE, ids=str)
def test_a_field_that_a_render_depends_on_cannot_change(server, name, update):
    server.apply(document({"metadata.name": name, **update.before}))
    with pytest.raises(KubectlError, match=f"spec.{update.field}: .*{update.field} is immutable"):
        server.apply(document({"metadata.name": name, **update.before, **update.changes}))


@pytest.mark.parametrize("update", MUTABLE, ids=str)
def test_the_machines_may_change(server, name, update):
    before = server.apply(document({"metadata.name": name, **update.before}))
    after = server.apply(document({"metadata.name": name, **update.before, **update.changes}))
    assert before["spec"].get(update.field) != after["spec"][update.field]
    assert after["metadata"]["generation"] == 2


def test_an_unknown_field_that_a_user_insists_on_is_dropped(server):
    stored = server.try_out(document({"spec.steps": 5}), validate="ignore")
    assert "steps" not in stored["spec"]


def test_a_status_can_only_be_written_through_its_subresource(server, name):
    server.apply(document({"metadata.name": name}))
    server.kubectl("patch", "videojob", name, "--type=merge", '--patch={"status": {"phase": "Rendering"}}')
    assert "status" not in server.get(name)
    server.patch_status(name, {"status": {"phase": "Rendering"}})
    assert server.get(name)["status"]["phase"] == "Rendering"


def test_the_status_subresource_leaves_the_spec_alone(server, name):
    before = server.apply(document({"metadata.name": name}))
    server.patch_status(name, {"spec": {"nodes": 5, "prompt": "A hare"}, "status": {"attempt": 1}})
    after = server.get(name)
    assert after["spec"] == before["spec"]
    assert after["metadata"]["generation"] == 1


def test_a_phase_that_there_is_not_is_refused(server, name):
    server.apply(document({"metadata.name": name}))
    with pytest.raises(KubectlError, match=r"status\.phase: Unsupported value"):
        server.patch_status(name, {"status": {"phase": "Sleeping"}})


def test_the_short_name_lists_the_agreed_columns(server, name):
    server.apply(document({"metadata.name": name}))
    progress = {"percent": 40, "summary": "40% (2/5)", "eta": "12m"}
    counts = {"blocksDone": 2, "blocksTotal": 5, "framesReady": 0, "framesTotal": 81, "segments": 0, "ready": "0:00"}
    server.patch_status(name, {"status": {"phase": "Rendering", "attempt": 2, "progress": progress | counts}})
    head, row = server.kubectl("get", "vj", name).splitlines()
    assert head.split() == ["NAME", "PHASE", "PROGRESS", "ETA", "ATTEMPT", "AGE"]
    assert row.split()[:-1] == [name, "Rendering", "40%", "(2/5)", "12m", "2"]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("videojob", "One long, continuous video"),
        ("videojob.spec.dualParallel", "Latent frames in a block"),
        ("vj.spec.scenes.prompt", "What the scene shows"),
        ("videojob.status.phase", "One word for the column"),
    ],
)
def test_kubectl_explains(server, field, told):
    def explained() -> str:
        text = server.kubectl("explain", field)
        return text if "DESCRIPTION" in text else ""

    text = until(explained, f"the explanation of {field}", SETTLED_S)
    assert told in " ".join(text.split())


def test_scenes_are_kept_in_their_order(server, name):
    stored = server.apply(document({"metadata.name": name, **AS_SCENES}))
    assert [scene["prompt"] for scene in stored["spec"]["scenes"]] == ["A fox", "A hare"]
