"""kopf's side: what is watched, and whom it wakes. Thin on purpose.

Only ``on.event`` handlers: they keep no state on the watched objects, so users find neither annotations nor finalizers
there. ``keeper`` and ``reconcile`` do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kopf

from videojob_api import names

from . import cluster
from .keeper import Keeper
from .reconcile import Reconciler


def register(registry: kopf.OperatorRegistry) -> None:
    """Put all handlers into a registry; they expect the ``Settings`` in ``memo.settings``."""
    ours: dict[str, Any] = {names.LABEL_MANAGED_BY: names.MANAGED_BY, names.LABEL_VIDEOJOB: kopf.PRESENT}

    @kopf.on.login(registry=registry)
    def login(settings: kopf.OperatorSettings, **_: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
        settings.posting.enabled = False  # events are reconcile's
        settings.watching.server_timeout = 270
        settings.watching.client_timeout = 300
        memo.keeper = Keeper(Reconciler(cluster.connect(memo.settings), memo.settings))

    @kopf.on.cleanup(registry=registry)
    async def stop(memo: kopf.Memo, **_: Any) -> None:
        await memo.keeper.close()

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def videojob_changed(
        namespace: str | None, name: str | None, event: kopf.RawEvent, memo: kopf.Memo, **_: Any
    ) -> None:
        if (namespace, name) not in memo.keeper or is_news(event):
            memo.keeper.wake((namespace, name))

    @kopf.on.event("batch", "v1", "jobs", labels=ours, registry=registry)
    @kopf.on.event("", "v1", "pods", labels=ours, registry=registry)
    async def part_changed(namespace: str | None, labels: kopf.Labels, memo: kopf.Memo, **_: Any) -> None:
        memo.keeper.wake((namespace, labels[names.LABEL_VIDEOJOB]))


def is_news(event: Mapping[str, Any]) -> bool:
    """Whether a VideoJob's event is more than the echo of our own status patch, which would lead to the next patch."""
    videojob = event["object"]
    seen = (videojob.get("status") or {}).get("observedGeneration")
    return bool(event["type"] != "MODIFIED" or videojob["metadata"].get("generation") != seen)
