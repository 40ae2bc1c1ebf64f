"""Digests of chunks, over data in one piece or in several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import crc32c
import xxhash


class Checksum(StrEnum):
    """Digest of a chunk's bytes."""

    NONE = "none"
    CRC32C = "crc32c"
    XXH3_64 = "xxh3_64"


def _crc32c(parts: Sequence[Any]) -> int:
    value = 0
    for part in parts:
        value = crc32c.crc32c(part, value)
    return value


def _xxh3_64(parts: Sequence[Any]) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


#: Digest of contiguous buffers, one after the other.
CHECKSUMS: dict[Checksum, Callable[[Sequence[Any]], int]] = {
    Checksum.NONE: lambda parts: 0,
    Checksum.CRC32C: _crc32c,
    Checksum.XXH3_64: _xxh3_64,
}
