"""What kopf is asked to watch, and what wakes the keeper."""

from __future__ import annotations

import asyncio

import kopf
import pytest

from videojob_api import names
from videojob_operator import handlers

from .builders import NAME, NAMESPACE, document, pod


@pytest.fixture
def registry():
    registry = kopf.OperatorRegistry()
    handlers.register(registry)
    return registry


class Woken:
    """A keeper that only listens, and holds no key or every key."""

    def __init__(self, *, all_kept: bool) -> None:
        self.keys: list = []
        self._all_kept = all_kept

    def __contains__(self, key) -> bool:
        return self._all_kept

    def wake(self, key) -> None:
        self.keys.append(key)


def watching(registry, resource: str):
    return next(each for each in registry._watching.get_all_handlers() if each.selector.any_name == resource)


def heard(registry, resource: str, body, kind: str | None = "MODIFIED", *, all_kept: bool = True):
    """The keys that an event wakes."""
    memo = kopf.Memo(keeper=Woken(all_kept=all_kept))
    metadata = body["metadata"]
    handler = watching(registry, resource)
    call = handler.fn(
        namespace=metadata["namespace"],
        name=metadata["name"],
        labels=metadata.get("labels", {}),
        event={"type": kind, "object": body},
        memo=memo,
    )
    asyncio.run(call)
    return memo.keeper.keys


def test_nothing_makes_kopf_write_to_what_it_watches(registry):
    assert registry._watching.get_all_handlers()
    for kind in (registry._changing, registry._spawning, registry._indexing, registry._webhooks):
        assert kind.get_all_handlers() == [], "only event handlers leave neither annotations nor finalizers"


def test_videojobs_jobs_and_pods_are_watched(registry):
    watched = {each.selector.any_name for each in registry._watching.get_all_handlers()}
    assert watched == {names.PLURAL, "jobs", "pods"}


@pytest.mark.parametrize("resource", ["pods", "jobs"])
def test_only_our_jobs_and_pods_are_heard(registry, resource):
    labels = watching(registry, resource).labels
    assert labels[names.LABEL_MANAGED_BY] == names.MANAGED_BY
    assert labels[names.LABEL_VIDEOJOB] is kopf.PRESENT


def test_a_pod_wakes_its_videojob(registry):
    assert heard(registry, "pods", pod()) == [(NAMESPACE, NAME)]


def seen(generation: int = 1):
    return document() | {"status": {"observedGeneration": generation}}


@pytest.mark.parametrize(
    ("kind", "body", "woken"),
    [
        ("ADDED", document(), True),
        (None, seen(), True),
        ("MODIFIED", document(), True),
        ("MODIFIED", seen(generation=0), True),
        ("MODIFIED", seen(), False),
        ("DELETED", seen(), True),
    ],
    ids=["new", "listed at the start", "without a status", "a new spec", "our own patch", "deleted"],
)
def test_a_videojobs_news_wake_it(registry, kind, body, woken):
    assert heard(registry, names.PLURAL, body, kind) == ([(NAMESPACE, NAME)] if woken else [])


def test_a_videojob_that_nobody_looks_after_is_woken_by_anything(registry):
    assert heard(registry, names.PLURAL, seen(), all_kept=False) == [(NAMESPACE, NAME)]
