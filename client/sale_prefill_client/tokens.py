"""Token ids: checks, digest, and reading them out of text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import InvalidTokenError

TokenIds = Sequence[int] | npt.NDArray[np.integer]

_ID_LIMIT = 1 << 32


def token_array(token_ids: TokenIds) -> npt.NDArray[np.uint32]:
    """Token ids as `[num_tokens]` uint32.

    Raises:
        InvalidTokenError: an entry is no integer from 0 to 2**32 - 1; names its index and value.
        ValueError: not one-dimensional.
    """
    try:
        array = np.asarray(token_ids)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"token ids must be one flat sequence of integers: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"token ids must be one flat sequence of integers; their shape is {list(array.shape)}")
    if array.size == 0:
        return np.empty(0, dtype=np.uint32)
    if array.dtype.kind not in "iu":
        _refuse_first(token_ids)
    outside = np.flatnonzero((array < 0) | (array >= _ID_LIMIT))
    if outside.size:
        raise _invalid(int(outside[0]), int(array[outside[0]]))
    return array.astype(np.uint32)


def _refuse_first(token_ids: TokenIds) -> None:
    for index, value in enumerate(token_ids):
        is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not is_integer or not 0 <= value < _ID_LIMIT:
            raise _invalid(index, value)


def _invalid(index: int, value: object) -> InvalidTokenError:
    return InvalidTokenError(
        f"token_ids[{index}] is {value!r}, which is no integer from 0 to {_ID_LIMIT - 1}",
        metadata={"index": str(index), "token_id": str(value)},
    )


def token_digest(token_ids: TokenIds) -> bytes:
    """SHA-256 of the ids as little-endian uint32, as `Session.token_digest` and `KvCache.token_digest` hold it."""
    return hashlib.sha256(token_array(token_ids).astype("<u4").tobytes()).digest()


def parse_token_ids(text: str) -> list[int]:
    """Token ids out of text: a JSON list, or integers separated by white space or commas.

    Raises:
        ValueError: names the first entry that is no token id, and its position from 0.
    """
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            entries = json.loads(stripped)
        except json.JSONDecodeError as error:
            raise ValueError(f"the token ids are not valid JSON: {error}") from error
    else:
        entries = [entry for entry in re.split(r"[\s,]+", stripped) if entry]
    return [_parse_one(index, entry) for index, entry in enumerate(entries)]


def _parse_one(index: int, entry: object) -> int:
    valid = entry.isascii() and entry.isdigit() if isinstance(entry, str) else type(entry) is int
    number = int(entry) if valid else -1  # type: ignore[call-overload]
    if not 0 <= number < _ID_LIMIT:
        raise ValueError(f"entry {index} is {entry!r}, which is no token id (an integer from 0 to {_ID_LIMIT - 1})")
    return number
