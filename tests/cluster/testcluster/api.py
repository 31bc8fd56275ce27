"""The few calls to the API server that booting needs, over plain HTTP, long before anything else is ready.

Tests use kubectl or a client library instead; knows nothing of who runs the server.
"""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Api:
    """The API server at ``https://ADDRESS``, called with a bearer token."""

    address: str
    authority: Path
    token: str

    def text(self, path: str) -> str | None:
        """What a GET answers, or None where there is no good answer (yet)."""
        try:
            return self._call("GET", path)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return None

    def get(self, path: str) -> dict[str, Any] | None:
        """The object at ``path``, or None where there is none (yet)."""
        text = self.text(path)
        return json.loads(text) if text else None

    def patch(self, path: str, operations: list[dict[str, Any]]) -> None:
        """Apply a JSON patch.

        Raises:
            urllib.error.HTTPError: the server refused it.
        """
        self._call("PATCH", path, json.dumps(operations).encode())

    def kubeconfig(self) -> str:
        """A self-contained kubeconfig with these credentials (JSON, which is YAML)."""
        authority = base64.b64encode(self.authority.read_bytes()).decode()
        cluster = {"server": f"https://{self.address}", "certificate-authority-data": authority}
        context = {"cluster": "test", "user": "test", "namespace": "default"}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": context}],
            "current-context": "test",
        }
        return json.dumps(document, indent=2)

    def _call(self, method: str, path: str, body: bytes | None = None) -> str:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json-patch+json"}
        request = urllib.request.Request(f"https://{self.address}{path}", body, headers, method=method)
        trusted = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(self.authority)))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), trusted)
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            text: str = answer.read().decode()
        return text
