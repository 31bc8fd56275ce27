"""What the object store beside the cluster promises to every other test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from testcluster.process import until
from testcluster.s3 import S3Server

OWN_A_SERVER = """
import signal
from testcluster.s3 import S3Server
with S3Server() as server:
    print(server.port, server.root.parent, flush=True)
    signal.pause()
"""


def test_a_wrong_secret_is_refused(s3_server: S3Server) -> None:
    bucket = s3_server.bucket()
    stranger = s3_server.client(aws_secret_access_key="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.put_object(Bucket=bucket, Key="key", Body=b"")


def test_a_key_is_written_once_where_the_writer_asks_for_that(s3_server: S3Server) -> None:
    client, bucket = s3_server.client(), s3_server.bucket()
    client.put_object(Bucket=bucket, Key="key", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="key", Body=b"second", IfNoneMatch="*")
    assert (s3_server.root / bucket / "key").read_bytes() == b"first"


def test_a_key_is_replaced_only_where_its_version_is_known(s3_server: S3Server) -> None:
    client, bucket = s3_server.client(), s3_server.bucket()
    old = client.put_object(Bucket=bucket, Key="key", Body=b"first")["ETag"]
    client.put_object(Bucket=bucket, Key="key", Body=b"second", IfMatch=old)
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="key", Body=b"third", IfMatch=old)


def test_objects_outlive_an_outage() -> None:
    with S3Server() as server:
        client, bucket = server.client(), server.bucket()
        client.put_object(Bucket=bucket, Key="key", Body=b"body")
        server.stop()
        with pytest.raises(EndpointConnectionError):
            client.head_object(Bucket=bucket, Key="key")
        server.start()
        assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == b"body"


def test_a_server_ends_with_its_owner() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", OWN_A_SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as owner:
        assert owner.stdout is not None
        port, folder = owner.stdout.readline().split()
        owner.send_signal(signal.SIGKILL)
    until(lambda: refuses(int(port)), "the end of the server", 10.0)
    shutil.rmtree(folder)


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
