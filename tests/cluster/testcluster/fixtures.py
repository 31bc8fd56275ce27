"""Hands clusters and object stores to tests: ``pytest_plugins = ["testcluster.fixtures"]`` in the root conftest.

With ``KUBECONFIG`` set, tests run against that cluster; otherwise one is booted for the whole session.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from testcluster.access import ExistingCluster, UnsupportedError
from testcluster.cluster import Cluster, existing
from testcluster.s3 import S3Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that needs a cluster, so that ``-m "not cluster"`` leaves them out."""
    for item in items:
        if isinstance(item, pytest.Function) and "cluster" in item.fixturenames:
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster | ExistingCluster]:
    """The session's cluster: the one that ``KUBECONFIG`` names, else one of two nodes of its own."""
    if os.environ.get("KUBECONFIG"):
        yield existing(dict(os.environ))
        return
    capture = request.config.pluginmanager.getplugin("capturemanager")
    reporter = request.config.pluginmanager.getplugin("terminalreporter")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line(f"cluster: {line}")

    with Cluster(progress=say) as booted:
        yield booted


@pytest.fixture
def own_cluster(cluster: Cluster | ExistingCluster) -> Cluster:
    """The session's cluster where it is the test's own, whose nodes may be stopped and whose GPUs are known."""
    if not isinstance(cluster, Cluster):
        pytest.skip("needs the test's own cluster: unset KUBECONFIG")
    return cluster


@pytest.fixture
def namespace(cluster: Cluster | ExistingCluster) -> Iterator[str]:
    """A fresh namespace that admits only pods of the restricted standard; deleted afterwards."""
    with cluster.namespace() as name:
        yield name


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An object store on loopback."""
    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def cluster_s3(cluster: Cluster | ExistingCluster) -> Iterator[S3Server]:
    """An object store that this machine and all pods reach under the same address."""
    try:
        address = cluster.host_ip
    except UnsupportedError as error:
        pytest.skip(str(error))
    with S3Server(address) as server:
        yield server
