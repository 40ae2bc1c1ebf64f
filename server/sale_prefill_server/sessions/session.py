"""One retained KV cache and what belongs to it."""

from __future__ import annotations

import hashlib
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from sale_prefill_server.engine.sequence import AttentionSettings
from sale_prefill_server.engine.sequence import Sequence as EngineSequence

TOKEN_BYTES = 4


class SessionState(StrEnum):
    """Life cycle. A session that is gone has no state."""

    BUSY = "busy"
    PARTIAL = "partial"
    READY = "ready"


@dataclass(frozen=True)
class Retention:
    """How long KV is kept.

    `lease_seconds` counts from the end of each request where `sliding`, else of the first one only. 0 frees the session
    when the request that created it ends.
    """

    lease_seconds: float
    sliding: bool = False


@dataclass
class Session:
    """A session's state is its token ids, its KV and the last position's logits.

    `last_logits` [vocabulary_size] float32 on the CPU is None where it must be recomputed from the last token. Times
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

    def truncate(self, num_tokens: int) -> None:
        """Cuts back to the first `num_tokens`, or to what the KV still holds where that is less."""
        self.sequence.truncate(num_tokens)
        num_tokens = min(num_tokens, self.sequence.num_tokens)
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


def token_digest(tokens: Sequence[int]) -> bytes:
    """SHA-256 of token ids as little-endian uint32."""
    packed = array("I", tokens)
    if packed.itemsize != TOKEN_BYTES:
        packed = array("L", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.sha256(packed).digest()
