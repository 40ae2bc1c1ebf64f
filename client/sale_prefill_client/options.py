"""What a caller may choose: connection, retries, attention, sampling. All are plain immutable values."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from .cuda_segments import Segment
    from .results import KvSpec

AttentionMode = Literal["default", "sale", "dense"]
InterruptPolicy = Literal["keep", "free"]
Durability = Literal["none", "async", "local", "shared"]
Pin = Literal["none", "soft", "hard"]
Layout = Literal["THD", "HTD"]
Checksum = Literal["crc32c", "xxh3_64", "none"]
SegmentTransport = Literal["shm", "cuda_ipc"]
Range = tuple[int, int | None]

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_MAX_MESSAGE_BYTES = 8 << 20
DEFAULT_CHUNK_BYTES = 1 << 20
#: Where chunks go through a segment: announcing one costs both sides together as much as some MiB of copy.
SEGMENT_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention method of a prefill; fixed by the request that creates a session. Decode is always dense.

    Args:
        mode: `"sale"` for sparse attention (arXiv 2505.24179), `"dense"`, or `"default"` for the server's choice.
        threshold: SALE threshold tau of every head, above 0 and at most 1; None takes the server's setting.
        query_stride: estimate from every n-th query row (1, 2 or 4); None takes the server's setting. Where both are
            None, heads do what the server's calibrated profile says, if it has one.
        error_budget: most that attention may change predictions, in nats of divergence a token: the level of the
            server's calibrated profile with the largest budget within it, dense where there is none. Not together with
            threshold and query_stride. None takes the server's default.
    """

    mode: AttentionMode = "default"
    threshold: float | None = None
    query_stride: int | None = None
    error_budget: float | None = None

    @classmethod
    def within(cls, error_budget: float) -> Attention:
        """Sparse attention as far as the server's profile keeps within `error_budget`, else dense."""
        return cls("sale", error_budget=error_budget)

    @classmethod
    def sale(cls, threshold: float | None = None, query_stride: int | None = None) -> Attention:
        """Sparse attention, with the server's setting for what is left out; its profile where both are."""
        return cls("sale", threshold, query_stride)

    @classmethod
    def dense(cls) -> Attention:
        """Exact attention over every key."""
        return cls("dense")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a decode chooses tokens; the defaults are greedy. Processors run in the order of the fields.

    Args:
        repetition_penalty: above 1 makes tokens of the session less likely; None or 1 is off.
        temperature: 0 is greedy.
        top_k: keep the k best tokens; 0 is off.
        top_p: keep the best tokens whose probabilities add up to this; None or 1 is off.
        min_p: keep tokens at least this likely relative to the best; 0 is off.
        seed: the same seed on the same session gives the same tokens; None draws a fresh one.
    """

    repetition_penalty: float | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float | None = None
    min_p: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Transport security. Each item is PEM bytes, or the path of a PEM file.

    Args:
        root_certificates: authorities to trust; None trusts those that gRPC ships.
        client_certificate: certificate chain to show the server (mutual TLS); needs `client_key`.
        client_key: private key of `client_certificate`.
        server_name: name to expect in the server's certificate where it differs from the target's host.
    """

    root_certificates: bytes | str | Path | None = None
    client_certificate: bytes | str | Path | None = None
    client_key: bytes | str | Path | None = field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("mutual TLS needs both client_certificate and client_key, and only one was given")


@dataclass(frozen=True, slots=True)
class Keepalive:
    """HTTP/2 pings that find a dead connection while a call is running.

    Args:
        interval_seconds: silence before a ping.
        timeout_seconds: wait for its answer before the connection counts as lost (the call fails as UNAVAILABLE).
    """

    interval_seconds: float = 30.0
    timeout_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How calls that are safe to repeat are repeated when the server is UNAVAILABLE.

    Safe are reads, lease renewals, a delete that allows a missing session, and every Prefill, Decode and KV pull: the
    first two carry a request id by which the server joins the running job, the last goes on from the chunk where it
    stopped. A wait that the server names (google.rpc.RetryInfo) takes the place of the computed one where it is longer.

    Args:
        max_attempts: attempts in a row without progress, the first one included; 1 never retries.
        initial_backoff_seconds: upper bound of the first wait; each later bound is `multiplier` times the last.
        max_backoff_seconds: limit of that bound.
        multiplier: growth of the bound.
        jitter: returns a number from 0 to 1; a wait is its bound times `0.5 + 0.5 * jitter()`.
    """

    max_attempts: int = 5
    initial_backoff_seconds: float = 0.2
    max_backoff_seconds: float = 5.0
    multiplier: float = 2.0
    jitter: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; use at least 1 (which never retries)")

    def backoff_seconds(self, failures: int) -> float:
        """Wait after the given number of failures in a row (at least 1)."""
        bound = min(self.max_backoff_seconds, self.initial_backoff_seconds * self.multiplier ** (failures - 1))
        return bound * (0.5 + 0.5 * self.jitter())


@dataclass(frozen=True, slots=True)
class InlineKv:
    """KV that comes with a prefill, each layer's while later ones are computed.

    Args:
        token_range, layer_range: part of the session, half-open; an end of None is the session's, None is everything.
        layout: axis order, `"THD"` (the fastest) or `"HTD"` (as transformers has it).
        chunk_bytes: bytes of a chunk, about; 1 MiB where left out, 8 MiB through a segment.
        checksum: digest of each chunk; where left out as of `pull_kv`.
        expected_spec: format that the KV must have, else KvSpecMismatchError before anything is computed.
        segment: memory shared with the server, from `open_transfer`, with room for all of it; the cache views it.
    """

    token_range: Range | None = None
    layer_range: Range | None = None
    layout: Layout = "THD"
    chunk_bytes: int | None = None
    checksum: Checksum | None = None
    expected_spec: KvSpec | None = None
    segment: Segment | None = None


class PrefillOptions(TypedDict, total=False):
    """Keyword options of a prefill.

    Args:
        session_id: session to append to, or to create under this id; None lets the server choose one.
        request_id: idempotency key: a repeat of the same request with the same key joins the running job or gets its
            result. None makes one up.
        expected_prefix_tokens: tokens that the session must hold already, else PrefixMismatchError; 0 demands a new
            session, None appends to whatever is there.
        attention: attention method; fixed by the request that creates the session.
        lease_seconds: how long the KV is kept after each request; 0 frees it at once, None takes the server's default.
        sliding: later requests extend the lease from their end.
        durability: what the session is to survive: `"none"`, nothing beyond the server's process; `"async"`, its end,
            once the tiers were written in the background; `"local"`, on the server's disk before the result comes;
            `"shared"`, in the store that other servers see before the result comes. None takes the server's default.
        pin: how the KV stands when memory runs out: `"none"`, least recently used goes first; `"soft"`, after
            everything that is not pinned; `"hard"`, it stays, and counts against the tenant's quota. None is `"none"`.
        prefix_reuse: whether a new session takes KV that the caller's other sessions hold for the tokens it begins
            with; False computes every token. None is True where the server reuses at all.
        on_interrupt: whether a half-done session is kept (default) or freed when this call is cancelled or lost.
        num_top_logits: logits of the last position to return; None for the server's default of 20.
        labels: set on a session that this request creates.
        inline_kv: send the KV as well; True is all of it. The result has it, events tell of every part that comes.
    """

    session_id: str | None
    request_id: str | None
    expected_prefix_tokens: int | None
    attention: Attention | None
    lease_seconds: float | None
    sliding: bool
    durability: Durability | None
    pin: Pin | None
    prefix_reuse: bool | None
    on_interrupt: InterruptPolicy
    num_top_logits: int | None
    labels: Mapping[str, str] | None
    inline_kv: InlineKv | bool | None


class DecodeOptions(TypedDict, total=False):
    """Keyword options of a decode.

    Args:
        max_new_tokens: limit on new tokens, at least 1; 256 where left out.
        sampling: how tokens are chosen; greedy where left out.
        stop_token_ids: tokens that end the answer besides the model's own; the one that did is part of the answer.
        ignore_eos: go on past the model's own end-of-sequence tokens.
        num_top_logprobs: alternatives to report with each token.
        request_id: idempotency key; None makes one up.
        expected_prefix_tokens: tokens that the session must hold already, else PrefixMismatchError.
        on_interrupt: whether the new tokens are kept (default) or cut off when this call is cancelled or lost.
    """

    max_new_tokens: int
    sampling: Sampling | None
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    num_top_logprobs: int
    request_id: str | None
    expected_prefix_tokens: int | None
    on_interrupt: InterruptPolicy
