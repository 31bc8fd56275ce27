"""The cluster's own network: one bridge that carries nodes, pods and services, and one link to this machine.

The bridge lies in the cluster's network namespace, which has no way out: traffic stays on it, on loopback and on the
link. No firewall rule is written and no forwarding switched on. The first service addresses lie on the bridge itself,
where the API server and the DNS server listen; there is no kube-proxy, so further services must be headless.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from testcluster.sandbox import Sandbox

CANDIDATES = tuple(ipaddress.IPv4Network("10.213.0.0/16").subnets(new_prefix=20))
SERVICES = ipaddress.IPv4Network("10.96.0.0/24")
API_SERVICE_IP = str(SERVICES[1])
DNS_SERVICE_IP = str(SERVICES[10])
BRIDGE = "cluster0"
BRIDGE_MAC = "02:76:6a:00:00:01"  # fixed: a bridge without one changes it as ports come and go
UPLINK = "uplink"
MAX_NODES = 14


class NetworkError(RuntimeError):
    """No free subnet, or the kernel refused a link; the message holds the remedy."""


@dataclass(frozen=True)
class Network:
    """Addresses of one cluster: .0.1 is this machine, .0.2 the API, .0.10 and on the nodes, .1.2 and on their pods."""

    subnet: ipaddress.IPv4Network

    @property
    def host_ip(self) -> str:
        """This machine, as pods reach it."""
        return str(self.subnet[1])

    @property
    def api_ip(self) -> str:
        """The control plane, as this machine and nodes reach it."""
        return str(self.subnet[2])

    def node_ip(self, index: int) -> str:
        return str(self.subnet[10 + index])

    def pod_range(self, index: int) -> tuple[str, str]:
        """First and last address of a node's pods."""
        start = 256 * (index + 1)
        return str(self.subnet[start + 2]), str(self.subnet[start + 254])

    def cni(self, index: int, data_folder: str) -> str:
        """The CNI configuration of a node."""
        first, last = self.pod_range(index)
        addresses = {"subnet": str(self.subnet), "rangeStart": first, "rangeEnd": last}
        ipam = {
            "type": "host-local",
            "dataDir": data_folder,
            "ranges": [[addresses]],
            "routes": [{"dst": str(SERVICES), "gw": self.api_ip}],
        }
        bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": False, "ipMasq": False, "ipam": ipam}
        return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}, indent=2)


def free_subnet() -> ipaddress.IPv4Network:
    """A subnet that no route or address of this machine touches.

    Raises:
        NetworkError: all are taken.
    """
    taken = list(_networks_in_use())
    for subnet in CANDIDATES:
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise NetworkError(f"all of {CANDIDATES[0]} to {CANDIDATES[-1]} is in use: close other clusters (`ip route`)")


def connect(network: Network, sandbox: Sandbox, link: str, nodes: int) -> None:
    """Make the bridge inside the sandbox and the link from this machine to it."""
    peer = ["type", "veth", "peer", "name", UPLINK, "netns", str(sandbox.pid)]
    _ip("link", "add", link, *peer)
    _ip("address", "add", f"{network.host_ip}/{network.subnet.prefixlen}", "dev", link)
    _ip("link", "set", link, "up")
    services = [API_SERVICE_IP, DNS_SERVICE_IP]
    addresses = [f"{ip}/32" for ip in [*services, *(network.node_ip(index) for index in range(nodes))]]
    commands = [
        "link set lo up",
        f"link add name {BRIDGE} address {BRIDGE_MAC} type bridge",
        f"address add {network.api_ip}/{network.subnet.prefixlen} dev {BRIDGE}",
        *(f"address add {address} dev {BRIDGE}" for address in addresses),
        f"link set {UPLINK} master {BRIDGE}",
        f"link set {UPLINK} up",
        f"link set {BRIDGE} up",
    ]
    sandbox.run(["ip", "-batch", "-"], stdin="\n".join(commands))


def _networks_in_use() -> Iterable[ipaddress.IPv4Network]:
    routes = json.loads(_ip("-json", "-4", "route", "show", "table", "all") or "[]")
    for route in routes:
        if route["dst"] != "default":
            yield ipaddress.IPv4Network(route["dst"], strict=False)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NetworkError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout
