"""What happened, for whoever watches. The service emits; `observability` subscribes; nobody waits for a watcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sale_prefill_server.store.events import StoreEvent


@dataclass(frozen=True)
class PrefillChunkDone:
    """One chunk went through the model."""

    num_tokens: int
    duration_seconds: float


@dataclass(frozen=True)
class PrefillWork:
    """What prefilling some tokens took, once finished or stopped.

    `prefix_tokens` are cached ones of other sessions, `restored_tokens` cached ones that other tiers held.
    """

    computed_tokens: int
    cached_tokens: int
    prefix_tokens: int
    restored_tokens: int
    prompt_tokens: int
    queue_seconds: float
    compute_seconds: float
    phase_seconds: Mapping[str, float]
    computed_blocks: int
    causal_blocks: int
    layer_densities: tuple[float, ...]
    dense_rows: Mapping[str, int]


@dataclass(frozen=True)
class RequestFinished:
    """A Prefill or Decode request ended.

    `outcome` is ok, cancelled, rejected or error; `kind` is prefill or decode. `prefill` is there where tokens were
    prefilled, `decoded_tokens` and `decode_seconds` count decode steps.
    """

    kind: str
    outcome: str
    reason: str = ""
    prefill: PrefillWork | None = None
    queue_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0
    wasted_tokens: int = 0


@dataclass(frozen=True)
class GuardLooked:
    """The guard recomputed tiles of a prefill: kept attention mass and mean relative row error of each.

    `alerts` holds one (layer, fell back to dense) for every layer or head that went over its limit.
    """

    kept_masses: tuple[float, ...]
    mean_errors: tuple[float, ...]
    alerts: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True)
class FirstToken:
    """A decode sent its first token, this long after admission."""

    duration_seconds: float


@dataclass(frozen=True)
class SessionChanged:
    """A session went from one state to another. `new_state` is `gone` at the end."""

    old_state: str
    new_state: str
    reason: str
    lifetime_seconds: float = 0.0


@dataclass(frozen=True)
class LeaseRenewed:
    """A lease renewal was asked for; `found` says whether the session was there."""

    found: bool


@dataclass(frozen=True)
class KvTransferred:
    """A KV stream ended."""

    direction: str
    transport: str
    num_bytes: int
    duration_seconds: float
    failure: str = ""


@dataclass(frozen=True)
class RpcStarted:
    """A gRPC call arrived."""

    service: str
    method: str
    type: str


@dataclass(frozen=True)
class RpcHandled:
    """A gRPC call ended."""

    service: str
    method: str
    type: str
    code: str
    duration_seconds: float


Event = (
    PrefillChunkDone
    | RequestFinished
    | GuardLooked
    | FirstToken
    | SessionChanged
    | LeaseRenewed
    | KvTransferred
    | RpcStarted
    | RpcHandled
    | StoreEvent
)
EventSink = Callable[[Event], None]


@dataclass
class EventBus:
    """Passes each event to every subscriber, in the emitter's thread; subscribers are quick and never raise."""

    _sinks: list[EventSink] = field(default_factory=list)

    def subscribe(self, sink: EventSink) -> None:
        """Adds a subscriber, before the service starts."""
        self._sinks.append(sink)

    def emit(self, event: Event) -> None:
        """Tells everybody."""
        for sink in self._sinks:
            sink(event)
