"""Where things lie and what importing them brings along."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("operator", "worker")
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(*sys.modules, sep="\\n")
"""


def imported_with(package: str) -> set[str]:
    """Top-level names that a fresh interpreter holds after it has imported all of a package."""
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALL, package]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folders_of_the_packages_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists(), "it would shadow the standard library's module, or lie twice"


def test_the_standard_librarys_operator_wins_even_inside_the_repository():
    done = subprocess.run(
        [sys.executable, "-c", "import operator; print(operator.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert not done.stdout.startswith(str(ROOT / "operator"))


def test_the_api_brings_along_neither_side_nor_any_client():
    foreign = {"torch", "diffusers", "transformers", "kopf", "kubernetes", "boto3", "httpx"}
    assert not imported_with("videojob_api") & (foreign | {"videojob_operator", "videojob_worker"})


def test_the_operator_brings_along_no_torch_and_no_worker():
    foreign = {"torch", "diffusers", "transformers", "boto3", "av"}
    assert not imported_with("videojob_operator") & (foreign | {"videojob_worker"})


def test_no_folder_or_helper_of_the_tests_is_named_like_a_package(pytestconfig):
    taken = sys.stdlib_module_names | packages_distributions().keys()
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"]
    helpers = [
        path
        for folder in pytestconfig.getini("pythonpath")
        for path in Path(folder).iterdir()
        if path.name != "__pycache__"
    ]
    assert {path.stem for path in (*folders, *helpers)} & taken == set()


def test_every_helper_of_the_tests_has_a_name_of_its_own(pytestconfig):
    names = [path.stem for folder in pytestconfig.getini("pythonpath") for path in Path(folder).glob("*.py")]
    helpers = sorted(name for name in names if not name.startswith("test_") and name != "conftest")
    assert helpers == sorted(set(helpers))
