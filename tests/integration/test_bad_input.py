"""Bad input: the right code, reason and message each time, and a server that goes on serving.

One table, one row a mistake; start-up mistakes and disconnects have their own tests below and in tests/fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from sale_prefill.v1 import kv_pb2, server_service_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as kv
from sale_prefill.v1 import prefill_service_pb2 as pb
from sale_prefill.v1 import session_service_pb2 as sessions
from tests.support import RunningServer, call_error, running_server, tokens_of

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@dataclass(frozen=True)
class Mistake:
    """A call that must be refused, and how."""

    call: Callable[[RunningServer], Any]
    code: grpc.StatusCode
    reason: str
    message: str
    field: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


def prefill(**fields: Any) -> Callable[[RunningServer], Any]:
    return lambda server: server.prefill.Prefill(pb.PrefillRequest(**fields))


def decode(**fields: Any) -> Callable[[RunningServer], Any]:
    return lambda server: server.prefill.Decode(pb.DecodeRequest(**fields))


def pull(**fields: Any) -> Callable[[RunningServer], Any]:
    return lambda server: server.kv.PullKv(kv.PullKvRequest(session_id="held", **fields))


def sampling(**fields: Any) -> Callable[[RunningServer], Any]:
    return decode(session_id="held", max_new_tokens=1, sampling=pb.SamplingOptions(**fields))


def attention(**fields: Any) -> Callable[[RunningServer], Any]:
    return prefill(token_ids=[5], attention=sessions.AttentionOptions(**fields))


MISTAKES = {
    "no tokens": Mistake(prefill(), INVALID, "NO_TOKENS", "nothing to prefill", "token_ids"),
    "token outside the vocabulary": Mistake(
        prefill(token_ids=[5, 320, 6]),
        INVALID,
        "INVALID_TOKEN",
        "token_ids[1] = 320 is outside the vocabulary of 320 tokens",
        "token_ids[1]",
        (("index", "1"), ("token_id", "320"), ("vocabulary_size", "320")),
    ),
    "largest token id of the wire": Mistake(prefill(token_ids=[2**32 - 1]), INVALID, "INVALID_TOKEN", "4294967295"),
    "longer than the context": Mistake(
        prefill(token_ids=[5] * 4097),
        grpc.StatusCode.OUT_OF_RANGE,
        "CONTEXT_EXCEEDED",
        "4097 tokens are longer than the model's context of 4096 tokens",
        "token_ids",
        (("total_tokens", "4097"), ("max_sequence_tokens", "4096")),
    ),
    "append longer than the context": Mistake(
        prefill(token_ids=[5] * 4000, session_id="held"),
        grpc.StatusCode.OUT_OF_RANGE,
        "CONTEXT_EXCEEDED",
        "4200 tokens are longer",
    ),
    "decode of an unknown session": Mistake(
        decode(session_id="nobody", max_new_tokens=1),
        grpc.StatusCode.NOT_FOUND,
        "SESSION_UNKNOWN",
        "'nobody' is not held here",
        metadata=(("session_id", "nobody"),),
    ),
    "append to an unknown session": Mistake(
        prefill(token_ids=[5], session_id="nobody", expected_prefix_tokens=9),
        grpc.StatusCode.NOT_FOUND,
        "SESSION_UNKNOWN",
        "'nobody'",
    ),
    "get of an unknown session": Mistake(
        lambda server: server.sessions.GetSession(sessions.GetSessionRequest(session_id="nobody")),
        grpc.StatusCode.NOT_FOUND,
        "SESSION_UNKNOWN",
        "'nobody'",
    ),
    "append with another prefix": Mistake(
        prefill(token_ids=[5], session_id="held", expected_prefix_tokens=199),
        grpc.StatusCode.FAILED_PRECONDITION,
        "PREFIX_MISMATCH",
        "holds 200 tokens, the request expects 199",
        "expected_prefix_tokens",
        (("num_tokens", "200"), ("expected_prefix_tokens", "199")),
    ),
    "new session where one is held": Mistake(
        prefill(token_ids=[5], session_id="held", expected_prefix_tokens=0),
        grpc.StatusCode.FAILED_PRECONDITION,
        "PREFIX_MISMATCH",
        "holds 200 tokens",
    ),
    "other attention than the session's": Mistake(
        prefill(
            token_ids=[5],
            session_id="held",
            attention=sessions.AttentionOptions(mode=sessions.ATTENTION_MODE_DENSE),
        ),
        grpc.StatusCode.FAILED_PRECONDITION,
        "ATTENTION_MISMATCH",
        "was created with sale attention",
        "attention",
    ),
    "bad session id": Mistake(
        prefill(token_ids=[5], session_id="a b"), INVALID, "INVALID_FIELD", "session_id: 'a b'", "session_id"
    ),
    "bad request id": Mistake(
        prefill(token_ids=[5], request_id="x" * 200), INVALID, "INVALID_FIELD", "request_id", "request_id"
    ),
    "no session id": Mistake(decode(max_new_tokens=1), INVALID, "INVALID_FIELD", "is empty", "session_id"),
    "no new tokens": Mistake(
        decode(session_id="held"), INVALID, "INVALID_FIELD", "ask for at least 1", "max_new_tokens"
    ),
    "stop token outside the vocabulary": Mistake(
        decode(session_id="held", max_new_tokens=1, stop_token_ids=[400]),
        INVALID,
        "INVALID_FIELD",
        "400 is outside",
        "stop_token_ids",
    ),
    "negative temperature": Mistake(
        sampling(temperature=-1), INVALID, "INVALID_SAMPLING", "temperature = -1", "sampling.temperature"
    ),
    "temperature that is no number": Mistake(
        sampling(temperature=float("nan")), INVALID, "INVALID_SAMPLING", "nan", "sampling.temperature"
    ),
    "top_p of 0": Mistake(sampling(top_p=0.0), INVALID, "INVALID_SAMPLING", "above 0", "sampling.top_p"),
    "top_p above 1": Mistake(sampling(top_p=1.5), INVALID, "INVALID_SAMPLING", "at most 1", "sampling.top_p"),
    "min_p above 1": Mistake(sampling(min_p=1.5), INVALID, "INVALID_SAMPLING", "0 to 1", "sampling.min_p"),
    "repetition penalty of 0": Mistake(
        sampling(repetition_penalty=0.0), INVALID, "INVALID_SAMPLING", "above 0", "sampling.repetition_penalty"
    ),
    "threshold of 0": Mistake(attention(threshold=0.0), INVALID, "INVALID_FIELD", "above 0", "attention.threshold"),
    "threshold that is no number": Mistake(
        attention(threshold=float("nan")), INVALID, "INVALID_FIELD", "nan", "attention.threshold"
    ),
    "query stride of 3": Mistake(
        attention(query_stride=3), INVALID, "INVALID_FIELD", "must be 1, 2 or 4", "attention.query_stride"
    ),
    "unknown attention mode": Mistake(attention(mode=9), INVALID, "INVALID_FIELD", "9", "attention.mode"),
    "unknown interrupt policy": Mistake(
        prefill(token_ids=[5], on_interrupt=7), INVALID, "INVALID_FIELD", "7", "on_interrupt"
    ),
    "too many logits": Mistake(
        prefill(token_ids=[5], num_top_logits=1001), INVALID, "INVALID_FIELD", "at most 1000", "num_top_logits"
    ),
    "lease too long": Mistake(
        prefill(token_ids=[5], retention=sessions.RetentionPolicy(lease_duration=Duration(seconds=10**6))),
        INVALID,
        "INVALID_FIELD",
        "must be 0 to 86400",
        "retention.lease_duration",
    ),
    "negative lease": Mistake(
        prefill(token_ids=[5], retention=sessions.RetentionPolicy(lease_duration=Duration(seconds=-1))),
        INVALID,
        "INVALID_FIELD",
        "-1",
        "retention.lease_duration",
    ),
    "too many labels": Mistake(
        prefill(token_ids=[5], labels={str(number): "" for number in range(33)}),
        INVALID,
        "INVALID_FIELD",
        "at most 32",
        "labels",
    ),
    "pull of tokens that are not there": Mistake(
        pull(range=kv_pb2.KvRange(token_end=201)), INVALID, "INVALID_FIELD", "holds 200", "range"
    ),
    "pull of layers that are not there": Mistake(
        pull(range=kv_pb2.KvRange(layer_end=3)), INVALID, "INVALID_FIELD", "has 2", "range"
    ),
    "pull of an empty range": Mistake(
        pull(range=kv_pb2.KvRange(token_start=50, token_end=50)), INVALID, "INVALID_FIELD", "[50, 50)", "range"
    ),
    "pull of another element type": Mistake(
        pull(element_type=kv_pb2.ELEMENT_TYPE_INT8), INVALID, "INVALID_FIELD", "ELEMENT_TYPE_FLOAT32", "element_type"
    ),
    "pull in tiny chunks": Mistake(pull(chunk_bytes=1), INVALID, "INVALID_FIELD", "4096", "chunk_bytes"),
    "pull in huge chunks": Mistake(pull(chunk_bytes=2**30), INVALID, "INVALID_FIELD", "32768", "chunk_bytes"),
    "pull of another generation": Mistake(
        pull(generation=99),
        grpc.StatusCode.ABORTED,
        "GENERATION_MISMATCH",
        "start the pull again",
        metadata=(("generation", "1"),),
    ),
    "pull past the last chunk": Mistake(
        pull(resume_from_chunk=10**6), INVALID, "INVALID_FIELD", "the stream has", "resume_from_chunk"
    ),
    "update of nothing": Mistake(
        lambda server: server.sessions.UpdateSession(
            sessions.UpdateSessionRequest(session=sessions.Session(session_id="held"))
        ),
        INVALID,
        "INVALID_FIELD",
        "name one or more of",
        "update_mask",
    ),
    "negative page size": Mistake(
        lambda server: server.sessions.ListSessions(sessions.ListSessionsRequest(page_size=-1)),
        INVALID,
        "INVALID_FIELD",
        "page_size",
        "page_size",
    ),
    "page token from elsewhere": Mistake(
        lambda server: server.sessions.ListSessions(sessions.ListSessionsRequest(page_token="!")),
        INVALID,
        "INVALID_FIELD",
        "is not from a response",
        "page_token",
    ),
    "message over the limit": Mistake(
        prefill(token_ids=[5], labels={"big": "x" * 70_000}),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "MESSAGE_TOO_LARGE",
        "the limit is 65536",
        metadata=(("max_message_bytes", "65536"),),
    ),
    "fork of more tokens than there are": Mistake(
        lambda server: server.sessions.ForkSession(sessions.ForkSessionRequest(session_id="held", num_tokens=201)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "201 of a session that holds 200",
        "num_tokens",
    ),
    "fork under an id that is taken": Mistake(
        lambda server: server.sessions.ForkSession(
            sessions.ForkSessionRequest(session_id="held", new_session_id="held")
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "exists",
        "new_session_id",
    ),
    "push without a header": Mistake(
        lambda server: server.kv.PushKv(iter([kv.PushKvRequest()])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "it comes first in the stream",
        "header",
    ),
    "push opened without a request id": Mistake(
        lambda server: server.kv.OpenPush(kv.OpenPushRequest()),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "request_id: is empty",
        "request_id",
    ),
    "drain": Mistake(
        lambda server: server.info.Drain(server_service_pb2.DrainRequest()),
        grpc.StatusCode.UNIMPLEMENTED,
        "NOT_IMPLEMENTED",
        "Drain",
    ),
}


@pytest.fixture(scope="module")
def server(tiny_model: object) -> Iterator[RunningServer]:
    with running_server(model=str(tiny_model), dtype="float32", max_message_bytes=65536) as server:
        server.prefill_tokens(tokens_of(200), session_id="held")
        yield server


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_refused_clearly_and_changes_nothing(server: RunningServer, mistake: Mistake) -> None:
    before = server.session("held")
    error = call_error(lambda: mistake.call(server))
    assert error.code is mistake.code
    assert error.reason == mistake.reason
    assert mistake.message in error.message
    assert error.fields == ([mistake.field] if mistake.field else error.fields)
    assert dict(mistake.metadata).items() <= error.metadata.items()
    after = server.session("held")
    assert (after.num_tokens, after.generation, after.state) == (before.num_tokens, before.generation, before.state)
    assert server.prefill_tokens(tokens_of(10)).session.num_tokens == 10
