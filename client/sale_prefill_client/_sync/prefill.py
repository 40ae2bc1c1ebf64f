# Generated from _async/prefill.py by tools/generate_sync_client.py. Do not edit.
"""Prefill: tokens in, a session with their KV out."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from typing import Unpack

from sale_prefill.v1 import prefill_service_pb2, prefill_service_pb2_grpc

from .. import _requests
from .._kv_stub import RawPrefillStub
from ..errors import ProtocolError
from ..inline_kv import InlineAssembly
from ..options import PrefillOptions
from ..progress import PrefillCallback, prefill_reporter
from ..results import PrefillAccepted, PrefillEvent, PrefillProgress, PrefillResult
from ..tokens import TokenIds
from .server import ServerCalls

_STUB = prefill_service_pb2_grpc.PrefillServiceStub


class PrefillCalls(ServerCalls):
    """PrefillService.Prefill."""

    def prefill(
        self,
        token_ids: TokenIds | None = None,
        *,
        text: str | None = None,
        progress: bool | PrefillCallback = False,
        timeout_seconds: float | None = None,
        **options: Unpack[PrefillOptions],
    ) -> PrefillResult:
        """Compute the KV of tokens, in a new session or appended to one, and keep it on the server.

        A connection that breaks is made again and the same request joined, as long as the retry policy allows.

        Args:
            token_ids: `[num_tokens]` ids below the vocabulary size.
            text: text instead, through the served tokenizer (extra `[text]`). What the model wants at the start of a
                text is added where the session is certainly new: no `session_id`, or `expected_prefix_tokens` of 0.
            progress: True shows a bar on standard error; a function is called with each event, and once at the end.
            timeout_seconds: for everything; None for no limit (a silent server is noticed all the same).
            options: see `PrefillOptions`.

        Returns:
            PrefillResult: session, best next tokens, cost and sparsity.

        Raises:
            SalePrefillError: one of its subclasses in `errors`.
        """
        with prefill_reporter(progress) as report:
            events = self.prefill_events(token_ids, text=text, timeout_seconds=timeout_seconds, **options)
            with closing(events):
                for event in events:
                    if isinstance(event, PrefillProgress):
                        report(event)
                    elif isinstance(event, PrefillResult):
                        stats, total = event.stats, event.session.num_tokens
                        report(PrefillProgress(total, total, 1.0, stats.queue_seconds + stats.compute_seconds, False))
                        return event
        raise ProtocolError("the prefill stream ended without its result")

    def prefill_events(
        self,
        token_ids: TokenIds | None = None,
        *,
        text: str | None = None,
        timeout_seconds: float | None = None,
        **options: Unpack[PrefillOptions],
    ) -> Generator[PrefillEvent, None]:
        """The events of a prefill as they come: PrefillAccepted, PrefillProgress at least once a second, KvArrived for
        every part of the KV where `inline_kv` asks for it, and at last PrefillResult. After a broken connection another
        PrefillAccepted comes, with `joined` set.

        Takes the arguments of `prefill`, less `progress`. Closing the iterator early cancels the request.
        """
        is_new = not options.get("session_id") or options.get("expected_prefix_tokens") == 0
        ids = self._prompt_ids(token_ids, text, add_special_tokens=is_new)
        request = _requests.prefill_request(ids, **options)
        kv = InlineAssembly.of(options.get("inline_kv"))
        session_id, computed_tokens = request.session_id, 0

        def next_request() -> tuple[prefill_service_pb2.PrefillRequest, str]:
            if kv is not None:
                request.inline_kv.resume_from_chunk = kv.next_chunk_index
            return request, session_id

        stub = _STUB if kv is None else RawPrefillStub
        stream = self._stream(stub, "Prefill", next_request, timeout_seconds=timeout_seconds)
        with closing(stream), nullcontext() if kv is None else closing(kv):
            while (message := stream.read()) is not None:
                if kv is not None and (message := kv.take(message)) is None:
                    stream.progressed()
                    if (arrived := kv.arrived) is not None:
                        yield arrived
                    continue
                kind = message.WhichOneof("event")
                if kind == "accepted":
                    session_id = message.accepted.session_id
                    yield PrefillAccepted.from_proto(message.accepted)
                elif kind == "progress":
                    if message.progress.computed_tokens > computed_tokens:
                        computed_tokens = message.progress.computed_tokens
                        stream.progressed()
                    yield PrefillProgress.from_proto(message.progress)
                elif kind == "result":
                    stream.finish()
                    cache = None if kv is None else kv.finish(message.result.session)
                    yield PrefillResult.from_proto(message.result, request.request_id, cache)
                    return
