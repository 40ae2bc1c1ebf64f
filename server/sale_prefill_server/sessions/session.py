"""One retained KV cache and what belongs to it."""

from __future__ import annotations

import hashlib
import sys
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from sale_prefill_server.engine.sequence import AttentionSettings
from sale_prefill_server.engine.sequence import Sequence as EngineSequence
from sale_prefill_server.kv.pool import PAGE_TOKENS

TOKEN_BYTES = 4


class SessionState(StrEnum):
    """Life cycle. A session that is gone has no state. An offloaded one is ready, but its KV is not on the device."""

    BUSY = "busy"
    PARTIAL = "partial"
    READY = "ready"
    OFFLOADED = "offloaded"


class Durability(StrEnum):
    """What a session is to survive: nothing; what is written soon; a crash here; the loss of this machine."""

    NONE = "none"
    ASYNC = "async"
    LOCAL = "local"
    SHARED = "shared"


class KvTier(StrEnum):
    """Where KV is, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    SHARED = "shared"


class SessionPin(StrEnum):
    """How a session's KV stands when memory runs out: first to go, last to go, never on its own."""

    NONE = "none"
    SOFT = "soft"
    HARD = "hard"


@dataclass(frozen=True)
class Retention:
    """How long KV is kept, and how well.

    `lease_seconds` counts from the end of each request where `sliding`, else of the first one only. 0 frees the session
    when the request that created it ends.
    """

    lease_seconds: float
    sliding: bool = False
    durability: Durability = Durability.NONE
    pin: SessionPin = SessionPin.NONE


@dataclass(frozen=True)
class Saved:
    """What other tiers were last given of a session: how much, and how it went. The store's own level may be higher."""

    generation: int
    done: Future[Durability]


@dataclass
class Session:
    """A session's state is its token ids, its KV and the last position's logits.

    The sequence may hold fewer tokens than the session, none where the KV was offloaded; the next request brings back
    or computes what is missing. `last_logits` [vocabulary_size] float32 on the CPU is None where it must be recomputed
    from the last token. `saved` is what other tiers were last given, `forgotten` tells when none has it any more. Times
    are `time.monotonic` seconds but for `created_unix_seconds`. Owned by the manager, which locks around every change
    of state and lease; contents are changed only by the one request that checked the session out.
    """

    tenant: str
    session_id: str
    sequence: EngineSequence
    retention: Retention
    labels: dict[str, str]
    state: SessionState = SessionState.BUSY
    state_before_busy: SessionState | None = None
    tokens: array[int] = field(default_factory=lambda: array("I"))
    last_logits: torch.Tensor | None = None
    generation: int = 0
    created_unix_seconds: float = field(default_factory=time.time)
    created_seconds: float = field(default_factory=time.monotonic)
    deadline_seconds: float | None = None
    delete_when_idle: bool = False
    used_seconds: float = field(default_factory=time.monotonic)
    saved: Saved | None = None
    forgotten: Future[None] | None = None
    digest_cache: tuple[int, bytes] = (-1, b"")

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return len(self.tokens)

    def extend(self, token_ids: Sequence[int], last_logits: torch.Tensor | None) -> None:
        """Records tokens whose KV is now complete."""
        if len(token_ids):
            self.tokens.extend(token_ids)
            self.last_logits = last_logits
            self.generation += 1
            self.sequence.offer(self.tokens)

    def grow(self, chunk: Sequence[int], end: int, last_logits: torch.Tensor | None) -> None:
        """KV of `chunk`, the tokens before `end`, was computed: new tokens, or ones of which it was missing."""
        new = min(len(chunk), end - len(self.tokens))
        if new > 0:
            self.extend(chunk[len(chunk) - new :], last_logits)
            return
        if last_logits is not None and end == len(self.tokens) and self.last_logits is None:
            self.last_logits = last_logits
        self.sequence.offer(self.tokens[:end])

    @property
    def visible_state(self) -> SessionState:
        """The state as callers see it."""
        return self.state if self.state is SessionState.BUSY or self.is_resident else SessionState.OFFLOADED

    @property
    def pinned_bytes(self) -> int:
        """Bytes on the device that its hard pin holds or, where a request is bringing it back, will hold."""
        if self.retention.pin is not SessionPin.HARD:
            return 0
        pages = -(-len(self.tokens) // PAGE_TOKENS)
        return max(self.sequence.kv.size_bytes, pages * self.sequence.kv.shape.page_bytes)

    def offload(self) -> None:
        """Gives up the KV on the device, which other tiers have; named pages may still be found there."""
        held, self.sequence = self.sequence, self.sequence.emptied()
        self.last_logits = None
        held.release(keep=True)

    @property
    def is_resident(self) -> bool:
        """Whether the device has the KV of all tokens."""
        return self.sequence.num_tokens == len(self.tokens)

    def truncate(self, num_tokens: int) -> None:
        """Cuts back to the first `num_tokens`."""
        self.sequence.truncate(num_tokens)
        if num_tokens < len(self.tokens):
            del self.tokens[num_tokens:]
            self.last_logits = None
            self.generation += 1

    def token_digest(self) -> bytes:
        """SHA-256 of all token ids as little-endian uint32; computed once a generation."""
        if self.digest_cache[0] != self.generation:
            self.digest_cache = (self.generation, token_digest(self.tokens))
        return self.digest_cache[1]


@dataclass(frozen=True)
class SessionInfo:
    """A session as it was at one moment, for those who do not own it.

    `remaining_lease_seconds` and `expire_unix_seconds` are None while a request is running.
    """

    session_id: str
    state: SessionState
    num_tokens: int
    size_bytes: int
    created_unix_seconds: float
    remaining_lease_seconds: float | None
    expire_unix_seconds: float | None
    generation: int
    token_digest: bytes
    retention: Retention
    settings: AttentionSettings
    labels: dict[str, str]
    tier: KvTier = KvTier.DEVICE
    durability: Durability = Durability.NONE


def token_digest(tokens: Sequence[int]) -> bytes:
    """SHA-256 of token ids as little-endian uint32."""
    packed = array("I", tokens)
    if packed.itemsize != TOKEN_BYTES:
        packed = array("L", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.sha256(packed).digest()
