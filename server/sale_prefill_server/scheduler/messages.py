"""What goes into the scheduler, and what comes out, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sale_prefill_server.engine.report import PrefillReport
from sale_prefill_server.engine.sampling import SampledToken, Sampling
from sale_prefill_server.engine.sequence import AttentionSettings
from sale_prefill_server.sessions.session import Retention, SessionInfo


class InterruptPolicy(StrEnum):
    """What becomes of a half-done session when nobody follows its request any more."""

    KEEP = "keep"
    FREE = "free"


@dataclass(frozen=True)
class PrefillCommand:
    """A request to append `token_ids` to a session, or to create one.

    `session_id` is empty for a fresh id; `attention` and `retention` are None for the server's defaults;
    `expected_prefix_tokens` is None for no guard. With `reuse_prefix`, a new session takes KV that the tenant's other
    sessions hold for the tokens it begins with. With `wants_kv`, the caller gets a reference to the KV.
    """

    tenant: str
    token_ids: Sequence[int]
    request_id: str = ""
    session_id: str = ""
    expected_prefix_tokens: int | None = None
    attention: AttentionSettings | None = None
    retention: Retention | None = None
    on_interrupt: InterruptPolicy = InterruptPolicy.KEEP
    num_top_logits: int = 20
    labels: Mapping[str, str] = field(default_factory=dict)
    reuse_prefix: bool = True
    wants_kv: bool = False


@dataclass(frozen=True)
class DecodeCommand:
    """A request to append `token_ids` (maybe none) to a session and sample up to `max_new_tokens`."""

    tenant: str
    session_id: str
    max_new_tokens: int
    token_ids: Sequence[int] = ()
    request_id: str = ""
    expected_prefix_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    num_top_logprobs: int = 0
    on_interrupt: InterruptPolicy = InterruptPolicy.KEEP


@dataclass(frozen=True)
class Accepted:
    """The request is admitted."""

    session_id: str
    queue_position: int
    queued_tokens: int
    cached_tokens: int
    total_tokens: int
    joined: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a prefill is. `completed_ratio` counts layer-tokens of this request, 0 to 1."""

    computed_tokens: int
    total_tokens: int
    completed_ratio: float
    elapsed_seconds: float
    queued: bool


class FinishReason(StrEnum):
    """Why decoding ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT = "context"


@dataclass(frozen=True)
class PrefillDone:
    """A finished prefill: (token id, logit, logprob) best first, and the report."""

    session: SessionInfo
    top_logits: tuple[tuple[int, float, float], ...]
    report: PrefillReport


@dataclass(frozen=True)
class DecodeDone:
    """A finished decode; `prefill` is the report of the appended tokens, where there were any."""

    session: SessionInfo
    finish_reason: FinishReason
    prefill: PrefillReport | None
    queue_seconds: float
    decode_seconds: float
    decoded_tokens: int
    seed: int


JobEvent = Accepted | Progress | SampledToken | PrefillDone | DecodeDone
