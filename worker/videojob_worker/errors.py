"""The errors that end a render, each with the reason that its last words carry.

    RenderError
    ├── InvalidSpecError          the model cannot render this spec
    ├── ModelNotFoundError        the source holds no such model
    ├── ModelInvalidError         a file of the model is missing, broken or of an unknown class
    ├── NotFiniteError            latents or hidden states became NaN or infinite
    ├── PeerLostError             a rank vanished or stopped answering
    └── StorageError
        ├── AccessDeniedError         the credentials are refused
        ├── BucketNotFoundError       the bucket does not exist
        ├── OutputConflictError       another render writes under the same prefix
        └── StorageUnavailableError   no answer for minutes

Library errors are wrapped at one place each, with their cause; the message says what to do.
"""

from __future__ import annotations

from typing import ClassVar

from videojob_api.progress import Reason


class RenderError(Exception):
    """Base of all foreseen ends of a render."""

    reason: ClassVar[Reason] = Reason.CRASHED


class InvalidSpecError(RenderError):
    """The model cannot render this spec."""

    reason = Reason.INVALID_SPEC


class ModelNotFoundError(RenderError):
    """The source holds no such model."""

    reason = Reason.MODEL_NOT_FOUND


class ModelInvalidError(RenderError):
    """A file of the model is missing, broken or of an unknown class."""

    reason = Reason.MODEL_INVALID


class NotFiniteError(RenderError):
    """Latents or hidden states became NaN or infinite; the same spec would end so again."""

    reason = Reason.NOT_FINITE


class PeerLostError(RenderError):
    """A rank vanished or stopped answering."""

    reason = Reason.PEER_LOST


class StorageError(RenderError):
    """Object storage refused or failed."""

    reason = Reason.STORAGE_UNAVAILABLE


class AccessDeniedError(StorageError):
    """The credentials are refused."""

    reason = Reason.ACCESS_DENIED


class BucketNotFoundError(StorageError):
    """The bucket does not exist."""

    reason = Reason.BUCKET_NOT_FOUND


class OutputConflictError(StorageError):
    """Another render writes under the same prefix."""

    reason = Reason.OUTPUT_CONFLICT


class StorageUnavailableError(StorageError):
    """Storage did not answer for minutes."""
