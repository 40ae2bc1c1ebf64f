"""A session as bytes, for the store: everything about it but its KV.

    uint32 length | JSON, UTF-8 | token ids, uint32

all little-endian. The store wraps the whole in a checksum.
"""

from __future__ import annotations

import json
import sys
from array import array
from dataclasses import asdict, dataclass
from typing import Any

from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings
from sale_prefill_server.sessions.session import Durability, Retention, SessionPin

_VERSION = 1


class RecordError(Exception):
    """Bytes that are no session of this release."""


@dataclass(frozen=True)
class SessionRecord:
    """What a session is.

    `fingerprint` names the model; `root` and `page_tokens` are what the blocks' keys were made with. `is_partial` says
    that its last prefill was interrupted. `logits_key` names the block that holds the last position's `num_logits`
    logits, if there are any.
    """

    tenant: str
    session_id: str
    fingerprint: str
    root: bytes
    page_tokens: int
    settings: AttentionSettings
    retention: Retention
    labels: dict[str, str]
    created_unix_seconds: float
    generation: int
    is_partial: bool
    logits_key: str
    num_logits: int
    tokens: array[int]


def encode_record(record: SessionRecord) -> bytes:
    """The bytes of a record."""
    fields: dict[str, Any] = {**asdict(record), "version": _VERSION, "root": record.root.hex()}
    del fields["tokens"]
    text = json.dumps(fields).encode()
    return len(text).to_bytes(4, "little") + text + _little_endian(record.tokens).tobytes()


def decode_record(data: bytes) -> SessionRecord:
    """The record of `data`.

    Raises:
        RecordError: it is none, or of another release.
    """
    try:
        length = int.from_bytes(data[:4], "little")
        fields = json.loads(data[4 : 4 + length])
        if fields.pop("version") != _VERSION:
            raise RecordError("the record is of another release")
        settings, retention = fields.pop("settings"), fields.pop("retention")
        tokens = array("I", data[4 + length :])
        return SessionRecord(
            **{
                **fields,
                "root": bytes.fromhex(fields["root"]),
                "settings": AttentionSettings(**{**settings, "mode": AttentionMode(settings["mode"])}),
                "retention": Retention(
                    **{
                        **retention,
                        "durability": Durability(retention["durability"]),
                        "pin": SessionPin(retention["pin"]),
                    }
                ),
                "tokens": _little_endian(tokens),
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"not a session's record: {error}") from error


def _little_endian(tokens: array[int]) -> array[int]:
    if sys.byteorder == "little":
        return tokens
    swapped = array("I", tokens)
    swapped.byteswap()
    return swapped
