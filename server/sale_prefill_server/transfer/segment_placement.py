"""KV in its place in a segment: written there from a session's pages, taken from there into them, digested on the way.

A segment is laid out as [layers of the range, 2, tokens of the range, kv_heads, head_dim] (THD) or [layers, 2,
kv_heads, tokens, head_dim] (HTD) from its first byte. The digest of a chunk is that of its bytes in the chunk's own
order, [tokens of the chunk, kv_heads, head_dim] or [kv_heads, tokens of the chunk, head_dim], the same as where it
travels in a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from sale_prefill_server.errors import invalid_field
from sale_prefill_server.kv.pool import KvShape
from sale_prefill_server.transfer.checksums import Checksum
from sale_prefill_server.transfer.chunks import KvRange, Layout
from sale_prefill_server.transfer.digest import RunningDigest, running_digest
from sale_prefill_server.transfer.segment_memory import SegmentTransport
from sale_prefill_server.transfer.segments import Segment
from sale_prefill_server.transfer.streaming_copy import (
    DIGESTED_BYTES,
    can_gather,
    copy_digested,
    gather,
    streaming_copy,
)

_Bytes = npt.NDArray[np.uint8]

#: Bytes that are handled at a time, so that the second of copy and digest finds them in a cache. GB/s with xxh3_64 and
#: crc32c on one core of an EPYC (Zen 4) beside a memcpy of all of them, 12.1: into a segment, digest first, then a
#: streaming copy, 10.1 and 7.7 in pieces of 128 KiB, 12.2 and 9.1 of 512 KiB, 13.4 and 9.7 of 2 MiB, no better of 4 MiB
#: (a plain copy: 10.7 and 7.9 of 512 KiB); out of one, a plain copy, then its digest, 11.3 and 9.3 of 512 KiB, 10.5 and
#: 8.6 of 2 MiB.
WRITE_PIECE_BYTES = 2**21
TAKE_PIECE_BYTES = 2**19
#: Runs shorter than this are copied many at a time.
_LONG_RUN_BYTES = 2**20


class SegmentPlacement:
    """One stream's KV in one segment. Different chunks may be written or taken by different threads at once.

    Args:
        segment: from `SegmentBroker.borrow`, for as long as that lasts.
        shape: geometry of the model's KV.
        range_: part of the session that the stream covers.
        layout: axis order in the segment.
        checksum: digest of each chunk.

    Raises:
        PrefillError: INVALID_FIELD, the range does not fit, or device memory with a checksum: bytes that never are in
            host memory are not digested.
    """

    def __init__(self, segment: Segment, shape: KvShape, range_: KvRange, layout: Layout, checksum: Checksum) -> None:
        self._segment = segment
        self._shape = shape
        self._range = range_
        self._layout = layout
        self._checksum = checksum
        row = (shape.num_kv_heads, shape.head_dim)
        tokens = range_.num_tokens
        axes = (tokens, *row) if layout is Layout.THD else (row[0], tokens, row[1])
        self._axes = (range_.num_layers, 2, *axes)
        self.total_bytes = 2 * range_.num_layers * tokens * row[0] * row[1] * shape.dtype.itemsize
        if self.total_bytes > segment.size_bytes:
            raise invalid_field(
                "transfer_id",
                f"the segment has {segment.size_bytes} bytes, the range {self.total_bytes}: open a larger one, or ask "
                "for part of the range",
            )
        if segment.transport is SegmentTransport.CUDA_IPC and checksum is not Checksum.NONE:
            raise invalid_field(
                "checksum_algorithm", f"{checksum}: device memory goes without; ask for NONE, or use shared memory"
            )

    def write(
        self, layer: int, kind: int, token_start: int, sources: Sequence[torch.Tensor], ready: object = None
    ) -> int:
        """Puts a chunk in its place; blocks until it is there.

        Args:
            layer: decoder layer of the model.
            kind: 0 for keys, 1 for values.
            token_start: the chunk's first token, in the session.
            sources: its KV, [n, kv_heads, head_dim] each, in order of tokens; all on one device.
            ready: `torch.cuda.Event` after which the sources are written; without one, whatever was queued on the
                device's default stream is waited for.

        Returns:
            The chunk's digest; 0 without one.
        """
        num_tokens = sum(source.shape[0] for source in sources)
        with self._segment.memory() as memory:
            if self._in_one_call(memory, sources):
                address = self._address(memory, layer, kind, token_start, num_tokens)
                addresses, sizes = _runs_of_memory(sources)
                return copy_digested(_following(address, sizes), addresses, sizes, shared=False)
            place = self._place(memory, layer, kind, token_start, num_tokens)
            digest = running_digest(self._checksum)
            if memory.is_cuda or sources[0].is_cuda:
                from sale_prefill_server.transfer.device_copy import copy_and_wait

                pairs = list(_runs(place, sources, self._layout))
                copy_and_wait(pairs, ready)
                for target, _ in pairs if self._checksum is not Checksum.NONE else ():
                    digest.update(_as_bytes(target))
            elif self._layout is Layout.THD and _is_scattered(sources):
                _gather_runs(place, sources, digest)
            else:
                for target, source in _runs(place, sources, self._layout):
                    _write_run(_as_bytes(target), _as_bytes(source), digest)
            return digest.value()

    def take(self, layer: int, kind: int, token_start: int, targets: Sequence[torch.Tensor]) -> int:
        """Copies a chunk out of its place, and digests the copy: the peer may still change what is in the segment.

        Args:
            layer, kind, token_start: as for `write`.
            targets: where it goes, [n, kv_heads, head_dim] each, in order of tokens; host memory where there is a
                checksum.

        Returns:
            Digest of what is in the targets now; 0 without one.
        """
        num_tokens = sum(target.shape[0] for target in targets)
        with self._segment.memory() as memory:
            if self._in_one_call(memory, targets):
                address = self._address(memory, layer, kind, token_start, num_tokens)
                addresses, sizes = _runs_of_memory(targets)
                return copy_digested(addresses, _following(address, sizes), sizes, shared=True)
            place = self._place(memory, layer, kind, token_start, num_tokens)
            pairs = [(target, source) for source, target in _runs(place, targets, self._layout)]
            digest = running_digest(self._checksum)
            if memory.is_cuda or targets[0].is_cuda:
                if self._checksum is not Checksum.NONE:
                    raise ValueError("a digest is of host memory: take the chunk into a tensor there first")
                from sale_prefill_server.transfer.device_copy import copy_and_wait

                copy_and_wait(pairs, None)
            else:
                for target, source in pairs:
                    _take_run(_as_bytes(target), _as_bytes(source), digest)
            return digest.value()

    def take_copy(self, layer: int, kind: int, token_start: int, num_tokens: int) -> tuple[torch.Tensor, int]:
        """A chunk in new memory, [num_tokens, kv_heads, head_dim], and its digest; on the segment's device."""
        shape = self._shape
        with self._segment.memory() as memory:
            copy = torch.empty(
                (num_tokens, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device=memory.device
            )
        return copy, self.take(layer, kind, token_start, [copy])

    def _in_one_call(self, memory: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
        """Whether a chunk can be copied and digested by one native call, which Python's threads need not wait for."""
        return (
            self._layout is Layout.THD
            and self._checksum is Checksum.XXH3_64
            and not memory.is_cuda
            and all(part.is_contiguous() and not part.is_cuda for part in parts)
            and sum(part.nbytes for part in parts) >= DIGESTED_BYTES
            and can_gather()
        )

    def _address(self, memory: torch.Tensor, layer: int, kind: int, token_start: int, num_tokens: int) -> int:
        """Of a chunk, THD."""
        start = self._checked_start(layer, kind, token_start, num_tokens)
        tensor_index = 2 * (layer - self._range.layer_start) + kind
        tensor_bytes = self.total_bytes // (2 * self._range.num_layers)
        return memory.data_ptr() + tensor_index * tensor_bytes + start * tensor_bytes // self._range.num_tokens

    def _checked_start(self, layer: int, kind: int, token_start: int, num_tokens: int) -> int:
        """Index of a chunk's first token in the range.

        Raises:
            PrefillError: INVALID_FIELD, it is not all in the range.
        """
        part = self._range
        start = token_start - part.token_start
        if not (
            part.layer_start <= layer < part.layer_end
            and kind in (0, 1)
            and 0 <= start < start + num_tokens <= part.num_tokens
        ):
            raise invalid_field(
                "chunk", f"layer {layer}, kind {kind}, tokens [{token_start}, {token_start + num_tokens}) of {part}"
            )
        return start

    def _place(self, memory: torch.Tensor, layer: int, kind: int, token_start: int, num_tokens: int) -> torch.Tensor:
        part = self._range
        start = self._checked_start(layer, kind, token_start, num_tokens)
        tensor = memory[: self.total_bytes].view(self._shape.dtype).view(self._axes)[layer - part.layer_start, kind]
        return tensor.narrow(0 if self._layout is Layout.THD else 1, start, num_tokens)


def _runs_of_memory(parts: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Addresses and sizes in bytes."""
    return [part.data_ptr() for part in parts], [part.nbytes for part in parts]


def _following(address: int, sizes: Sequence[int]) -> list[int]:
    """Addresses of parts of those sizes that follow each other."""
    return [address + before for before in accumulate(sizes[:-1], initial=0)]


def _runs(
    place: torch.Tensor, parts: Sequence[torch.Tensor], layout: Layout
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The chunk as pairs of equal shape, in the order of its bytes: a run of the segment, what belongs there."""
    sizes = [part.shape[0] for part in parts]
    if layout is Layout.THD:
        yield from zip(torch.split(place, sizes), parts, strict=True)
        return
    for head in range(place.shape[0]):
        yield from zip(torch.split(place[head], sizes), (part[:, head] for part in parts), strict=True)


def _as_bytes(tensor: torch.Tensor) -> _Bytes:
    array: _Bytes = tensor.view(torch.uint8).numpy()
    return array.reshape(-1) if array.flags.c_contiguous else array


def _pieces(target: _Bytes, source: _Bytes, piece_bytes: int) -> Iterator[tuple[_Bytes, _Bytes]]:
    """Both in pieces along the first axis; flat where both are contiguous."""
    if target.ndim != source.ndim:  # one side is flat
        shape = target.shape if target.ndim > source.ndim else source.shape
        target, source = target.reshape(shape), source.reshape(shape)
    rows = max(1, piece_bytes * len(target) // target.size)
    for start in range(0, len(target), rows):
        yield target[start : start + rows], source[start : start + rows]


def _write_run(target: _Bytes, source: _Bytes, digest: RunningDigest) -> None:
    """Into the segment. What is digested is this side's own where it is contiguous: nobody else can change that."""
    for to, from_ in _pieces(target, source, WRITE_PIECE_BYTES):
        if from_.flags.c_contiguous:
            digest.update(from_)
            streaming_copy(to, from_)
        else:
            np.copyto(to, from_)
            digest.update(to)


def _is_scattered(sources: Sequence[torch.Tensor]) -> bool:
    """Whether a chunk comes in runs so short that what Python does for each would take as long as its copy."""
    total_bytes = sum(source.nbytes for source in sources)
    short = len(sources) > 1 and total_bytes < len(sources) * _LONG_RUN_BYTES
    return short and all(source.is_contiguous() for source in sources) and can_gather()


def _gather_runs(place: torch.Tensor, sources: Sequence[torch.Tensor], digest: RunningDigest) -> None:
    """Into the segment, many runs in one call. What is digested is the copy, while it is in a cache: only the peer that
    is to verify it could have changed it."""
    target, start = _as_bytes(place), 0
    addresses: list[int] = []
    sizes: list[int] = []
    for number, source in enumerate(sources, 1):
        addresses.append(source.data_ptr())
        sizes.append(source.nbytes)
        size = sum(sizes)
        if size >= TAKE_PIECE_BYTES or number == len(sources):
            piece = target[start : start + size]
            gather(piece.ctypes.data, addresses, sizes)
            digest.update(piece)
            start += size
            addresses, sizes = [], []


def _take_run(target: _Bytes, source: _Bytes, digest: RunningDigest) -> None:
    """Out of the segment. What is digested is the copy, never what the peer can still change."""
    for to, from_ in _pieces(target, source, TAKE_PIECE_BYTES):
        own = to if to.flags.c_contiguous else np.empty_like(from_)
        np.copyto(own, from_)
        digest.update(own)
        if own is not to:
            np.copyto(to, own)
