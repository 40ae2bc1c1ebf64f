"""KV bytes to the caller."""

from __future__ import annotations

from contextlib import closing

from sale_prefill.kv_frames import PULL_FRAMES, ChunkFrame
from sale_prefill.v1 import kv_transfer_service_pb2, kv_transfer_service_pb2_grpc

from .. import _requests
from ..kv import KvCache
from ..kv_assembly import KvAssembler
from ..options import DEFAULT_CHUNK_BYTES, Checksum, Layout, Range
from ..progress import BytesCallback, bytes_reporter
from .connection import AsyncConnection


class _STUB:
    def __init__(self, channel):
        self.PullKv = channel.unary_stream("/sale_prefill.v1.KvTransferService/PullKv", request_serializer=kv_transfer_service_pb2.PullKvRequest.SerializeToString)


class AsyncKvCalls(AsyncConnection):
    """KvTransferService.PullKv."""

    async def pull_kv(
        self,
        session_id: str,
        *,
        token_range: Range | None = None,
        layer_range: Range | None = None,
        layout: Layout = "THD",
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        checksum: Checksum = "crc32c",
        generation: int = 0,
        progress: bool | BytesCallback = False,
        into=None,
        timeout_seconds: float | None = None,
    ) -> KvCache:
        """Copy a session's KV cache to this process.

        The bytes go into one preallocated block, copied once; each chunk's checksum is verified, and that every byte
        came exactly once. A connection that breaks is made again and the stream goes on from the chunk where it
        stopped, of the same generation of the session.

        Args:
            session_id: the session.
            token_range, layer_range: part of it, half-open; an end of None is the session's, None is everything.
            layout: axis order, `"THD"` (tokens, heads, head_dim; the fastest) or `"HTD"` (as transformers has it).
            chunk_bytes: bytes of a message, about; below both sides' message limit.
            checksum: digest of each chunk; `"xxh3_64"` needs the package xxhash.
            generation: generation that the session must have, else GenerationMismatchError; 0 for any.
            progress: True shows a bar on standard error; a function is called with (bytes done, bytes in all).
            timeout_seconds: for everything; None for no limit (a silent server is noticed all the same).

        Raises:
            ChecksumMismatchError: a chunk differs from its checksum.
            ProtocolError: bytes are missing, repeated or out of place.
            SalePrefillError: another of its subclasses in `errors`.
        """
        request = _requests.pull_request(
            session_id,
            token_range=token_range,
            layer_range=layer_range,
            layout=layout,
            chunk_bytes=chunk_bytes,
            checksum=checksum,
            generation=generation,
        )
        assembler = KvAssembler(
            session_id, token_range=token_range, layer_range=layer_range, layout=layout, checksum=checksum, into=into
        )

        def next_request() -> tuple[kv_transfer_service_pb2.PullKvRequest, str]:
            request.resume_from_chunk = assembler.next_chunk_index
            request.generation = assembler.generation or generation
            return request, session_id

        frames = self._stream(_STUB, "PullKv", next_request, timeout_seconds=timeout_seconds)
        with closing(frames), bytes_reporter(progress) as report:
            while not assembler.complete and (frame := await frames.read()) is not None:
                frame = PULL_FRAMES.decode(frame)
                if not isinstance(frame, ChunkFrame):
                    assembler.add_manifest(frame.manifest)
                else:
                    assembler.add_chunk(frame)
                    frames.progressed()
                    report(assembler.received_bytes, assembler.total_bytes)
            await frames.finish()
        return assembler.finish()
