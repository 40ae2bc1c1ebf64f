"""Keyword arguments shared by the ways to decode."""

from __future__ import annotations

from .options import DecodeOptions
from .progress import PrefillCallback


class DecodeArguments(DecodeOptions, total=False):
    """What `decode` takes by keyword: the options of `DecodeOptions`, and what is not part of the request."""

    text: str | None
    progress: bool | PrefillCallback
    timeout_seconds: float | None
