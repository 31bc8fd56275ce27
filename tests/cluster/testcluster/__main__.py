"""``make cluster``: boots a cluster and an object store, says how to use them, and stays until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys

from testcluster.build import BuildError
from testcluster.cgroups import CgroupError
from testcluster.cluster import Cluster
from testcluster.network import NetworkError
from testcluster.preflight import PreflightError
from testcluster.process import DaemonError
from testcluster.s3 import S3Server
from testcluster.sandbox import SandboxError

USAGE = """\
export KUBECONFIG={kubeconfig}
export VIDEOJOB_TEST_HOST_IP={host}
export AWS_ENDPOINT_URL={s3.endpoint} AWS_ACCESS_KEY_ID={s3.access_key} AWS_SECRET_ACCESS_KEY={s3.secret_key}

nodes            {nodes} (8 nvidia.com/gpu each)
worker image     {worker}
operator image   {operator}
object store     {s3.endpoint}, bucket {bucket}, files in {s3.root}
logs             {logs}

Ctrl-C ends the cluster and removes all of it.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="testcluster", description=__doc__)
    parser.add_argument("--nodes", type=int, default=2, help="how many nodes (default 2; 0 is an API server only)")
    nodes: int = parser.parse_args().nodes
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        _serve(nodes)
    except KeyboardInterrupt:
        return 0
    except (BuildError, CgroupError, DaemonError, NetworkError, PreflightError, SandboxError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _serve(nodes: int) -> None:
    with Cluster(nodes, progress=_say) as cluster, S3Server(cluster.host_ip) as s3:
        print(
            USAGE.format(
                kubeconfig=cluster.kubeconfig,
                s3=s3,
                nodes=", ".join(cluster.nodes) or "none",
                worker=cluster.worker_image,
                operator=cluster.operator_image,
                host=cluster.host_ip,
                bucket=s3.bucket("videos"),
                logs=cluster.logs,
            ),
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
        _say("ending")
    _say("nothing is left")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
