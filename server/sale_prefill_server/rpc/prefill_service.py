"""PrefillService: commands in, a job's events out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import grpc

from sale_prefill.v1 import prefill_service_pb2 as pb
from sale_prefill.v1 import prefill_service_pb2_grpc
from sale_prefill_server.engine.sampling import SampledToken
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.rpc.convert import Converter, accepted_message, progress_message, token_message
from sale_prefill_server.rpc.inline_kv import InlineStreams, merged
from sale_prefill_server.rpc.interceptor import current_caller
from sale_prefill_server.scheduler.admission import Admission, Admitted
from sale_prefill_server.scheduler.messages import DecodeDone, PrefillCommand, PrefillDone, Progress

#: Seconds between progress events; the contract promises one a second.
HEARTBEAT_SECONDS = 0.5
#: A job may stop at the very moment a retry joins it; the retry then starts it again, this often at most.
_REJOINS = 3


class PrefillServicer(prefill_service_pb2_grpc.PrefillServiceServicer):
    """Serves Prefill and Decode."""

    def __init__(self, admission: Admission, converter: Converter, inline: InlineStreams) -> None:
        self._admission = admission
        self._converter = converter
        self._inline = inline

    async def Prefill(  # noqa: N802
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PrefillResponse | bytes]:
        """Accepted, progress, KV where it is wanted, result."""
        command = self._converter.prefill_command(request, current_caller().tenant)
        events: AsyncIterator[object] = _follow(lambda: self._admission.prefill(command))
        if request.HasField("inline_kv"):
            self._inline.check(request.inline_kv)
            events = self._with_kv(events, request.inline_kv, command)
        async with aclosing(events):  # type: ignore[type-var]  # generators, both
            async for event in events:
                if isinstance(event, bytes | pb.PrefillResponse):
                    yield event
                elif isinstance(event, Admitted):
                    yield pb.PrefillResponse(accepted=accepted_message(event.job.accepted, event.joined))
                elif isinstance(event, Progress):
                    yield pb.PrefillResponse(progress=progress_message(event))
                elif isinstance(event, PrefillDone):
                    yield pb.PrefillResponse(result=self._converter.prefill_result(event))

    async def _with_kv(
        self, events: AsyncIterator[object], asked: pb.InlineKv, command: PrefillCommand
    ) -> AsyncIterator[object]:
        """The events, with the manifest after the first and KV among the others."""
        async with aclosing(events):  # type: ignore[type-var]  # a generator
            admitted = await anext(events)
            assert isinstance(admitted, Admitted)
            assert admitted.kv is not None
            stream = self._inline.open(asked, command.tenant, admitted.tokens, admitted.kv)
            try:
                yield admitted
                yield pb.PrefillResponse(kv_manifest=stream.manifest)
                both = merged(events, stream.frames(), lambda event: isinstance(event, PrefillDone))
                async with aclosing(both):  # type: ignore[type-var]  # a generator
                    async for item in both:
                        if isinstance(item, Admitted) and item.kv is not None:
                            stream.go_on_with(item.kv)
                        yield item
            finally:
                stream.close()

    async def Decode(  # noqa: N802
        self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeResponse]:
        """Accepted, progress while appended tokens are prefilled, tokens, result."""
        command = self._converter.decode_command(request, current_caller().tenant)
        sent_tokens = position = 0
        async for event in _follow(lambda: self._admission.decode(command)):
            if isinstance(event, Admitted):
                position = 0  # a job that is followed again tells everything from the first token
                yield pb.DecodeResponse(accepted=accepted_message(event.job.accepted, event.joined))
            elif isinstance(event, Progress):
                yield pb.DecodeResponse(progress=progress_message(event))
            elif isinstance(event, SampledToken):
                position += 1
                if position > sent_tokens:
                    sent_tokens = position
                    yield pb.DecodeResponse(tokens=pb.DecodedTokens(tokens=[token_message(event)]))
            elif isinstance(event, DecodeDone):
                yield pb.DecodeResponse(result=self._converter.decode_result(event))


async def _follow(
    admit: Callable[[], Admitted],
) -> AsyncIterator[Admitted | Progress | SampledToken | PrefillDone | DecodeDone]:
    """The admission, then the job's events. A job that stopped while this call was joining it is admitted again."""
    for attempt in range(_REJOINS):
        admitted = admit()
        yield admitted
        try:
            async for event in admitted.job.follow(HEARTBEAT_SECONDS):
                yield event
            return
        except PrefillError as error:
            rejoinable = admitted.joined and error.reason is Reason.CANCELLED and not admitted.job.cancelled
            if not rejoinable or attempt == _REJOINS - 1:
                raise
