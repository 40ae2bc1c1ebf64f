"""ServerService: what this server is, how loaded it is, its tokenizer files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import grpc

from sale_attention import Profile
from sale_prefill.v1 import kv_transfer_service_pb2, server_service_pb2_grpc
from sale_prefill.v1 import server_service_pb2 as pb
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.kv.pool import PAGE_TOKENS
from sale_prefill_server.models.tokenizer_files import TokenizerFiles
from sale_prefill_server.rpc.convert import MAX_TOP_LOGITS, Converter, attention_message, retention_message
from sale_prefill_server.rpc.transfer_calls import transport_value
from sale_prefill_server.scheduler.scheduler import Scheduler
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Retention
from sale_prefill_server.transfer.segment_memory import SegmentTransport

_FILE_CHUNK_BYTES = 2**18


class ServerServicer(server_service_pb2_grpc.ServerServiceServicer):
    """Describes the server; Drain is not in this release."""

    def __init__(
        self,
        engine: Engine,
        manager: SessionManager,
        scheduler: Scheduler,
        converter: Converter,
        tokenizer_files: TokenizerFiles,
        *,
        server_id: str,
        server_version: str,
        default_retention: Retention,
        max_message_bytes: int,
        segment_transports: Sequence[SegmentTransport],
        draining: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._manager = manager
        self._scheduler = scheduler
        self._converter = converter
        self._tokenizer_files = tokenizer_files
        self._server_id = server_id
        self._server_version = server_version
        self._default_retention = default_retention
        self._max_message_bytes = max_message_bytes
        self._transports = [kv_transfer_service_pb2.TRANSPORT_GRPC, *map(transport_value, segment_transports)]
        self._draining = draining

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Model, KV format, limits."""
        model = self._engine.model
        return pb.GetServerInfoResponse(
            server_id=self._server_id,
            server_version=self._server_version,
            model_name=model.name,
            kv_spec=self._converter.kv_spec(),
            max_sequence_tokens=model.max_sequence_tokens,
            max_message_bytes=self._max_message_bytes,
            vocabulary_size=model.vocabulary_size,
            eos_token_ids=model.eos_token_ids,
            default_attention=attention_message(self._engine.defaults),
            default_retention=retention_message(self._default_retention),
            device=str(model.device),
            attention_backend=self._engine.attention_backend,
            transports=self._transports,
            num_query_heads=model.num_query_heads,
            max_top_logits=MAX_TOP_LOGITS,
            profile=None if self._engine.profile is None else _profile_info(self._engine.profile),
            page_tokens=PAGE_TOKENS,
        )

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadResponse:
        """What a router needs."""
        load = self._scheduler.load()
        return pb.GetLoadResponse(
            running_requests=load.running_requests,
            queued_requests=load.queued_requests,
            queued_tokens=load.queued_tokens,
            prefill_tokens_per_second=load.prefill_tokens_per_second,
            kv_used_bytes=self._engine.pool.used_bytes,
            kv_capacity_bytes=self._engine.pool.capacity_bytes,
            sessions=sum(self._manager.states().values()),
            draining=self._draining(),
        )

    async def GetTokenizerFiles(  # noqa: N802
        self, request: pb.GetTokenizerFilesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GetTokenizerFilesResponse]:
        """Manifest, then the files in pieces; the manifest alone where the caller has them."""
        files = self._tokenizer_files
        manifest = pb.TokenizerManifest(
            digest=files.digest,
            files=[
                pb.TokenizerFile(name=file.path.name, size_bytes=file.size_bytes, sha256=file.sha256)
                for file in files.files
            ],
        )
        yield pb.GetTokenizerFilesResponse(manifest=manifest)
        if request.known_digest == files.digest:
            return
        for index, file in enumerate(files.files):
            for start in range(0, file.size_bytes, _FILE_CHUNK_BYTES):
                data = await asyncio.to_thread(_read_piece, file.path, start)
                yield pb.GetTokenizerFilesResponse(chunk=pb.TokenizerFileChunk(file_index=index, data=data))

    async def Drain(  # noqa: N802
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DrainResponse]:
        """Not in this release."""
        raise PrefillError(Reason.NOT_IMPLEMENTED, "Drain is not in this release: send SIGTERM")
        yield


def _profile_info(profile: Profile) -> pb.ProfileInfo:
    return pb.ProfileInfo(
        name=profile.name, digest=profile.digest, error_budgets=[level.error_budget for level in profile.levels]
    )


def _read_piece(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(_FILE_CHUNK_BYTES)
