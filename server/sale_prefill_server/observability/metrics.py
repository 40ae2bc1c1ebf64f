"""Prometheus metrics. One line here makes a metric; one branch in `observe` feeds it.

Every series with known label values exists at zero from the start, so that a rate over the first minutes is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sale_prefill_server.errors import Reason
from sale_prefill_server.events import (
    Event,
    FirstToken,
    GuardLooked,
    KvTransferred,
    LeaseRenewed,
    PrefillChunkDone,
    PrefillWork,
    RequestFinished,
    RpcHandled,
    RpcStarted,
    SessionChanged,
)

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
TOKEN_BUCKETS = tuple(base * 10**power for power in range(2, 7) for base in (1, 2, 5))
MASS_BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
ERROR_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
RATIO_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)

OUTCOMES = ("ok", "cancelled", "rejected", "error")
PHASES = ("estimation", "attention", "other")
DENSE_REASONS = ("requested", "short", "head", "unsupported")
SEGMENT_TRANSPORTS = ("shm", "cuda_ipc")
TRANSPORTS = ("grpc", *SEGMENT_TRANSPORTS)
DIRECTIONS = ("pull", "push", "inline")
SESSION_ENDS = ("expired", "released", "deleted", "cancelled", "failed", "rejected", "shutdown")


class Metrics:
    """The metrics of one server, in a registry of its own; `observe` is the event subscriber.

    Args:
        model_name: value of the label `model_name`.
        methods: every (service, method, type) served, to exist at zero.
    """

    def __init__(self, model_name: str, methods: Iterable[tuple[str, str, str]] = ()) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._define_requests()
        self._define_attention()
        self._define_guard()
        self._define_sessions()
        self._define_rpc()
        self._start_at_zero(methods)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sale_prefill_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"sale_prefill_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"sale_prefill_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _define_requests(self) -> None:
        self.requests = self._counter("requests", "Requests ended, by outcome.", "model_name", "kind", "outcome")
        self.rejections = self._counter("admission_rejections", "Requests refused at the door, by reason.", "reason")
        self.queue_seconds = self._histogram(
            "queue_duration_seconds", "Time from admission to the first step.", LATENCY_BUCKETS, "model_name"
        )
        self.prefill_seconds = self._histogram(
            "prefill_duration_seconds", "Engine time of a prefill.", LATENCY_BUCKETS, "model_name"
        )
        self.chunk_seconds = self._histogram(
            "chunk_duration_seconds", "Engine time of one prefill chunk.", LATENCY_BUCKETS, "model_name"
        )
        self.decode_seconds = self._histogram(
            "decode_duration_seconds", "Engine time of a decode's own steps.", LATENCY_BUCKETS, "model_name"
        )
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds",
            "Time from a decode's admission to its first token.",
            LATENCY_BUCKETS,
            "model_name",
        )
        self.prompt_tokens = self._histogram(
            "prompt_tokens", "Tokens of a session at the end of a prefill.", TOKEN_BUCKETS, "model_name"
        )
        self.tokens = self._counter("tokens", "Prompt tokens by where their KV came from.", "source")
        self.decoded_tokens = self._counter("decoded_tokens", "Tokens sampled.")
        self.wasted_tokens = self._counter("wasted_tokens", "Tokens computed whose KV nobody kept.", "reason")
        self.queued_requests = self._gauge("queued_requests", "Requests that wait for their first step.")
        self.running_requests = self._gauge("running_requests", "Requests in the engine.")
        self.queued_tokens = self._gauge("queued_tokens", "Tokens admitted and not prefilled yet.")

    def _define_attention(self) -> None:
        self.sparsity = self._histogram(
            "attention_sparsity_ratio", "Share of causal blocks that a prefill skipped.", RATIO_BUCKETS, "model_name"
        )
        self.layer_sparsity = self._gauge("layer_sparsity_ratio", "Sparsity of the last prefill, by layer.", "layer")
        self.phase_seconds = self._counter(
            "compute_seconds",
            "Engine seconds by phase of prefill; the estimation overhead is a ratio of rates.",
            "phase",
        )
        self.blocks = self._counter("attention_blocks", "Causal attention blocks, by what was done.", "decision")
        self.dense_rows = self._counter(
            "dense_fallback_rows", "Rows (query token x head x layer) that took dense attention, by reason.", "reason"
        )

        self.kernel_fallbacks = self._counter(
            "kernel_fallbacks", "Times that native kernels could not be used and a slower way computes.", "reason"
        )

    def _define_guard(self) -> None:
        self.guard_kept_mass = self._histogram(
            "guard_kept_mass_ratio", "Attention mass on kept keys, by tile that the guard recomputed.", MASS_BUCKETS
        )
        self.guard_error = self._histogram(
            "guard_output_error_ratio", "Mean relative row error, by tile that the guard recomputed.", ERROR_BUCKETS
        )
        self.guard_alerts = self._counter("guard_alerts", "Layers and heads that lost more than calibrated.", "layer")
        self.guard_fallbacks = self._counter("guard_dense_fallbacks", "Heads that the guard made dense.", "layer")

    def _define_sessions(self) -> None:
        self.sessions = self._gauge("sessions", "Sessions held, by state.", "state")
        self.session_ends = self._counter("session_ends", "Sessions that ended, by reason.", "reason")
        self.session_lifetime = self._histogram(
            "session_lifetime_seconds",
            "Age of a session when it ended.",
            (1, 10, 60, 300, 600, 1800, 3600, 14400, 86400),
        )
        self.lease_renewals = self._counter("lease_renewals", "Lease renewals asked for.", "result")
        self.kv_used_bytes = self._gauge("kv_used_bytes", "Bytes of KV in use.", "tier")
        self.kv_kept_bytes = self._gauge(
            "kv_kept_bytes", "Bytes of KV that no session holds, kept for prompts that begin the same.", "tier"
        )
        self.kv_capacity_bytes = self._gauge("kv_capacity_bytes", "Bytes of KV there are.", "tier")
        self.transfer_bytes = self._counter("kv_transfer_bytes", "KV bytes moved.", "transport", "direction")
        self.transfer_seconds = self._histogram(
            "kv_transfer_duration_seconds", "Duration of KV streams.", LATENCY_BUCKETS, "transport", "direction"
        )
        self.transfer_failures = self._counter(
            "kv_transfer_failures", "KV streams that broke off.", "transport", "reason"
        )
        self.segment_bytes = self._gauge(
            "transfer_segment_bytes", "Bytes of memory shared with callers for KV streams.", "transport"
        )

    def _define_rpc(self) -> None:
        labels = ("grpc_service", "grpc_method", "grpc_type")
        self.rpc_started = Counter("grpc_server_started", "RPCs started.", labels, registry=self.registry)
        self.rpc_handled = Counter("grpc_server_handled", "RPCs ended.", (*labels, "grpc_code"), registry=self.registry)
        self.rpc_seconds = Histogram(
            "grpc_server_handling_seconds", "Duration of RPCs.", labels, buckets=LATENCY_BUCKETS, registry=self.registry
        )
        self.ready = self._gauge("ready", "1 when the server takes work.")
        self.start_time = self._gauge("start_time_seconds", "Unix time of the server's start.")
        self.build_info = self._gauge(
            "build_info", "1, with what is running as labels.", "version", "device", "backend"
        )

    def _start_at_zero(self, methods: Iterable[tuple[str, str, str]]) -> None:
        name = self._model_name
        for kind in ("prefill", "decode"):
            for outcome in OUTCOMES:
                self.requests.labels(name, kind, outcome)
        for histogram in (
            self.queue_seconds,
            self.prefill_seconds,
            self.chunk_seconds,
            self.decode_seconds,
            self.first_token_seconds,
            self.prompt_tokens,
            self.sparsity,
        ):
            histogram.labels(name)
        label_values: list[tuple[Counter | Gauge, Iterable[str]]] = [
            (self.rejections, [reason.value for reason in Reason]),
            (self.tokens, ("computed", "session", "prefix", "store")),
            (self.wasted_tokens, ("cancelled", "error")),
            (self.phase_seconds, PHASES),
            (self.blocks, ("computed", "skipped")),
            (self.dense_rows, DENSE_REASONS),
            (self.kernel_fallbacks, ("build", "shape")),
            (self.sessions, ("busy", "partial", "ready", "offloaded")),
            (self.session_ends, SESSION_ENDS),
            (self.lease_renewals, ("renewed", "missing")),
            (self.kv_used_bytes, ("device",)),
            (self.kv_kept_bytes, ("device",)),
            (self.kv_capacity_bytes, ("device",)),
            (self.segment_bytes, SEGMENT_TRANSPORTS),
        ]
        for metric, values in label_values:
            for value in values:
                metric.labels(value)
        for transport in TRANSPORTS:
            for direction in DIRECTIONS:
                self.transfer_bytes.labels(transport, direction)
                self.transfer_seconds.labels(transport, direction)
            for reason in ("cancelled", *(reason.value.lower() for reason in Reason)):
                self.transfer_failures.labels(transport, reason)
        for method in methods:
            self.rpc_started.labels(*method)
            self.rpc_seconds.labels(*method)
            self.rpc_handled.labels(*method, "OK")

    def start_layers_at_zero(self, num_layers: int) -> None:
        """Series by layer, once the model is known."""
        for layer in range(num_layers):
            self.guard_alerts.labels(str(layer))
            self.guard_fallbacks.labels(str(layer))

    def read_at_scrape(self, gauge: Gauge, value: Callable[[], float]) -> None:
        """Makes a gauge ask for its value when it is scraped."""
        gauge.set_function(value)

    def observe(self, event: Event) -> None:
        """Counts an event."""
        name = self._model_name
        if isinstance(event, RequestFinished):
            self._observe_request(event)
        elif isinstance(event, PrefillChunkDone):
            self.chunk_seconds.labels(name).observe(event.duration_seconds)
        elif isinstance(event, GuardLooked):
            self._observe_guard(event)
        elif isinstance(event, FirstToken):
            self.first_token_seconds.labels(name).observe(event.duration_seconds)
        elif isinstance(event, SessionChanged):
            if event.new_state == "gone":
                self.session_ends.labels(event.reason).inc()
                self.session_lifetime.observe(event.lifetime_seconds)
        elif isinstance(event, LeaseRenewed):
            self.lease_renewals.labels("renewed" if event.found else "missing").inc()
        elif isinstance(event, KvTransferred):
            self.transfer_bytes.labels(event.transport, event.direction).inc(event.num_bytes)
            self.transfer_seconds.labels(event.transport, event.direction).observe(event.duration_seconds)
            if event.failure:
                self.transfer_failures.labels(event.transport, event.failure).inc()
        elif isinstance(event, RpcStarted):
            self.rpc_started.labels(event.service, event.method, event.type).inc()
        elif isinstance(event, RpcHandled):
            self.rpc_handled.labels(event.service, event.method, event.type, event.code).inc()
            self.rpc_seconds.labels(event.service, event.method, event.type).observe(event.duration_seconds)

    def _observe_guard(self, event: GuardLooked) -> None:
        for mass in event.kept_masses:
            self.guard_kept_mass.observe(mass)
        for error in event.mean_errors:
            self.guard_error.observe(error)
        for layer, fell_back in event.alerts:
            self.guard_alerts.labels(str(layer)).inc()
            self.guard_fallbacks.labels(str(layer)).inc(fell_back)

    def _observe_request(self, event: RequestFinished) -> None:
        name = self._model_name
        self.requests.labels(name, event.kind, event.outcome).inc()
        if event.outcome == "rejected":
            self.rejections.labels(event.reason).inc()
            return
        self.queue_seconds.labels(name).observe(event.queue_seconds)
        if event.wasted_tokens:
            self.wasted_tokens.labels(event.outcome).inc(event.wasted_tokens)
        if event.kind == "decode":
            self.decode_seconds.labels(name).observe(event.decode_seconds)
            self.decoded_tokens.inc(event.decoded_tokens)
        if event.prefill is not None:
            self._observe_prefill(event.prefill)

    def _observe_prefill(self, work: PrefillWork) -> None:
        name = self._model_name
        self.prefill_seconds.labels(name).observe(work.compute_seconds)
        self.prompt_tokens.labels(name).observe(work.prompt_tokens)
        self.tokens.labels("computed").inc(work.computed_tokens)
        self.tokens.labels("session").inc(work.cached_tokens - work.prefix_tokens - work.restored_tokens)
        self.tokens.labels("store").inc(work.restored_tokens)
        self.tokens.labels("prefix").inc(work.prefix_tokens)
        for phase, seconds in work.phase_seconds.items():
            self.phase_seconds.labels(phase).inc(seconds)
        self.blocks.labels("computed").inc(work.computed_blocks)
        self.blocks.labels("skipped").inc(work.causal_blocks - work.computed_blocks)
        for reason, rows in work.dense_rows.items():
            self.dense_rows.labels(reason).inc(rows)
        if work.causal_blocks:
            self.sparsity.labels(name).observe(1.0 - work.computed_blocks / work.causal_blocks)
        for layer, density in enumerate(work.layer_densities):
            self.layer_sparsity.labels(str(layer)).set(1.0 - density)
