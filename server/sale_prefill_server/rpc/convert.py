"""Messages to domain objects and back. Everything a caller may get wrong in a field is refused here."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from sale_prefill.v1 import kv_pb2, prefill_service_pb2, session_service_pb2
from sale_prefill_server.engine.guard import GuardReport
from sale_prefill_server.engine.model import LoadedModel
from sale_prefill_server.engine.report import PrefillReport, ProfileReport
from sale_prefill_server.engine.sampling import SampledToken, Sampling
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings
from sale_prefill_server.errors import invalid_field
from sale_prefill_server.scheduler.messages import (
    Accepted,
    DecodeCommand,
    DecodeDone,
    FinishReason,
    InterruptPolicy,
    PrefillCommand,
    PrefillDone,
    Progress,
)
from sale_prefill_server.sessions.session import Durability, KvTier, Retention, SessionInfo, SessionPin, SessionState

MAX_TOP_LOGITS = 1000
DEFAULT_TOP_LOGITS = 20
_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_ELEMENT_TYPES = {
    "torch.float32": kv_pb2.ELEMENT_TYPE_FLOAT32,
    "torch.float16": kv_pb2.ELEMENT_TYPE_FLOAT16,
    "torch.bfloat16": kv_pb2.ELEMENT_TYPE_BFLOAT16,
}
_STATES = {
    SessionState.BUSY: session_service_pb2.SESSION_STATE_BUSY,
    SessionState.PARTIAL: session_service_pb2.SESSION_STATE_PARTIAL,
    SessionState.READY: session_service_pb2.SESSION_STATE_READY,
    SessionState.OFFLOADED: session_service_pb2.SESSION_STATE_OFFLOADED,
}
_DURABILITY_VALUES = {
    Durability.NONE: session_service_pb2.DURABILITY_NONE,
    Durability.ASYNC: session_service_pb2.DURABILITY_ASYNC,
    Durability.LOCAL: session_service_pb2.DURABILITY_LOCAL,
    Durability.SHARED: session_service_pb2.DURABILITY_SHARED,
}
#: None: the server's default.
_DURABILITIES: dict[int, Durability | None] = {
    session_service_pb2.DURABILITY_UNSPECIFIED: None,
    **{value: durability for durability, value in _DURABILITY_VALUES.items()},
}
_PIN_VALUES = {
    SessionPin.NONE: session_service_pb2.PIN_NONE,
    SessionPin.SOFT: session_service_pb2.PIN_SOFT,
    SessionPin.HARD: session_service_pb2.PIN_HARD,
}
_PINS = {
    session_service_pb2.PIN_UNSPECIFIED: SessionPin.NONE,
    **{value: pin for pin, value in _PIN_VALUES.items()},
}
_TIERS = {
    KvTier.DEVICE: session_service_pb2.KV_TIER_DEVICE,
    KvTier.HOST: session_service_pb2.KV_TIER_HOST,
    KvTier.DISK: session_service_pb2.KV_TIER_DISK,
    KvTier.SHARED: session_service_pb2.KV_TIER_SHARED,
}
_FINISH_REASONS = {
    FinishReason.STOP: prefill_service_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: prefill_service_pb2.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT: prefill_service_pb2.FINISH_REASON_CONTEXT,
}
_DENSE_REASONS = {
    "requested": prefill_service_pb2.DENSE_REASON_REQUESTED,
    "short": prefill_service_pb2.DENSE_REASON_SHORT,
    "head": prefill_service_pb2.DENSE_REASON_HEAD,
    "unsupported": prefill_service_pb2.DENSE_REASON_UNSUPPORTED,
}
_MODES = {
    AttentionMode.SALE: session_service_pb2.ATTENTION_MODE_SALE,
    AttentionMode.DENSE: session_service_pb2.ATTENTION_MODE_DENSE,
}


def identifier(field: str, value: str) -> str:
    """`value`, empty or a plain id.

    Raises:
        PrefillError: INVALID_FIELD.
    """
    if value and not _ID.fullmatch(value):
        raise invalid_field(field, f"{value[:140]!r}: use 1 to 128 letters, digits, '.', '_', ':' or '-'")
    return value


def required_identifier(field: str, value: str) -> str:
    """`value`, a plain id.

    Raises:
        PrefillError: INVALID_FIELD.
    """
    if not value:
        raise invalid_field(field, "is empty: name one")
    return identifier(field, value)


def duration(seconds: float) -> Duration:
    """Seconds as a message."""
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def seconds_of(field: str, message: Duration, maximum_seconds: float) -> float:
    """A message as seconds.

    Raises:
        PrefillError: INVALID_FIELD, negative or over the maximum.
    """
    value = message.seconds + message.nanos / 1e9
    if not 0 <= value <= maximum_seconds:
        raise invalid_field(field, f"{value:g} s: must be 0 to {maximum_seconds:g} s")
    return value


class Converter:
    """Conversions that depend on the server's model and settings.

    Args:
        model: loaded model.
        server_id: name of this server in Session messages.
        defaults: attention of a session that asks for none.
        default_retention: retention of a session that asks for none.
        max_lease_seconds: longest lease.
        has_profile: whether requests may name an error budget.
    """

    def __init__(
        self,
        model: LoadedModel,
        server_id: str,
        defaults: AttentionSettings,
        default_retention: Retention,
        max_lease_seconds: float,
        has_profile: bool = False,
        durabilities: Sequence[Durability] = (Durability.NONE,),
    ) -> None:
        self._durabilities = tuple(durabilities)
        self._has_profile = has_profile
        self._model = model
        self._server_id = server_id
        self._defaults = defaults
        self._default_retention = default_retention
        self._max_lease_seconds = max_lease_seconds

    def prefill_command(self, request: prefill_service_pb2.PrefillRequest, tenant: str) -> PrefillCommand:
        """A Prefill request.

        Raises:
            PrefillError: INVALID_FIELD.
        """
        top = request.num_top_logits if request.HasField("num_top_logits") else DEFAULT_TOP_LOGITS
        return PrefillCommand(
            tenant=tenant,
            token_ids=array("I", request.token_ids),
            request_id=identifier("request_id", request.request_id),
            session_id=identifier("session_id", request.session_id),
            expected_prefix_tokens=(
                request.expected_prefix_tokens if request.HasField("expected_prefix_tokens") else None
            ),
            attention=self.attention(request.attention) if request.HasField("attention") else None,
            retention=self.retention(request.retention) if request.HasField("retention") else None,
            on_interrupt=interrupt_policy(request.on_interrupt),
            num_top_logits=_at_most("num_top_logits", top, MAX_TOP_LOGITS),
            labels=labels_of(request.labels),
            wants_kv=request.HasField("inline_kv"),
            reuse_prefix=request.prefix_reuse != prefill_service_pb2.PREFIX_REUSE_OFF,
        )

    def decode_command(self, request: prefill_service_pb2.DecodeRequest, tenant: str) -> DecodeCommand:
        """A Decode request.

        Raises:
            PrefillError: INVALID_FIELD, INVALID_SAMPLING.
        """
        if request.max_new_tokens < 1:
            raise invalid_field("max_new_tokens", "is 0: ask for at least 1")
        for token_id in request.stop_token_ids:
            if token_id >= self._model.vocabulary_size:
                raise invalid_field(
                    "stop_token_ids", f"{token_id} is outside the vocabulary of {self._model.vocabulary_size} tokens"
                )
        return DecodeCommand(
            tenant=tenant,
            session_id=required_identifier("session_id", request.session_id),
            max_new_tokens=request.max_new_tokens,
            token_ids=array("I", request.token_ids),
            request_id=identifier("request_id", request.request_id),
            expected_prefix_tokens=(
                request.expected_prefix_tokens if request.HasField("expected_prefix_tokens") else None
            ),
            sampling=_sampling(request.sampling),
            stop_token_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            num_top_logprobs=_at_most("num_top_logprobs", request.num_top_logprobs, MAX_TOP_LOGITS),
            on_interrupt=interrupt_policy(request.on_interrupt),
        )

    def attention(self, message: session_service_pb2.AttentionOptions) -> AttentionSettings:
        """Attention settings, the server's defaults filled in.

        Raises:
            PrefillError: INVALID_FIELD.
        """
        modes = {value: key for key, value in _MODES.items()} | {
            session_service_pb2.ATTENTION_MODE_UNSPECIFIED: self._defaults.mode
        }
        if message.mode not in modes:
            raise invalid_field("attention.mode", f"{message.mode} is no AttentionMode; send SALE or DENSE")
        error_budget = self._error_budget(message)
        threshold = message.threshold if message.HasField("threshold") else self._defaults.threshold
        if not 0.0 < threshold <= 1.0 or math.isnan(threshold):
            raise invalid_field(
                "attention.threshold", f"{threshold}: must be above 0 and at most 1; for none, ask for DENSE"
            )
        stride = message.query_stride if message.HasField("query_stride") else self._defaults.query_stride
        if stride not in (1, 2, 4):
            raise invalid_field("attention.query_stride", f"{stride}: must be 1, 2 or 4")
        if modes[message.mode] is AttentionMode.DENSE:
            return AttentionSettings(AttentionMode.DENSE, self._defaults.threshold, self._defaults.query_stride)
        return AttentionSettings(AttentionMode.SALE, threshold, stride, error_budget)

    def _error_budget(self, message: session_service_pb2.AttentionOptions) -> float | None:
        uniform = message.HasField("threshold") or message.HasField("query_stride")
        if not message.HasField("error_budget"):
            return None if uniform else self._defaults.error_budget
        budget = message.error_budget
        if not 0.0 < budget < math.inf:
            raise invalid_field("attention.error_budget", f"{budget}: must be above 0; for none, ask for DENSE")
        if uniform:
            raise invalid_field(
                "attention.error_budget", "a profile has thresholds and strides of its own: leave these out, or this"
            )
        if not self._has_profile:
            raise invalid_field(
                "attention.error_budget",
                "this server has no profile of its model: send a threshold, or start it with --profile FILE "
                "(sale-prefill calibrate writes one)",
            )
        return budget

    def retention(self, message: session_service_pb2.RetentionPolicy) -> Retention:
        """A retention policy, the server's default lease filled in.

        Raises:
            PrefillError: INVALID_FIELD.
        """
        lease_seconds = self._default_retention.lease_seconds
        if message.HasField("lease_duration"):
            lease_seconds = seconds_of("retention.lease_duration", message.lease_duration, self._max_lease_seconds)
        if message.durability not in _DURABILITIES:
            raise invalid_field("retention.durability", f"{message.durability} is no Durability")
        if message.pin not in _PINS:
            raise invalid_field("retention.pin", f"{message.pin} is no Pin")
        durability = _DURABILITIES[message.durability] or self._default_retention.durability
        if durability not in self._durabilities:
            raise invalid_field(
                "retention.durability",
                f"{durability} cannot be promised by this server: it has {', '.join(self._durabilities)}",
            )
        return Retention(lease_seconds, message.sliding, durability, _PINS[message.pin])

    def kv_spec(self, layout: kv_pb2.KvLayout = kv_pb2.KV_LAYOUT_HTD) -> kv_pb2.KvSpec:
        """The model's KV format."""
        shape = self._model.kv_shape
        return kv_pb2.KvSpec(
            model_fingerprint=self._model.fingerprint,
            element_type=_ELEMENT_TYPES[str(shape.dtype)],
            layout=layout,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rope_applied=True,
            rope_fingerprint=self._model.rope_fingerprint,
        )

    def session(self, info: SessionInfo) -> session_service_pb2.Session:
        """A session."""
        message = session_service_pb2.Session(
            session_id=info.session_id,
            server_id=self._server_id,
            state=_STATES[info.state],
            num_tokens=info.num_tokens,
            kv_spec=self.kv_spec(),
            size_bytes=info.size_bytes,
            generation=info.generation,
            token_digest=info.token_digest,
            retention=retention_message(info.retention),
            attention=attention_message(info.settings),
            labels=info.labels,
            tier=_TIERS[info.tier],
            durability=_DURABILITY_VALUES[info.durability],
        )
        message.create_time.FromNanoseconds(int(info.created_unix_seconds * 1e9))
        if info.remaining_lease_seconds is not None and info.expire_unix_seconds is not None:
            message.remaining_lease_duration.CopyFrom(duration(info.remaining_lease_seconds))
            message.expire_time.FromNanoseconds(int(info.expire_unix_seconds * 1e9))
        return message

    def prefill_result(self, done: PrefillDone) -> prefill_service_pb2.PrefillResult:
        """The last message of a prefill."""
        return prefill_service_pb2.PrefillResult(
            session=self.session(done.session),
            top_logits=[_token_logit(*entry) for entry in done.top_logits],
            stats=self.prefill_stats(done.report),
        )

    def prefill_stats(self, report: PrefillReport) -> prefill_service_pb2.PrefillStats:
        """The cost and sparsity report."""
        return prefill_service_pb2.PrefillStats(
            queue_duration=duration(report.queue_seconds),
            compute_duration=duration(report.compute_seconds),
            estimation_duration=duration(report.estimation_seconds),
            attention_duration=duration(report.attention_seconds),
            other_duration=duration(report.other_seconds),
            computed_tokens=report.computed_tokens,
            cached_tokens=report.cached_tokens,
            computed_blocks=report.computed_blocks,
            causal_blocks=report.causal_blocks,
            density=report.density,
            layers=[
                prefill_service_pb2.LayerStats(
                    computed_blocks=layer.computed_blocks,
                    causal_blocks=layer.causal_blocks,
                    head_densities=layer.head_densities,
                )
                for layer in report.layers
            ],
            dense_fallbacks=[
                prefill_service_pb2.DenseFallback(reason=_DENSE_REASONS[reason], num_rows=rows)
                for reason, rows in sorted(report.dense_rows.items())
                if rows
            ],
            attention_backend=report.backend,
            profile=None if report.profile is None else _profile_stats(report.profile),
            guard=None if report.guard is None else _guard_stats(report.guard),
            prefix_tokens=report.prefix_tokens,
            restored_tokens=report.restored_tokens,
        )

    def decode_result(self, done: DecodeDone) -> prefill_service_pb2.DecodeResult:
        """The last message of a decode."""
        stats = prefill_service_pb2.DecodeStats(
            queue_duration=duration(done.queue_seconds),
            decode_duration=duration(done.decode_seconds),
            decoded_tokens=done.decoded_tokens,
            seed=done.seed,
        )
        if done.prefill is not None:
            stats.prefill.CopyFrom(self.prefill_stats(done.prefill))
        return prefill_service_pb2.DecodeResult(
            session=self.session(done.session), finish_reason=_FINISH_REASONS[done.finish_reason], stats=stats
        )


def _profile_stats(report: ProfileReport) -> prefill_service_pb2.ProfileStats:
    return prefill_service_pb2.ProfileStats(
        name=report.name,
        digest=report.digest,
        error_budget=report.error_budget,
        expected_error=report.expected_error,
        sparse_heads=report.sparse_heads,
        streaming_heads=report.streaming_heads,
        dense_heads=report.dense_heads,
    )


def _guard_stats(report: GuardReport) -> prefill_service_pb2.GuardStats:
    return prefill_service_pb2.GuardStats(
        num_tiles=len(report.tiles),
        kept_mass=report.kept_mass,
        mean_error=report.mean_error,
        max_error=report.max_error,
        alerts=[
            prefill_service_pb2.GuardAlert(
                layer=alert.layer,
                head=alert.head,
                dense=alert.dense,
                mean_error=alert.mean_error,
                expected_error=alert.expected_error,
            )
            for alert in report.alerts
        ],
    )


def accepted_message(accepted: Accepted, joined: bool) -> prefill_service_pb2.PrefillAccepted:
    """The first message of a stream."""
    return prefill_service_pb2.PrefillAccepted(
        session_id=accepted.session_id,
        queue_position=accepted.queue_position,
        queued_tokens=accepted.queued_tokens,
        cached_tokens=accepted.cached_tokens,
        total_tokens=accepted.total_tokens,
        joined=joined,
    )


def progress_message(progress: Progress) -> prefill_service_pb2.PrefillProgress:
    """A heartbeat."""
    return prefill_service_pb2.PrefillProgress(
        computed_tokens=progress.computed_tokens,
        total_tokens=progress.total_tokens,
        completed_ratio=progress.completed_ratio,
        elapsed_duration=duration(progress.elapsed_seconds),
        queued=progress.queued,
    )


def token_message(token: SampledToken) -> prefill_service_pb2.DecodedToken:
    """A new token."""
    return prefill_service_pb2.DecodedToken(
        token_id=token.token_id,
        logprob=token.logprob,
        top_logprobs=[_token_logit(*entry) for entry in token.top],
    )


def retention_message(retention: Retention) -> session_service_pb2.RetentionPolicy:
    """A retention policy."""
    return session_service_pb2.RetentionPolicy(
        lease_duration=duration(retention.lease_seconds),
        sliding=retention.sliding,
        durability=_DURABILITY_VALUES[retention.durability],
        pin=_PIN_VALUES[retention.pin],
    )


def attention_message(settings: AttentionSettings) -> session_service_pb2.AttentionOptions:
    """Attention settings; what does not matter to them is left out."""
    message = session_service_pb2.AttentionOptions(mode=_MODES[settings.mode])
    if settings.mode is AttentionMode.DENSE:
        return message
    if settings.error_budget is not None:
        message.error_budget = settings.error_budget
    else:
        message.threshold = settings.threshold
        message.query_stride = settings.query_stride
    return message


def interrupt_policy(value: prefill_service_pb2.InterruptPolicy) -> InterruptPolicy:
    """An interrupt policy.

    Raises:
        PrefillError: INVALID_FIELD.
    """
    policies = {
        prefill_service_pb2.INTERRUPT_POLICY_UNSPECIFIED: InterruptPolicy.KEEP,
        prefill_service_pb2.INTERRUPT_POLICY_KEEP: InterruptPolicy.KEEP,
        prefill_service_pb2.INTERRUPT_POLICY_FREE: InterruptPolicy.FREE,
    }
    if value not in policies:
        raise invalid_field("on_interrupt", f"{value} is no InterruptPolicy; send KEEP or FREE")
    return policies[value]


def labels_of(labels: object) -> dict[str, str]:
    """Labels, at most 32 of at most 256 characters.

    Raises:
        PrefillError: INVALID_FIELD.
    """
    plain: dict[str, str] = dict(labels)  # type: ignore[call-overload]
    if len(plain) > 32 or any(len(key) > 256 or len(value) > 256 for key, value in plain.items()):
        raise invalid_field("labels", f"{len(plain)} labels: at most 32, keys and values of at most 256 characters")
    return plain


def _sampling(message: prefill_service_pb2.SamplingOptions) -> Sampling:
    return Sampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        seed=message.seed if message.HasField("seed") else None,
    )


def _at_most(field: str, value: int, maximum: int) -> int:
    if value > maximum:
        raise invalid_field(field, f"{value}: at most {maximum}")
    return value


def _token_logit(token_id: int, logit: float, logprob: float) -> prefill_service_pb2.TokenLogit:
    return prefill_service_pb2.TokenLogit(token_id=token_id, logit=logit, logprob=logprob)
