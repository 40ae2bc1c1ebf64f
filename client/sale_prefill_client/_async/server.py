"""Calls about the server itself: what it is, how busy, its tokenizer, whether it is ready."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import grpc

from sale_prefill.v1 import server_service_pb2, server_service_pb2_grpc

from .. import tokenizer_cache
from .._retry import Deadline
from ..errors import NoTokenizerError, NotReadyError, ProtocolError, UnavailableError, from_rpc_error
from ..results import Load, ServerInfo
from ..tokenizer import TOKENIZER_FILE, Tokenizer
from ..tokens import TokenIds
from ._io import run_blocking, sleep
from .connection import AsyncConnection

_STUB = server_service_pb2_grpc.ServerServiceStub

# grpc.health.v1 in bytes, so that the base install needs no grpcio-health-checking: the request's field 1 is the name
# of the service, and the response's field 1 (a varint) is 1 for SERVING. Health, not GetServerInfo, because it answers
# while a model is loading, says just this, and is what load balancers ask.
_HEALTH_METHOD = "/grpc.health.v1.Health/Check"
_HEALTH_SERVICE = b"sale_prefill.v1.PrefillService"
_HEALTH_REQUEST = b"\x0a" + bytes([len(_HEALTH_SERVICE)]) + _HEALTH_SERVICE
_HEALTH_SERVING = b"\x08\x01"
_HEALTH_INTERVAL_SECONDS = 0.2
_HEALTH_CHECK_SECONDS = 5.0


class AsyncServerCalls(AsyncConnection):
    """ServerService and grpc.health.v1."""

    _tokenizer: Tokenizer | None = None

    async def get_server_info(self, *, timeout_seconds: float | None = None) -> ServerInfo:
        """Model, native KV format, limits and defaults of the server."""
        request = server_service_pb2.GetServerInfoRequest()
        response = await self._call(_STUB, "GetServerInfo", request, timeout_seconds=timeout_seconds, repeatable=True)
        return ServerInfo.from_proto(response)

    async def get_load(self, *, timeout_seconds: float | None = None) -> Load:
        """How busy the server is."""
        request = server_service_pb2.GetLoadRequest()
        response = await self._call(_STUB, "GetLoad", request, timeout_seconds=timeout_seconds, repeatable=True)
        return Load.from_proto(response)

    async def tokenizer(self, *, cache_folder: Path | None = None, timeout_seconds: float | None = None) -> Tokenizer:
        """The served model's tokenizer. Its files are fetched once and kept on disk by their digest.

        Args:
            cache_folder: where to keep them; None for `$XDG_CACHE_HOME/sale-prefill/tokenizers`.
            timeout_seconds: for the download; None for no limit.

        Raises:
            MissingExtraError: the extra `[text]` is not installed.
            ChecksumMismatchError: a file differs from its SHA-256.
            NoTokenizerError: the served model has none.
            ProtocolError: the server names files that must not be written.
        """
        if self._tokenizer is None:
            root = tokenizer_cache.cache_root() if cache_folder is None else cache_folder
            folder = await self._fetch_tokenizer(root, timeout_seconds)
            self._tokenizer = await run_blocking(Tokenizer, folder)
        return self._tokenizer

    async def _fetch_tokenizer(self, root: Path, timeout_seconds: float | None) -> Path:
        request = server_service_pb2.GetTokenizerFilesRequest()
        frames = self._stream(_STUB, "GetTokenizerFiles", lambda: (request, None), timeout_seconds=timeout_seconds)
        download: tokenizer_cache.TokenizerDownload | None = None
        with closing(frames):
            while (frame := await frames.read()) is not None:
                if frame.WhichOneof("frame") == "manifest":
                    # An attempt after a break begins anew, with its manifest.
                    tokenizer_cache.check_manifest(frame.manifest)
                    if not any(entry.name == TOKENIZER_FILE for entry in frame.manifest.files):
                        raise NoTokenizerError(f"the served model has no {TOKENIZER_FILE}; send token ids, not text")
                    cached = await run_blocking(tokenizer_cache.find, frame.manifest, root)
                    if cached is not None:
                        return cached
                    download = tokenizer_cache.TokenizerDownload(frame.manifest)
                elif download is None:
                    raise ProtocolError("a tokenizer chunk came before the manifest")
                else:
                    download.add(frame.chunk)
        if download is None:
            raise ProtocolError("the stream of tokenizer files ended before its manifest")
        return await run_blocking(download.store, root)

    async def _prompt_ids(self, token_ids: TokenIds | None, text: str | None, *, add_special_tokens: bool) -> TokenIds:
        """Token ids as given, or those of a text."""
        if text is None:
            return () if token_ids is None else token_ids
        if token_ids is not None and len(token_ids):
            raise ValueError("both token_ids and text were given; pass one of them")
        return (await self.tokenizer()).encode(text, add_special_tokens=add_special_tokens)

    async def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Wait until the server can be reached and its model is loaded and warm (grpc.health.v1 SERVING).

        Raises:
            UnavailableError: it could not be reached in time.
            NotReadyError: it was reached, and was not ready in time.
        """
        deadline = Deadline(timeout_seconds)
        while (problem := await self._health_problem(deadline)) is not None:
            if (deadline.remaining_seconds() or 0.0) <= _HEALTH_INTERVAL_SECONDS:
                raise type(problem)(f"{self.target} was not ready in {timeout_seconds:g} seconds: {problem.message}")
            await sleep(_HEALTH_INTERVAL_SECONDS)

    async def _health_problem(self, deadline: Deadline) -> UnavailableError | None:
        """Why the server does not serve now; None where it does."""
        check = self._open_channel().unary_unary(_HEALTH_METHOD)
        timeout_seconds = min(max(deadline.remaining_seconds() or 0.0, 0.1), _HEALTH_CHECK_SECONDS)
        try:
            status = await check(_HEALTH_REQUEST, timeout=timeout_seconds, metadata=self._metadata(None))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return NotReadyError("it does not offer the prefill service yet")
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return UnavailableError(f"it could not be reached: {error.details()}")
            raise from_rpc_error(error) from error
        return None if status == _HEALTH_SERVING else NotReadyError("its model is not loaded and warm yet")
