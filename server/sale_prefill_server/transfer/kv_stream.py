"""KV of a session as a planned series of chunks: what is where, and its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import crc32c
import torch
import xxhash

from sale_prefill_server.errors import invalid_field
from sale_prefill_server.kv.pool import KvShape, SessionKv

DEFAULT_CHUNK_BYTES = 2**20
MINIMUM_CHUNK_BYTES = 2**12


class Layout(StrEnum):
    """Axis order of a chunk: heads x tokens x head_dim, or tokens x heads x head_dim."""

    HTD = "HTD"
    THD = "THD"


class Checksum(StrEnum):
    """Digest of a chunk's bytes."""

    NONE = "none"
    CRC32C = "crc32c"
    XXH3_64 = "xxh3_64"


CHECKSUMS: dict[Checksum, Callable[[bytes], int]] = {
    Checksum.NONE: lambda data: 0,
    Checksum.CRC32C: crc32c.crc32c,
    Checksum.XXH3_64: xxhash.xxh3_64_intdigest,
}


@dataclass(frozen=True)
class KvRange:
    """Tokens [token_start, token_end) of layers [layer_start, layer_end)."""

    token_start: int
    token_end: int
    layer_start: int
    layer_end: int

    @property
    def num_tokens(self) -> int:
        """Tokens of each layer."""
        return self.token_end - self.token_start

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.layer_end - self.layer_start


def resolve_range(asked: KvRange, shape: KvShape, num_tokens: int) -> KvRange:
    """`asked` with 0 ends filled in.

    Raises:
        PrefillError: INVALID_FIELD, empty or past what the session holds.
    """
    token_end = asked.token_end or num_tokens
    layer_end = asked.layer_end or shape.num_layers
    if not 0 <= asked.token_start < token_end <= num_tokens:
        raise invalid_field("range", f"tokens [{asked.token_start}, {token_end}) of a session that holds {num_tokens}")
    if not 0 <= asked.layer_start < layer_end <= shape.num_layers:
        raise invalid_field(
            "range", f"layers [{asked.layer_start}, {layer_end}) of a model that has {shape.num_layers}"
        )
    return KvRange(asked.token_start, token_end, asked.layer_start, layer_end)


@dataclass(frozen=True)
class PlannedChunk:
    """A run of tokens of one layer's K (`kind` 0) or V (`kind` 1)."""

    index: int
    layer: int
    kind: int
    token_start: int
    num_tokens: int


class KvStream:
    """The chunks of a range, the same for the same arguments, so that a broken stream resumes at an index.

    Chunks go layer by layer, K before V, in order of tokens.

    Args:
        kv: source; the caller holds a reference while it reads.
        range_: resolved range.
        layout: axis order.
        checksum: digest of each chunk.
        chunk_bytes: target size; a chunk is a whole number of tokens.
    """

    def __init__(self, kv: SessionKv, range_: KvRange, layout: Layout, checksum: Checksum, chunk_bytes: int) -> None:
        shape = kv.shape
        token_bytes = shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        self._kv = kv
        self._layout = layout
        self._checksum = CHECKSUMS[checksum]
        self._range = range_
        self._tokens_per_chunk = max(1, chunk_bytes // token_bytes)
        self._chunks_per_tensor = -(-range_.num_tokens // self._tokens_per_chunk)
        self.total_bytes = 2 * range_.num_layers * range_.num_tokens * token_bytes
        self.total_chunks = 2 * range_.num_layers * self._chunks_per_tensor

    def plan(self, index: int) -> PlannedChunk:
        """What chunk `index` holds."""
        tensor, part = divmod(index, self._chunks_per_tensor)
        start = self._range.token_start + part * self._tokens_per_chunk
        end = min(start + self._tokens_per_chunk, self._range.token_end)
        return PlannedChunk(index, self._range.layer_start + tensor // 2, tensor % 2, start, end - start)

    def read(self, chunk: PlannedChunk) -> tuple[bytes, int]:
        """The bytes of a chunk and their digest; copies from the device, so call it off the event loop."""
        end = chunk.token_start + chunk.num_tokens
        part = torch.cat(self._kv.segments(chunk.layer, chunk.kind, chunk.token_start, end))
        if self._layout is Layout.HTD:
            part = part.transpose(0, 1)
        data = part.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return data, self._checksum(data)
