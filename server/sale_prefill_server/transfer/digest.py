"""Digests of bytes that come in pieces."""

from __future__ import annotations

from typing import Any, Protocol

import crc32c
import xxhash

from sale_prefill_server.transfer.checksums import Checksum


class RunningDigest(Protocol):
    """Takes bytes in order; the value is that of all of them together."""

    def update(self, data: Any) -> None:
        """Adds a contiguous buffer."""
        ...

    def value(self) -> int:
        """Digest so far, as `KvChunk.checksum` has it."""
        ...


class _NoDigest:
    def update(self, data: Any) -> None:
        pass

    def value(self) -> int:
        return 0


class _Crc32c:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any) -> None:
        self._value = crc32c.crc32c(data, self._value)

    def value(self) -> int:
        return self._value


class _Xxh3:
    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, data: Any) -> None:
        self._state.update(data)

    def value(self) -> int:
        value: int = self._state.intdigest()
        return value


_DIGESTS: dict[Checksum, type[_NoDigest] | type[_Crc32c] | type[_Xxh3]] = {
    Checksum.NONE: _NoDigest,
    Checksum.CRC32C: _Crc32c,
    Checksum.XXH3_64: _Xxh3,
}


def running_digest(checksum: Checksum) -> RunningDigest:
    """A digest of no bytes yet."""
    return _DIGESTS[checksum]()
