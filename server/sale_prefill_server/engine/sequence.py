"""One session's compute state: its KV, the cache the model writes to, and what attention keeps between chunks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sale_attention import LayerPolicy, LayerState, SaleConfig
from sale_prefill_server.engine.cache import SessionCache
from sale_prefill_server.kv.pool import SessionKv

if TYPE_CHECKING:
    from sale_prefill_server.engine.decode import SequenceGraph


class AttentionMode(StrEnum):
    """Attention method of prefill."""

    SALE = "sale"
    DENSE = "dense"


@dataclass(frozen=True)
class AttentionSettings:
    """Attention of one session, fixed for its life so that chunks and appends cannot change a result.

    For SALE: with an `error_budget` what the profile says, else `threshold` (tau) and `query_stride` (1, 2 or 4) for
    all heads.
    """

    mode: AttentionMode
    threshold: float
    query_stride: int
    error_budget: float | None = None

    def __str__(self) -> str:
        """For messages: the mode and what matters to it."""
        if self.mode is AttentionMode.DENSE:
            return "dense attention"
        if self.error_budget is not None:
            return f"sale attention, error_budget {self.error_budget:g}"
        return f"sale attention, threshold {self.threshold:g}, query_stride {self.query_stride}"


class Sequence:
    """Owned by its session; used by one engine step at a time.

    `config` and `policies` (one a layer) are fixed for its life, so that chunks and appends cannot change a result;
    `level` is the profile's level that they come from, None for a threshold of the caller's, or where all is dense.
    `states` (one a layer) can be recomputed from the KV and never travel, no more than `decode_graph` and `has_decoded`
    do, which belong to `decode.GraphDecoder`.
    """

    def __init__(
        self,
        kv: SessionKv,
        settings: AttentionSettings,
        config: SaleConfig,
        policies: list[LayerPolicy],
        level: int | None = None,
    ) -> None:
        self.kv = kv
        self.settings = settings
        self.config = config
        self.policies = policies
        self.level = level
        self.states = [LayerState() for _ in policies]
        self.cache = SessionCache(kv)
        self.has_decoded = False
        self.decode_graph: SequenceGraph | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is complete."""
        return self.kv.num_tokens

    def truncate(self, num_tokens: int) -> None:
        """Forgets everything from `num_tokens` on, half-written layers included."""
        self.kv.truncate(num_tokens)
        for state in self.states:
            state.truncate(num_tokens)

    def release(self) -> None:
        """Gives the memory back once the last reader is done."""
        self.states.clear()
        if self.decode_graph is not None:
            self.decode_graph.retire()
        self.decode_graph = None
        self.kv.release()
