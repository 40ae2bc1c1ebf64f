"""Why a model cannot be used. Each error names the thing, the value and the way out."""

from __future__ import annotations

from typing import ClassVar


class ModelError(Exception):
    """A model that cannot be used.

    Args:
        message: what is wrong, with the path or name and the value found.
        remedy: what the user can do about it.

    Attributes:
        reason: the cause, for programs; one a class.
    """

    reason: ClassVar[str] = "MODEL_ERROR"

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}. {remedy}.")
        self.message = message
        self.remedy = remedy


class ModelNotFoundError(ModelError):
    """Nothing of that name: no directory, no file, no hub repository."""

    reason = "MODEL_NOT_FOUND"


class ModelUnreadableError(ModelError):
    """The operating system refuses to read it."""

    reason = "MODEL_UNREADABLE"


class ModelInvalidError(ModelError):
    """It is there, but it is no whole model: no or a corrupt config.json, weights missing or cut short."""

    reason = "MODEL_INVALID"


class ModelUnsupportedError(ModelError):
    """A whole model, of an architecture that this server cannot run."""

    reason = "MODEL_UNSUPPORTED"


class ModelDownloadError(ModelError):
    """The download did not succeed: no network, or no such package or repository version."""

    reason = "MODEL_DOWNLOAD_FAILED"


class ModelCorruptError(ModelError):
    """Downloaded bytes are not the bytes that were asked for."""

    reason = "MODEL_CORRUPT"


class ModelCacheError(ModelError):
    """The cache folder cannot be written."""

    reason = "MODEL_CACHE_FAILED"
