"""Models come from a folder, a claim, S3 or the Hugging Face Hub, and what is missing or closed is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from testcluster.s3 import S3Server
from videojob_api.spec import Source
from videojob_worker import source
from videojob_worker.errors import AccessDeniedError, BucketNotFoundError, ModelNotFoundError

FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b'{"_class_name": "WanTransformer3DModel"}',
    "transformer/diffusion_pytorch_model.safetensors": b"weights" * 1000,
    "tokenizer/spiece.model": b"pieces",
}
UNWANTED = {
    "text_encoder/pytorch_model.bin": b"a pickle",
    "vae/model.pt": b"a pickle",
    "transformer/custom.py": b"code",
    "README.md": b"words",
}


def given(**fields) -> Source:
    return Source.model_validate(fields)


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# --- A folder, a claim


def test_a_models_fingerprint_tells_other_weights_and_settings_apart(tmp_path):
    from videojob_worker import tiny

    for name, options in {"one": {}, "same": {}, "weights": {"seed": 1}, "layers": {"layers": 7}}.items():
        tiny.save(tmp_path / name, **options)
    (tmp_path / "same" / "README.md").write_text("other words")
    prints = {folder.name: source.fingerprint(folder) for folder in tmp_path.iterdir()}
    assert prints["one"] == prints["same"]
    config = tmp_path / "same" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("3.0", "5.0"))
    prints["settings"] = source.fingerprint(tmp_path / "same")
    assert len(set(prints.values())) == 4


def test_a_folder_is_used_where_it_is(tiny_model, tmp_path):
    assert source.fetch(given(localPath=str(tiny_model)), tmp_path) == tiny_model
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"localPath": "/nowhere"}, "spec.model.source.localPath: there is no diffusers model in /nowhere"),
        (
            {"persistentVolumeClaim": {"claimName": "weights", "path": "wan/absent"}},
            "spec.model.source.persistentVolumeClaim.path: there is no diffusers model in /models/wan/absent",
        ),
    ],
)
def test_a_folder_without_a_model_is_named_by_its_field_with_the_remedy(fields, said, tmp_path):
    with pytest.raises(ModelNotFoundError, match=f"{said}.*`videojob tiny-model DIR`"):
        source.fetch(given(**fields), tmp_path)


# --- S3


@dataclass
class Bucket:
    """A model in S3."""

    server: S3Server
    name: str

    def put(self, key: str, body: bytes) -> None:
        self.server.client().put_object(Bucket=self.name, Key=f"models/wan/{key}", Body=body)

    def source(self, prefix: str = "models/wan") -> Source:
        return given(s3={"bucket": self.name, "prefix": prefix, "endpoint": self.server.endpoint})


@pytest.fixture
def bucket(s3_server, monkeypatch) -> Bucket:
    monkeypatch.setenv("MODEL_AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("MODEL_AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    made = Bucket(s3_server, s3_server.bucket())
    for key, body in (FILES | UNWANTED).items():
        made.put(key, body)
    return made


def test_a_model_comes_from_s3_without_pickles_and_code(bucket, tmp_path):
    assert files(source.fetch(bucket.source(), tmp_path)) == FILES


def test_only_what_is_missing_is_fetched_again(bucket, tmp_path):
    folder = source.fetch(bucket.source(), tmp_path)
    lost, kept = folder / "model_index.json", folder / "transformer/config.json"
    lost.unlink()
    before = kept.stat()
    assert files(source.fetch(bucket.source(), tmp_path)) == FILES
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_ranks_of_one_node_fetch_once(bucket, tmp_path):
    inodes = []

    def rank() -> None:
        inodes.append((source.fetch(bucket.source(), tmp_path) / "model_index.json").stat().st_ino)

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(inodes) == 4
    assert len(set(inodes)) == 1


def test_a_prefix_without_a_model_is_named(bucket, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"spec.model.source.s3: there is no diffusers model"):
        source.fetch(bucket.source("models/wan/transformer"), tmp_path)


def test_a_missing_bucket_is_named(bucket, tmp_path):
    bucket.name = "absent"
    with pytest.raises(BucketNotFoundError, match=r"spec.model.source.s3: bucket absent"):
        source.fetch(bucket.source(), tmp_path)


def test_refused_keys_are_named(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDeniedError, match=r"correct spec.model.source.s3.credentialsSecret"):
        source.fetch(bucket.source(), tmp_path)


# --- The hub, played by a server on loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys
from pathlib import Path
from videojob_api.spec import Source
from videojob_worker import errors, source

given = Source.model_validate({"huggingFace": {"repository": "wan/tiny", "revision": sys.argv[1]}})
try:
    print(source.fetch(given, Path(sys.argv[2])))
except errors.RenderError as error:
    print(error.reason, error)
"""


@dataclass
class Hub:
    """Serves the files of one repository, or refuses everything with a status and the hub's word for it."""

    status: int = 200
    code: str = ""
    breaks_off: bool = False  # in the middle of every file
    asked: list[str] = field(default_factory=list)

    def fetch(self, scratch: Path) -> str:
        """What a process says that fetches from here."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", FETCH, COMMIT, str(scratch)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
        return done.stdout.strip()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        if self.status != 200:
            return self.status, {"X-Error-Code": self.code} if self.code else {}, b""
        if path.startswith(f"/api/models/wan/tiny/tree/{COMMIT}"):
            entries = [
                {"type": "file", "oid": f"{number:040x}", "size": len(body), "path": name}
                for number, (name, body) in enumerate((FILES | UNWANTED).items())
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        name = path.removeprefix(f"/wan/tiny/resolve/{COMMIT}/")
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{name.replace("/", "-")}"'}, (FILES | UNWANTED)[name]

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - the handler has its own self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = hub.answer(self.path)
                self.send_response(status)
                for header, value in headers.items():
                    self.send_header(header, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    breaks_off = hub.breaks_off and "/resolve/" in self.path
                    self.wfile.write(body[: len(body) // 2] if breaks_off else body)
                    self.close_connection = breaks_off

            do_HEAD = do_GET  # noqa: N815 - the library's name

            def log_message(self, *_: object) -> None: ...

        return Handler


def test_a_model_comes_from_the_hub_without_pickles_and_code(tmp_path):
    hub = Hub()
    folder = Path(hub.fetch(tmp_path))
    assert files(folder) == FILES
    assert not [path for path in hub.asked if Path(path).suffix in (".bin", ".pt", ".py", ".md")]


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "GatedRepo", "AccessDenied .* accept its licence and give spec.model.source.huggingFace.tokenSecret"),
        (401, "RepoNotFound", "ModelNotFound wan/tiny@.* is private and no spec.model.source.huggingFace.tokenSecret"),
        (404, "RevisionNotFound", "ModelNotFound wan/tiny@.* does not exist"),
        (401, "", "AccessDenied .* correct spec.model.source.huggingFace.tokenSecret"),
        (403, "", "AccessDenied .* correct spec.model.source.huggingFace.tokenSecret"),
        (410, "", "StorageUnavailable wan/tiny@.* cannot be fetched"),
    ],
)
def test_the_hubs_refusals_are_named_with_the_remedy(status, code, said, tmp_path):
    heard = Hub(status, code).fetch(tmp_path)
    assert re.match(said, heard), heard


def test_a_hub_that_breaks_off_may_be_asked_again_later(tmp_path):
    assert "StorageUnavailable wan/tiny@" in Hub(breaks_off=True).fetch(tmp_path)
