"""Memory beside gRPC that a stream's bytes may be in: what a transfer segment is to the streams that use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.kv.pool import KvShape
from sale_prefill_server.transfer.chunks import KvRange, Layout, PlannedChunk


class Segment(Protocol):
    """Memory that both sides see. `transport` names it in the metrics; `memory` is all of it, [size_bytes] uint8."""

    @property
    def transport(self) -> str:
        """Such as "shm"."""
        ...

    @property
    def memory(self) -> torch.Tensor:
        """On the host or a device."""
        ...


class Segments(Protocol):
    """Where segments are found."""

    def borrow(self, tenant: str, transfer_id: str) -> AbstractContextManager[Segment]:
        """The caller's segment, for one stream at a time.

        Raises:
            PrefillError: TRANSFER_UNKNOWN, or SESSION_BUSY where another stream has it.
        """
        ...


class NoSegments:
    """A server that opens none."""

    @contextmanager
    def borrow(self, tenant: str, transfer_id: str) -> Iterator[Segment]:
        """Never finds one."""
        raise PrefillError(
            Reason.TRANSFER_UNKNOWN,
            f"transfer {transfer_id!r} is not open here: open one, or leave transfer_id out",
            metadata={"transfer_id": transfer_id},
        )
        yield


class SegmentView:
    """A range's KV in a segment, from its start: [layers, 2, tokens, heads, head_dim], or with heads before tokens.

    Raises:
        PrefillError: INVALID_FIELD, the segment is too small.
    """

    def __init__(self, segment: Segment, range_: KvRange, shape: KvShape, layout: Layout) -> None:
        rows = (range_.num_tokens, shape.num_kv_heads)
        axes = rows if layout is Layout.THD else rows[::-1]
        sizes = (range_.num_layers, 2, *axes, shape.head_dim)
        needed_bytes = 2 * range_.num_layers * range_.num_tokens * shape.num_kv_heads * shape.head_dim
        needed_bytes *= shape.dtype.itemsize
        memory = segment.memory
        if memory.numel() < needed_bytes:
            raise PrefillError(
                Reason.INVALID_FIELD,
                f"transfer_id: its segment has {memory.numel()} bytes, the range has {needed_bytes}: open a larger one",
                metadata={"segment_bytes": memory.numel(), "needed_bytes": needed_bytes},
                field="transfer_id",
            )
        self._layout = layout
        self._range = range_
        self._whole = memory[:needed_bytes].view(shape.dtype).view(sizes)

    def chunk(self, chunk: PlannedChunk) -> torch.Tensor:
        """The chunk's place, in the segment's layout: [tokens, heads, head_dim] or [heads, tokens, head_dim]."""
        tensor = self._whole[chunk.layer - self._range.layer_start, chunk.kind]
        first = chunk.token_start - self._range.token_start
        run = slice(first, first + chunk.num_tokens)
        return tensor[run] if self._layout is Layout.THD else tensor[:, run]
