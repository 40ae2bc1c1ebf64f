"""Puts the chunks of a KV stream in their place in one buffer, trusting nothing that they say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sale_prefill.kv_frames import ChunkFrame
from sale_prefill.v1 import kv_pb2

from .checksums import ALGORITHM_NUMBERS, digest_function
from .errors import ChecksumMismatchError, ProtocolError
from .kv import KvCache
from .options import Checksum, Layout, Range
from .results import KvSpec
from .tokens import token_digest

_KIND_INDEX: dict[int, int] = {kv_pb2.KV_KIND_KEY: 0, kv_pb2.KV_KIND_VALUE: 1}


class KvAssembler:
    """Assembles one pull, over any number of streams where the connection breaks in between.

    Each byte is copied once, from the message to its place. Every chunk is checked: its number follows the
    last one's, its checksum holds, it lies in the range, and it goes on where the last chunk of the same layer and kind
    ended. With the totals of the manifest that means: every byte arrived exactly once.

    Args:
        session_id: session that is read.
        token_range, layer_range: what was asked for, half-open; an end of None is the session's, None is everything.
        layout: axis order asked for.
        checksum: digest asked for.
        into: memory for the bytes, flat; fresh memory where left out.
    """

    _cache_class: type[KvCache] = KvCache

    def __init__(
        self,
        session_id: str,
        *,
        token_range: Range | None,
        layer_range: Range | None,
        layout: Layout,
        checksum: Checksum,
        into: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self._session_id = session_id
        self._asked_ranges = (token_range, layer_range)
        self._layout: Layout = layout
        self._checksum: Checksum = checksum
        self._digest = digest_function(checksum)
        self._into = into
        self._manifest: kv_pb2.KvManifest | None = None
        self._spec: KvSpec | None = None
        self._buffer: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._next_token: npt.NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)
        self._next_index = 0
        self._received_bytes = 0

    @property
    def next_chunk_index(self) -> int:
        """Chunk to resume from."""
        return self._next_index

    @property
    def generation(self) -> int:
        """Generation that the manifest named; 0 before it came."""
        return 0 if self._manifest is None else self._manifest.generation

    @property
    def received_bytes(self) -> int:
        """KV bytes in place."""
        return self._received_bytes

    @property
    def total_bytes(self) -> int:
        """KV bytes of the whole range; 0 before the manifest came."""
        return 0 if self._manifest is None else self._manifest.total_bytes

    @property
    def complete(self) -> bool:
        """Every chunk of the manifest is in place."""
        return self._manifest is not None and self._next_index == self._manifest.total_chunks

    def add_manifest(self, manifest: kv_pb2.KvManifest) -> None:
        """Take the first message of a stream: the plan, or on a resumed stream the same plan again.

        Raises:
            ProtocolError: it contradicts itself, the request, or the first stream's manifest.
        """
        if self._manifest is not None:
            if manifest != self._manifest:
                raise ProtocolError("the resumed KV stream has another manifest than the interrupted one; pull again")
            return
        spec = self._checked_spec(manifest)
        self._check_tokens(manifest)
        token_count, layer_count = self._checked_range(manifest, spec)
        expected_bytes = layer_count * 2 * token_count * spec.layer_token_bytes
        if manifest.total_bytes != expected_bytes:
            raise ProtocolError(
                f"the KV manifest names {manifest.total_bytes} bytes, but {layer_count} layers of {token_count} tokens "
                f"in its format are {expected_bytes} bytes"
            )
        rows = (token_count, spec.num_kv_heads) if self._layout == "THD" else (spec.num_kv_heads, token_count)
        self._buffer = self._memory((layer_count, 2, *rows, spec.head_dim * spec.element_bytes))
        self._next_token = np.full((layer_count, 2), manifest.range.token_start, dtype=np.int64)
        self._manifest, self._spec = manifest, spec

    def _memory(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Where the bytes go, uint8 in `shape`."""
        num_bytes = math.prod(shape)
        memory = np.empty(num_bytes, np.uint8) if self._into is None else self._into[:num_bytes]
        if memory.nbytes < num_bytes:
            raise ValueError(f"the KV has {num_bytes} bytes; the memory given for it has {memory.nbytes}")
        return memory.reshape(shape)

    def _checked_spec(self, manifest: kv_pb2.KvManifest) -> KvSpec:
        spec = KvSpec.from_proto(manifest.spec)
        if spec.layout != self._layout:
            raise ProtocolError(f"the KV manifest's layout is {spec.layout}, but {self._layout} was asked for")
        if manifest.checksum_algorithm != ALGORITHM_NUMBERS[self._checksum]:
            number = manifest.checksum_algorithm
            raise ProtocolError(f"the KV manifest's checksum algorithm is number {number}, not {self._checksum}")
        return spec

    def _check_tokens(self, manifest: kv_pb2.KvManifest) -> None:
        if not manifest.token_ids:
            return
        if len(manifest.token_ids) != manifest.range.token_end:
            raise ProtocolError(
                f"the KV manifest has {len(manifest.token_ids)} token ids, but its range ends at token "
                f"{manifest.range.token_end}"
            )
        if token_digest(manifest.token_ids) != manifest.token_digest:
            raise ProtocolError("the KV manifest's token ids differ from their digest; pull again")

    def _checked_range(self, manifest: kv_pb2.KvManifest, spec: KvSpec) -> tuple[int, int]:
        part = manifest.range
        tokens, layers = (part.token_start, part.token_end), (part.layer_start, part.layer_end)
        for name, found, asked in zip(("token", "layer"), (tokens, layers), self._asked_ranges, strict=True):
            start, end = asked or (0, None)
            if found[0] >= found[1] or found[0] != start or end not in (None, found[1]):
                wanted = f"{start}..{'end' if end is None else end}"
                raise ProtocolError(f"the KV manifest's {name} range is {found[0]}..{found[1]}; asked for: {wanted}")
        if layers[1] > spec.num_layers:
            raise ProtocolError(f"the KV manifest's layer range ends at {layers[1]} of {spec.num_layers} layers")
        return tokens[1] - tokens[0], layers[1] - layers[0]

    def add_chunk(self, chunk: ChunkFrame | kv_pb2.KvChunk) -> None:
        """Check a chunk and copy it into its place.

        Raises:
            ChecksumMismatchError: the data differs from its checksum; metadata: chunk_index.
            ProtocolError: missing, repeated, out of order, out of range or of the wrong size.
        """
        if self._manifest is None or self._spec is None:
            raise ProtocolError("a KV chunk came before the manifest")
        if chunk.index != self._next_index:
            problem = "missing" if chunk.index > self._next_index else "repeated or out of order"
            raise ProtocolError(f"KV chunk {chunk.index} came where {self._next_index} was due: chunks are {problem}")
        layer, kind, start = self._checked_place(chunk, self._manifest.range)
        run = slice(start, start + chunk.num_tokens)
        place = self._buffer[layer, kind, run] if self._layout == "THD" else self._buffer[layer, kind, :, run]
        num_bytes = chunk.num_tokens * self._spec.layer_token_bytes
        self._take(chunk, place, num_bytes)
        self._next_token[layer, kind] += chunk.num_tokens
        self._next_index += 1
        self._received_bytes += num_bytes

    def add_chunks(self, chunks: Sequence[ChunkFrame]) -> None:
        """The same for several chunks, in order."""
        for chunk in chunks:
            self.add_chunk(chunk)

    def _take(self, chunk: ChunkFrame | kv_pb2.KvChunk, place: npt.NDArray[np.uint8], num_bytes: int) -> None:
        """Check a chunk's bytes, which are to be so many, and bring them to their place."""
        data = chunk.data  # once: each access to a message's makes a copy
        if self._digest is not None:
            self._check_digest(chunk, self._digest(data))
        if len(data) != num_bytes:
            raise ProtocolError(
                f"{_name(chunk)} holds {len(data)} bytes; its {chunk.num_tokens} tokens are {num_bytes}"
            )
        place[...] = np.frombuffer(data, dtype=np.uint8).reshape(place.shape)

    def _check_digest(self, chunk: ChunkFrame | kv_pb2.KvChunk, digest: int) -> None:
        if digest != chunk.checksum:
            raise ChecksumMismatchError(
                f"KV chunk {chunk.index} (layer {chunk.layer}, tokens from {chunk.token_start}) differs from its "
                f"{self._checksum} checksum; pull again",
                metadata={"chunk_index": str(chunk.index)},
            )

    def _checked_place(self, chunk: ChunkFrame | kv_pb2.KvChunk, part: kv_pb2.KvRange) -> tuple[int, int, int]:
        """Indices of the chunk's layer, kind and first token in the buffer."""
        name = _name(chunk)
        if not part.layer_start <= chunk.layer < part.layer_end or chunk.kind not in _KIND_INDEX:
            raise ProtocolError(f"{name} is outside the range asked for")
        layer, kind = chunk.layer - part.layer_start, _KIND_INDEX[chunk.kind]
        due = int(self._next_token[layer, kind])
        if chunk.token_start != due:
            raise ProtocolError(f"{name} starts at token {chunk.token_start}, but token {due} was due")
        if not chunk.num_tokens or due + chunk.num_tokens > part.token_end:
            raise ProtocolError(
                f"{name} holds {chunk.num_tokens} tokens from {due}; the range ends at {part.token_end}"
            )
        return layer, kind, due - part.token_start

    def finish(self) -> KvCache:
        """The whole cache, after the last chunk.

        Raises:
            ProtocolError: the stream ended early.
        """
        manifest, spec = self._manifest, self._spec
        if manifest is None or spec is None:
            raise ProtocolError("the KV stream ended before its manifest")
        if self._received_bytes != manifest.total_bytes or self._next_index != manifest.total_chunks:
            raise ProtocolError(
                f"the KV stream ended after {self._next_index} of {manifest.total_chunks} chunks and "
                f"{self._received_bytes} of {manifest.total_bytes} bytes"
            )
        return self._cache_class(
            session_id=self._session_id,
            spec=spec,
            token_start=manifest.range.token_start,
            token_end=manifest.range.token_end,
            layer_start=manifest.range.layer_start,
            layer_end=manifest.range.layer_end,
            generation=manifest.generation,
            token_digest=manifest.token_digest,
            buffer=self._buffer,
            token_ids=np.array(manifest.token_ids, np.uint32) if manifest.token_ids else None,
        )

    def close(self) -> None:
        """Let go of what is held beside the memory."""


def _name(chunk: ChunkFrame | kv_pb2.KvChunk) -> str:
    return f"KV chunk {chunk.index} (layer {chunk.layer}, kind {chunk.kind})"
