"""An S3 server that checks signatures and honours conditional writes: versitygw over a plain folder.

Stands beside a cluster or alone, needs no root, and can be stopped and started again on its port to play an outage.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testcluster import build
from testcluster.process import Daemon, guarded, until
from videojob_worker.local import free_port

REGION = "us-east-1"
VERSITYGW = next(component for component in build.COMPONENTS if component.name == "versitygw")


class S3Server:
    """A running server: a context manager that starts it, and removes it with all objects.

    Args:
        address: where it listens: loopback, or `Cluster.host_ip` for pods to reach it.
        port: 0 for any free one.
    """

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.address = address
        self.port = port or free_port()
        self.access_key = f"AK{secrets.token_hex(8).upper()}"
        self.secret_key = secrets.token_hex(20)

    def __enter__(self) -> Self:
        """Start.

        Raises:
            BuildError: versitygw does not build.
            DaemonError: it does not run.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="videojob-s3-"))
        self.root.mkdir()
        self._sidecar.mkdir()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    @property
    def root(self) -> Path:
        """The objects as files: ``root / BUCKET / KEY``."""
        return self._folder / "objects"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which the AWS SDKs find this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self) -> None:
        """Start, or start again, on the same port and with the same objects."""
        log = self._folder / "log"
        command = [str(build.build(VERSITYGW) / "versitygw"), "--port", f"{self.address}:{self.port}", "posix"]
        if not _keeps_attributes(self.root):
            command += ["--sidecar", str(self._sidecar)]
        credentials = {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key}
        process = guarded([*command, str(self.root)], log, {"PATH": os.environ["PATH"], **credentials})
        self._daemon = Daemon("versitygw", process, log)
        until(self._answers, f"versitygw on {self.endpoint}", 20.0, [self._daemon], every_s=0.02)

    def stop(self) -> None:
        """Stop at once, as in an outage; connections are refused until `start`."""
        self._daemon.kill()
        until(lambda: not self._answers(), f"the end of versitygw on {self.endpoint}", 20.0, every_s=0.02)

    def client(self, **overrides: str) -> Any:
        """A boto3 client that signs with version 4 and puts the bucket into the path.

        Args:
            overrides: arguments of ``boto3.client`` in place of this server's own.
        """
        import boto3  # only a test that talks S3 pays for it
        from botocore.config import Config

        settings: dict[str, Any] = {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "region_name": REGION,
            "config": Config(signature_version="s3v4", s3={"addressing_style": "path"}, proxies={}),
        }
        return boto3.client("s3", **(settings | overrides))

    def bucket(self, name: str | None = None) -> str:
        """A new bucket's name; without ``name`` a fresh one."""
        name = name or f"bucket-{secrets.token_hex(4)}"
        self.client().create_bucket(Bucket=name)
        return name

    @property
    def _sidecar(self) -> Path:
        return self._folder / "attributes"

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((self.address, self.port)) == 0


def _keeps_attributes(folder: Path) -> bool:
    """Whether files there can bear extended attributes, in which versitygw keeps an object's metadata."""
    try:
        os.setxattr(folder, "user.videojob", b"")
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        raise
    return True
