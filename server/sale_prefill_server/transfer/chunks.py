"""KV of a range as a planned series of chunks: which part is where. The same for the same arguments, so that a broken
stream resumes at an index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from sale_prefill_server.errors import invalid_field
from sale_prefill_server.kv.pool import KvShape

DEFAULT_CHUNK_BYTES = 2**20
MINIMUM_CHUNK_BYTES = 2**12
#: Of chunks whose bytes are in a segment. An announcement costs the two sides together as much as 2.5 MiB of copy, so
#: they are large; the most is what a stream may keep a copying thread from others' streams for, some milliseconds.
SEGMENT_CHUNK_BYTES = 2**23
MAXIMUM_SEGMENT_CHUNK_BYTES = 2**26


class Layout(StrEnum):
    """Axis order of a chunk: heads x tokens x head_dim, or tokens x heads x head_dim."""

    HTD = "HTD"
    THD = "THD"


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


def layer_token_bytes(shape: KvShape) -> int:
    """Bytes of one token's K (or V) in one layer."""
    return shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize


@dataclass(frozen=True)
class PlannedChunk:
    """A run of tokens of one layer's K (`kind` 0) or V (`kind` 1)."""

    index: int
    layer: int
    kind: int
    token_start: int
    num_tokens: int


class ChunkPlan:
    """The chunks of a range: span by span, layer by layer, K before V, in order of tokens.

    Args:
        range_: resolved range.
        shape: of the model's KV.
        chunk_bytes: target size; a chunk is a whole number of tokens.
        boundaries: positions inside the range where a new span of tokens begins, ascending: a stream of KV that is
            being computed sends a span in all layers before the next. Empty for one span.
    """

    def __init__(self, range_: KvRange, shape: KvShape, chunk_bytes: int, boundaries: Sequence[int] = ()) -> None:
        token_bytes = layer_token_bytes(shape)
        self.range = range_
        self._token_bytes = token_bytes
        self.tokens_per_chunk = max(1, min(chunk_bytes // token_bytes, range_.num_tokens))
        self.chunk_bytes = self.tokens_per_chunk * token_bytes
        self.total_bytes = 2 * range_.num_layers * range_.num_tokens * token_bytes
        edges = (range_.token_start, *boundaries, range_.token_end)
        self._spans = list(pairwise(edges))
        self._first_chunks = [0]
        for start, end in self._spans:
            chunks = 2 * range_.num_layers * -(-(end - start) // self.tokens_per_chunk)
            self._first_chunks.append(self._first_chunks[-1] + chunks)

    @property
    def total_chunks(self) -> int:
        """Chunks of the range."""
        return self._first_chunks[-1]

    def num_bytes(self, index: int) -> int:
        """Bytes of chunk `index`."""
        return self[index].num_tokens * self._token_bytes

    def __getitem__(self, index: int) -> PlannedChunk:
        """What chunk `index` holds."""
        span = bisect_right(self._first_chunks, index) - 1
        start, end = self._spans[span]
        per_tensor = -(-(end - start) // self.tokens_per_chunk)
        tensor, part = divmod(index - self._first_chunks[span], per_tensor)
        first = start + part * self.tokens_per_chunk
        count = min(self.tokens_per_chunk, end - first)
        return PlannedChunk(index, self.range.layer_start + tensor // 2, tensor % 2, first, count)
