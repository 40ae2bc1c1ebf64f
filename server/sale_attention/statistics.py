"""What the attention of a request cost: blocks computed and skipped, rows that went dense and why, time by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
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
        self._computed: dict[int, Tensor] = {}
        self._causal: dict[int, Tensor] = {}
        self._dense_rows = dict.fromkeys(DENSE_REASONS, 0)
        self._rows = 0
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._unsupported: set[str] = set()

    def count_blocks(self, layer: int, computed: Tensor, causal: Tensor) -> None:
        """Add blocks attended to and blocks in the causal triangle: int64 `[H]` each."""
        for store, blocks in ((self._computed, computed), (self._causal, causal)):
            store[layer] = store[layer] + blocks if layer in store else blocks

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
            begin, finish = _timing_event(), _timing_event()
            begin.record(torch.cuda.current_stream(device))
            yield
            finish.record(torch.cuda.current_stream(device))
            self._events.append((name, begin, finish))
        else:
            start_seconds = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start_seconds

    @property
    def layers(self) -> list[int]:
        """Layers that were counted, ascending."""
        return sorted(self._causal)

    @property
    def computed_blocks(self) -> dict[int, Tensor]:
        """By layer, blocks attended to: int64 `[H]` on the CPU."""
        return {layer: self._computed[layer].cpu() for layer in self.layers}

    @property
    def causal_blocks(self) -> dict[int, Tensor]:
        """By layer, blocks in the causal triangle: int64 `[H]` on the CPU."""
        return {layer: self._causal[layer].cpu() for layer in self.layers}

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
        self._events.clear()


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
