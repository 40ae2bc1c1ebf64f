"""A KV cache in this process as the chunks of a push."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sale_prefill.kv_frames import PUSH_FRAMES, ChunkFrame
from sale_prefill.v1 import kv_pb2

from .checksums import ALGORITHM_NUMBERS, digest_function
from .kv import KvCache
from .options import Checksum
from .tokens import TokenIds, token_array, token_digest

Runs = list[tuple[int, int]]


class KvChunks:
    """The chunks of a whole cache: layer by layer, keys before values, in order of tokens.

    Args:
        cache: tokens from the first on, in every layer.
        token_ids: the tokens it is of; those that it knows where left out.
        chunk_bytes: target size; a chunk is a whole number of tokens.
        checksum: digest of each.

    Raises:
        ValueError: a part of a cache, or one of unknown or other tokens.
    """

    #: Segment that the bytes are in; empty where they are in the messages.
    transfer_id = ""

    def __init__(self, cache: KvCache, token_ids: TokenIds | None, chunk_bytes: int, checksum: Checksum) -> None:
        cache.require_whole("a session is made of")
        self.token_ids = _known_tokens(cache, token_ids)
        self._cache = cache
        self._checksum = checksum
        self._digest = digest_function(checksum)
        self._token_bytes = cache.spec.layer_token_bytes
        self._tokens_per_chunk = max(1, min(chunk_bytes // self._token_bytes, cache.num_tokens))
        self._per_tensor = -(-cache.num_tokens // self._tokens_per_chunk)
        self.total_chunks = 2 * cache.spec.num_layers * self._per_tensor

    def manifest(self) -> kv_pb2.KvManifest:
        """What the chunks are of."""
        cache = self._cache
        return kv_pb2.KvManifest(
            spec=cache.spec.to_proto(),
            range=kv_pb2.KvRange(token_end=cache.num_tokens, layer_end=cache.spec.num_layers),
            total_bytes=cache.num_bytes,
            total_chunks=self.total_chunks,
            checksum_algorithm=ALGORITHM_NUMBERS[self._checksum],
            token_digest=token_digest(self.token_ids),
        )

    def num_bytes(self, runs: Runs) -> int:
        """Bytes of the chunks in half-open runs of indices."""
        return sum(self._place(index)[3] for start, end in runs for index in range(start, end)) * self._token_bytes

    def frames(self, runs: Runs) -> Iterator[tuple[bytes, int]]:
        """Messages of the chunks in half-open runs of indices, each with the bytes of KV in it."""
        for start, end in runs:
            for index in range(start, end):
                yield self._frame(index)

    def _place(self, index: int) -> tuple[int, int, int, int]:
        """Layer, kind, first token and number of tokens of a chunk."""
        tensor, part = divmod(index, self._per_tensor)
        start = part * self._tokens_per_chunk
        return tensor // 2, tensor % 2, start, min(self._tokens_per_chunk, self._cache.num_tokens - start)

    def _part(
        self, buffer: npt.NDArray[np.uint8], layer: int, kind: int, start: int, count: int
    ) -> npt.NDArray[np.uint8]:
        """A chunk of memory that is laid out as the cache."""
        tensor, run = buffer[layer, kind], slice(start, start + count)
        part: npt.NDArray[np.uint8] = tensor[run] if self._cache.spec.layout == "THD" else tensor[:, run]
        return part

    def _frame(self, index: int) -> tuple[bytes, int]:
        layer, kind, start, count = self._place(index)
        part = self._part(self._cache.buffer, layer, kind, start, count)
        flat: npt.NDArray[np.uint8] = np.ascontiguousarray(part).reshape(-1)
        data = flat.data
        checksum = 0 if self._digest is None else self._digest(data)
        return PUSH_FRAMES.encode(ChunkFrame(index, layer, kind + 1, start, count, checksum, data)), data.nbytes


def split_runs(runs: Runs, count: int) -> list[Runs]:
    """Half-open runs of indices in up to `count` parts of nearly the same length, none empty; none for no indices."""
    total = sum(end - start for start, end in runs)
    count = min(count, total)
    edges = [total * part // count for part in range(count + 1)] if count else []
    parts: list[Runs] = [[] for _ in edges[1:]]
    first = 0  # of the run, counted over all runs
    for start, end in runs:
        for part, (low, high) in enumerate(pairwise(edges)):
            low, high = max(low, first), min(high, first + end - start)
            if low < high:
                parts[part].append((start + low - first, start + high - first))
        first += end - start
    return parts


def _known_tokens(cache: KvCache, token_ids: TokenIds | None) -> npt.NDArray[np.uint32]:
    tokens = cache.token_ids if token_ids is None else token_array(token_ids)
    if tokens is None:
        raise ValueError("the KV cache does not say which tokens it is of; pass token_ids")
    if len(tokens) != cache.num_tokens:
        raise ValueError(f"there are {len(tokens)} token ids, and the KV cache holds {cache.num_tokens} tokens")
    if cache.token_digest and token_digest(tokens) != cache.token_digest:
        raise ValueError("the token ids are not those that the KV cache was computed from: their digests differ")
    return tokens
