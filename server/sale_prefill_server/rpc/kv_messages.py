"""Messages of KV streams to domain objects and back."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from sale_prefill.v1 import kv_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_server.errors import PrefillError, Reason, invalid_field
from sale_prefill_server.rpc.convert import Converter, identifier, labels_of
from sale_prefill_server.sessions.session import Session, token_digest
from sale_prefill_server.transfer.checksums import Checksum
from sale_prefill_server.transfer.chunks import (
    DEFAULT_CHUNK_BYTES,
    MAXIMUM_SEGMENT_CHUNK_BYTES,
    MINIMUM_CHUNK_BYTES,
    SEGMENT_CHUNK_BYTES,
    ChunkPlan,
    KvRange,
    Layout,
)
from sale_prefill_server.transfer.uploads import ImportCommand

#: Of the element types that a model's KV may have.
ELEMENT_BYTES = {
    kv_pb2.ELEMENT_TYPE_FLOAT32: 4,
    kv_pb2.ELEMENT_TYPE_FLOAT16: 2,
    kv_pb2.ELEMENT_TYPE_BFLOAT16: 2,
}
_LAYOUTS = {
    kv_pb2.KV_LAYOUT_UNSPECIFIED: Layout.THD,
    kv_pb2.KV_LAYOUT_THD: Layout.THD,
    kv_pb2.KV_LAYOUT_HTD: Layout.HTD,
}
_CHECKSUMS = {
    kv_pb2.CHECKSUM_ALGORITHM_UNSPECIFIED: Checksum.CRC32C,
    kv_pb2.CHECKSUM_ALGORITHM_CRC32C: Checksum.CRC32C,
    kv_pb2.CHECKSUM_ALGORITHM_XXH3_64: Checksum.XXH3_64,
    kv_pb2.CHECKSUM_ALGORITHM_NONE: Checksum.NONE,
}
_LAYOUT_VALUES = {Layout.THD: kv_pb2.KV_LAYOUT_THD, Layout.HTD: kv_pb2.KV_LAYOUT_HTD}
_CHECKSUM_VALUES = {
    Checksum.NONE: kv_pb2.CHECKSUM_ALGORITHM_NONE,
    Checksum.CRC32C: kv_pb2.CHECKSUM_ALGORITHM_CRC32C,
    Checksum.XXH3_64: kv_pb2.CHECKSUM_ALGORITHM_XXH3_64,
}


def layout_of(value: kv_pb2.KvLayout, field: str = "layout") -> Layout:
    """An axis order; THD where left out.

    Raises:
        PrefillError: INVALID_FIELD.
    """
    if value not in _LAYOUTS:
        raise invalid_field(field, f"{value} is no KvLayout; ask for THD or HTD")
    return _LAYOUTS[value]


def checksum_of(value: kv_pb2.ChecksumAlgorithm, field: str = "checksum_algorithm") -> Checksum:
    """A digest; CRC32C where left out.

    Raises:
        PrefillError: INVALID_FIELD.
    """
    if value not in _CHECKSUMS:
        raise invalid_field(field, f"{value} is none that this server knows")
    return _CHECKSUMS[value]


def layout_value(layout: Layout) -> kv_pb2.KvLayout:
    """The message's number of an axis order."""
    return _LAYOUT_VALUES[layout]


def checksum_value(checksum: Checksum) -> kv_pb2.ChecksumAlgorithm:
    """The message's number of a digest."""
    return _CHECKSUM_VALUES[checksum]


def range_message(range_: KvRange) -> kv_pb2.KvRange:
    """A resolved range."""
    return kv_pb2.KvRange(
        token_start=range_.token_start,
        token_end=range_.token_end,
        layer_start=range_.layer_start,
        layer_end=range_.layer_end,
    )


def range_of(message: kv_pb2.KvRange) -> KvRange:
    """A range as asked for: 0 ends mean the end."""
    return KvRange(message.token_start, message.token_end, message.layer_start, message.layer_end)


def chunk_bytes_of(asked: int, max_chunk_bytes: int, *, in_segment: bool = False) -> int:
    """Target size of a chunk; the default where left out.

    Args:
        asked: by the request.
        max_chunk_bytes: that a message may hold.
        in_segment: its bytes are beside the messages, whose limit then does not count.

    Raises:
        PrefillError: INVALID_FIELD, too small to be worth a message or over the limit.
    """
    default = SEGMENT_CHUNK_BYTES if in_segment else DEFAULT_CHUNK_BYTES
    max_chunk_bytes = MAXIMUM_SEGMENT_CHUNK_BYTES if in_segment else max_chunk_bytes
    chunk_bytes = asked or min(default, max_chunk_bytes)
    if not MINIMUM_CHUNK_BYTES <= chunk_bytes <= max_chunk_bytes:
        raise invalid_field("chunk_bytes", f"{chunk_bytes}: must be {MINIMUM_CHUNK_BYTES} to {max_chunk_bytes}")
    return chunk_bytes


def require_spec(actual: kv_pb2.KvSpec, expected: kv_pb2.KvSpec, field_name: str, *, every_field: bool = False) -> None:
    """Both sides mean the same bytes.

    Args:
        actual: this server's format.
        expected: the caller's.
        field_name: field of the request that holds it.
        every_field: compare fields that the caller left out, too.

    Raises:
        PrefillError: KV_SPEC_MISMATCH, naming the first field that differs and both values.
    """
    for field in actual.DESCRIPTOR.fields:
        ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
        if ours == theirs or not (theirs or every_field):
            continue
        if field.enum_type is not None:
            ours, theirs = (_enum_name(field.enum_type, value) for value in (ours, theirs))
        raise PrefillError(
            Reason.KV_SPEC_MISMATCH,
            f"{field.name} is {ours!r} here and {theirs!r} in the request: "
            "the KV is of another model, or in another format",
            metadata={"field": field.name, "expected": theirs, "actual": ours},
            field=f"{field_name}.{field.name}",
        )


def _enum_name(enumeration: Any, value: int) -> str:
    known = enumeration.values_by_number.get(value)
    return str(value) if known is None else known.name


def manifest_message(
    session: Session, spec: kv_pb2.KvSpec, plan: ChunkPlan, checksum: Checksum, *, token_ids: Sequence[int] = ()
) -> kv_pb2.KvManifest:
    """The first message of a stream that sends a session's KV."""
    range_ = plan.range
    whole = range_.token_end == session.num_tokens
    return kv_pb2.KvManifest(
        spec=spec,
        range=range_message(range_),
        total_bytes=plan.total_bytes,
        total_chunks=plan.total_chunks,
        checksum_algorithm=_CHECKSUM_VALUES[checksum],
        generation=session.generation,
        token_digest=session.token_digest() if whole else token_digest(session.tokens[: range_.token_end]),
        token_ids=token_ids,
    )


def import_command(
    header: pb.PushKvHeader, converter: Converter, tenant: str, request_id: str, field: str
) -> ImportCommand:
    """What a push wants, its contract checked.

    Args:
        header: of the push.
        converter: knows the model's format and the server's defaults.
        tenant: of the caller.
        request_id: idempotency key; empty for none.
        field: field of the request that holds the header.

    Raises:
        PrefillError: KV_SPEC_MISMATCH; CHECKSUM_MISMATCH, the token ids differ from their digest; INVALID_FIELD.
    """
    manifest = header.manifest
    layout = layout_of(manifest.spec.layout, f"{field}.manifest.spec.layout")
    actual = converter.kv_spec(layout_value(layout))
    expected = kv_pb2.KvSpec()
    expected.CopyFrom(manifest.spec)
    expected.layout = layout_value(layout)
    require_spec(actual, expected, f"{field}.manifest.spec", every_field=True)
    token_ids = array("I", header.token_ids)
    _check_whole(manifest, actual, len(token_ids), f"{field}.manifest")
    if token_digest(token_ids) != manifest.token_digest:
        raise PrefillError(
            Reason.CHECKSUM_MISMATCH,
            f"the {len(token_ids)} token ids differ from their digest: send both again",
            field=f"{field}.manifest.token_digest",
        )
    return ImportCommand(
        tenant=tenant,
        request_id=request_id,
        fingerprint=hashlib.sha256(header.SerializeToString(deterministic=True)).digest(),
        session_id=identifier(f"{field}.session_id", header.session_id),
        token_ids=token_ids,
        layout=layout,
        checksum=checksum_of(manifest.checksum_algorithm, f"{field}.manifest.checksum_algorithm"),
        total_chunks=manifest.total_chunks,
        retention=converter.retention(header.retention),
        attention=converter.attention(header.attention) if header.HasField("attention") else None,
        labels=labels_of(header.labels),
    )


def _check_whole(manifest: kv_pb2.KvManifest, spec: kv_pb2.KvSpec, num_tokens: int, field: str) -> None:
    """A session is made of all layers of tokens from the first on."""
    part = manifest.range
    tokens, layers = part.token_end or num_tokens, part.layer_end or spec.num_layers
    if (part.token_start, tokens, part.layer_start, layers) != (0, num_tokens, 0, spec.num_layers):
        raise invalid_field(
            f"{field}.range",
            f"tokens [{part.token_start}, {part.token_end}) of layers [{part.layer_start}, {part.layer_end}): a push "
            f"brings all {num_tokens} tokens that it names in all {spec.num_layers} layers",
        )
    tensors = 2 * spec.num_layers
    total_bytes = tensors * num_tokens * spec.num_kv_heads * spec.head_dim * ELEMENT_BYTES[spec.element_type]
    if manifest.total_bytes != total_bytes:
        raise invalid_field(
            f"{field}.total_bytes", f"{manifest.total_bytes}: KV of {num_tokens} tokens is {total_bytes}"
        )
    if not tensors <= manifest.total_chunks <= tensors * max(1, num_tokens):
        raise invalid_field(
            f"{field}.total_chunks", f"{manifest.total_chunks}: a chunk is one or more tokens of one layer's K or V"
        )
