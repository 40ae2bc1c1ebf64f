"""Digests of KV chunks, by the names of `ChecksumAlgorithm`."""

from __future__ import annotations

from collections.abc import Callable

import crc32c
import xxhash

from sale_prefill.v1 import kv_pb2

from .options import Checksum

Buffer = bytes | memoryview

ALGORITHM_NUMBERS: dict[str, kv_pb2.ChecksumAlgorithm] = {
    "none": kv_pb2.CHECKSUM_ALGORITHM_NONE,
    "crc32c": kv_pb2.CHECKSUM_ALGORITHM_CRC32C,
    "xxh3_64": kv_pb2.CHECKSUM_ALGORITHM_XXH3_64,
}


def _crc32c(data: Buffer) -> int:
    digest: int = crc32c.crc32c(data)
    return digest


def _xxh3_64(data: Buffer) -> int:
    digest: int = xxhash.xxh3_64_intdigest(data)
    return digest


def digest_function(name: Checksum) -> Callable[[Buffer], int] | None:
    """The function that digests a chunk's data; None for `"none"`.

    Raises:
        ValueError: no such algorithm.
    """
    if name == "none":
        return None
    if name == "crc32c":
        return _crc32c
    if name == "xxh3_64":
        return _xxh3_64
    raise ValueError(f"checksum is {name!r}; choose from {', '.join(ALGORITHM_NUMBERS)}")
