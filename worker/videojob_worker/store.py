"""Object storage: a small store with conditional writes, in S3, in a folder and in memory; and who may write a prefix.

``publisher`` writes through an ``Output``, ``source`` fetches models with ``download_prefix``. The only module that
imports boto3. Knows nothing of latents, frames or playlists: to it, all objects are bytes.

**Fencing.** Attempt n may still be alive on a node that the cluster has given up when attempt n + 1 begins. The object
``.videojob.json`` under the prefix says which VideoJob (uid, spec digest) and which attempt writes there; it is written
first and taken over by compare-and-swap. All other writes are conditional on what the writer saw last (``If-None-Match:
*`` or ``If-Match``). Whoever is surprised by one looks (1) at the object, then (2) at the claim, and only then writes
(3) over the version seen in (1). A writer that lost the claim before (2) fails there; one that loses it later has its
write refused in (3) if the new owner wrote meanwhile, or else is overwritten by the new owner, who is surprised in his
turn. So an object never goes back to an older attempt's content. The loser raises ``OutputConflictError``.

A claim for the same VideoJob and spec digest by an older attempt, or by the same one (``videojob render`` run twice),
is taken over; any other, and output without a claim, is an ``OutputConflictError``: nothing of another job is ever
overwritten.

A server that ignores conditional writes is found out by a trial; then the store compares before it writes, which
leaves a gap of milliseconds, and says so once.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar
from urllib.parse import quote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as UnreachableError

from videojob_api import names
from videojob_api.spec import S3Location, VideoJob

from .errors import (
    AccessDeniedError,
    BucketNotFoundError,
    InvalidSpecError,
    ModelInvalidError,
    ModelNotFoundError,
    OutputConflictError,
    StorageError,
    StorageUnavailableError,
)

log = logging.getLogger(__name__)

CLAIM: Final = ".videojob.json"  # under the prefix: who writes there
PART_BYTES: Final = 16 * 2**20  # of an upload; at most 10,000 parts make an object
RANGE_BYTES: Final = 32 * 2**20  # of a download
CONNECTIONS: Final = 8  # at once, in uploads and downloads of big objects
_ROUNDS = 5  # of a conditional write that is refused again and again

R = TypeVar("R")
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class StaleError(Exception):
    """A conditional write was refused: the object is not, or no longer, as the writer knows it."""


@dataclass(frozen=True)
class Stored:
    """An object and its version."""

    body: bytes
    version: str


@dataclass(frozen=True)
class Head:
    """What is known of an object without reading it."""

    version: str
    sha256: str | None  # None: some other program wrote it


class Store(Protocol):
    """Objects under one prefix. Keys are relative to it; a version is an opaque string; safe to use from many threads.

    All methods raise AccessDeniedError, BucketNotFoundError, InvalidSpecError and StorageUnavailableError, the last
    after having tried for minutes.
    """

    def put(self, key: str, body: bytes, *, attempt: int, replaces: str | None = None) -> str:
        """Write an object that is absent, or is of the version ``replaces``; its version.

        Raises:
            StaleError: it is there, or of another version. Or it was written and only the reply was lost.
        """
        ...

    def upload(
        self, key: str, file: Path, *, sha256: str, attempt: int, replaces: str | None = None, progress: Progress
    ) -> None:
        """As ``put`` with a file of any size, whose digest is given."""
        ...

    def read(self, key: str) -> Stored | None:
        """A small object; None if absent."""
        ...

    def head(self, key: str) -> Head | None:
        """What is known of an object; None if absent, or hidden by the credentials."""
        ...

    def delete(self, key: str, version: str) -> None:
        """Remove an object of this version; one that is absent stays so.

        Raises:
            StaleError: it is of another version.
        """
        ...

    def url(self, key: str) -> str:
        """Where a player would look for the object."""
        ...

    def abort(self) -> None:
        """Make calls that wait for storage, now or later, fail at once with StorageUnavailableError."""
        ...


def _version(known: Stored | Head | None) -> str | None:
    return None if known is None else known.version


def _ignore(_done: int, _total: int) -> None:
    """No progress callback."""


# --- Who may write a prefix ----------------------------------------------------------------------------------------


class Output:
    """A prefix that one attempt has claimed; see the module's docstring. Made by ``take``.

    A context manager: an attempt that fails before it wrote anything gives a fresh claim back, so that the job may be
    corrected and started again.
    """

    def __init__(self, store: Store, attempt: int, claim: Stored, *, inherited: bool) -> None:
        self._store = store
        self._claim = claim
        self._touched = False  # whether this attempt has tried to write
        self._versions: dict[str, str | None] = {}
        self.attempt = attempt
        self.inherited = inherited
        """Whether an older attempt of the same job may have left objects."""

    @classmethod
    def take(cls, store: Store, videojob: VideoJob, attempt: int, writer: str | None = None) -> Output:
        """Claim the store's prefix for an attempt. Cheap, and finds wrong credentials, buckets and prefixes.

        Args:
            store: where.
            videojob: for whom.
            attempt: its number, from 1.
            writer: tells two processes of the same attempt apart; random by default.

        Raises:
            OutputConflictError: another job, or a newer attempt of this one, writes there.
            StorageError: as the store's methods.
        """
        claim = _Claim.of(videojob, attempt, writer or secrets.token_hex(4))
        older: Stored | None = None
        for _ in range(_ROUNDS):
            try:
                version = store.put(CLAIM, claim.body, attempt=attempt, replaces=_version(older))
                break
            except StaleError:
                found = store.read(CLAIM)
                if found is not None and found.body == claim.body:
                    version = found.version  # only the reply was lost
                    break
                older = found
                if older is not None:
                    claim.supersedes(older.body, store.url(""))
        else:
            raise OutputConflictError(f"several writers contend for {store.url('')}; stop all but one")
        if older is None:
            _refuse_strangers(store)
        return cls(store, attempt, Stored(claim.body, version), inherited=older is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.give_back()

    def give_back(self) -> None:
        """Give a fresh claim back, if nothing was written; the end of all writing."""
        if self._touched or self.inherited:
            return
        self.abort()  # a claim that stays is no reason to wait
        with suppress(StaleError, StorageError):
            self.check()
            self._store.delete(CLAIM, self._claim.version)

    @property
    def writer(self) -> str:
        """This process's mark."""
        return str(json.loads(self._claim.body)["writer"])

    def url(self, key: str) -> str:
        """Where a player would look for the object."""
        return self._store.url(key)

    def read(self, key: str) -> Stored | None:
        """A small object; None if absent."""
        return None if self._store.head(key) is None else self._store.read(key)

    def digest(self, key: str) -> str | None:
        """The SHA-256 that an object was written with; None if it is absent or another program's."""
        found = self._store.head(key)
        return None if found is None else found.sha256

    def write(self, key: str, body: bytes) -> None:
        """Write an object: a new one, or over what this job left there.

        Raises:
            OutputConflictError: a newer attempt has taken over.
            StorageError: as the store's methods.
        """
        self._touched = True
        version = self._versions.get(key)
        for _ in range(_ROUNDS):
            try:
                self._versions[key] = self._store.put(key, body, attempt=self.attempt, replaces=version)
                return
            except StaleError:
                found = self._store.read(key)
                if found is not None and found.body == body:
                    self._versions[key] = found.version
                    return
                self.check()
                version = _version(found)
        raise self._contended(key)

    def upload(self, key: str, file: Path, sha256: str, progress: Progress = _ignore) -> None:
        """As ``write`` with a file of any size.

        Args:
            key: of the object.
            file: its content.
            sha256: the file's digest.
            progress: called now and then with bytes sent and bytes in all.
        """
        self._touched = True
        for _ in range(_ROUNDS):
            found = self._store.head(key)
            if found is not None and found.sha256 == sha256:
                return
            self.check()
            try:
                self._store.upload(
                    key, file, sha256=sha256, attempt=self.attempt, replaces=_version(found), progress=progress
                )
                return
            except StaleError:
                continue
        raise self._contended(key)

    def remove(self, key: str) -> None:
        """Remove an object of this job, if it is there."""
        for _ in range(_ROUNDS):
            found = self._store.head(key)
            if found is None:
                self._versions.pop(key, None)
                return
            self.check()
            try:
                self._store.delete(key, found.version)
            except StaleError:
                continue
        raise self._contended(key)

    def check(self) -> None:
        """See whether this attempt may still write.

        Raises:
            OutputConflictError: it may not.
        """
        found = self._store.read(CLAIM)
        if found is None:
            raise OutputConflictError(f"{self.url(CLAIM)} was removed during the render; start the job again")
        if found.body != self._claim.body:
            raise OutputConflictError(
                f"attempt {self.attempt} has lost {self.url('')} to attempt {_Claim.attempt_of(found.body)} of this "
                "VideoJob and stops; nothing needs to be done"
            )

    def abort(self) -> None:
        """Make calls that wait for storage fail at once."""
        self._store.abort()

    def _contended(self, key: str) -> OutputConflictError:
        return OutputConflictError(f"another program keeps on changing {self.url(key)}; use another prefix")


@dataclass(frozen=True)
class _Claim:
    """The claim's content."""

    job: Mapping[str, str]
    attempt: int
    writer: str

    @classmethod
    def of(cls, videojob: VideoJob, attempt: int, writer: str) -> _Claim:
        metadata = videojob.metadata
        job = {
            "videoJob": f"{metadata.namespace}/{metadata.name}",
            "uid": metadata.uid,
            "specDigest": videojob.spec.digest(),
        }
        return cls(job, attempt, writer)

    @property
    def body(self) -> bytes:
        content = {**self.job, "attempt": self.attempt, "writer": self.writer}
        return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"

    def supersedes(self, body: bytes, prefix: str) -> None:
        """Raise OutputConflictError unless the claim ``body`` is this job's, of no newer attempt."""
        remedy = "set another spec.output.s3.prefix, or remove what is there"
        try:
            found = json.loads(body)
            job, attempt = {key: found[key] for key in self.job}, int(found["attempt"])
        except (ValueError, TypeError, KeyError) as error:
            raise OutputConflictError(f"{prefix}{CLAIM} is not of this program: {remedy}") from error
        if job != self.job:
            what = "of another spec" if job["uid"] == self.job["uid"] else f"with uid {job['uid'] or '(none)'}"
            raise OutputConflictError(f"{prefix} holds the output of VideoJob {job['videoJob']} {what}: {remedy}")
        if attempt > self.attempt:
            raise OutputConflictError(
                f"{prefix} belongs to attempt {attempt} of this VideoJob; attempt {self.attempt} comes too late"
            )

    @staticmethod
    def attempt_of(body: bytes) -> str:
        try:
            return str(json.loads(body)["attempt"])
        except (ValueError, TypeError, KeyError):
            return "?"


def _refuse_strangers(store: Store) -> None:
    """Give a fresh claim back if there is output that nobody claims."""
    for key in (names.PLAYLIST, names.INIT_SEGMENT, names.segment(0), names.VIDEO, names.MANIFEST):
        if store.head(key) is not None:
            claim = store.head(CLAIM)
            if claim is not None:
                store.delete(CLAIM, claim.version)
            raise OutputConflictError(
                f"{store.url(key)} is there already, from another program: "
                "set another spec.output.s3.prefix, or remove what is there"
            )


# --- In memory and in a folder -------------------------------------------------------------------------------------


class MemoryStore:
    """The twin for tests."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self._lock = threading.Lock()
        self.attempts: dict[str, int] = {}
        self._writes = 0

    def put(self, key: str, body: bytes, *, attempt: int, replaces: str | None = None) -> str:
        """Write if absent or as known."""
        with self._lock:
            self._expect(key, replaces)
            self._writes += 1
            self.objects[key] = Stored(body, str(self._writes))
            self.attempts[key] = attempt
            return str(self._writes)

    def upload(
        self, key: str, file: Path, *, sha256: str, attempt: int, replaces: str | None = None, progress: Progress
    ) -> None:
        """Write if absent or as known."""
        body = file.read_bytes()
        _expect_digest(hashlib.sha256(body).hexdigest(), sha256, file)
        self.put(key, body, attempt=attempt, replaces=replaces)
        progress(len(body), len(body))

    def read(self, key: str) -> Stored | None:
        """The object."""
        return self.objects.get(key)

    def head(self, key: str) -> Head | None:
        """Its version and digest."""
        found = self.objects.get(key)
        return None if found is None else Head(found.version, hashlib.sha256(found.body).hexdigest())

    def delete(self, key: str, version: str) -> None:
        """Remove it."""
        with self._lock:
            if key in self.objects:
                self._expect(key, version)
                del self.objects[key]

    def url(self, key: str) -> str:
        """For messages."""
        return f"memory:/{key}"

    def abort(self) -> None:
        """Nothing ever waits here."""

    def _expect(self, key: str, version: str | None) -> None:
        found = self.objects.get(key)
        if _version(found) != version:
            raise StaleError(key)


class FolderStore:
    """Objects as the files of a folder; an object's version is its digest, and renames make writes whole.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def put(
        self,
        key: str,
        body: bytes,
        *,
        attempt: int,  # noqa: ARG002 - files bear no labels
        replaces: str | None = None,
    ) -> str:
        """Write if absent or as known."""
        with self._writing(key, replaces) as file:
            file.write_bytes(body)
        return hashlib.sha256(body).hexdigest()

    def upload(
        self,
        key: str,
        file: Path,
        *,
        sha256: str,
        attempt: int,  # noqa: ARG002 - files bear no labels
        replaces: str | None = None,
        progress: Progress,
    ) -> None:
        """Write if absent or as known."""
        total = file.stat().st_size
        with self._writing(key, replaces) as copy:
            with file.open("rb") as source, copy.open("wb") as target:
                while chunk := source.read(PART_BYTES):
                    target.write(chunk)
                    progress(target.tell(), total)
            _expect_digest(sha256_of(copy), sha256, file)

    def read(self, key: str) -> Stored | None:
        """The file."""
        with _folder_errors(self._folder):
            try:
                body = (self._folder / key).read_bytes()
            except FileNotFoundError:
                return None
        return Stored(body, hashlib.sha256(body).hexdigest())

    def head(self, key: str) -> Head | None:
        """The file's digest."""
        with _folder_errors(self._folder):
            try:
                digest = sha256_of(self._folder / key)
            except FileNotFoundError:
                return None
        return Head(digest, digest)

    def delete(self, key: str, version: str) -> None:
        """Remove the file."""
        with _folder_errors(self._folder), self._locked():
            found = self.head(key)
            if found is not None and found.version != version:
                raise StaleError(key)
            (self._folder / key).unlink(missing_ok=True)
            with suppress(OSError):  # of folders that are not empty
                for parent in Path(key).parents[:-1]:
                    (self._folder / parent).rmdir()

    def url(self, key: str) -> str:
        """The file's URI."""
        return (self._folder / key).as_uri() if key else self._folder.as_uri() + "/"

    def abort(self) -> None:
        """Nothing ever waits here."""

    @contextmanager
    def _writing(self, key: str, replaces: str | None) -> Iterator[Path]:
        """A temporary file that becomes the object when the block ends well."""
        path = self._folder / key
        with _folder_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=self._folder) as scratch:
                file = Path(scratch) / "object"
                yield file
                with self._locked():
                    found = self.head(key)
                    if _version(found) != replaces:
                        raise StaleError(key)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


@contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AccessDeniedError(f"{folder} may not be written: {error.strerror}: {error.filename}") from error
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error


def _expect_digest(found: str, expected: str, file: Path) -> None:
    if found != expected:
        raise StorageError(f"{file} changed while it was copied: its digest is {found}, not {expected}")


def sha256_of(file: Path) -> str:
    """The digest of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# --- S3 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patience:
    """How long a call bridges an outage. The SDK's own retries give up within seconds."""

    total_s: float = 600.0
    first_s: float = 0.5
    longest_s: float = 30.0

    def delays(self) -> Iterator[float]:
        """Seconds between tries: doubling up to the longest."""
        delay = self.first_s
        while True:
            yield delay
            delay = min(2 * delay, self.longest_s)


@dataclass(frozen=True)
class Listed:
    """An object of a listing."""

    key: str  # relative to the prefix
    size_bytes: int
    version: str


class S3Store:
    """Objects under a prefix of a bucket.

    Needs s3:PutObject, s3:GetObject and s3:DeleteObject there; s3:ListBucket only to download a model. Credentials
    come from the SDK's chain (variables, web identity, pod identity, instance), or from variables with a prefix.

    Args:
        location: bucket, prefix, endpoint, region, addressing.
        field: of the spec, for messages.
        env_prefix: look for AWS_ACCESS_KEY_ID and its companions behind this prefix first.
        environ: the environment.
        patience: with outages.
        clock: seconds, monotonic.
        sleep: waits some seconds; by default until ``abort``.
    """

    def __init__(
        self,
        location: S3Location,
        *,
        field: str = "spec.output.s3",
        env_prefix: str = "",
        environ: Mapping[str, str] = os.environ,
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._location = location
        self._field = field
        self._patience = patience
        self._clock = clock
        self._aborted = threading.Event()
        self._sleep = sleep or self._aborted.wait
        self._client = _client(location, field, env_prefix, environ)
        self._honours_conditions: bool | None = None
        self._lock = threading.Lock()

    def put(self, key: str, body: bytes, *, attempt: int, replaces: str | None = None) -> str:
        """Write if absent or as known."""
        condition = self._condition(key, replaces)
        labels = _labels(key, attempt, hashlib.sha256(body).hexdigest())
        return str(self._call(self._client.put_object, Key=self._key(key), Body=body, **labels, **condition)["ETag"])

    def upload(
        self, key: str, file: Path, *, sha256: str, attempt: int, replaces: str | None = None, progress: Progress
    ) -> None:
        """Write if absent or as known, in parts; an outage costs the parts under way, not those that arrived."""
        if file.stat().st_size <= PART_BYTES:
            self.put(key, file.read_bytes(), attempt=attempt, replaces=replaces)
            progress(file.stat().st_size, file.stat().st_size)
            return
        name = {"Key": self._key(key)}
        started = self._call(self._client.create_multipart_upload, **name, **_labels(key, attempt, sha256))
        name["UploadId"] = started["UploadId"]
        try:
            parts = self._upload_parts(file, name, progress)
            condition = self._condition(key, replaces)
            self._call(self._client.complete_multipart_upload, MultipartUpload={"Parts": parts}, **name, **condition)
        except BaseException:
            self._forget(self._client.abort_multipart_upload, **name)
            raise

    def read(self, key: str) -> Stored | None:
        """The object."""
        found = self._call(self._get, missing=_NOTHING, Key=self._key(key))
        return None if found is _NOTHING else Stored(found["Body"], found["ETag"])

    def head(self, key: str) -> Head | None:
        """ETag and our digest. Without s3:ListBucket, S3 hides what is absent behind a 403; then it is None, too."""
        try:
            found = self._call(self._client.head_object, missing=_NOTHING, Key=self._key(key))
        except AccessDeniedError:
            return None
        return None if found is _NOTHING else Head(found["ETag"], found["Metadata"].get("sha256"))

    def delete(self, key: str, version: str) -> None:
        """Remove it. Some servers know no conditional delete; there, what came a moment ago is removed, too."""
        condition = {"IfMatch": version} if self._conditional() else {}
        self._call(self._client.delete_object, missing=_NOTHING, Key=self._key(key), **condition)

    def url(self, key: str) -> str:
        """HTTP(S), in the addressing style that requests use."""
        endpoint = urlsplit(self._client.meta.endpoint_url)
        bucket, path = self._location.bucket, quote(self._key(key))
        root = endpoint.path.rstrip("/")
        if _path_style(self._location):
            return f"{endpoint.scheme}://{endpoint.netloc}{root}/{bucket}/{path}"
        return f"{endpoint.scheme}://{bucket}.{endpoint.netloc}{root}/{path}"

    def abort(self) -> None:
        """Let waiting calls fail."""
        self._aborted.set()

    def listing(self) -> Iterator[Listed]:
        """All objects under the prefix."""
        root = self._key("")
        token: dict[str, str] = {}
        while True:
            page = self._call(self._client.list_objects_v2, Prefix=root, **token)
            for found in page.get("Contents", []):
                yield Listed(found["Key"].removeprefix(root), found["Size"], found["ETag"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def read_range(self, listed: Listed, begin: int, size_bytes: int) -> bytes:
        """A piece of an object.

        Raises:
            StaleError: the object is no longer as listed.
            StorageError: the server sent less.
        """
        span = f"bytes={begin}-{begin + size_bytes - 1}"
        found = self._call(self._get, Key=self._key(listed.key), Range=span, IfMatch=listed.version)
        body: bytes = found["Body"]
        if len(body) != size_bytes:
            raise StorageError(f"{self.url(listed.key)}: {len(body)} bytes came where {size_bytes} were asked for")
        return body

    def _key(self, key: str) -> str:
        return f"{self._location.prefix}/{key}" if self._location.prefix else key

    def _get(self, **arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get_object(**arguments)
        with found["Body"] as body:
            return {**found, "Body": body.read()}

    def _upload_parts(self, file: Path, name: dict[str, str], progress: Progress) -> list[dict[str, Any]]:
        total = file.stat().st_size
        size = max(PART_BYTES, -(-total // 10_000))

        def send(number: int) -> dict[str, Any]:
            with file.open("rb") as content:
                content.seek((number - 1) * size)
                sent = self._call(self._client.upload_part, **name, PartNumber=number, Body=content.read(size))
            return {"PartNumber": number, "ETag": sent["ETag"]}

        parts = []
        with self.pool() as pool:
            for part in pool.map(send, range(1, -(-total // size) + 1)):
                parts.append(part)
                progress(min(total, len(parts) * size), total)
        return parts

    @contextmanager
    def pool(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that end soon when the block fails."""
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="s3")
        try:
            yield pool
        except BaseException:
            self.abort()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    # Conditional writes

    def _condition(self, key: str, replaces: str | None) -> dict[str, str]:
        """The headers of a conditional write; compares by hand where the server knows none."""
        if self._conditional():
            return {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        found = self.head(key)
        if _version(found) != replaces:
            raise StaleError(key)
        return {}

    def _conditional(self) -> bool:
        with self._lock:
            if self._honours_conditions is None:
                self._honours_conditions = self._try_conditions()
                if not self._honours_conditions:
                    log.warning(
                        "%s ignores conditional writes: make sure that no two jobs write to the same prefix",
                        self.url(""),
                    )
            return self._honours_conditions

    def _try_conditions(self) -> bool:
        """Write an object twice under the condition that it is absent; a good server refuses the second time."""
        key = self._key(f".videojob-probe-{secrets.token_hex(8)}")
        refuses = False
        try:
            for _ in range(2):
                self._call(self._client.put_object, Key=key, Body=b"", IfNoneMatch="*")
        except StaleError:
            refuses = True
        except _UnsupportedError:
            pass
        self._forget(self._client.delete_object, Key=key)
        return refuses

    # Calls and their errors

    def _call(self, operation: Callable[..., R], *, missing: Any = None, **arguments: Any) -> R:
        """Call the SDK, again and again while storage does not answer.

        Args:
            operation: a method of the client, or like one.
            missing: returned if the object is absent.
            arguments: beside the bucket.
        """
        deadline = self._clock() + self._patience.total_s
        for delay in self._patience.delays():
            try:
                return operation(Bucket=self._location.bucket, **arguments)
            except (ClientError, BotoCoreError) as error:
                if _code(error) in _MISSING and missing is not None:
                    return missing  # type: ignore[no-any-return]
                if not _transient(error):
                    raise self._permanent(error) from error
                if self._clock() + delay > deadline:
                    waited = f"{self._patience.total_s:.0f} s"
                    raise StorageUnavailableError(f"{self._place} did not answer for {waited}: {error}") from error
                log.warning("%s: trying again in %.1f s: %s", self._place, delay, error)
            self._sleep(delay)
            if self._aborted.is_set():
                raise StorageUnavailableError(f"{self._place} did not answer until the worker was stopped")
        raise AssertionError("delays are endless")

    def _forget(self, operation: Callable[..., Any], **arguments: Any) -> None:
        """Clean up by one call; what cannot be cleaned up stays."""
        try:
            operation(Bucket=self._location.bucket, **arguments)
        except (ClientError, BotoCoreError) as error:
            log.info("%s: a left-over stays: %s", self._place, error)

    @property
    def _place(self) -> str:
        return f"{self._field}: bucket {self._location.bucket} at {self._client.meta.endpoint_url}"

    def _permanent(self, error: ClientError | BotoCoreError) -> Exception:
        """What an error that will not pass means, with the remedy."""
        code, status = _code(error), _status(error)
        if code in _STALE or code in _MISSING:
            return StaleError(str(error))
        if code == "NoSuchBucket":
            return BucketNotFoundError(f"{self._place} does not exist: create it, or correct the name")
        if code == "NotImplemented":
            return _UnsupportedError(f"{self._place} lacks an operation: {error}")
        if code in _WRONG_REGION:
            return InvalidSpecError(f"{self._field}.region is wrong for bucket {self._location.bucket}: {error}")
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return AccessDeniedError(f"{self._place} needs credentials: set {self._credentials}")
        if status in (401, 403) or code in _DENIED:
            return AccessDeniedError(f"{self._place} refuses the credentials ({error}): correct {self._credentials}")
        return StorageError(f"{self._place} failed: {error}")

    @property
    def _credentials(self) -> str:
        service_account = f", {self._field}.serviceAccountName" if "output" in self._field else ""
        return f"{self._field}.credentialsSecret{service_account} or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class _UnsupportedError(StorageError):
    """The server does not know an operation or a header."""


_NOTHING: Final[Any] = object()
_STALE = {"PreconditionFailed", "412"}
_MISSING = {"NoSuchKey", "NotFound", "404", "NoSuchUpload"}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}
_DENIED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "XAdminUserNotFound"}
_TRANSIENT = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "ConditionalRequestConflict"}
_IMMUTABLE = "public, max-age=31536000, immutable"
_CONTENT_TYPES = {
    ".m3u8": "application/vnd.apple.mpegurl",
    ".mp4": "video/mp4",
    ".m4s": "video/mp4",
    ".safetensors": "application/octet-stream",
}


def _code(error: Exception) -> str:
    return str(error.response["Error"].get("Code", "")) if isinstance(error, ClientError) else ""


def _status(error: Exception) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"]) if isinstance(error, ClientError) else 0


def _transient(error: Exception) -> bool:
    if isinstance(error, ClientError):
        busy = _status(error) >= 500 or _status(error) == 429
        return (busy and _code(error) != "NotImplemented") or _code(error) in _TRANSIENT
    return isinstance(error, UnreachableError | HTTPClientError | IncompleteReadError | CredentialRetrievalError)


def _labels(key: str, attempt: int, sha256: str) -> dict[str, Any]:
    suffix = Path(key).suffix
    return {
        "ContentType": _CONTENT_TYPES.get(suffix, "application/json"),
        "CacheControl": _IMMUTABLE if suffix == ".m4s" else "no-cache",
        "Metadata": {"attempt": str(attempt), "sha256": sha256},
    }


def _path_style(location: S3Location) -> bool:
    return location.addressing_style == "path" or (
        location.addressing_style == "auto" and (location.endpoint is not None or "." in location.bucket)
    )


def _client(location: S3Location, field: str, env_prefix: str, environ: Mapping[str, str]) -> Any:
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if _path_style(location) else "virtual"},
        retries={"mode": "standard", "total_max_attempts": 2},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=2 * CONNECTIONS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session(region_name=location.region, **_keys(env_prefix, environ))
        return session.client("s3", endpoint_url=location.endpoint, config=config)
    except ValueError as error:
        raise InvalidSpecError(f"{field}.endpoint {location.endpoint} is not usable: {error}") from error
    except BotoCoreError as error:
        raise AccessDeniedError(f"{field}: the AWS configuration of this process is broken: {error}") from error


def _keys(env_prefix: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """The session's arguments for keys behind the prefix; none, for the SDK's own chain."""
    if not env_prefix or not environ.get(f"{env_prefix}AWS_ACCESS_KEY_ID"):
        return {}
    variables = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    found = {name.lower(): environ.get(f"{env_prefix}{name}") for name in variables}
    return {name: value for name, value in found.items() if value}


# --- Models in S3 --------------------------------------------------------------------------------------------------

_STATE = ".videojob-download.json"  # in the folder: the versions of the files that are complete


def download_prefix(
    location: S3Location,
    folder: Path,
    *,
    env_prefix: str = "",
    patterns: Sequence[str] = ("*",),
    progress: Progress = _ignore,
    field: str = "spec.model.source.s3",
    store: S3Store | None = None,
) -> None:
    """Bring all objects under a prefix into a folder; files that came complete in an earlier call are kept.

    A file appears under its name only when it is whole and of the listed version. Big files come in ranges over
    several connections.

    Args:
        location: of the model.
        folder: made if missing.
        env_prefix: see ``S3Store``.
        patterns: only file names that match one of these, as a shell would.
        progress: called with bytes done and bytes in all.
        field: of the spec, for messages.
        store: to read from, instead of one for ``location``.

    Raises:
        ModelNotFoundError: nothing is there.
        ModelInvalidError: an object's name is no safe file name.
        StorageError: as the store's methods, or an object changed meanwhile.
    """
    store = store or S3Store(location, field=field, env_prefix=env_prefix)
    listed = [found for found in store.listing() if _wanted(found.key, patterns)]
    if not listed:
        raise ModelNotFoundError(f"{field}: there is nothing under {store.url('')}")
    folder.mkdir(parents=True, exist_ok=True)
    state = _read_state(folder)
    done, total = 0, sum(found.size_bytes for found in listed)
    for found in listed:
        path = folder / _safe(found.key, field)
        if not (state.get(found.key) == found.version and _size(path) == found.size_bytes):
            try:
                for fetched in _download(store, found, path):
                    progress(done + fetched, total)
            except StaleError as error:
                raise StorageError(f"{store.url(found.key)} changed while it was read; try again") from error
            state[found.key] = found.version
            _write_state(folder, state)
        done += found.size_bytes
        progress(done, total)


def _wanted(key: str, patterns: Sequence[str]) -> bool:
    """Not the markers that consoles make for folders."""
    name = key.rpartition("/")[2]
    return name != "" and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _safe(key: str, field: str) -> Path:
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part or len(part) > 255 for part in parts):
        raise ModelInvalidError(f"{field}: the object name {key!r} is no safe file name: rename or remove it")
    return Path(*parts)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _download(store: S3Store, listed: Listed, path: Path) -> Iterator[int]:
    """Fetch one object, yielding the bytes fetched so far; the file is there when the iterator ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.truncate(listed.size_bytes)

        def fetch(begin: int) -> int:
            size = min(RANGE_BYTES, listed.size_bytes - begin)
            return os.pwrite(file.fileno(), store.read_range(listed, begin, size), begin)

        done = 0
        with store.pool() as pool:
            for count in pool.map(fetch, range(0, listed.size_bytes, RANGE_BYTES)):
                done += count
                yield done
    part.replace(path)


def _read_state(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / _STATE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _write_state(folder: Path, state: dict[str, str]) -> None:
    file = folder / f"{_STATE}.part"
    file.write_text(json.dumps(state))
    file.replace(folder / _STATE)
