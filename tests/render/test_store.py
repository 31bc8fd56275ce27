"""What stores promise, the real S3 server's outages and refusals included, and who may write a prefix."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testcluster.s3 import S3Server
from videojob_api import names
from videojob_api.spec import S3Location, VideoJob
from videojob_worker import store
from videojob_worker.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ModelInvalidError,
    ModelNotFoundError,
    OutputConflictError,
    StorageError,
    StorageUnavailableError,
)
from videojob_worker.store import CLAIM, FolderStore, Listed, MemoryStore, Output, Patience, S3Store, StaleError

PART = 16 * 2**20


def location(server: S3Server, bucket: str, prefix: str = "videos/fox", **fields) -> S3Location:
    return S3Location(bucket=bucket, prefix=prefix, endpoint=server.endpoint, **fields)


def keys(server: S3Server, **others: str) -> dict[str, str]:
    found = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key} | others
    return {f"TEST_{name}": value for name, value in found.items()}


def s3(server: S3Server, bucket: str, prefix: str = "videos/fox", environ: dict | None = None, **options) -> S3Store:
    environ = environ or keys(server)
    return S3Store(location(server, bucket, prefix), env_prefix="TEST_", environ=environ, **options)


@pytest.fixture(params=["memory", "folder", "s3"])
def any_store(request, tmp_path):
    if request.param == "s3":
        server = request.getfixturevalue("s3_server")
        return s3(server, server.bucket())
    return MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "out")


def videojob(name: str = "fox", uid: str = "u-1", prompt: str = "a fox") -> VideoJob:
    return VideoJob.model_validate(
        {
            "apiVersion": "videojob.dev/v1alpha1",
            "kind": "VideoJob",
            "metadata": {"name": name, "uid": uid},
            "spec": {
                "prompt": prompt,
                "video": {"frames": 33},
                "model": {"source": {"localPath": "/model"}},
                "output": {"s3": {"bucket": "videos"}},
            },
        }
    )


def send(target: store.Store, key: str, file: Path, replaces: str | None = None) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    target.upload(key, file, sha256=digest, attempt=1, replaces=replaces, progress=lambda _done, _total: None)


class Clock:
    """Time that passes only in sleep."""

    def __init__(self, during_sleep: Callable[[], None] = lambda: None) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self._during_sleep = during_sleep

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self._during_sleep()


# --- Any store


def test_an_object_is_written_once(any_store):
    any_store.put("a/b", b"first", attempt=1)
    with pytest.raises(StaleError):
        any_store.put("a/b", b"second", attempt=1)
    assert any_store.read("a/b").body == b"first"


def test_an_object_is_replaced_by_who_knows_its_version(any_store):
    first = any_store.put("a/b", b"first", attempt=1)
    second = any_store.put("a/b", b"second", attempt=1, replaces=first)
    with pytest.raises(StaleError):
        any_store.put("a/b", b"third", attempt=1, replaces=first)
    assert any_store.read("a/b") == store.Stored(b"second", second)


def test_an_absent_object_is_replaced_by_nobody(any_store):
    version = any_store.put("a", b"first", attempt=1)
    with pytest.raises(StaleError):
        any_store.put("b", b"second", attempt=1, replaces=version)
    assert any_store.read("b") is None
    assert any_store.head("b") is None


def test_a_head_tells_version_and_digest(any_store):
    version = any_store.put("a", b"body", attempt=1)
    assert any_store.head("a") == store.Head(version, hashlib.sha256(b"body").hexdigest())


def test_an_object_is_deleted_by_who_knows_its_version(any_store):
    first = any_store.put("a", b"first", attempt=1)
    second = any_store.put("a", b"second", attempt=1, replaces=first)
    with pytest.raises(StaleError):
        any_store.delete("a", first)
    any_store.delete("a", second)
    any_store.delete("a", second)
    assert any_store.read("a") is None


@pytest.mark.parametrize("size", [0, 1, PART, 3 * PART + 5])
def test_a_file_of_any_size_is_uploaded(any_store, tmp_path, size):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    heard = []
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    any_store.upload("v", file, sha256=digest, attempt=1, progress=lambda done, total: heard.append((done, total)))
    assert any_store.read("v").body == file.read_bytes()
    assert any_store.head("v").sha256 == digest
    assert heard == sorted(heard)
    assert size == 0 or heard[-1] == (size, size)


@pytest.mark.parametrize("size", [1, PART + 1])
def test_an_upload_is_conditional_too(any_store, tmp_path, size):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    send(any_store, "v", file)
    first = any_store.head("v").version
    file.write_bytes(os.urandom(size))
    with pytest.raises(StaleError):
        send(any_store, "v", file)
    send(any_store, "v", file, replaces=first)
    assert any_store.read("v").body == file.read_bytes()
    with pytest.raises(StaleError):
        send(any_store, "v", file, replaces=first)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_file_that_changes_under_the_upload_is_noticed(kind, tmp_path):
    target = MemoryStore() if kind == "memory" else FolderStore(tmp_path / "out")
    (tmp_path / "file").write_bytes(b"new")
    with pytest.raises(StorageError, match="changed while it was copied"):
        target.upload("v", tmp_path / "file", sha256="0", attempt=1, progress=lambda _done, _total: None)
    assert target.head("v") is None


# --- A folder


def test_a_folder_holds_the_objects_and_nothing_else(tmp_path):
    target = FolderStore(tmp_path)
    target.put("segments/00000.m4s", b"body", attempt=1)
    with pytest.raises(StaleError):
        target.put("segments/00000.m4s", b"other", attempt=1)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["segments", "segments/00000.m4s"]
    assert target.url("segments/00000.m4s") == f"file://{tmp_path}/segments/00000.m4s"


def test_of_many_writers_to_a_folder_one_wins(tmp_path):
    target, won = FolderStore(tmp_path), []

    def write(number: int) -> None:
        try:
            target.put("a", str(number).encode(), attempt=1)
        except StaleError:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read("a").body == str(*won).encode()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("a file is in the way")
    with pytest.raises(StorageError, match="out cannot be written"):
        FolderStore(tmp_path / "out").put("a", b"", attempt=1)


# --- S3


def test_objects_carry_type_caching_and_attempt(s3_server):
    bucket = s3_server.bucket()
    target, client = s3(s3_server, bucket), s3_server.client()
    expected = {
        names.PLAYLIST: ("application/vnd.apple.mpegurl", "no-cache"),
        names.segment(7): ("video/mp4", "public, max-age=31536000, immutable"),
        names.VIDEO: ("video/mp4", "no-cache"),
        names.MANIFEST: ("application/json", "no-cache"),
    }
    for key, (kind, caching) in expected.items():
        target.put(key, b"body", attempt=3)
        found = client.head_object(Bucket=bucket, Key=f"videos/fox/{key}")
        assert (found["ContentType"], found["CacheControl"]) == (kind, caching)
        assert found["Metadata"]["attempt"] == "3"


def test_the_trial_of_conditional_writes_leaves_nothing(s3_server):
    bucket = s3_server.bucket()
    s3(s3_server, bucket).put("a", b"", attempt=1)
    listed = s3_server.client().list_objects_v2(Bucket=bucket)["Contents"]
    assert [found["Key"] for found in listed] == ["videos/fox/a"]


def test_a_wrong_secret_is_refused_at_once_with_the_remedy(s3_server):
    clock = Clock()
    environ = keys(s3_server, AWS_SECRET_ACCESS_KEY="wrong")
    target = s3(s3_server, s3_server.bucket(), environ=environ, clock=clock, sleep=clock.sleep)
    with pytest.raises(AccessDeniedError, match=r"correct spec\.output\.s3\.credentialsSecret"):
        Output.take(target, videojob(), 1)
    assert clock.slept == []


def test_an_unknown_key_is_refused(s3_server):
    environ = keys(s3_server, AWS_ACCESS_KEY_ID="nobody")
    with pytest.raises(AccessDeniedError, match="refuses the credentials"):
        s3(s3_server, s3_server.bucket(), environ=environ).put("a", b"", attempt=1)


def test_missing_credentials_are_asked_for(s3_server, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    target = S3Store(location(s3_server, s3_server.bucket()), field="spec.model.source.s3")
    with pytest.raises(AccessDeniedError, match=r"needs credentials: set spec\.model\.source\.s3\.credentialsSecret"):
        target.read("a")


def test_a_missing_bucket_is_named(s3_server):
    with pytest.raises(BucketNotFoundError, match=r"spec\.output\.s3: bucket absent-bucket at http.* does not exist"):
        Output.take(s3(s3_server, "absent-bucket"), videojob(), 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"endpoint": "http://s3:7070"}, "http://s3:7070/videos/a/b%20c/index.m3u8"),
        ({"endpoint": "http://s3:7070/root/"}, "http://s3:7070/root/videos/a/b%20c/index.m3u8"),
        (
            {"endpoint": "https://s3.example", "addressing_style": "virtual"},
            "https://videos.s3.example/a/b%20c/index.m3u8",
        ),
        ({"region": "eu-west-1"}, "https://videos.s3.eu-west-1.amazonaws.com/a/b%20c/index.m3u8"),
        (
            {"region": "eu-west-1", "addressing_style": "path"},
            "https://s3.eu-west-1.amazonaws.com/videos/a/b%20c/index.m3u8",
        ),
    ],
)
def test_a_url_is_what_requests_use(fields, expected, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    where = S3Location.model_construct(**{**S3Location(bucket="videos").__dict__, "prefix": "a/b c", **fields})
    assert S3Store(where).url("index.m3u8") == expected


@pytest.fixture
def own_server() -> Iterator[S3Server]:
    """A server that the test may stop."""
    with S3Server() as server:
        yield server


def test_an_outage_is_bridged(own_server):
    bucket = own_server.bucket()
    clock = Clock(lambda: own_server.start() if len(clock.slept) == 4 else None)
    target = s3(own_server, bucket, clock=clock, sleep=clock.sleep)
    target.put("a", b"before", attempt=1)
    own_server.stop()
    target.put("b", b"after", attempt=1)
    assert clock.slept == [0.5, 1.0, 2.0, 4.0]
    assert target.read("b").body == b"after"


def test_an_outage_in_the_middle_of_an_upload_is_bridged(own_server, tmp_path):
    bucket, lock, stopped = own_server.bucket(), threading.Lock(), []
    file = tmp_path / "file"
    file.write_bytes(os.urandom(11 * PART))

    def stop(done: int, total: int) -> None:
        if not stopped:
            with lock:
                own_server.stop()
                stopped.append(done)

    def restart(_seconds: float) -> None:
        with lock:
            if len(stopped) == 1:
                own_server.start()
                stopped.append(0)

    target = s3(own_server, bucket, sleep=restart)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    target.upload("v", file, sha256=digest, attempt=1, progress=stop)
    assert len(stopped) == 2
    assert stopped[0] < 11 * PART
    assert hashlib.sha256(target.read("v").body).hexdigest() == digest
    assert "Uploads" not in own_server.client().list_multipart_uploads(Bucket=bucket)


def test_an_upload_that_fails_leaves_no_parts(s3_server, tmp_path):
    bucket = s3_server.bucket()
    target = s3(s3_server, bucket)
    file = tmp_path / "file"
    file.write_bytes(bytes(2 * PART))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        target.upload("v", file, sha256="", attempt=1, progress=interrupt)
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket)


def test_an_endless_outage_ends_in_an_error_that_names_the_server(own_server):
    bucket, clock = own_server.bucket(), Clock()
    own_server.stop()
    target = s3(own_server, bucket, clock=clock, sleep=clock.sleep)
    with pytest.raises(StorageUnavailableError, match=rf"{own_server.endpoint} did not answer for 600 s"):
        target.read("a")
    own_server.start()
    assert 570 <= clock.now <= 600
    assert max(clock.slept) == 30


def test_an_abort_ends_the_wait(own_server, caplog):
    bucket = own_server.bucket()
    own_server.stop()
    target = s3(own_server, bucket, patience=Patience(first_s=3600, longest_s=3600, total_s=7200))
    failures, waits = [], threading.Event()

    class Notice(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            waits.set()

    def read() -> None:
        try:
            target.read("a")
        except StorageUnavailableError as error:
            failures.append(error)

    notice = Notice()
    store.log.addHandler(notice)
    thread = threading.Thread(target=read)
    thread.start()
    waits.wait()
    target.abort()
    thread.join()
    store.log.removeHandler(notice)
    own_server.start()
    assert "until the worker was stopped" in str(*failures)


def deaf(server: S3Server, bucket: str) -> S3Store:
    """A store whose server never sees the conditions of a write, as if it ignored them."""
    target = s3(server, bucket)

    def strip(request, **_: object) -> None:
        for header in ("If-None-Match", "If-Match"):
            del request.headers[header]

    for operation in ("PutObject", "CompleteMultipartUpload", "DeleteObject"):
        target._client.meta.events.register(f"before-sign.s3.{operation}", strip)
    return target


def test_a_server_that_ignores_conditions_is_found_out_and_compared_by_hand(s3_server, caplog):
    target = deaf(s3_server, s3_server.bucket())
    first = target.put("a", b"first", attempt=1)
    with pytest.raises(StaleError):
        target.put("a", b"second", attempt=1)
    second = target.put("a", b"second", attempt=1, replaces=first)
    with pytest.raises(StaleError):
        target.put("a", b"third", attempt=1, replaces=first)
    assert target.read("a") == store.Stored(b"second", second)
    assert [record.message for record in caplog.records].count(
        f"{target.url('')} ignores conditional writes: make sure that no two jobs write to the same prefix"
    ) == 1


def test_an_older_attempt_is_fenced_where_conditions_are_ignored_too(s3_server):
    bucket = s3_server.bucket()
    older = Output.take(deaf(s3_server, bucket), videojob(), 1)
    older.write(names.PLAYLIST, b"older")
    newer = Output.take(deaf(s3_server, bucket), videojob(), 2)
    newer.write(names.PLAYLIST, b"newer")
    with pytest.raises(OutputConflictError):
        older.write(names.PLAYLIST, b"older again")
    assert newer.read(names.PLAYLIST).body == b"newer"


# --- Who may write


def test_a_fresh_prefix_is_claimed(any_store):
    output = Output.take(any_store, videojob(), 3, "w")
    assert not output.inherited
    assert json.loads(any_store.read(CLAIM).body) == {
        "videoJob": "default/fox",
        "uid": "u-1",
        "specDigest": videojob().spec.digest(),
        "attempt": 3,
        "writer": "w",
    }
    output.check()


@pytest.mark.parametrize("attempt", [1, 2, 7])
def test_the_same_or_a_newer_attempt_takes_over(any_store, attempt):
    older = Output.take(any_store, videojob(), 1)
    newer = Output.take(any_store, videojob(), attempt)
    assert newer.inherited
    newer.check()
    with pytest.raises(OutputConflictError, match=rf"attempt 1 has lost .* to attempt {attempt}"):
        older.check()


def test_an_older_attempt_comes_too_late(any_store):
    Output.take(any_store, videojob(), 2)
    with pytest.raises(OutputConflictError, match="belongs to attempt 2 of this VideoJob; attempt 1 comes too late"):
        Output.take(any_store, videojob(), 1)


@pytest.mark.parametrize(
    "other", [videojob(uid="u-2"), videojob(prompt="a boat"), videojob(name="boat")], ids=["uid", "spec", "name"]
)
def test_another_jobs_output_is_not_touched(any_store, other):
    Output.take(any_store, videojob(), 1)
    before = any_store.read(CLAIM)
    with pytest.raises(
        OutputConflictError, match=r"holds the output of VideoJob default/fox .*spec\.output\.s3\.prefix"
    ):
        Output.take(any_store, other, 1)
    assert any_store.read(CLAIM) == before


@pytest.mark.parametrize("key", [names.PLAYLIST, names.segment(0), names.VIDEO, names.MANIFEST, names.INIT_SEGMENT])
def test_output_that_nobody_claims_is_not_touched(any_store, key):
    any_store.put(key, b"precious", attempt=1)
    with pytest.raises(OutputConflictError, match="is there already, from another program"):
        Output.take(any_store, videojob(), 1)
    assert any_store.read(key).body == b"precious"
    assert any_store.read(CLAIM) is None


def test_a_claim_that_is_none_is_not_touched(any_store):
    any_store.put(CLAIM, b"[]", attempt=1)
    with pytest.raises(OutputConflictError, match="is not of this program"):
        Output.take(any_store, videojob(), 1)


def test_of_two_writers_the_older_one_is_fenced(any_store, tmp_path):
    older = Output.take(any_store, videojob(), 1)
    for key in (names.segment(0), names.PLAYLIST):
        older.write(key, b"older")
    newer = Output.take(any_store, videojob(), 2)
    for key in (names.segment(0), names.segment(1), names.PLAYLIST, names.MANIFEST):
        newer.write(key, b"newer")
    (tmp_path / "video").write_bytes(b"older")
    for write in (
        lambda: older.write(names.segment(0), b"older still"),
        lambda: older.write(names.segment(1), b"older"),
        lambda: older.write(names.PLAYLIST, b"older still"),
        lambda: older.write(names.MANIFEST, b"older"),
        lambda: older.upload(names.VIDEO, tmp_path / "video", hashlib.sha256(b"older").hexdigest()),
        lambda: older.remove(names.PLAYLIST),
    ):
        with pytest.raises(OutputConflictError, match="attempt 1 has lost"):
            write()
    for key in (names.segment(0), names.segment(1), names.PLAYLIST, names.MANIFEST):
        assert any_store.read(key).body == b"newer"
    assert any_store.read(names.VIDEO) is None


def test_what_an_older_attempt_slips_in_after_the_claim_is_replaced(any_store):
    older = Output.take(any_store, videojob(), 1)
    newer = Output.take(any_store, videojob(), 2)
    older.write(names.segment(0), b"older")
    newer.write(names.segment(0), b"newer")
    assert any_store.read(names.segment(0)).body == b"newer"


def test_identical_objects_of_an_older_attempt_are_left_alone(any_store):
    Output.take(any_store, videojob(), 1).write(names.segment(0), b"same")
    before = any_store.read(names.segment(0))
    Output.take(any_store, videojob(), 2).write(names.segment(0), b"same")
    assert any_store.read(names.segment(0)) == before


def test_the_digest_is_known_without_reading(any_store, tmp_path):
    output = Output.take(any_store, videojob(), 1)
    output.write("a/b", b"body")
    (tmp_path / "file").write_bytes(b"other")
    output.upload("a/c", tmp_path / "file", hashlib.sha256(b"other").hexdigest())
    assert output.digest("a/b") == hashlib.sha256(b"body").hexdigest()
    assert output.digest("a/c") == hashlib.sha256(b"other").hexdigest()
    assert output.digest("a/d") is None


def test_a_folder_that_holds_nothing_more_goes_with_its_last_file(tmp_path):
    output = Output.take(FolderStore(tmp_path / "out"), videojob(), 1)
    for key in ("a/b/c", "a/b/d", "a/e"):
        output.write(key, b"body")
    output.remove("a/b/c")
    output.remove("a/b/d")
    assert [path.name for path in (tmp_path / "out" / "a").iterdir()] == ["e"]
    output.remove("a/e")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [CLAIM]


def test_a_removed_claim_is_noticed(any_store):
    output = Output.take(any_store, videojob(), 1)
    any_store.delete(CLAIM, any_store.head(CLAIM).version)
    with pytest.raises(OutputConflictError, match="was removed during the render"):
        output.check()


class LosesReplies(MemoryStore):
    """Does every write, but its answer is lost, so that the retry is refused."""

    def put(self, key: str, body: bytes, *, attempt: int, replaces: str | None = None) -> str:
        super().put(key, body, attempt=attempt, replaces=replaces)
        raise StaleError(key)


def test_lost_replies_are_no_conflicts(tmp_path):
    target = LosesReplies()
    output = Output.take(target, videojob(), 1)
    assert not output.inherited
    output.write(names.PLAYLIST, b"one")
    output.write(names.PLAYLIST, b"two")
    (tmp_path / "video").write_bytes(b"video")
    output.upload(names.VIDEO, tmp_path / "video", hashlib.sha256(b"video").hexdigest())
    Output.take(target, videojob(), 2).write(names.PLAYLIST, b"three")
    assert target.read(names.PLAYLIST).body == b"three"
    assert target.read(names.VIDEO).body == b"video"


# --- Models


@pytest.fixture
def model(s3_server) -> tuple[S3Store, str]:
    bucket, client = s3_server.bucket(), s3_server.client()
    for key, body in {
        "m/model_index.json": b"{}",
        "m/vae/config.json": b'{"z_dim": 16}',
        "m/vae/weights.bin": b"pickle",
        "m/empty.txt": b"",
        "other/file": b"no",
    }.items():
        client.put_object(Bucket=bucket, Key=key, Body=body)
    client.put_object(Bucket=bucket, Key="m/folder/", Body=b"")
    return s3(s3_server, bucket, "m"), bucket


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".videojob-download.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_prefix_becomes_a_folder(model, tmp_path):
    source, _ = model
    heard = []
    store.download_prefix(
        source._location,
        tmp_path / "model",
        patterns=["*.json", "*.txt"],
        progress=lambda done, total: heard.append((done, total)),
        store=source,
    )
    assert files(tmp_path / "model") == {
        "model_index.json": b"{}",
        "vae/config.json": b'{"z_dim": 16}',
        "empty.txt": b"",
    }
    assert heard[-1] == (15, 15)


def test_only_what_changed_is_fetched_again(model, tmp_path, s3_server):
    source, bucket = model
    fetched = []

    def count(params, **_: object) -> None:
        fetched.append(params["Key"])

    store.download_prefix(source._location, tmp_path, store=source)
    (tmp_path / "vae/weights.bin").unlink()
    s3_server.client().put_object(Bucket=bucket, Key="m/vae/config.json", Body=b'{"z_dim": 48}')
    source._client.meta.events.register("before-parameter-build.s3.GetObject", count)
    store.download_prefix(source._location, tmp_path, store=source)
    assert sorted(fetched) == ["m/vae/config.json", "m/vae/weights.bin"]
    assert files(tmp_path)["vae/config.json"] == b'{"z_dim": 48}'


def test_a_big_object_comes_in_ranges_through_an_outage(own_server, tmp_path):
    bucket, body, lock, down = own_server.bucket(), os.urandom(70 * 2**20 + 7), threading.Lock(), []
    own_server.client().put_object(Bucket=bucket, Key="m/weights.safetensors", Body=body)

    def restart(_seconds: float) -> None:
        with lock:
            if not down:
                own_server.start()
                down.append(1)

    source = s3(own_server, bucket, "m", sleep=restart)
    listed = list(source.listing())
    own_server.stop()
    source.listing = lambda: iter(listed)
    store.download_prefix(source._location, tmp_path, store=source)
    assert files(tmp_path) == {"weights.safetensors": body}


def test_an_object_that_changes_under_the_download_is_noticed(model, tmp_path):
    source, _ = model
    listed = [Listed(found.key, found.size_bytes, '"0"') for found in source.listing()]
    source.listing = lambda: iter(listed)
    with pytest.raises(StorageError, match="changed while it was read"):
        store.download_prefix(source._location, tmp_path, store=source)


def test_an_empty_prefix_holds_no_model(s3_server, tmp_path):
    source = s3(s3_server, s3_server.bucket(), "nothing")
    with pytest.raises(ModelNotFoundError, match=r"spec\.model\.source\.s3: there is nothing under http.*/nothing/"):
        store.download_prefix(source._location, tmp_path, store=source)


@pytest.mark.parametrize(
    "key", ["../escape", "a/../../escape", "/etc/passwd", "a//b", "a\\b", "nul\0", "./a", "x" * 300]
)
def test_an_object_name_that_is_no_safe_file_name_is_refused(model, tmp_path, key):
    source, _ = model
    source.listing = lambda: iter([Listed(key, 1, '"0"')])
    with pytest.raises(ModelInvalidError, match="no safe file name"):
        store.download_prefix(source._location, tmp_path / "model", store=source)


def test_keys_with_a_prefix_come_first(s3_server, monkeypatch, tmp_path):
    bucket = s3_server.bucket()
    s3_server.client().put_object(Bucket=bucket, Key="m/a.json", Body=b"{}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "for-the-output-only")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "for-the-output-only")
    monkeypatch.setenv("MODEL_AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("MODEL_AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    where = location(s3_server, bucket, "m")
    with pytest.raises(AccessDeniedError, match=r"spec\.model\.source\.s3"):
        store.download_prefix(where, tmp_path)
    store.download_prefix(where, tmp_path, env_prefix="MODEL_")
    assert files(tmp_path) == {"a.json": b"{}"}
