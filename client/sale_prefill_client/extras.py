"""Optional dependencies: imported when first needed, with the way out where one is missing."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class MissingExtraError(ImportError):
    """A feature needs packages that the base install leaves out; the message gives the command that adds them."""


@contextmanager
def needing(extra: str, purpose: str) -> Iterator[None]:
    """Turns a missing module within the block into MissingExtraError.

    Args:
        extra: extra of the distribution that brings it.
        purpose: what needs it, for the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {error.name!r}, which is not installed; "
            f"run: pip install 'sale-prefill[{extra}]'",
            name=error.name,
        ) from error


def require(module_name: str, *, extra: str, purpose: str) -> Any:
    """Import an optional module; MissingExtraError where it is not installed."""
    with needing(extra, purpose):
        return importlib.import_module(module_name)
