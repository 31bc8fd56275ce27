"""``python -m videojob_operator``: reads the settings and runs kopf."""

from __future__ import annotations

import logging
import sys

import kopf

from . import handlers, settings


def main() -> None:
    """Run until asked to stop."""
    try:
        config = settings.read()
    except settings.SettingsError as error:
        sys.exit(f"videojob-operator: {error}")
    kopf.configure(log_format=kopf.LogFormat[config.log_format.upper()])
    for noisy in ("httpx", "kopf.objects", "aiohttp.access"):  # a line a poll, a line an event, a line a probe
        logging.getLogger(noisy).setLevel(logging.WARNING)
    registry = kopf.OperatorRegistry()
    handlers.register(registry)
    memo = kopf.Memo(settings=config)
    kopf.run(
        registry=registry,
        memo=memo,
        standalone=True,
        clusterwide=not config.namespaces,
        namespaces=config.namespaces,
        liveness_endpoint=f"http://0.0.0.0:{config.port}/healthz",
    )


if __name__ == "__main__":
    main()
