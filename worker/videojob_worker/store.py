"""Where the video goes and where models may come from: S3-compatible storage, a folder, or memory.

``publisher`` writes through ``Store``; the only module that knows boto3. Objects are named relative to the output
prefix. Knows nothing of video.

Writers are fenced by an *owner* object under the prefix, written with conditional requests: it says whose output lies
there and which attempt writes it. A newer attempt of the same render takes the prefix over; an older one that is still
alive finds out at its next write of the playlist, because its copy of the playlist's ETag is stale.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from videojob_api.spec import S3Location

from .errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ModelNotFoundError,
    OutputConflictError,
    StorageError,
    StorageUnavailableError,
)

log = logging.getLogger(__name__)

CONTENT_TYPES = {
    ".m3u8": "application/vnd.apple.mpegurl",
    ".m4s": "video/iso.segment",
    ".mp4": "video/mp4",
    ".json": "application/json",
}
DENIED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403", "Forbidden"})
MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
PRECONDITION = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})


class Changed(Exception):  # noqa: N818 - an answer, not a fault
    """A conditional write was refused: the object is not as the caller last saw it."""


class Store(Protocol):
    """A place for the objects of one output."""

    def get(self, name: str) -> tuple[bytes, str] | None:
        """An object's bytes and version, None if it does not exist."""
        ...

    def put(self, name: str, body: bytes, expected: str | None) -> str:
        """Write an object and return its new version.

        Args:
            name: relative to the prefix.
            body: all of it.
            expected: the version it must have; None: it must not exist.

        Raises:
            Changed: it is otherwise.
        """
        ...

    def upload(self, name: str, file: Path) -> None:
        """Write a big object, whatever is there."""
        ...

    def url(self, name: str) -> str:
        """Where the object can be fetched."""
        ...


def put_once(store: Store, name: str, body: bytes) -> None:
    """Write an object that never changes; one that is there already must be the same.

    Raises:
        OutputConflictError: it differs.
    """
    try:
        store.put(name, body, None)
    except Changed as error:
        found = store.get(name)
        if found is None or found[0] != body:
            raise OutputConflictError(
                f"{store.url(name)} exists and differs: another render writes there; choose another spec.output.s3.prefix"
            ) from error


def version_of(body: bytes) -> str:
    """The version that folders and memory give to an object."""
    return hashlib.sha256(body).hexdigest()


class MemoryStore:
    """A store for tests; ``before`` is called ahead of every operation and may raise."""

    def __init__(self, before: Callable[[str, str], None] = lambda operation, name: None) -> None:
        self.objects: dict[str, bytes] = {}
        self._before = before

    def get(self, name: str) -> tuple[bytes, str] | None:
        """See ``Store``."""
        self._before("get", name)
        body = self.objects.get(name)
        return None if body is None else (body, version_of(body))

    def put(self, name: str, body: bytes, expected: str | None) -> str:
        """See ``Store``."""
        self._before("put", name)
        found = self.objects.get(name)
        if (None if found is None else version_of(found)) != expected:
            raise Changed(name)
        self.objects[name] = body
        return version_of(body)

    def upload(self, name: str, file: Path) -> None:
        """See ``Store``."""
        self._before("upload", name)
        self.objects[name] = file.read_bytes()

    def url(self, name: str) -> str:
        """See ``Store``."""
        return f"memory:{name}"


class FolderStore:
    """A folder of this machine; every object appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str) -> tuple[bytes, str] | None:
        """See ``Store``."""
        with _as_storage_error(self.url(name)):
            path = self._folder / name
            if not path.exists():
                return None
            body = path.read_bytes()
        return body, version_of(body)

    def put(self, name: str, body: bytes, expected: str | None) -> str:
        """See ``Store``."""
        found = self.get(name)
        if (None if found is None else found[1]) != expected:
            raise Changed(name)
        with _as_storage_error(self.url(name)):
            part = self._part(name)
            part.write_bytes(body)
            part.replace(self._folder / name)
        return version_of(body)

    def upload(self, name: str, file: Path) -> None:
        """See ``Store``."""
        with _as_storage_error(self.url(name)):
            part = self._part(name)
            part.write_bytes(file.read_bytes())
            part.replace(self._folder / name)

    def url(self, name: str) -> str:
        """See ``Store``."""
        return str(self._folder / name)

    def _part(self, name: str) -> Path:
        path = self._folder / f"{name}.part"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def _as_storage_error(place: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AccessDeniedError(f"{place} cannot be written: {error.strerror}") from error
    except OSError as error:
        raise StorageUnavailableError(f"{place} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Patience:
    """How long an outage is bridged; the SDK's own retries give up within seconds."""

    total_s: float = 600.0
    first_s: float = 0.5
    longest_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def delays(self) -> Iterator[float]:
        """Seconds to wait before each further try, until the total is spent."""
        deadline, delay = self.clock() + self.total_s, self.first_s
        while self.clock() < deadline:
            yield delay
            delay = min(2 * delay, self.longest_s)


class S3Store:
    """A prefix of a bucket.

    Args:
        location: bucket, prefix and how to reach them.
        patience: for outages.
        env_prefix: of the variables with the keys; without it the SDK looks for credentials itself.

    Raises:
        AccessDeniedError, BucketNotFoundError, StorageUnavailableError: from any operation, with the remedy.
    """

    def __init__(self, location: S3Location, patience: Patience | None = None, env_prefix: str = "") -> None:
        self._location = location
        self._patience = patience or Patience()
        self._client = _client(location, env_prefix)
        self._conditional: bool | None = None
        self._lock = threading.Lock()

    def get(self, name: str) -> tuple[bytes, str] | None:
        """See ``Store``."""
        try:
            answer = self._try(lambda: self._client.get_object(Bucket=self._bucket, Key=self._key(name)))
        except _Missing:
            return None
        return self._try(answer["Body"].read), answer["ETag"]

    def put(self, name: str, body: bytes, expected: str | None) -> str:
        """See ``Store``; a refusal that answers our own lost reply counts as success."""
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        if not self._conditional_writes():
            condition = {}
        request = {
            "Bucket": self._bucket,
            "Key": self._key(name),
            "Body": body,
            "ContentType": CONTENT_TYPES.get(Path(name).suffix, "application/octet-stream"),
            "CacheControl": _cache_control(name),
            **condition,
        }
        try:
            return str(self._try(lambda: self._client.put_object(**request))["ETag"])
        except (Changed, _Missing) as error:
            found = self.get(name)
            if found is not None and found[0] == body:
                return found[1]
            raise Changed(name) from error

    def upload(self, name: str, file: Path) -> None:
        """See ``Store``; in parts where the file is big."""
        extra = {"ContentType": CONTENT_TYPES.get(Path(name).suffix, "application/octet-stream")}
        config = TransferConfig(max_concurrency=4)
        self._try(
            lambda: self._client.upload_file(
                str(file), self._bucket, self._key(name), ExtraArgs=extra, Config=config
            )
        )

    def url(self, name: str) -> str:
        """See ``Store``."""
        base = self._location.endpoint or f"https://s3.{self._location.region}.amazonaws.com"
        return f"{base.rstrip('/')}/{self._bucket}/{self._key(name)}"

    def list(self) -> Iterator[tuple[str, int, str]]:
        """(name, size in bytes, ETag) of every object under the prefix."""
        prefix = self._key("")
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
        for page in self._try(lambda: list(pages)):
            for item in page.get("Contents", ()):
                yield item["Key"].removeprefix(prefix), item["Size"], item["ETag"]

    def download(self, name: str, file: Path) -> None:
        """Fetch an object into a file."""
        self._try(lambda: self._client.download_file(self._bucket, self._key(name), str(file)))

    @property
    def _bucket(self) -> str:
        return self._location.bucket

    def _key(self, name: str) -> str:
        prefix = self._location.prefix
        return f"{prefix}/{name}" if prefix else name

    def _conditional_writes(self) -> bool:
        """Whether the server honours conditions; some accept and ignore them."""
        with self._lock:
            if self._conditional is None:
                self._conditional = self._probe()
                if not self._conditional:
                    log.warning("%s ignores conditional writes: two writers would not notice each other", self.url(""))
            return self._conditional

    def _probe(self) -> bool:
        request = {"Bucket": self._bucket, "Key": self._key(".videojob-probe"), "Body": b"", "IfNoneMatch": "*"}
        try:
            for _ in range(2):
                self._try(lambda: self._client.put_object(**request))
        except Changed:
            return True
        return False

    def _try(self, request: Callable[[], Any]) -> Any:
        """Carry out a request, again and again through an outage."""
        failure: Exception | None = None
        for delay in self._patience.delays():
            try:
                return request()
            except (NoCredentialsError, PartialCredentialsError) as error:
                raise AccessDeniedError(
                    f"no credentials for {self.url('')}: give spec.output.s3.credentialsSecret or serviceAccountName, "
                    "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY where you render without a cluster"
                ) from error
            except ClientError as error:
                self._judge(error)
                failure = error
            except (BotoCoreError, boto3.exceptions.Boto3Error, OSError) as error:
                cause = error.__cause__ or error.__context__
                if isinstance(cause, ClientError):
                    self._judge(cause)
                failure = error
            log.warning("storage does not answer, next try in %.1f s: %s", delay, failure)
            self._patience.sleep(delay)
        raise StorageUnavailableError(
            f"{self.url('')} did not answer for {self._patience.total_s:.0f} s: {failure}"
        ) from failure

    def _judge(self, error: ClientError) -> None:
        """Raise what another try would not mend."""
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in PRECONDITION:
            raise Changed(code) from error
        if code == "NoSuchBucket":
            raise BucketNotFoundError(
                f"bucket {self._bucket} does not exist at {self._location.endpoint or 'AWS'}: make it, or correct "
                "spec.output.s3.bucket"
            ) from error
        if code in MISSING:
            raise _Missing(code) from error
        if code in DENIED:
            raise AccessDeniedError(
                f"{self.url('')} refuses the credentials ({code}): check the keys and that they may write there"
            ) from error
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) < 500 and code != "SlowDown":
            raise StorageError(f"{self.url('')} refuses a request: {error}") from error


class _Missing(Exception):  # noqa: N818 - an answer, not a fault
    """There is no such object."""


def _cache_control(name: str) -> str:
    return "public, max-age=31536000, immutable" if name.endswith(".m4s") else "no-cache"


def _client(location: S3Location, env_prefix: str) -> Any:
    keys = {
        "aws_access_key_id": os.environ.get(f"{env_prefix}AWS_ACCESS_KEY_ID"),
        "aws_secret_access_key": os.environ.get(f"{env_prefix}AWS_SECRET_ACCESS_KEY"),
        "aws_session_token": os.environ.get(f"{env_prefix}AWS_SESSION_TOKEN"),
    }
    return boto3.session.Session().client(
        "s3",
        endpoint_url=location.endpoint,
        region_name=location.region,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": location.addressing_style},
            connect_timeout=5,
            read_timeout=60,
            retries={"total_max_attempts": 2, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
        **(keys if env_prefix and keys["aws_access_key_id"] else {}),
    )


def download_prefix(location: S3Location, folder: Path, *, env_prefix: str = "") -> None:
    """Fetch every object under a prefix into a folder; what is there already and has the right size stays.

    Raises:
        ModelNotFoundError: there is nothing under the prefix.
    """
    source = S3Store(location, env_prefix=env_prefix)
    try:
        objects = [(name, size) for name, size, _ in source.list() if name and not name.endswith("/")]
    except _Missing:
        objects = []
    if not objects:
        raise ModelNotFoundError(f"there is nothing under {source.url('')}: check bucket and prefix of spec.model.source.s3")
    for number, (name, size) in enumerate(objects, 1):
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise ModelNotFoundError(f"{source.url(name)} would leave the model's folder: remove '..' from its name")
        if target.exists() and target.stat().st_size == size:
            continue
        log.info("fetching %d of %d: %s (%.1f MB)", number, len(objects), name, size / 1e6)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        source.download(name, part)
        part.replace(target)
