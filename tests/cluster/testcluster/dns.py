"""CoreDNS on the service address that pods are told: names of services and pods, and nothing of the outside.

Knows how to ask the API server, not who runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from testcluster.network import DNS_SERVICE_IP, Network
from testcluster.process import Daemon
from testcluster.sandbox import Sandbox
from testcluster.state import State

DOMAIN = "cluster.local"
COREFILE = """\
{domain} in-addr.arpa {{
    bind {address}
    errors
    ready {ready}:8181
    kubernetes {domain} in-addr.arpa {{
        kubeconfig {kubeconfig} test
        pods insecure
        ttl 1
    }}
}}
. {{
    bind {address}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


def start(state: State, network: Network, sandbox: Sandbox, binaries: Mapping[str, Path]) -> Daemon:
    """Start CoreDNS as the administrator; it waits for the API server itself."""
    file = state.folder / "Corefile"
    file.write_text(
        COREFILE.format(domain=DOMAIN, address=DNS_SERVICE_IP, ready=network.api_ip, kubeconfig=state.kubeconfig)
    )
    return sandbox.start("coredns", [str(binaries["coredns"]), f"-conf={file}"], state.logs / "coredns.log")
