"""What the attention of a request cost: blocks computed and skipped, rows that went dense and why, time by phase."""

from __future__ import annotations

import operator
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

ESTIMATION_PHASES = ("quantise", "sink_local", "select")
ATTENTION_PHASES = ("compute", "dense")
DENSE_REASONS = ("requested", "short", "head", "unsupported")


class AttentionStatistics:
    """Accumulates over layers, calls and chunks; one a request, not thread-safe.

    Counts of blocks are in units of one query block x one key block of one head. A query block that two calls share
    (an append at a position that is no multiple of the query block) counts in both. Counting and timing never make
    the host wait for a device; reading does.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to zero."""
        self._computed: dict[int, list[int]] = {}
        self._causal: dict[int, list[int]] = {}
        self._kept: dict[int, Tensor] = {}
        self._dense_rows = dict.fromkeys(DENSE_REASONS, 0)
        self._rows = 0
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._unsupported: set[str] = set()

    def count_blocks(self, layer: int, computed: Sequence[int], causal: Sequence[int]) -> None:
        """Add blocks attended to, without those that selection kept, and blocks in the causal triangle, by head."""
        for store, blocks in ((self._computed, computed), (self._causal, causal)):
            held = store.get(layer)
            store[layer] = list(blocks if held is None else map(operator.add, held, blocks))

    def kept_blocks(self, layer: int, heads: int, device: torch.device) -> Tensor:
        """Blocks that selection kept in `layer`, int64 `[H]` on `device`: a counter for the backend to add to."""
        if layer not in self._kept:
            self._kept[layer] = torch.zeros(heads, dtype=torch.int64, device=device)
        return self._kept[layer]

    def count_rows(self, rows: int, heads: int) -> None:
        """Add `rows` query rows of `heads` heads, dense or sparse."""
        self._rows += rows * heads

    def count_dense(self, rows: int, heads: int, reason: str, explanation: str | None = None) -> None:
        """Add `rows` rows of `heads` heads that attended to everything, for one of `DENSE_REASONS`."""
        self._dense_rows[reason] += rows * heads
        if explanation is not None:
            self._unsupported.add(explanation)

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Time the block as phase `name`: wall clock on the CPU, a pair of events on CUDA."""
        if device.type == "cuda":
            begin, finish = self.timing_events(device, 2)
            begin.record(torch.cuda.current_stream(device))
            yield
            finish.record(torch.cuda.current_stream(device))
            self.time_phases((name,), (begin, finish))
        else:
            start_seconds = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start_seconds

    def timing_events(self, device: torch.device, count: int) -> list[torch.cuda.Event]:
        """Events that exist on `device`, to be recorded before, between and after phases."""
        return [_EVENTS.take(device) for _ in range(count)]

    def time_phases(self, phases: Sequence[str], events: Sequence[torch.cuda.Event]) -> None:
        """The phases that passed between `events`, one more than there are phases."""
        self._events += zip(phases, events[:-1], events[1:], strict=True)

    @property
    def layers(self) -> list[int]:
        """Layers that were counted, ascending."""
        return sorted(self._causal)

    @property
    def computed_blocks(self) -> dict[int, Tensor]:
        """By layer, blocks attended to: int64 `[H]` on the CPU. On CUDA this waits for the last call."""
        blocks = {layer: torch.tensor(self._computed[layer]) for layer in self.layers}
        return {
            layer: held + self._kept[layer].cpu() if layer in self._kept else held for layer, held in blocks.items()
        }

    @property
    def causal_blocks(self) -> dict[int, Tensor]:
        """By layer, blocks in the causal triangle: int64 `[H]` on the CPU."""
        return {layer: torch.tensor(self._causal[layer]) for layer in self.layers}

    @property
    def dense_rows(self) -> dict[str, int]:
        """Rows x heads x layers that went dense, by reason.

        "requested" (the caller or the backend asked), "short" (positions below `SaleConfig.dense_rows`), "head"
        (tau = 0), "unsupported" (a feature that SALE does not do; see `unsupported_reasons`).
        """
        return dict(self._dense_rows)

    @property
    def unsupported_reasons(self) -> tuple[str, ...]:
        """What lies behind "unsupported", in words."""
        return tuple(sorted(self._unsupported))

    @property
    def rows(self) -> int:
        """Rows x heads x layers, dense and sparse."""
        return self._rows

    def density_by_layer(self) -> dict[int, float]:
        """Share of causal blocks that were computed, by layer."""
        computed, causal = self.computed_blocks, self.causal_blocks
        return {layer: _share(int(computed[layer].sum()), int(causal[layer].sum())) for layer in self.layers}

    @property
    def density(self) -> float:
        """Share of causal blocks that were computed, over everything; 1.0 where nothing was counted."""
        computed = sum(int(blocks.sum()) for blocks in self.computed_blocks.values())
        return _share(computed, sum(int(blocks.sum()) for blocks in self.causal_blocks.values()))

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase: quantise, sink_local, select, compute, dense. On CUDA this waits for the last event."""
        self._resolve_events()
        return {name: self._seconds[name] for name in (*ESTIMATION_PHASES, *ATTENTION_PHASES)}

    @property
    def estimation_seconds(self) -> float:
        """Seconds spent finding out which blocks matter."""
        seconds = self.phase_seconds
        return sum(seconds[name] for name in ESTIMATION_PHASES)

    @property
    def attention_seconds(self) -> float:
        """Seconds spent attending."""
        seconds = self.phase_seconds
        return sum(seconds[name] for name in ATTENTION_PHASES)

    def _resolve_events(self) -> None:
        for name, begin, finish in self._events:
            finish.synchronize()
            self._seconds[name] += begin.elapsed_time(finish) / 1e3
        _EVENTS.give_back({id(event): event for _, *pair in self._events for event in pair}.values())
        self._events.clear()


class _EventPool:
    """Timing events of all requests: making one takes the host longer than recording it."""

    def __init__(self) -> None:
        self._free: dict[torch.device, list[torch.cuda.Event]] = defaultdict(list)

    def take(self, device: torch.device) -> torch.cuda.Event:
        """An event that was recorded once, so that it exists on the device."""
        try:
            return self._free[device].pop()
        except IndexError:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            return event

    def give_back(self, events: Iterable[torch.cuda.Event]) -> None:
        """For other requests; their times were read."""
        for event in events:
            self._free[event.device].append(event)


_EVENTS = _EventPool()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
