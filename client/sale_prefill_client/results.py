"""What calls return: immutable values with plain types, made from the protobuf messages of `proto/sale_prefill/v1/`.

Durations are float seconds, instants are aware datetimes in UTC, enumerations are lower-case strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from google.protobuf.duration_pb2 import Duration

from sale_prefill.v1 import (
    kv_pb2,
    kv_transfer_service_pb2,
    prefill_service_pb2,
    server_service_pb2,
    session_service_pb2,
)

from .options import Attention, AttentionMode, Durability, Layout, Pin

if TYPE_CHECKING:
    from .kv import KvCache

ElementType = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]
SessionState = Literal["unspecified", "busy", "partial", "ready", "offloaded"]
Tier = Literal["device", "host", "disk", "shared"]
FinishReason = Literal["unspecified", "stop", "length", "context"]
DenseReason = Literal["unspecified", "requested", "short", "head", "unsupported"]

_ELEMENT_TYPES: dict[int, ElementType] = {
    kv_pb2.ELEMENT_TYPE_FLOAT32: "float32",
    kv_pb2.ELEMENT_TYPE_FLOAT16: "float16",
    kv_pb2.ELEMENT_TYPE_BFLOAT16: "bfloat16",
    kv_pb2.ELEMENT_TYPE_FLOAT8_E4M3FN: "float8_e4m3fn",
    kv_pb2.ELEMENT_TYPE_FLOAT8_E5M2: "float8_e5m2",
    kv_pb2.ELEMENT_TYPE_INT8: "int8",
}
_ELEMENT_BYTES: dict[ElementType, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
}
_LAYOUTS: dict[int, Layout] = {kv_pb2.KV_LAYOUT_HTD: "HTD", kv_pb2.KV_LAYOUT_THD: "THD"}
_SESSION_STATES: dict[int, SessionState] = {
    session_service_pb2.SESSION_STATE_BUSY: "busy",
    session_service_pb2.SESSION_STATE_PARTIAL: "partial",
    session_service_pb2.SESSION_STATE_READY: "ready",
    session_service_pb2.SESSION_STATE_OFFLOADED: "offloaded",
}
_TIERS: dict[int, Tier] = {
    session_service_pb2.KV_TIER_DEVICE: "device",
    session_service_pb2.KV_TIER_HOST: "host",
    session_service_pb2.KV_TIER_DISK: "disk",
    session_service_pb2.KV_TIER_SHARED: "shared",
}
_DURABILITIES: dict[int, Durability] = {
    session_service_pb2.DURABILITY_NONE: "none",
    session_service_pb2.DURABILITY_ASYNC: "async",
    session_service_pb2.DURABILITY_LOCAL: "local",
    session_service_pb2.DURABILITY_SHARED: "shared",
}
_PINS: dict[int, Pin] = {
    session_service_pb2.PIN_NONE: "none",
    session_service_pb2.PIN_SOFT: "soft",
    session_service_pb2.PIN_HARD: "hard",
}
_ATTENTION_MODES: dict[int, AttentionMode] = {
    session_service_pb2.ATTENTION_MODE_SALE: "sale",
    session_service_pb2.ATTENTION_MODE_DENSE: "dense",
}
_FINISH_REASONS: dict[int, FinishReason] = {
    prefill_service_pb2.FINISH_REASON_STOP: "stop",
    prefill_service_pb2.FINISH_REASON_LENGTH: "length",
    prefill_service_pb2.FINISH_REASON_CONTEXT: "context",
}
_DENSE_REASONS: dict[int, DenseReason] = {
    prefill_service_pb2.DENSE_REASON_REQUESTED: "requested",
    prefill_service_pb2.DENSE_REASON_SHORT: "short",
    prefill_service_pb2.DENSE_REASON_HEAD: "head",
    prefill_service_pb2.DENSE_REASON_UNSUPPORTED: "unsupported",
}


def _transport_name(number: int) -> str:
    known = number in kv_transfer_service_pb2.Transport.values()
    return kv_transfer_service_pb2.Transport.Name(number).removeprefix("TRANSPORT_").lower() if known else str(number)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


@dataclass(frozen=True, slots=True)
class KvSpec:
    """Format of KV bytes: element type, axis order (None where it has none yet) and the shape of one token's KV."""

    model_fingerprint: str
    element_type: ElementType
    layout: Layout | None
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_applied: bool
    rope_fingerprint: str

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return _ELEMENT_BYTES[self.element_type]

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token's keys (or values) in one layer."""
        return self.num_kv_heads * self.head_dim * self.element_bytes

    @classmethod
    def from_proto(cls, message: kv_pb2.KvSpec) -> KvSpec:
        """Read the message; ValueError for an element type that this client does not know."""
        element_type = _ELEMENT_TYPES.get(message.element_type)
        if element_type is None:
            raise ValueError(f"KV element type {message.element_type} is unknown to this client; update sale-prefill")
        return cls(
            model_fingerprint=message.model_fingerprint,
            element_type=element_type,
            layout=_LAYOUTS.get(message.layout),
            num_layers=message.num_layers,
            num_kv_heads=message.num_kv_heads,
            head_dim=message.head_dim,
            rope_applied=message.rope_applied,
            rope_fingerprint=message.rope_fingerprint,
        )

    def to_proto(self) -> kv_pb2.KvSpec:
        """The message."""
        return kv_pb2.KvSpec(
            model_fingerprint=self.model_fingerprint,
            element_type=f"ELEMENT_TYPE_{self.element_type.upper()}",
            layout=f"KV_LAYOUT_{self.layout or 'UNSPECIFIED'}",
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope_applied=self.rope_applied,
            rope_fingerprint=self.rope_fingerprint,
        )


@dataclass(frozen=True, slots=True)
class Session:
    """A retained KV cache.

    Args:
        session_id: opaque id.
        server_id: server that holds it.
        state: `"busy"` while a request adds tokens, `"partial"` after an interrupted prefill, `"offloaded"` where the
            KV left the device and the next request brings it back, else `"ready"`.
        num_tokens: tokens held.
        kv_spec: native format of the KV; None where the server left it out.
        size_bytes: bytes that the KV takes on the device.
        create_time: creation, by the server's clock.
        expire_time: end of the lease, by the server's clock; None while a request is running.
        remaining_lease_seconds: time left on the lease when the server answered; None while a request is running.
        generation: grows with every change of the contents.
        token_digest: SHA-256 of the token ids (see `tokens.token_digest`).
        lease_seconds: lease from the end of a request; None where the server left it out.
        sliding: requests after the first extend the lease.
        attention: attention settings, fixed at creation.
        labels: the caller's labels.
        tier: fastest tier that holds the whole KV; None where the server left it out.
        durability: what the session survives already, all its tokens; None where the server left it out.
        wanted_durability: what it is to survive, by its policy; None where the server left it out.
        pin: how it stands when memory runs out; None where the server left it out.
    """

    session_id: str
    server_id: str
    state: SessionState
    num_tokens: int
    kv_spec: KvSpec | None
    size_bytes: int
    create_time: datetime | None
    expire_time: datetime | None
    remaining_lease_seconds: float | None
    generation: int
    token_digest: bytes
    lease_seconds: float | None
    sliding: bool
    attention: Attention
    labels: dict[str, str]
    tier: Tier | None = None
    durability: Durability | None = None
    wanted_durability: Durability | None = None
    pin: Pin | None = None

    @classmethod
    def from_proto(cls, message: session_service_pb2.Session) -> Session:
        """Read the message."""

        def instant(name: Literal["create_time", "expire_time"]) -> datetime | None:
            return getattr(message, name).ToDatetime(tzinfo=UTC) if message.HasField(name) else None

        remaining, retention = message.remaining_lease_duration, message.retention
        return cls(
            session_id=message.session_id,
            server_id=message.server_id,
            state=_SESSION_STATES.get(message.state, "unspecified"),
            num_tokens=message.num_tokens,
            kv_spec=KvSpec.from_proto(message.kv_spec) if message.HasField("kv_spec") else None,
            size_bytes=message.size_bytes,
            create_time=instant("create_time"),
            expire_time=instant("expire_time"),
            remaining_lease_seconds=_seconds(remaining) if message.HasField("remaining_lease_duration") else None,
            generation=message.generation,
            token_digest=message.token_digest,
            lease_seconds=_seconds(retention.lease_duration) if retention.HasField("lease_duration") else None,
            sliding=retention.sliding,
            attention=attention_from_proto(message.attention),
            labels=dict(message.labels),
            tier=_TIERS.get(message.tier),
            durability=_DURABILITIES.get(message.durability),
            wanted_durability=_DURABILITIES.get(retention.durability),
            pin=_PINS.get(retention.pin),
        )


def attention_from_proto(message: session_service_pb2.AttentionOptions) -> Attention:
    """The attention settings that the message holds."""
    return Attention(
        mode=_ATTENTION_MODES.get(message.mode, "default"),
        threshold=message.threshold if message.HasField("threshold") else None,
        query_stride=message.query_stride if message.HasField("query_stride") else None,
        error_budget=message.error_budget if message.HasField("error_budget") else None,
    )


@dataclass(frozen=True, slots=True)
class TokenLogit:
    """A token id with its logit and the natural logarithm of its probability at temperature 1."""

    token_id: int
    logit: float
    logprob: float

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.TokenLogit) -> TokenLogit:
        """Read the message."""
        return cls(message.token_id, message.logit, message.logprob)


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Attention of one layer: blocks computed, blocks that the causal mask allows, density of each query head."""

    computed_blocks: int
    causal_blocks: int
    head_densities: tuple[float, ...]

    @property
    def density(self) -> float:
        """Share of the allowed blocks that was computed, 0 to 1; 1 where there were none."""
        return self.computed_blocks / self.causal_blocks if self.causal_blocks else 1.0


@dataclass(frozen=True, slots=True)
class DenseFallback:
    """Rows (query token x head x layer) that took dense attention, and why."""

    reason: DenseReason
    num_rows: int


@dataclass(frozen=True, slots=True)
class ProfileStats:
    """Which settings of the server's calibrated profile a session has.

    Args:
        name: name of the profile.
        digest: SHA-256 of its content, hexadecimal.
        error_budget: of the level in use; 0 where the request's was below the least, and every head is dense.
        expected_error: mean relative error of attention outputs, by row, that calibration measured at that level.
        sparse_heads: heads (x layer) with a threshold.
        streaming_heads: heads that attend to the first and the nearest keys only.
        dense_heads: heads that attend to every key.
    """

    name: str
    digest: str
    error_budget: float
    expected_error: float
    sparse_heads: int
    streaming_heads: int
    dense_heads: int

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.ProfileStats) -> ProfileStats:
        """Read the message."""
        return cls(
            name=message.name,
            digest=message.digest,
            error_budget=message.error_budget,
            expected_error=message.expected_error,
            sparse_heads=message.sparse_heads,
            streaming_heads=message.streaming_heads,
            dense_heads=message.dense_heads,
        )


@dataclass(frozen=True, slots=True)
class GuardAlert:
    """A layer (`head` None) or head that loses more than calibration said; `dense`: from now on, in new sessions."""

    layer: int
    head: int | None
    dense: bool
    mean_error: float
    expected_error: float


@dataclass(frozen=True, slots=True)
class GuardStats:
    """Tiles (a query block of a head in a layer) that the server attended to densely once more.

    Args:
        num_tiles: tiles.
        kept_mass: mean share of the attention mass that kept keys hold.
        mean_error: mean relative error of attention outputs, by row.
        max_error: the largest.
        alerts: layers and heads that went over their limit.
    """

    num_tiles: int
    kept_mass: float
    mean_error: float
    max_error: float
    alerts: tuple[GuardAlert, ...]

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.GuardStats) -> GuardStats:
        """Read the message."""
        return cls(
            num_tiles=message.num_tiles,
            kept_mass=message.kept_mass,
            mean_error=message.mean_error,
            max_error=message.max_error,
            alerts=tuple(
                GuardAlert(
                    layer=alert.layer,
                    head=alert.head if alert.HasField("head") else None,
                    dense=alert.dense,
                    mean_error=alert.mean_error,
                    expected_error=alert.expected_error,
                )
                for alert in message.alerts
            ),
        )


@dataclass(frozen=True, slots=True)
class PrefillStats:
    """Where a prefill's time went and how sparse its attention was. estimation + attention + other = compute.

    Args:
        queue_seconds: from admission to the first step.
        compute_seconds: in the engine, this request's steps only.
        estimation_seconds: quantising, sink-local pass and selection.
        attention_seconds: attention over the kept blocks, and dense attention.
        other_seconds: everything else in the engine.
        computed_tokens: tokens computed by this request.
        cached_tokens: tokens that were in the session already.
        computed_blocks: key blocks (query block x key block x head x layer) that attention computed.
        causal_blocks: key blocks that the causal mask allows.
        density: computed_blocks / causal_blocks, 0 to 1.
        layers: the same by layer.
        dense_fallbacks: rows that took dense attention.
        attention_backend: backend that ran.
        profile: what heads got from the calibrated profile; None where the session has a threshold of its own, or is
            dense.
        guard: what the live guard found; None where it did not look.
        prefix_tokens: of cached_tokens, those that came from the caller's other sessions.
        restored_tokens: of cached_tokens, those that were read back from a slower tier.
    """

    queue_seconds: float
    compute_seconds: float
    estimation_seconds: float
    attention_seconds: float
    other_seconds: float
    computed_tokens: int
    cached_tokens: int
    computed_blocks: int
    causal_blocks: int
    density: float
    layers: tuple[LayerStats, ...]
    dense_fallbacks: tuple[DenseFallback, ...]
    attention_backend: str
    profile: ProfileStats | None
    guard: GuardStats | None
    prefix_tokens: int = 0
    restored_tokens: int = 0

    @property
    def sparsity(self) -> float:
        """Share of the allowed blocks that was skipped: 1 - density; 0 where there were none."""
        return 1.0 - self.density if self.causal_blocks else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Computed tokens per second of engine time; 0 where no time was spent."""
        return self.computed_tokens / self.compute_seconds if self.compute_seconds else 0.0

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.PrefillStats) -> PrefillStats:
        """Read the message."""
        return cls(
            queue_seconds=_seconds(message.queue_duration),
            compute_seconds=_seconds(message.compute_duration),
            estimation_seconds=_seconds(message.estimation_duration),
            attention_seconds=_seconds(message.attention_duration),
            other_seconds=_seconds(message.other_duration),
            computed_tokens=message.computed_tokens,
            cached_tokens=message.cached_tokens,
            computed_blocks=message.computed_blocks,
            causal_blocks=message.causal_blocks,
            density=message.density,
            layers=tuple(
                LayerStats(layer.computed_blocks, layer.causal_blocks, tuple(layer.head_densities))
                for layer in message.layers
            ),
            dense_fallbacks=tuple(
                DenseFallback(_DENSE_REASONS.get(entry.reason, "unspecified"), entry.num_rows)
                for entry in message.dense_fallbacks
            ),
            attention_backend=message.attention_backend,
            profile=ProfileStats.from_proto(message.profile) if message.HasField("profile") else None,
            guard=GuardStats.from_proto(message.guard) if message.HasField("guard") else None,
            prefix_tokens=message.prefix_tokens,
            restored_tokens=message.restored_tokens,
        )


@dataclass(frozen=True, slots=True)
class PrefillAccepted:
    """The request is admitted.

    Args:
        session_id: the session.
        queue_position: requests ahead of this one.
        queued_tokens: tokens to compute before this request starts.
        cached_tokens: tokens of the session whose KV is there already.
        total_tokens: tokens of the session when this request is done.
        joined: this call joined a job that an earlier one with the same request id started.
    """

    session_id: str
    queue_position: int
    queued_tokens: int
    cached_tokens: int
    total_tokens: int
    joined: bool

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.PrefillAccepted) -> PrefillAccepted:
        """Read the message."""
        return cls(
            session_id=message.session_id,
            queue_position=message.queue_position,
            queued_tokens=message.queued_tokens,
            cached_tokens=message.cached_tokens,
            total_tokens=message.total_tokens,
            joined=message.joined,
        )


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far a prefill is; sent at least once a second.

    Args:
        computed_tokens: tokens of the session whose KV is complete in all layers, cached ones included.
        total_tokens: tokens of the session when the request is done.
        completed_ratio: share of this request's work done, 0 to 1; moves within a chunk too.
        elapsed_seconds: time since the request was admitted.
        queued: the request waits for its first step.
    """

    computed_tokens: int
    total_tokens: int
    completed_ratio: float
    elapsed_seconds: float
    queued: bool

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.PrefillProgress) -> PrefillProgress:
        """Read the message."""
        return cls(
            computed_tokens=message.computed_tokens,
            total_tokens=message.total_tokens,
            completed_ratio=message.completed_ratio,
            elapsed_seconds=_seconds(message.elapsed_duration),
            queued=message.queued,
        )


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """A finished prefill: the session, the last position's logits best first, the cost and sparsity report, and the
    request id under which a repeat would find this result. `kv` is there where the request had `inline_kv`."""

    session: Session
    top_logits: tuple[TokenLogit, ...]
    stats: PrefillStats
    request_id: str
    kv: KvCache | None = None

    @property
    def session_id(self) -> str:
        """Id of the session."""
        return self.session.session_id

    @classmethod
    def from_proto(
        cls, message: prefill_service_pb2.PrefillResult, request_id: str, kv: KvCache | None = None
    ) -> PrefillResult:
        """Read the message."""
        return cls(
            kv=kv,
            session=Session.from_proto(message.session),
            top_logits=tuple(TokenLogit.from_proto(entry) for entry in message.top_logits),
            stats=PrefillStats.from_proto(message.stats),
            request_id=request_id,
        )


@dataclass(frozen=True, slots=True)
class KvArrived:
    """A part of the KV is here: tokens [token_start, token_end) of one layer's keys (`kind` 0) or values (1)."""

    layer: int
    kind: int
    token_start: int
    token_end: int
    received_bytes: int
    total_bytes: int


PrefillEvent = PrefillAccepted | PrefillProgress | KvArrived | PrefillResult


@dataclass(frozen=True, slots=True)
class DecodedToken:
    """One new token.

    Args:
        token_id: its id.
        logprob: natural logarithm of its probability at temperature 1, before any other processor.
        top_logprobs: alternatives, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[TokenLogit, ...] = ()

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.DecodedToken) -> DecodedToken:
        """Read the message."""
        alternatives = tuple(TokenLogit.from_proto(entry) for entry in message.top_logprobs)
        return cls(message.token_id, message.logprob, alternatives)


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """Where a decode's time went.

    Args:
        queue_seconds: from admission to the first step.
        prefill: report on the appended tokens; None where none were appended.
        decode_seconds: in the engine, decode steps only.
        decoded_tokens: new tokens.
        seed: seed that was used; meaningless for greedy decoding.
    """

    queue_seconds: float
    prefill: PrefillStats | None
    decode_seconds: float
    decoded_tokens: int
    seed: int

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.DecodeStats) -> DecodeStats:
        """Read the message."""
        return cls(
            queue_seconds=_seconds(message.queue_duration),
            prefill=PrefillStats.from_proto(message.prefill) if message.HasField("prefill") else None,
            decode_seconds=_seconds(message.decode_duration),
            decoded_tokens=message.decoded_tokens,
            seed=message.seed,
        )


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """A finished decode: the session with the new tokens in it, why decoding ended, and what it cost."""

    session: Session
    finish_reason: FinishReason
    stats: DecodeStats
    request_id: str

    @classmethod
    def from_proto(cls, message: prefill_service_pb2.DecodeResult, request_id: str) -> DecodeResult:
        """Read the message."""
        return cls(
            session=Session.from_proto(message.session),
            finish_reason=_FINISH_REASONS.get(message.finish_reason, "unspecified"),
            stats=DecodeStats.from_proto(message.stats),
            request_id=request_id,
        )


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole decode: every new token, and the result."""

    tokens: tuple[DecodedToken, ...]
    result: DecodeResult

    @property
    def token_ids(self) -> list[int]:
        """Ids of the new tokens, the one that ended the answer included."""
        return [token.token_id for token in self.tokens]


@dataclass(frozen=True, slots=True)
class RenewResult:
    """Sessions whose lease was extended, and ids that the server does not hold."""

    renewed: tuple[Session, ...]
    missing_session_ids: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: session_service_pb2.RenewSessionResponse) -> RenewResult:
        """Read the message."""
        return cls(tuple(Session.from_proto(entry) for entry in message.renewed), tuple(message.missing_session_ids))


@dataclass(frozen=True, slots=True)
class ProfileInfo:
    """The calibrated profile in force: its name, the SHA-256 of its content, the error budgets of its levels."""

    name: str
    digest: str
    error_budgets: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is: model, native KV format, limits, defaults, device.

    Args:
        kv_spec: native KV format; None where the server left it out.
        max_sequence_tokens: the model's context.
        max_message_bytes: biggest message, either way.
        vocabulary_size: token ids are below it.
        default_lease_seconds: lease of a session that asks for none; None where the server left it out.
        transports: transports offered for KV, such as `"grpc"`.
        max_top_logits: most logits or logprobs that a request may ask for at a position.
        profile: the calibrated profile in force; None where there is none.
    """

    server_id: str
    server_version: str
    model_name: str
    kv_spec: KvSpec | None
    max_sequence_tokens: int
    max_message_bytes: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    default_attention: Attention
    default_lease_seconds: float | None
    default_sliding: bool
    device: str
    attention_backend: str
    transports: tuple[str, ...]
    num_query_heads: int
    max_top_logits: int
    profile: ProfileInfo | None

    @classmethod
    def from_proto(cls, message: server_service_pb2.GetServerInfoResponse) -> ServerInfo:
        """Read the message."""
        retention = message.default_retention
        return cls(
            server_id=message.server_id,
            server_version=message.server_version,
            model_name=message.model_name,
            kv_spec=KvSpec.from_proto(message.kv_spec) if message.HasField("kv_spec") else None,
            max_sequence_tokens=message.max_sequence_tokens,
            max_message_bytes=message.max_message_bytes,
            vocabulary_size=message.vocabulary_size,
            eos_token_ids=tuple(message.eos_token_ids),
            default_attention=attention_from_proto(message.default_attention),
            default_lease_seconds=_seconds(retention.lease_duration) if retention.HasField("lease_duration") else None,
            default_sliding=retention.sliding,
            device=message.device,
            attention_backend=message.attention_backend,
            transports=tuple(_transport_name(number) for number in message.transports),
            num_query_heads=message.num_query_heads,
            max_top_logits=message.max_top_logits,
            profile=(
                ProfileInfo(message.profile.name, message.profile.digest, tuple(message.profile.error_budgets))
                if message.HasField("profile")
                else None
            ),
        )


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a server is.

    Args:
        running_requests: requests in the engine.
        queued_requests: requests waiting.
        queued_tokens: tokens waiting to be prefilled, cached ones not counted.
        prefill_tokens_per_second: measured speed, moving average; 0 before the first prefill.
        kv_used_bytes: KV bytes in use.
        kv_capacity_bytes: KV bytes there are.
        sessions: sessions held.
        draining: a drain has begun.
    """

    running_requests: int
    queued_requests: int
    queued_tokens: int
    prefill_tokens_per_second: float
    kv_used_bytes: int
    kv_capacity_bytes: int
    sessions: int
    draining: bool

    @classmethod
    def from_proto(cls, message: server_service_pb2.GetLoadResponse) -> Load:
        """Read the message."""
        return cls(
            running_requests=message.running_requests,
            queued_requests=message.queued_requests,
            queued_tokens=message.queued_tokens,
            prefill_tokens_per_second=message.prefill_tokens_per_second,
            kv_used_bytes=message.kv_used_bytes,
            kv_capacity_bytes=message.kv_capacity_bytes,
            sessions=message.sessions,
            draining=message.draining,
        )
