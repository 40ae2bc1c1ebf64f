"""What every tier of KV storage does, what it promises, and how it fails.

Two kinds of objects are kept, each under a tenant, so that nothing is ever shared across tenants:

* A **block**: the KV of one page of tokens in all layers, as equally long parts: K of layer 0, V of layer 0, K of
  layer 1 and so on, each [tokens, kv_heads, head_dim], little-endian. It never changes: its key is a hash of the tokens
  up to the page's end, the model and the attention settings, computed by the caller.
* A **record**: what a session is (bytes of the caller's), and the blocks that it needs. It is replaced as a whole, and
  the caller writes it after its blocks.

Promises of a tier: an object is whole or absent, whatever dies when; `put_…` that returned is as durable as `level`
says; every part carries a checksum that is verified when it is read, so that a reader may take layer after layer;
damaged objects are moved out of the way before `CorruptError` is raised, and never used. All methods may be called from
several threads.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview

#: Objects larger than this are not written: no page of any model comes near.
MAXIMUM_BLOCK_BYTES = 64 * 2**20

_HEX = re.compile(r"[0-9a-f]{2,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_CODEC = re.compile(r"[a-z0-9-]{0,24}")


class Level(IntEnum):
    """What a tier survives."""

    MEMORY = 1  #: nothing that is promised; such a tier gets no records
    LOCAL = 2  #: the process's death and a power cut of this machine
    SHARED = 3  #: the loss of this machine; other servers see it too


class Pin(IntEnum):
    """How the blocks of a record stand when a tier runs full."""

    NONE = 0  #: go after blocks that no record needs
    SOFT = 1  #: go last
    HARD = 2  #: stay; count against the tenant's quota


class BlockKey(NamedTuple):
    """Names a block: `tenant` and `hash` are lower-case hexadecimal digests, `hash` of 32 bytes.

    `codec` is empty for the bytes as they were; a lossy form (see `compression`) is another object with its own key, so
    that it can never pass for them.
    """

    tenant: str
    hash: str
    codec: str = ""

    def checked(self) -> BlockKey:
        """This key.

        Raises:
            ValueError: not what the class promises; such a key could name a file elsewhere.
        """
        if not (_HEX.fullmatch(self.tenant) and _HASH.fullmatch(self.hash) and _CODEC.fullmatch(self.codec)):
            raise ValueError(f"{self!r}: tenant and hash must be lower-case hexadecimal, the hash of 32 bytes")
        return self

    @property
    def lossless(self) -> BlockKey:
        """The key of the same block as it was."""
        return self._replace(codec="") if self.codec else self


class RecordKey(NamedTuple):
    """Names a session's record: digests of the tenant and of the session's id, in lower-case hexadecimal."""

    tenant: str
    session: str

    def checked(self) -> RecordKey:
        """This key.

        Raises:
            ValueError: not what the class promises.
        """
        if not (_HEX.fullmatch(self.tenant) and _HEX.fullmatch(self.session)):
            raise ValueError(f"{self!r}: tenant and session must be lower-case hexadecimal digests, 64 digits at most")
        return self


@dataclass(frozen=True)
class Block:
    """A block to be written. Its buffers, of bytes, become the store's: whoever made them never changes them again.

    A view keeps all memory behind it alive, so each block should have its own.
    """

    key: BlockKey
    parts: Sequence[Buffer]

    @property
    def part_bytes(self) -> int:
        """Length of each part."""
        return len(self.parts[0])

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return len(self.parts) * self.part_bytes


@dataclass(frozen=True)
class Record:
    """A session: `payload` is the caller's, `blocks` the hashes of what it needs, in the order of its tokens.

    `lossless` says that its next tokens must be bit for bit those of KV that never left the device: it never gets a
    lossy form of a block.
    """

    key: RecordKey
    payload: bytes
    blocks: tuple[str, ...] = ()
    lossless: bool = True
    pin: Pin = Pin.NONE

    @property
    def block_keys(self) -> list[BlockKey]:
        """Keys of the blocks as they were."""
        return [BlockKey(self.key.tenant, hash_) for hash_ in self.blocks]


class BlockEntry(NamedTuple):
    """What a tier knows of a block without reading it: bytes that it takes, and when it was written (Unix time)."""

    size_bytes: int
    modified_seconds: float


class StoreError(Exception):
    """Something about the store of KV."""


class NotFoundError(StoreError):
    """No such object in this tier."""

    def __init__(self, tier: str, key: BlockKey | RecordKey) -> None:
        super().__init__(f"{tier}: no {describe(key)}")


class CorruptError(StoreError):
    """An object was damaged. It is in quarantine already; compute it again."""

    def __init__(self, tier: str, key: BlockKey | RecordKey, reason: str) -> None:
        super().__init__(f"{tier}: {describe(key)} is damaged and was put aside: {reason}")
        self.tier = tier
        self.key = key
        self.reason = reason


class UnavailableError(StoreError):
    """A tier cannot serve now: down, slow or refused. It may later."""

    def __init__(self, tier: str, reason: str) -> None:
        super().__init__(f"{tier}: {reason}")
        self.tier = tier
        self.reason = reason


class FullError(UnavailableError):
    """A tier has no room. It still serves reads."""


class MissingBlocksError(UnavailableError):
    """A record was not written, since a tier lacks blocks that it needs. Put `keys` and then the record again."""

    def __init__(self, tier: str, keys: Sequence[BlockKey]) -> None:
        super().__init__(tier, f"{len(keys)} blocks of the record are not there, the first of them {describe(keys[0])}")
        self.keys = list(keys)


class PinQuotaError(StoreError):
    """Hard pins of a tenant would go over its quota. Carries both numbers, in bytes."""

    def __init__(self, needed_bytes: int, quota_bytes: int) -> None:
        super().__init__(
            f"hard pins would take {needed_bytes} bytes, the tenant's quota is {quota_bytes}: delete pinned sessions, "
            "or pin this one softly"
        )
        self.needed_bytes = needed_bytes
        self.quota_bytes = quota_bytes


class BlocksLostError(StoreError):
    """A block could be read from no tier. All layers of the blocks before `block_index` may still be."""

    def __init__(self, block_index: int, layer: int, reason: str) -> None:
        super().__init__(f"block {block_index} cannot be read from layer {layer} on: {reason}; compute it again")
        self.block_index = block_index
        self.layer = layer
        self.reason = reason


class BlockReader(ABC):
    """Reads parts of one block. It may be used by several threads; close it."""

    key: BlockKey
    num_parts: int
    part_bytes: int

    @abstractmethod
    def read(self, first_part: int, into: Sequence[Buffer]) -> None:
        """Fills each buffer, of `part_bytes`, with one part, from `first_part` on, and verifies their checksums.

        Raises:
            CorruptError, NotFoundError, UnavailableError: the buffers hold nothing of use then.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of what the reader holds; reads that still run in other threads end first."""


class Tier(ABC):
    """A place where KV is kept. The module says what it promises; every method may raise `UnavailableError`."""

    name: str
    level: Level

    @property
    def is_shared(self) -> bool:
        """Whether other servers put and remove things too, so that the tier must be asked what it has."""
        return self.level is Level.SHARED

    @abstractmethod
    def put_blocks(self, blocks: Sequence[Block]) -> None:
        """Writes blocks. One that is there already is replaced by its equal.

        Raises:
            FullError: no room; some of the blocks may have been written.
        """

    @abstractmethod
    def open_block(self, key: BlockKey) -> BlockReader:
        """A reader of a block; what describes the block is verified.

        Raises:
            NotFoundError, CorruptError
        """

    @abstractmethod
    def find_blocks(self, keys: Iterable[BlockKey]) -> dict[BlockKey, BlockEntry]:
        """Which of the blocks are there."""

    @abstractmethod
    def delete_blocks(self, keys: Iterable[BlockKey]) -> None:
        """Removes blocks; those that are not there are no error. A power cut may bring them back."""

    @abstractmethod
    def list_blocks(self) -> Iterator[tuple[BlockKey, BlockEntry]]:
        """All blocks, in no order, without reading any."""

    @abstractmethod
    def put_record(self, record: Record) -> None:
        """Writes or replaces a record. Its blocks must have been put before."""

    @abstractmethod
    def get_record(self, key: RecordKey) -> Record:
        """A record, verified.

        Raises:
            NotFoundError, CorruptError
        """

    @abstractmethod
    def delete_record(self, key: RecordKey) -> None:
        """Removes a record, as durably as `put_record` writes one; no error where it is not there."""

    @abstractmethod
    def list_records(self) -> list[RecordKey]:
        """Keys of all records."""

    @abstractmethod
    def close(self) -> None:
        """Ends what the tier holds. Nothing is lost: there is nothing that `put_…` left for later."""


def describe(key: BlockKey | RecordKey) -> str:
    """A key for people: kind, and the beginnings of its digests."""
    if isinstance(key, BlockKey):
        return f"block {key.hash[:12]}{'/' if key.codec else ''}{key.codec} of tenant {key.tenant[:8]}"
    return f"record {key.session[:12]} of tenant {key.tenant[:8]}"


def checked_block(block: Block) -> Block:
    """The block.

    Raises:
        ValueError: parts of different lengths, none, or more bytes than `MAXIMUM_BLOCK_BYTES`.
    """
    block.key.checked()
    if not block.parts or not block.part_bytes or any(len(part) != block.part_bytes for part in block.parts):
        raise ValueError(f"{describe(block.key)}: parts must be equally long, and some")
    if block.size_bytes > MAXIMUM_BLOCK_BYTES:
        raise ValueError(f"{describe(block.key)}: {block.size_bytes} bytes, at most {MAXIMUM_BLOCK_BYTES} are kept")
    return block
