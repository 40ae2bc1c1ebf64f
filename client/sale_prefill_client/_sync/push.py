# Generated from _async/push.py by tools/generate_sync_client.py. Do not edit.
"""KV bytes from the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from sale_prefill.kv_frames import MANIFEST_DIGEST_KEY, keep_freed_memory, message_digest
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill.v1 import kv_transfer_service_pb2_grpc, session_service_pb2

from .. import _requests
from .._kv_stub import RawKvStub
from .._retry import Attempts, Deadline
from ..cuda_segments import Segment
from ..errors import ProtocolError, SessionBusyError, UnavailableError
from ..kv import KvCache
from ..kv_chunks import KvChunks, Runs, split_runs
from ..options import DEFAULT_CHUNK_BYTES, Attention, Checksum, Durability, Pin
from ..progress import BytesCallback, bytes_reporter
from ..results import Session
from ..segment_kv import SegmentChunks
from ..tokens import TokenIds, token_digest
from ._io import begin_upload, run_blocking, run_together, sleep, upload_response
from .connection import Connection

_STUB = kv_transfer_service_pb2_grpc.KvTransferServiceStub


class PushCalls(Connection):
    """KvTransferService.OpenPush and PushKv."""

    def push_kv(
        self,
        kv: KvCache,
        token_ids: TokenIds | None = None,
        *,
        session_id: str | None = None,
        request_id: str | None = None,
        attention: Attention | None = None,
        lease_seconds: float | None = None,
        sliding: bool = False,
        durability: Durability | None = None,
        pin: Pin | None = None,
        labels: Mapping[str, str] | None = None,
        chunk_bytes: int | None = None,
        checksum: Checksum | None = None,
        stripes: int = 1,
        segment: Segment | None = None,
        progress: bool | BytesCallback = False,
        timeout_seconds: float | None = None,
    ) -> Session:
        """Make a session out of KV that was computed elsewhere.

        The server checks format, tokens and room before a byte moves, and each chunk as it comes; the session appears
        when all of them are there. Where the connection breaks, only chunks that are missing are sent again.

        Args:
            kv: every layer, from the first token on.
            token_ids: the tokens that it is of; those that `kv` knows where left out.
            session_id: new session; None lets the server choose an id.
            request_id: idempotency key: a repeat of the same push with the same key goes on with it. None makes one up.
            attention: attention of what will be appended; None takes that of `kv`, then the server's default.
            lease_seconds: how long the session is kept after each request; None takes the server's default.
            sliding: later requests extend the lease from their end.
            durability: what the session is to survive, as in `PrefillOptions`.
            pin: how it stands when memory runs out, as in `PrefillOptions`.
            labels: set on the session.
            chunk_bytes: bytes of a chunk, about; 1 MiB where left out, and below both sides' message limit, but 8 MiB
                where they go through a segment, and 64 MiB at most.
            checksum: digest of each chunk; where left out `"crc32c"`, or `"xxh3_64"` in shared memory, or `"none"` in
                device memory, which goes without: servers refuse others there.
            stripes: connections to send over, each bringing some of the chunks.
            segment: memory shared with the server, from `open_transfer`, that the bytes are copied to once; not at all
                where `kv` is the segment's beginning already (`KvCache.from_numpy(segment.array(...), ...)`, or the
                result of a pull through it). The server copies what it verifies, so it may be used again afterwards.
            progress: True shows a bar on standard error; a function is called with (bytes done, bytes in all).
            timeout_seconds: for everything; None for no limit.

        Raises:
            KvSpecMismatchError: the server's model has other KV; metadata: field, expected, actual.
            ChecksumMismatchError: a chunk was changed on its way.
            PrefixMismatchError: the session exists.
            SalePrefillError: another of its subclasses in `errors`.
            SessionBusyError: another stream uses the segment.
            TransferUnknownError: the server no longer has the segment: it was closed, idle for minutes, or the server
                started anew.
            ValueError: `kv` is a part of a session's KV, or of other tokens; or it does not fit the segment; or
                `segment` together with `stripes`.
        """
        keep_freed_memory()
        if segment is None:
            chunks = KvChunks(kv, token_ids, chunk_bytes or DEFAULT_CHUNK_BYTES, checksum or "crc32c")
        elif stripes > 1:
            raise ValueError("KV goes through a segment in one stream: leave out stripes")
        else:
            size, digest = chunk_bytes or segment.default_chunk_bytes, checksum or segment.default_checksum
            chunks = run_blocking(SegmentChunks, segment, kv, token_ids, size, digest)
        request = _requests.push_request(
            chunks.manifest(),
            chunks.token_ids,
            session_id=session_id,
            request_id=request_id,
            attention=attention or kv.attention,
            lease_seconds=lease_seconds,
            sliding=sliding,
            durability=durability,
            pin=pin,
            labels=labels,
        )
        deadline = Deadline(timeout_seconds)
        with bytes_reporter(progress, "pushing") as report:
            session = self._send_missing(request, chunks, stripes, deadline, report)
        return _checked(session, request.header)

    def _send_missing(
        self,
        request: pb.OpenPushRequest,
        chunks: KvChunks,
        stripes: int,
        deadline: Deadline,
        report: BytesCallback,
    ) -> session_service_pb2.Session:
        """Asks what is missing and sends it, until the session is there."""
        attempts = Attempts(self._retry, deadline, holds=bool(chunks.transfer_id))
        missing_before = chunks.total_chunks
        while True:
            upload: pb.OpenPushResponse = self._call(
                _STUB,
                "OpenPush",
                request,
                timeout_seconds=_positive(deadline.remaining_seconds()),
                session_id=request.header.session_id,
                repeatable=True,
            )
            if upload.HasField("session"):
                return upload.session
            runs: Runs = [(run.start, run.end) for run in upload.missing_chunks]
            missing = sum(end - start for start, end in runs)
            if missing < missing_before:
                attempts.progressed()
            missing_before = missing
            try:
                responses = self._send_striped(upload.upload_id, chunks, runs, stripes, deadline, report)
            except (UnavailableError, SessionBusyError) as error:
                sleep(attempts.wait_seconds(error))
                continue
            for response in responses:
                if response.HasField("session"):
                    return response.session
            # A stream that broke off on this side may still hold the last chunks on the other.
            waiting = UnavailableError("the server has every chunk, and no session yet")
            sleep(attempts.wait_seconds(waiting))

    def _send_striped(
        self,
        upload_id: str,
        chunks: KvChunks,
        runs: Runs,
        stripes: int,
        deadline: Deadline,
        report: BytesCallback,
    ) -> list[pb.PushKvResponse]:
        total_bytes = chunks.num_bytes([(0, chunks.total_chunks)])
        done_bytes = total_bytes - chunks.num_bytes(runs)
        counting = threading.Lock()

        def count(num_bytes: int) -> None:
            nonlocal done_bytes
            with counting:
                done_bytes += num_bytes
                report(done_bytes, total_bytes)

        calls = [
            self._begin_push(upload_id, chunks, part, number, deadline, count)
            for number, part in enumerate(split_runs(runs, stripes))
        ]

        def stop() -> None:
            for call in calls:
                call.cancel()

        return run_together([partial(upload_response, call, deadline.timeout_seconds) for call in calls], stop)

    def _begin_push(
        self,
        upload_id: str,
        chunks: KvChunks,
        runs: Runs,
        channel_number: int,
        deadline: Deadline,
        count: Callable[[int], None],
    ) -> Any:
        opening = pb.PushKvHeader(upload_id=upload_id, transfer_id=chunks.transfer_id)
        header = pb.PushKvRequest(header=opening).SerializeToString()

        def frames() -> Iterator[bytes]:
            yield header
            made = chunks.frames(runs)
            while (item := run_blocking(next, made, None) if chunks.transfer_id else next(made, None)) is not None:
                frame, num_bytes = item
                yield frame
                count(num_bytes)

        return begin_upload(
            RawKvStub(self._open_channel(channel_number)).PushKv,
            frames(),
            timeout=deadline.remaining_seconds(),
            metadata=[*self._metadata(None), (MANIFEST_DIGEST_KEY, message_digest(header))],
        )


def _positive(seconds: float | None) -> float | None:
    return None if seconds is None else max(seconds, 1e-3)


def _checked(message: session_service_pb2.Session, header: pb.PushKvHeader) -> Session:
    """The session that came of a push; ProtocolError where it is not what was pushed."""
    session = Session.from_proto(message)
    if header.session_id not in ("", session.session_id) or session.token_digest != token_digest(header.token_ids):
        raise ProtocolError(f"the server made session {session.session_id!r} of other tokens than those pushed")
    return session
