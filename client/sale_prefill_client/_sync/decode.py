# Generated from _async/decode.py by tools/generate_sync_client.py. Do not edit.
"""Decode: new tokens out of a session."""

from __future__ import annotations

from types import TracebackType
from typing import Self, Unpack

from sale_prefill.v1 import prefill_service_pb2, prefill_service_pb2_grpc

from .. import _requests
from .._arguments import DecodeArguments
from ..detokenizer import IncrementalDecoder
from ..errors import ProtocolError, RequestCancelledError
from ..options import DecodeOptions
from ..progress import PrefillBar, PrefillCallback
from ..results import DecodedToken, DecodeResult, Generation, PrefillAccepted, PrefillProgress
from ..tokens import TokenIds
from .event_stream import EventStream
from .server import ServerCalls

_STUB = prefill_service_pb2_grpc.PrefillServiceStub


class DecodeStream:
    """New tokens as they are sampled. Iterate it; `result` is there afterwards. Made by `decode`.

    A connection that breaks is made again with the same request; the server then sends the same tokens from the first
    on, and those that were yielded already are left out. Leaving a `with` block early cancels the request.
    """

    def __init__(
        self,
        calls: DecodeCalls,
        session_id: str,
        token_ids: TokenIds,
        text: str | None,
        progress: bool | PrefillCallback,
        timeout_seconds: float | None,
        options: DecodeOptions,
    ) -> None:
        self.session_id = session_id
        self.accepted: PrefillAccepted | None = None
        self.result: DecodeResult | None = None
        self._calls = calls
        self._prompt = (token_ids, text)
        self._bar = PrefillBar() if progress is True else None
        self._report = self._bar or (progress if callable(progress) else None)
        self._timeout_seconds = timeout_seconds
        self._options = options
        self._request = prefill_service_pb2.DecodeRequest()
        self._events: EventStream | None = None
        self._computed_tokens = 0
        self._yielded_ids: list[int] = []
        self._replayed = 0
        self._ready: list[DecodedToken] = []
        self._cancelled = False

    def __iter__(self) -> Self:
        """The stream itself; its tokens come once."""
        return self

    def __next__(self) -> DecodedToken:
        """The next token.

        Raises:
            SalePrefillError: the decode failed; one of its subclasses in `errors`. After `cancel`, iteration just ends.
        """
        try:
            while not self._ready and self.result is None and not self._cancelled:
                self._read_event()
        except RequestCancelledError:
            if not self._cancelled:
                raise
        if self._cancelled or not self._ready:
            self._close()
            raise StopIteration
        token = self._ready.pop(0)
        self._yielded_ids.append(token.token_id)
        return token

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what is still running."""
        self.cancel()

    def cancel(self) -> None:
        """Stop decoding and end the iteration; `result` stays None. Any thread or task may call it."""
        self._cancelled = self.result is None
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()

    def _open(self) -> EventStream:
        token_ids, text = self._prompt
        ids = self._calls._prompt_ids(token_ids, text, add_special_tokens=False)
        self._request = _requests.decode_request(self.session_id, ids, **self._options)
        return self._calls._stream(_STUB, "Decode", self._next_request, timeout_seconds=self._timeout_seconds)

    def _next_request(self) -> tuple[prefill_service_pb2.DecodeRequest, str]:
        self._replayed = 0
        return self._request, self.session_id

    def _read_event(self) -> None:
        if self._events is None:
            self._events = self._open()
        message = self._events.read()
        if message is None:
            self._close()
            raise ProtocolError("the decode stream ended without its result")
        kind = message.WhichOneof("event")
        if kind == "accepted":
            self.accepted = PrefillAccepted.from_proto(message.accepted)
        elif kind == "progress":
            self._take_progress(PrefillProgress.from_proto(message.progress), self._events)
        elif kind == "tokens":
            self._take_tokens(message.tokens, self._events)
        elif kind == "result":
            self._events.finish()
            self.result = DecodeResult.from_proto(message.result, self._request.request_id)

    def _take_progress(self, progress: PrefillProgress, events: EventStream) -> None:
        if progress.computed_tokens > self._computed_tokens:
            self._computed_tokens = progress.computed_tokens
            events.progressed()
        if self._report is not None:
            self._report(progress)

    def _take_tokens(self, message: prefill_service_pb2.DecodedTokens, events: EventStream) -> None:
        if self._bar is not None:
            self._bar.close()
        for entry in message.tokens:
            token = DecodedToken.from_proto(entry)
            if self._replayed < len(self._yielded_ids):
                known = self._yielded_ids[self._replayed]
                if token.token_id != known:
                    raise ProtocolError(
                        f"after a broken connection the server sent token {token.token_id} at position "
                        f"{self._replayed}, where it had sent {known}"
                    )
                self._replayed += 1
            else:
                self._replayed += 1
                self._ready.append(token)
                events.progressed()


class TextStream:
    """The new text as it is decoded: pieces of whole characters. Iterate it; `result` is there afterwards. Made by
    `decode_text`.

    Special tokens are left out of the text; `token_ids` has all ids.
    """

    def __init__(self, calls: DecodeCalls, tokens: DecodeStream) -> None:
        self.tokens = tokens
        self.text = ""
        self.token_ids: list[int] = []
        self._calls = calls
        self._decoder: IncrementalDecoder | None = None
        self._flushed = False

    @property
    def result(self) -> DecodeResult | None:
        """How it ended; None while it has not."""
        return self.tokens.result

    def __iter__(self) -> Self:
        """The stream itself; its text comes once."""
        return self

    def __next__(self) -> str:
        """The next piece, never empty."""
        if self._decoder is None:
            self._decoder = (self._calls.tokenizer()).stream_decoder()
        while not self._flushed:
            piece = self._next_piece(self._decoder)
            if piece:
                self.text += piece
                return piece
        raise StopIteration

    def _next_piece(self, decoder: IncrementalDecoder) -> str:
        try:
            token = next(self.tokens)
        except StopIteration:
            self._flushed = True
            return decoder.flush()
        self.token_ids.append(token.token_id)
        return decoder.push(token.token_id)

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what is still running."""
        self.cancel()

    def cancel(self) -> None:
        """Stop decoding and end the iteration."""
        self.tokens.cancel()


class DecodeCalls(ServerCalls):
    """PrefillService.Decode."""

    def decode(
        self,
        session_id: str,
        token_ids: TokenIds = (),
        *,
        text: str | None = None,
        progress: bool | PrefillCallback = False,
        timeout_seconds: float | None = None,
        **options: Unpack[DecodeOptions],
    ) -> DecodeStream:
        """Continue a session, token by token. Nothing is sent before the first token is asked for.

        Args:
            session_id: the session.
            token_ids: `[num_tokens]` ids to append first, such as the next question.
            text: text to append instead, through the served tokenizer (extra `[text]`), without special tokens.
            progress: True shows a bar on standard error while appended tokens are prefilled; a function is called with
                each of those events.
            timeout_seconds: for everything; None for no limit (a silent server is noticed all the same).
            options: see `DecodeOptions`.
        """
        return DecodeStream(self, session_id, token_ids, text, progress, timeout_seconds, options)

    def generate(self, session_id: str, token_ids: TokenIds = (), **arguments: Unpack[DecodeArguments]) -> Generation:
        """Continue a session and return all new tokens at once. Takes the arguments of `decode`."""
        with self.decode(session_id, token_ids, **arguments) as stream:
            tokens = []
            for token in stream:
                tokens.append(token)
        if stream.result is None:
            raise RequestCancelledError("the decode was cancelled before its result")
        return Generation(tuple(tokens), stream.result)

    def decode_text(
        self, session_id: str, token_ids: TokenIds = (), **arguments: Unpack[DecodeArguments]
    ) -> TextStream:
        """Continue a session and yield the new text in pieces, never half a character (extra `[text]`). Takes the
        arguments of `decode`."""
        return TextStream(self, self.decode(session_id, token_ids, **arguments))
