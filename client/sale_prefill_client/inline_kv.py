"""Puts the KV that comes with a prefill together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from sale_prefill.kv_frames import PREFILL_FRAMES, ChunkFrame, FrameError, keep_freed_memory
from sale_prefill.v1 import session_service_pb2

from ._requests import inline_checksum
from .errors import ProtocolError
from .kv import KvCache
from .kv_assembly import KvAssembler
from .options import InlineKv
from .results import KvArrived
from .segment_kv import SegmentAssembler


class InlineAssembly:
    """The KV of one prefill, over any number of streams where the connection breaks in between.

    Args:
        inline: what was asked for.
    """

    def __init__(self, inline: InlineKv) -> None:
        keep_freed_memory()
        kind = (
            KvAssembler if inline.segment is None else partial(SegmentAssembler, inline.segment, verified_at_once=True)
        )
        self._assembler = kind(
            session_id="",
            token_range=inline.token_range,
            layer_range=inline.layer_range,
            layout=inline.layout,
            checksum=inline_checksum(inline),
        )
        self.arrived: KvArrived | None = None

    @classmethod
    def of(cls, option: InlineKv | bool | None) -> InlineAssembly | None:
        """None where no KV was asked for."""
        if not option:
            return None
        return cls(InlineKv() if option is True else option)

    @property
    def next_chunk_index(self) -> int:
        """Chunk to resume from."""
        return self._assembler.next_chunk_index

    def take(self, raw: bytes) -> Any:
        """Takes a manifest or a chunk; what it brought is `arrived`. Gives any other event back, parsed.

        Raises:
            ChecksumMismatchError: a chunk differs from its checksum.
            ProtocolError: a message that is none, or KV that is out of place.
        """
        self.arrived = None
        try:
            message = PREFILL_FRAMES.decode(raw)
        except FrameError as error:
            raise ProtocolError(f"the prefill stream is broken: {error}") from error
        assembler = self._assembler
        if isinstance(message, ChunkFrame):
            assembler.add_chunk(message)
            self.arrived = KvArrived(
                message.layer,
                message.kind - 1,
                message.token_start,
                message.token_start + message.num_tokens,
                assembler.received_bytes,
                assembler.total_bytes,
            )
            return None
        if message.WhichOneof("event") == "kv_manifest":
            assembler.add_manifest(message.kv_manifest)
            return None
        return message

    def finish(self, session: session_service_pb2.Session) -> KvCache:
        """The whole cache, of the session as the result describes it.

        Raises:
            ProtocolError: some of it is missing.
        """
        cache = self._assembler.finish()
        return replace(cache, session_id=session.session_id, generation=session.generation)

    def close(self) -> None:
        """Takes no more."""
        if isinstance(self._assembler, SegmentAssembler):
            self._assembler.close()
