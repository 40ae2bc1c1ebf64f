# Generated from _async/pull.py by tools/generate_sync_client.py. Do not edit.
"""KV bytes to the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sale_prefill.kv_frames import (
    MANIFEST_DIGEST_KEY,
    PULL_FRAMES,
    ChunkFrame,
    FrameError,
    group_frames,
    keep_freed_memory,
    message_digest,
)
from sale_prefill.v1 import kv_transfer_service_pb2

from .. import _requests
from .._kv_stub import RawKvStub
from .._retry import Deadline
from ..cuda_segments import DeviceKvCache, Segment
from ..errors import ProtocolError, SalePrefillError, TransferUnknownError
from ..kv import KvCache
from ..kv_assembly import KvAssembler
from ..kv_stripes import Stripe, StripePlan, flat_memory
from ..options import DEFAULT_CHUNK_BYTES, Checksum, Layout, Range, SegmentTransport
from ..progress import BytesCallback, bytes_reporter
from ..results import KvSpec
from ..segment_kv import SegmentAssembler
from ._io import run_blocking, run_together
from .event_stream import EventStream
from .sessions import SessionCalls
from .transfers import TransferCalls


class PullCalls(SessionCalls, TransferCalls):
    """KvTransferService.PullKv."""

    def pull_kv(
        self,
        session_id: str,
        *,
        token_range: Range | None = None,
        layer_range: Range | None = None,
        layout: Layout = "THD",
        chunk_bytes: int | None = None,
        checksum: Checksum | None = None,
        generation: int = 0,
        expected_spec: KvSpec | None = None,
        stripes: int = 1,
        into: npt.NDArray[np.uint8] | None = None,
        segment: Segment | None = None,
        transports: Sequence[SegmentTransport] = (),
        progress: bool | BytesCallback = False,
        timeout_seconds: float | None = None,
    ) -> KvCache:
        """Copy a session's KV cache to this process.

        The bytes go into one block, copied once; each chunk's checksum is verified, and that every byte came exactly
        once. A connection that breaks is made again and the stream goes on from the chunk where it stopped, of the same
        generation of the session.

        Args:
            session_id: the session.
            token_range, layer_range: part of it, half-open; an end of None is the session's, None is everything.
            layout: axis order, `"THD"` (tokens, heads, head_dim; the fastest) or `"HTD"` (as transformers has it).
            chunk_bytes: bytes of a chunk, about; 1 MiB where left out, and below both sides' message limit, but 8 MiB
                where they go through a segment, and 64 MiB at most.
            checksum: digest of each chunk; where left out `"crc32c"`, or `"xxh3_64"` in shared memory, or `"none"` in
                device memory, which goes without: servers refuse others there.
            generation: generation that the session must have, else GenerationMismatchError; 0 for any.
            expected_spec: format that the KV must have, else KvSpecMismatchError before a byte moves; its layout is
                not compared.
            stripes: connections to read over, each bringing some of the layers.
            into: C-contiguous memory for the bytes, at least as many; it saves making some. The result's buffer is a
                view of its beginning.
            segment: memory shared with the server, from `open_transfer`. Nothing is copied to this process then: the
                result views the segment (a DeviceKvCache where that is device memory, good until it is closed), and
                the next stream through it writes over that.
            transports: `"cuda_ipc"`, `"shm"`, best first: opens such a segment for this pull alone, or goes through
                messages where none can be had, said once (SegmentFallbackWarning). The result is this process's own:
                KV on a device is copied there, shared memory stays. `"cuda_ipc"` is passed over where there is to be
                a checksum.
            progress: True shows a bar on standard error; a function is called with (bytes done, bytes in all).
            timeout_seconds: for everything; None for no limit (a silent server is noticed all the same).

        Raises:
            ChecksumMismatchError: a chunk differs from its checksum.
            ProtocolError: bytes are missing, repeated or out of place.
            SalePrefillError: another of its subclasses in `errors`.
            SessionBusyError: another stream uses the segment.
            TransferUnknownError: the server no longer has the segment: it was closed, idle for minutes, or the server
                started anew.
            ValueError: `into` or the segment is too small; or segments together with `stripes` or `into`.
        """
        keep_freed_memory()
        if (segment is not None or transports) and (stripes > 1 or into is not None):
            raise ValueError("KV comes to a segment in one stream and to no other memory: leave out stripes and into")
        if segment is None and transports:
            pull = partial(
                self.pull_kv,
                session_id,
                token_range=token_range,
                layer_range=layer_range,
                layout=layout,
                chunk_bytes=chunk_bytes,
                checksum=checksum,
                generation=generation,
                expected_spec=expected_spec,
                progress=progress,
            )
            wanted = [kind for kind in transports if kind != "cuda_ipc" or checksum in (None, "none")]
            open_segment = partial(
                self.open_transfer,
                session_id=session_id,
                token_range=token_range,
                layer_range=layer_range,
                transports=wanted,
            )
            return self._pull_same_host(open_segment, pull, Deadline(timeout_seconds))
        memory = None if into is None else flat_memory(into)
        digest = checksum or ("crc32c" if segment is None else segment.default_checksum)
        request = partial(
            _requests.pull_request,
            session_id,
            layout=layout,
            chunk_bytes=chunk_bytes or (DEFAULT_CHUNK_BYTES if segment is None else segment.default_chunk_bytes),
            checksum=digest,
            expected_spec=expected_spec,
            transfer_id="" if segment is None else segment.transfer_id,
        )
        kind = partial(KvAssembler, into=memory) if segment is None else partial(SegmentAssembler, segment)
        assembler = partial(kind, session_id=session_id, layout=layout, checksum=digest)
        with bytes_reporter(progress, "pulling") as report:
            if stripes > 1:
                stripe = partial(self._stripe, request, assembler, timeout_seconds)
                session = self.get_session(session_id)
                plan = StripePlan(session, token_range, layer_range, stripes, memory, generation)
                return self._pull_striped(plan, stripe, report)
            whole = request(token_range=token_range, layer_range=layer_range, generation=generation)
            with (
                closing(assembler(token_range=token_range, layer_range=layer_range)) as single,
                closing(self._chunks(whole, single, timeout_seconds)) as frames,
            ):
                return _assemble(frames, single, lambda: report(single.received_bytes, single.total_bytes))

    def _pull_same_host(
        self,
        open_segment: Callable[..., Any],
        pull: Callable[..., Any],
        deadline: Deadline,
    ) -> KvCache:
        """A pull through a segment of its own, or through messages where there is none."""
        cache: KvCache
        segment: Segment | None = open_segment(timeout_seconds=deadline.remaining_seconds())
        if segment is not None:
            try:
                cache = pull(segment=segment, timeout_seconds=deadline.remaining_seconds())
                if isinstance(cache, DeviceKvCache):
                    cache = run_blocking(cache.copied)
                return cache
            except TransferUnknownError as error:
                self._say_fallback(error)
            finally:
                with suppress(SalePrefillError):  # the server frees it anyway once the connection ends
                    self.close_transfer(segment)
        cache = pull(timeout_seconds=deadline.remaining_seconds())
        return cache

    def _stripe(
        self,
        request: Callable[..., kv_transfer_service_pb2.PullKvRequest],
        assembler: Callable[..., KvAssembler],
        timeout_seconds: float | None,
        stripe: Stripe,
    ) -> tuple[EventStream, KvAssembler]:
        """A stripe's stream, over a connection of its own, and what puts it together."""
        ranges = {"token_range": stripe.token_range, "layer_range": stripe.layer_range}
        part = assembler(**ranges, into=stripe.memory)
        wanted = request(**ranges, generation=stripe.generation)
        return self._chunks(wanted, part, timeout_seconds, stripe.number), part

    def _pull_striped(
        self,
        plan: StripePlan,
        open_stripe: Callable[[Stripe], tuple[EventStream, KvAssembler]],
        report: BytesCallback,
    ) -> KvCache:
        opened = [open_stripe(stripe) for stripe in plan.stripes]
        counting = threading.Lock()

        def count() -> None:
            with counting:
                report(sum(part.received_bytes for _, part in opened), plan.memory.nbytes)

        calls = [partial(_assemble, frames, part, count) for frames, part in opened]

        def stop() -> None:
            for frames, _ in opened:
                frames.cancel()

        return plan.joined(run_together(calls, stop))

    def _chunks(
        self,
        request: kv_transfer_service_pb2.PullKvRequest,
        assembler: KvAssembler,
        timeout_seconds: float | None,
        channel_number: int = 0,
    ) -> EventStream:
        """The stream of what `assembler` still lacks."""

        def next_request() -> tuple[kv_transfer_service_pb2.PullKvRequest, str]:
            request.resume_from_chunk = assembler.next_chunk_index
            request.generation = assembler.generation or request.generation
            return request, request.session_id

        return self._stream(
            RawKvStub,
            "PullKv",
            next_request,
            timeout_seconds=timeout_seconds,
            channel_number=channel_number,
            holds=bool(request.transfer_id),
        )


def _assemble(frames: EventStream, assembler: KvAssembler, report: Callable[[], None]) -> KvCache:
    opened = 0  # the attempt that has had its manifest
    while not assembler.complete and (raw := frames.read()) is not None:
        try:
            frame = PULL_FRAMES.decode(raw)
        except FrameError as error:
            raise ProtocolError(f"the KV stream is broken: {error}; pull again") from error
        if isinstance(frame, ChunkFrame):
            assembler.add_chunk(frame)
            frames.progressed()
            report()
        elif frame.HasField("chunks"):
            assembler.add_chunks(group_frames(frame.chunks))
            frames.progressed()
            report()
        else:
            if opened == frames.attempt:
                raise ProtocolError("the KV stream has a manifest too many; pull again")
            opened = frames.attempt
            if (frames.initial_metadata()).get(MANIFEST_DIGEST_KEY, expected := message_digest(raw)) != expected:
                raise ProtocolError("the KV manifest differs from its digest; pull again")
            assembler.add_manifest(frame.manifest)
    frames.finish()
    return run_blocking(assembler.finish)
