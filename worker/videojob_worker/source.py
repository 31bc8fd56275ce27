"""Brings the model to this node: one rank fetches, the others of the node wait for it.

``__main__`` asks for the folder; ``wan`` and ``conditions`` read it. S3 is ``store``'s business.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download

from videojob_api import names
from videojob_api.spec import HuggingFaceSource, Source

from . import store
from .errors import AccessDeniedError, ModelNotFoundError, StorageUnavailableError

log = logging.getLogger(__name__)

FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]  # never pickles, never code
_END_BYTES = 64 * 2**10
_HTTPError: type[Exception] = hub.HTTPError  # type: ignore[attr-defined] # of whichever HTTP library it uses


def fetch(source: Source, scratch: Path) -> Path:
    """The model's folder on this node.

    Raises:
        ModelNotFoundError, AccessDeniedError, StorageUnavailableError: with the remedy.
    """
    if source.local_path is not None:
        return _existing(Path(source.local_path), "spec.model.source.localPath")
    if source.persistent_volume_claim is not None:
        folder = Path(names.CLAIM_DIR) / source.persistent_volume_claim.path
        return _existing(folder, "spec.model.source.persistentVolumeClaim.path")
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if source.s3 is not None:
            store.download_prefix(source.s3, scratch / "model", env_prefix="MODEL_", patterns=FILES)
            return _existing(scratch / "model", "spec.model.source.s3")
        assert source.hugging_face is not None  # noqa: S101 - the spec's rules
        return _from_hub(source.hugging_face, scratch)


def fingerprint(folder: Path) -> str:
    """Tells two models apart without reading them whole: by their configurations, and by each file's size and ends."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.glob("*/*") if path.suffix in (".json", ".safetensors")):
        if file.parent.name.startswith("."):
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as content:
            for begin in (0, max(0, size - _END_BYTES)):
                content.seek(begin)
                digest.update(content.read(_END_BYTES))
    return digest.hexdigest()


def _existing(folder: Path, field: str) -> Path:
    if not (folder / "model_index.json").is_file():
        raise ModelNotFoundError(
            f"{field}: there is no diffusers model in {folder}, which has no model_index.json; "
            "`videojob tiny-model DIR` makes a small one to try with"
        )
    return folder


def _from_hub(source: HuggingFaceSource, scratch: Path) -> Path:
    name = f"{source.repository}@{source.revision}"
    log.info("fetching %s", name)
    try:
        folder = snapshot_download(
            source.repository, revision=source.revision, cache_dir=scratch / "hub", allow_patterns=FILES
        )
    except hub.GatedRepoError as error:
        raise AccessDeniedError(
            f"{name} is gated: accept its licence and give spec.model.source.huggingFace.tokenSecret"
        ) from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        raise ModelNotFoundError(
            f"{name} does not exist, or is private and no spec.model.source.huggingFace.tokenSecret is given"
        ) from error
    except (_HTTPError, OSError, ValueError) as error:
        if _refused(error):
            raise AccessDeniedError(
                f"{name} is closed to this token: correct spec.model.source.huggingFace.tokenSecret"
            ) from error
        raise StorageUnavailableError(f"{name} cannot be fetched: {error}") from error
    return _existing(Path(folder), "spec.model.source.huggingFace")


def _refused(error: BaseException | None) -> bool:
    """Whether the hub's answer, wrapped or not, was that the token does not do."""
    if isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (401, 403):
        return True
    return error is not None and _refused(error.__cause__)
