"""Protobuf requests out of plain Python arguments.

What cannot even be written into a message is refused here, with the errors that the server would use; everything else
is the server's to judge.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from sale_prefill.v1 import kv_pb2, kv_transfer_service_pb2, prefill_service_pb2, session_service_pb2

from .checksums import ALGORITHM_NUMBERS
from .errors import FieldViolation, InvalidFieldError, InvalidRequestError, InvalidSamplingError
from .options import (
    Attention,
    Checksum,
    Durability,
    InlineKv,
    InterruptPolicy,
    Layout,
    Pin,
    Range,
    Sampling,
    SegmentTransport,
)
from .results import KvSpec
from .tokens import TokenIds, token_array

_INTERRUPT_POLICIES = {
    "keep": prefill_service_pb2.INTERRUPT_POLICY_KEEP,
    "free": prefill_service_pb2.INTERRUPT_POLICY_FREE,
}
_ATTENTION_MODES = {
    "default": session_service_pb2.ATTENTION_MODE_UNSPECIFIED,
    "sale": session_service_pb2.ATTENTION_MODE_SALE,
    "dense": session_service_pb2.ATTENTION_MODE_DENSE,
}
_DURABILITIES = {
    "none": session_service_pb2.DURABILITY_NONE,
    "async": session_service_pb2.DURABILITY_ASYNC,
    "local": session_service_pb2.DURABILITY_LOCAL,
    "shared": session_service_pb2.DURABILITY_SHARED,
}
_PINS = {
    "none": session_service_pb2.PIN_NONE,
    "soft": session_service_pb2.PIN_SOFT,
    "hard": session_service_pb2.PIN_HARD,
}
_LAYOUTS = {"HTD": kv_pb2.KV_LAYOUT_HTD, "THD": kv_pb2.KV_LAYOUT_THD}
_TRANSPORTS = {
    "shm": kv_transfer_service_pb2.TRANSPORT_SHM,
    "cuda_ipc": kv_transfer_service_pb2.TRANSPORT_CUDA_IPC,
}
_UINT32_LIMIT = 1 << 32
_UINT64_LIMIT = 1 << 64
_MAX_DURATION_SECONDS = 315_576_000_000

_Choice = TypeVar("_Choice")


def new_request_id() -> str:
    """A fresh idempotency key (RFC 9562, version 4)."""
    return str(uuid.uuid4())


def _refuse(
    field: str, value: object, want: str, error_class: type[InvalidRequestError] = InvalidFieldError
) -> InvalidRequestError:
    description = f"{field} is {value!r}; it must be {want}"
    return error_class(description, field_violations=(FieldViolation(field, description),))


def _choice(table: Mapping[str, _Choice], field: str, value: str) -> _Choice:
    if value not in table:
        raise _refuse(field, value, f"one of {', '.join(table)}")
    return table[value]


def _count(
    field: str, value: int, limit: int = _UINT32_LIMIT, error_class: type[InvalidRequestError] = InvalidFieldError
) -> int:
    if not 0 <= value < limit:
        raise _refuse(field, value, f"from 0 to {limit - 1}", error_class)
    return int(value)


def duration(field: str, seconds: float) -> Duration:
    """A protobuf duration, to the nanosecond; InvalidFieldError where it cannot hold the value."""
    if not (math.isfinite(seconds) and 0 <= seconds <= _MAX_DURATION_SECONDS):
        raise _refuse(field, seconds, f"a number of seconds from 0 to {_MAX_DURATION_SECONDS}")
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def retention(
    lease_seconds: float | None, sliding: bool | None, durability: Durability | None = None, pin: Pin | None = None
) -> session_service_pb2.RetentionPolicy:
    """A retention policy; what is None stays unset."""
    message = session_service_pb2.RetentionPolicy()
    if lease_seconds is not None:
        message.lease_duration.CopyFrom(duration("retention.lease_duration", lease_seconds))
    if sliding is not None:
        message.sliding = sliding
    if durability is not None:
        message.durability = _choice(_DURABILITIES, "retention.durability", durability)
    if pin is not None:
        message.pin = _choice(_PINS, "retention.pin", pin)
    return message


def _says_anything(lease_seconds: float | None, sliding: bool, durability: Durability | None, pin: Pin | None) -> bool:
    return lease_seconds is not None or sliding or durability is not None or pin is not None


def attention_options(attention: Attention) -> session_service_pb2.AttentionOptions:
    """Attention settings; what is None stays unset."""
    message = session_service_pb2.AttentionOptions(mode=_choice(_ATTENTION_MODES, "attention.mode", attention.mode))
    if attention.threshold is not None:
        message.threshold = attention.threshold
    if attention.query_stride is not None:
        message.query_stride = _count("attention.query_stride", attention.query_stride)
    if attention.error_budget is not None:
        message.error_budget = attention.error_budget
    return message


def sampling_options(sampling: Sampling) -> prefill_service_pb2.SamplingOptions:
    """Sampling settings; what is None stays unset."""
    message = prefill_service_pb2.SamplingOptions(
        temperature=sampling.temperature,
        top_k=_count("sampling.top_k", sampling.top_k, error_class=InvalidSamplingError),
        min_p=sampling.min_p,
    )
    if sampling.repetition_penalty is not None:
        message.repetition_penalty = sampling.repetition_penalty
    if sampling.top_p is not None:
        message.top_p = sampling.top_p
    if sampling.seed is not None:
        message.seed = _count("sampling.seed", sampling.seed, _UINT64_LIMIT, InvalidSamplingError)
    return message


def prefill_request(
    token_ids: TokenIds,
    *,
    session_id: str | None = None,
    request_id: str | None = None,
    expected_prefix_tokens: int | None = None,
    attention: Attention | None = None,
    lease_seconds: float | None = None,
    sliding: bool = False,
    durability: Durability | None = None,
    pin: Pin | None = None,
    prefix_reuse: bool | None = None,
    on_interrupt: InterruptPolicy = "keep",
    num_top_logits: int | None = None,
    labels: Mapping[str, str] | None = None,
    inline_kv: InlineKv | bool | None = None,
) -> prefill_service_pb2.PrefillRequest:
    """A prefill request; a request id is made up where there is none."""
    request = prefill_service_pb2.PrefillRequest(
        request_id=request_id or new_request_id(),
        session_id=session_id or "",
        token_ids=token_array(token_ids).tolist(),
        on_interrupt=_choice(_INTERRUPT_POLICIES, "on_interrupt", on_interrupt),
        labels=labels,
    )
    if expected_prefix_tokens is not None:
        request.expected_prefix_tokens = _count("expected_prefix_tokens", expected_prefix_tokens)
    if attention is not None:
        request.attention.CopyFrom(attention_options(attention))
    if _says_anything(lease_seconds, sliding, durability, pin):
        request.retention.CopyFrom(retention(lease_seconds, sliding, durability, pin))
    if prefix_reuse is not None:
        request.prefix_reuse = (
            prefill_service_pb2.PREFIX_REUSE_ON if prefix_reuse else prefill_service_pb2.PREFIX_REUSE_OFF
        )
    if num_top_logits is not None:
        request.num_top_logits = _count("num_top_logits", num_top_logits)
    if inline_kv:
        request.inline_kv.CopyFrom(inline_kv_message(InlineKv() if inline_kv is True else inline_kv))
    return request


def inline_checksum(inline: InlineKv) -> Checksum:
    """The digest of inline KV, where none was chosen the one that suits its way."""
    return inline.checksum or ("crc32c" if inline.segment is None else inline.segment.default_checksum)


def inline_kv_message(inline: InlineKv) -> prefill_service_pb2.InlineKv:
    """What a prefill says about KV that is to come with it."""
    default = 0 if inline.segment is None else inline.segment.default_chunk_bytes
    message = prefill_service_pb2.InlineKv(
        layout=_choice(_LAYOUTS, "layout", inline.layout),
        chunk_bytes=_count("chunk_bytes", inline.chunk_bytes or default),
        checksum_algorithm=_choice(ALGORITHM_NUMBERS, "checksum", inline_checksum(inline)),
        transfer_id="" if inline.segment is None else inline.segment.transfer_id,
    )
    if inline.expected_spec is not None:
        message.expected_spec.CopyFrom(replace(inline.expected_spec, layout=None).to_proto())
    _put_range(message.range, inline.token_range, inline.layer_range)
    return message


def decode_request(
    session_id: str,
    token_ids: TokenIds,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_token_ids: TokenIds = (),
    ignore_eos: bool = False,
    num_top_logprobs: int = 0,
    request_id: str | None = None,
    expected_prefix_tokens: int | None = None,
    on_interrupt: InterruptPolicy = "keep",
) -> prefill_service_pb2.DecodeRequest:
    """A decode request; a request id is made up where there is none."""
    request = prefill_service_pb2.DecodeRequest(
        request_id=request_id or new_request_id(),
        session_id=session_id,
        token_ids=token_array(token_ids).tolist(),
        max_new_tokens=_count("max_new_tokens", max_new_tokens),
        stop_token_ids=token_array(stop_token_ids).tolist(),
        ignore_eos=ignore_eos,
        num_top_logprobs=_count("num_top_logprobs", num_top_logprobs),
        on_interrupt=_choice(_INTERRUPT_POLICIES, "on_interrupt", on_interrupt),
    )
    if expected_prefix_tokens is not None:
        request.expected_prefix_tokens = _count("expected_prefix_tokens", expected_prefix_tokens)
    if sampling is not None:
        request.sampling.CopyFrom(sampling_options(sampling))
    return request


def update_request(
    session_id: str,
    *,
    lease_seconds: float | None,
    sliding: bool | None,
    durability: Durability | None,
    pin: Pin | None,
    labels: Mapping[str, str] | None,
) -> session_service_pb2.UpdateSessionRequest:
    """A request that changes what is not None; `labels` replaces them all."""
    session = session_service_pb2.Session(session_id=session_id, labels=labels)
    session.retention.CopyFrom(retention(lease_seconds, sliding, durability, pin))
    request = session_service_pb2.UpdateSessionRequest(session=session)
    given = {
        "retention.lease_duration": lease_seconds,
        "retention.sliding": sliding,
        "retention.durability": durability,
        "retention.pin": pin,
        "labels": labels,
    }
    request.update_mask.paths.extend(path for path, value in given.items() if value is not None)
    return request


def renew_request(session_ids: Sequence[str], lease_seconds: float | None) -> session_service_pb2.RenewSessionRequest:
    """A request that extends leases."""
    if isinstance(session_ids, str):
        raise _refuse("session_ids", session_ids, "a list of session ids; put the one in a list")
    request = session_service_pb2.RenewSessionRequest(session_ids=session_ids)
    if lease_seconds is not None:
        request.lease_duration.CopyFrom(duration("lease_duration", lease_seconds))
    return request


def fork_request(
    session_id: str,
    *,
    new_session_id: str | None,
    num_tokens: int,
    lease_seconds: float | None,
    sliding: bool,
    durability: Durability | None,
    pin: Pin | None,
) -> session_service_pb2.ForkSessionRequest:
    """A request that makes a child session."""
    request = session_service_pb2.ForkSessionRequest(
        session_id=session_id, new_session_id=new_session_id or "", num_tokens=_count("num_tokens", num_tokens)
    )
    if _says_anything(lease_seconds, sliding, durability, pin):
        request.retention.CopyFrom(retention(lease_seconds, sliding, durability, pin))
    return request


def pull_request(
    session_id: str,
    *,
    token_range: Range | None,
    layer_range: Range | None,
    layout: Layout,
    chunk_bytes: int,
    checksum: Checksum,
    generation: int,
    expected_spec: KvSpec | None = None,
    transfer_id: str = "",
) -> kv_transfer_service_pb2.PullKvRequest:
    """A request for KV bytes, from its first chunk."""
    request = kv_transfer_service_pb2.PullKvRequest(
        session_id=session_id,
        layout=_choice(_LAYOUTS, "layout", layout),
        chunk_bytes=_count("chunk_bytes", chunk_bytes),
        checksum_algorithm=_choice(ALGORITHM_NUMBERS, "checksum", checksum),
        generation=_count("generation", generation, _UINT64_LIMIT),
        transfer_id=transfer_id,
        group_chunks=bool(transfer_id),
        include_token_ids=True,
    )
    if expected_spec is not None:  # in whatever order of axes: `layout` says which one comes
        request.expected_spec.CopyFrom(replace(expected_spec, layout=None).to_proto())
    _put_range(request.range, token_range, layer_range)
    return request


def open_transfer_request(
    *,
    session_id: str,
    token_range: Range | None,
    layer_range: Range | None,
    size_bytes: int,
    transports: Sequence[SegmentTransport],
) -> kv_transfer_service_pb2.OpenTransferRequest:
    """A request for a segment; gRPC messages are its last choice, so that a server without segments can answer."""
    if isinstance(transports, str):
        raise _refuse("transports", transports, "a list of transports; put the one in a list")
    request = kv_transfer_service_pb2.OpenTransferRequest(
        session_id=session_id,
        transports=[_choice(_TRANSPORTS, "transports", transport) for transport in transports],
        size_bytes=_count("size_bytes", size_bytes, _UINT64_LIMIT),
    )
    request.transports.append(kv_transfer_service_pb2.TRANSPORT_GRPC)
    _put_range(request.range, token_range, layer_range)
    return request


def _put_range(message: kv_pb2.KvRange, token_range: Range | None, layer_range: Range | None) -> None:
    for name, part in (("token", token_range), ("layer", layer_range)):
        if part is None:
            continue
        start, end = part
        if not 0 <= start < (_UINT32_LIMIT if end is None else end) <= _UINT32_LIMIT:
            raise _refuse(f"range.{name}_start", part, "a pair (first, one past the last or None) that is not empty")
        setattr(message, f"{name}_start", start)
        setattr(message, f"{name}_end", end or 0)


def push_request(
    manifest: kv_pb2.KvManifest,
    token_ids: TokenIds,
    *,
    session_id: str | None,
    request_id: str | None,
    attention: Attention | None,
    lease_seconds: float | None,
    sliding: bool,
    durability: Durability | None,
    pin: Pin | None,
    labels: Mapping[str, str] | None,
) -> kv_transfer_service_pb2.OpenPushRequest:
    """A request to import KV; a request id is made up where there is none."""
    header = kv_transfer_service_pb2.PushKvHeader(
        session_id=session_id or "", token_ids=token_array(token_ids).tolist(), manifest=manifest, labels=labels
    )
    if attention is not None:
        header.attention.CopyFrom(attention_options(attention))
    if _says_anything(lease_seconds, sliding, durability, pin):
        header.retention.CopyFrom(retention(lease_seconds, sliding, durability, pin))
    return kv_transfer_service_pb2.OpenPushRequest(request_id=request_id or new_request_id(), header=header)
