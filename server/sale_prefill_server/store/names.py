"""What blocks and records are called in a directory or a bucket."""

from __future__ import annotations

from sale_prefill_server.store.base import BlockKey, RecordKey

_BLOCK_SUFFIX = ".kv"
_RECORD_SUFFIX = ".record"


def block_name(key: BlockKey) -> str:
    """A block's name under its tenant.

    Raises:
        ValueError: a malformed key.
    """
    key.checked()
    return f"{key.hash}.{key.codec}{_BLOCK_SUFFIX}" if key.codec else f"{key.hash}{_BLOCK_SUFFIX}"


def record_name(key: RecordKey) -> str:
    """A record's name under its tenant.

    Raises:
        ValueError: a malformed key.
    """
    return key.checked().session + _RECORD_SUFFIX


def parse_block_name(tenant: str, name: str) -> BlockKey | None:
    """The key that a name says, or None where it is none of ours."""
    if not name.endswith(_BLOCK_SUFFIX):
        return None
    hash_, _, codec = name.removesuffix(_BLOCK_SUFFIX).partition(".")
    try:
        return BlockKey(tenant, hash_, codec).checked()
    except ValueError:
        return None


def parse_record_name(tenant: str, name: str) -> RecordKey | None:
    """The key that a name says, or None where it is none of ours."""
    if not name.endswith(_RECORD_SUFFIX):
        return None
    try:
        return RecordKey(tenant, name.removesuffix(_RECORD_SUFFIX)).checked()
    except ValueError:
        return None
