"""Blocks and records that tests write."""

from __future__ import annotations

import hashlib
import random

from sale_prefill_server.store.base import Block, BlockKey, Pin, Record, RecordKey, Tier

TENANT = hashlib.sha256(b"tenant").hexdigest()[:32]
OTHER_TENANT = hashlib.sha256(b"another").hexdigest()[:32]
LAYERS = 3
PART_BYTES = 320


def digest(name: object) -> str:
    """A SHA-256 in hexadecimal."""
    return hashlib.sha256(str(name).encode()).hexdigest()


def block_key(name: object, tenant: str = TENANT) -> BlockKey:
    """The key of a made-up page."""
    return BlockKey(tenant, digest(name))


def block(name: object, *, tenant: str = TENANT, layers: int = LAYERS, part_bytes: int = PART_BYTES) -> Block:
    """A block whose bytes follow from its name."""
    source = random.Random(f"{tenant}/{name}")
    return Block(block_key(name, tenant), [source.randbytes(part_bytes) for _ in range(2 * layers)])


def blocks(*names: object, tenant: str = TENANT) -> list[Block]:
    """Several."""
    return [block(name, tenant=tenant) for name in names]


def record(
    name: object,
    block_names: tuple[object, ...] = (),
    *,
    tenant: str = TENANT,
    payload: bytes = b"{}",
    lossless: bool = True,
    pin: Pin = Pin.NONE,
) -> Record:
    """A record of a made-up session that needs blocks of those names."""
    return Record(RecordKey(tenant, digest(name)), payload, tuple(map(digest, block_names)), lossless, pin)


def read_whole(tier: Tier, key: BlockKey) -> list[bytes]:
    """All parts of a block."""
    reader = tier.open_block(key)
    try:
        parts = [bytearray(reader.part_bytes) for _ in range(reader.num_parts)]
        reader.read(0, parts)
        return [bytes(part) for part in parts]
    finally:
        reader.close()
