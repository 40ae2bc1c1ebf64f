"""The cost and sparsity report of a prefill."""

from __future__ import annotations

from dataclasses import dataclass

from sale_attention import AttentionStatistics
from sale_prefill_server.engine.guard import GuardReport


@dataclass(frozen=True)
class LayerReport:
    """One layer: blocks computed and allowed by the causal mask, and each query head's density."""

    computed_blocks: int
    causal_blocks: int
    head_densities: tuple[float, ...]


@dataclass(frozen=True)
class ProfileReport:
    """What a session got from the profile: its level's budget and expected mean relative row error, heads by strategy.

    Without a level, where the caller's budget is below the least, every head is dense.
    """

    name: str
    digest: str
    error_budget: float
    expected_error: float
    sparse_heads: int
    streaming_heads: int
    dense_heads: int


@dataclass(frozen=True)
class PrefillReport:
    """Where the time of a prefill went, in seconds, and how sparse its attention was.

    `compute_seconds` is the request's own engine time; estimation, attention and other add up to it. A block is a query
    block x key block of one head in one layer; `dense_rows` counts query token x head x layer by reason. `backend` is
    the attention backend of the rows that were not dense. `profile` is there where heads did what a profile says,
    `guard` where the guard looked. `prefix_tokens`, of the cached ones, came from other sessions,
    `restored_tokens` from other tiers.
    """

    queue_seconds: float
    compute_seconds: float
    estimation_seconds: float
    attention_seconds: float
    computed_tokens: int
    cached_tokens: int
    layers: tuple[LayerReport, ...]
    dense_rows: dict[str, int]
    backend: str
    profile: ProfileReport | None = None
    guard: GuardReport | None = None
    prefix_tokens: int = 0
    restored_tokens: int = 0

    @property
    def other_seconds(self) -> float:
        """Everything in the engine but attention: projections, MLP, embeddings, logits."""
        return max(0.0, self.compute_seconds - self.estimation_seconds - self.attention_seconds)

    @property
    def computed_blocks(self) -> int:
        """Blocks that attention computed."""
        return sum(layer.computed_blocks for layer in self.layers)

    @property
    def causal_blocks(self) -> int:
        """Blocks that the causal mask allows."""
        return sum(layer.causal_blocks for layer in self.layers)

    @property
    def density(self) -> float:
        """Kept share of the causal blocks, 0 to 1; 1 where there were none."""
        return self.computed_blocks / self.causal_blocks if self.causal_blocks else 1.0


def make_report(
    statistics: AttentionStatistics,
    *,
    queue_seconds: float,
    compute_seconds: float,
    computed_tokens: int,
    cached_tokens: int,
    backend: str,
    profile: ProfileReport | None = None,
    guard: GuardReport | None = None,
    prefix_tokens: int = 0,
    restored_tokens: int = 0,
) -> PrefillReport:
    """The report of a finished or stopped prefill; waits for GPU timers where there are any."""
    layers = tuple(
        LayerReport(
            computed_blocks=int(statistics.computed_blocks[layer].sum()),
            causal_blocks=int(statistics.causal_blocks[layer].sum()),
            head_densities=tuple(
                (statistics.computed_blocks[layer] / statistics.causal_blocks[layer].clamp(min=1)).tolist()
            ),
        )
        for layer in statistics.layers
    )
    return PrefillReport(
        queue_seconds=queue_seconds,
        compute_seconds=compute_seconds,
        estimation_seconds=statistics.estimation_seconds,
        attention_seconds=statistics.attention_seconds,
        computed_tokens=computed_tokens,
        cached_tokens=cached_tokens,
        layers=layers,
        dense_rows=dict(statistics.dense_rows),
        backend=backend,
        profile=profile,
        guard=guard,
        prefix_tokens=prefix_tokens,
        restored_tokens=restored_tokens,
    )
