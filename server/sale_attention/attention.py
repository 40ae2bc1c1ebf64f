"""`attend`: quantise -> sink-local log-sum-exp -> select -> compute, and dense attention where SALE does not apply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .audit import Audit
from .backends import AUTO, AttentionBackend, AttentionRequest, LayerCall, get_backend
from .config import HeadPlan, LayerPolicy, SaleConfig
from .dense import dense_attention, dense_log_sum_exp
from .geometry import BlockGrid
from .kv_view import KvView
from .state import LayerState
from .statistics import AttentionStatistics

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class AttentionResult:
    """Attention of one call.

    Attributes:
        output: `[B, H, Nq, d_v]`, the query's dtype.
        lse: float32 `[B, H, Nq]`, natural log-sum-exp over the keys attended to; None if not asked for.
    """

    output: Tensor
    lse: Tensor | None


def attend(
    query: Tensor,
    kv: KvView,
    *,
    policy: LayerPolicy | None = None,
    config: SaleConfig | None = None,
    state: LayerState | None = None,
    scale: float | None = None,
    prompt_end: int | None = None,
    statistics: AttentionStatistics | None = None,
    layer: int = 0,
    backend: str = AUTO,
    dense: bool = False,
    window: int | None = None,
    return_lse: bool = True,
    audit: Audit | None = None,
) -> AttentionResult:
    """Causal attention of `query`, the last Nq positions of `kv`, by SALE (arXiv 2505.24179).

    Rows below `config.dense_rows`, prompts up to `config.dense_prompt_tokens`, heads with tau = 0, and calls that SALE
    or the backend does not cover run dense; `statistics` says which and why. Results do not depend on how a prompt is
    split into calls if the splits lie at multiples of 128 and `prompt_end` is the same in each. What is asked to be
    dense may take other kernels for one row than for several, with the last bits that these give.

    Args:
        query: `[B, H, Nq, d]`, bfloat16, float16, float32 or float64; H a multiple of the KV heads.
        kv: keys and values `[B, Hkv, Nk, d]`, `Nk >= Nq`, contiguous or paged.
        policy: per-head thresholds and strides; default `LayerPolicy.uniform(H)`.
        config: block geometry and code width; default `SaleConfig()`.
        state: key codes of this session and layer, extended in place; None quantises all keys again.
        scale: softmax scale, default 1 / sqrt(d).
        prompt_end: absolute end of the whole prompt; its last rows are all inspected whatever the stride. Default Nk.
        statistics: what to add this call's costs to.
        layer: the layer's index in `statistics`.
        backend: a registered backend's name; "auto" is the fastest for the query's device, "dense" runs all dense.
        dense: run everything dense.
        window: sliding window in tokens, itself included; runs dense, since SALE's blocks know no window.
        return_lse: False leaves `lse` out, and saves a pass over the scores of dense rows.
        audit: looks at what sparse rows came out as.

    Raises:
        ValueError: for tensors, policy or values that do not fit together, naming them.
    """
    config = SaleConfig() if config is None else config
    _check_inputs(query, kv, window)
    policy = LayerPolicy.uniform(query.shape[1]) if policy is None else policy
    if policy.num_heads != query.shape[1]:
        raise ValueError(f"the policy has {policy.num_heads} heads, the query {query.shape[1]}")
    end = kv.tokens if prompt_end is None else prompt_end
    call = _Call(
        query=query,
        kv=kv,
        policy=policy,
        config=config,
        state=state,
        scale=1.0 / math.sqrt(query.shape[3]) if scale is None else scale,
        plan=HeadPlan.resolve(policy, config, end),
        dense_until=kv.tokens if end <= config.dense_prompt_tokens else config.dense_rows,
        statistics=statistics,
        layer=layer,
        backend=get_backend(backend, query.device),
        return_lse=return_lse,
        audit=audit,
    )
    if dense or backend == "dense":
        return call.all_dense("requested", None, window)
    unsupported = call.unsupported(window)
    if unsupported is not None:
        return call.all_dense("unsupported", unsupported, window)
    return call.run()


@dataclass(slots=True, eq=False)  # not frozen: that costs five times as long to make, in every layer
class _Call:
    """One `attend`, its defaults filled in."""

    query: Tensor
    kv: KvView
    policy: LayerPolicy
    config: SaleConfig
    state: LayerState | None
    scale: float
    plan: HeadPlan
    dense_until: int
    statistics: AttentionStatistics | None
    layer: int
    backend: AttentionBackend
    return_lse: bool
    audit: Audit | None

    def unsupported(self, window: int | None) -> str | None:
        """Why this call cannot be sparse, if so."""
        if window is not None:
            return f"sliding window of {window} tokens"
        if self._wants_gradients():
            return "gradients are wanted; SALE is for inference"
        return self.backend.supports(AttentionRequest(self.query, self.kv, self.policy, self.config))

    def _wants_gradients(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        return self.query.requires_grad or self.kv.keys.requires_grad or self.kv.values.requires_grad

    def all_dense(self, reason: str, explanation: str | None, window: int | None) -> AttentionResult:
        """Everything through dense attention."""
        batch, heads, rows, _ = self.query.shape
        self._count_dense(BlockGrid.of(rows, self.kv.tokens, self.config), range(heads), reason, explanation)
        if self.statistics is not None:
            self.statistics.count_rows(rows, batch * heads)
        return AttentionResult(*self._dense(self.query, self.kv, window))

    def run(self) -> AttentionResult:
        """Short rows and sparse heads, then dense heads."""
        batch, heads, rows, _ = self.query.shape
        offset = self.kv.tokens - rows
        short_rows = min(max(0, self.dense_until - offset), rows)
        if self.statistics is not None:
            self.statistics.count_rows(rows, batch * heads)
        output = self._new_output()
        wants_lse = self.return_lse or self.audit is not None
        lse = self.query.new_empty(batch, heads, rows, dtype=torch.float32) if wants_lse else None
        if short_rows < rows and not all(self.plan.dense):
            self._count_dense(BlockGrid.of(short_rows, offset + short_rows, self.config), range(heads), "short")
            self._sparse(short_rows, output, lse)
        elif short_rows:
            kv = self.kv if short_rows == rows else self.kv.prefix(offset + short_rows)
            self._attend_all(range(heads), slice(0, short_rows), kv, output, lse, "short")
        if short_rows < rows and any(self.plan.dense):
            self._dense_heads(slice(short_rows, rows), output, lse)
        if short_rows < rows and self.audit is not None and lse is not None:
            self.audit.observe(self.layer, self.query, self.kv, output, lse, self.scale)
        return AttentionResult(output, lse if self.return_lse else None)

    def _new_output(self) -> Tensor:
        """In memory `[B, Nq, H, d_v]`, as models want it next, so that joining the heads copies nothing."""
        batch, heads, rows, _ = self.query.shape
        dim = self.kv.value_dim
        return self.query.new_empty_strided((batch, heads, rows, dim), (rows * heads * dim, dim, heads * dim, 1))

    def _sparse(self, short_rows: int, output: Tensor, lse: Tensor | None) -> None:
        query, kv, statistics = self.query, self.kv, self.statistics
        kept = None if statistics is None else statistics.kept_blocks(self.layer, query.shape[1], query.device)
        state = LayerState() if self.state is None else self.state
        keys = state.extension(kv, self.policy, self.config)
        self.backend.attend_layer(
            LayerCall(
                query=query,
                kv=kv,
                keys=keys,
                policy=self.policy,
                plan=self.plan,
                config=self.config,
                scale=self.scale,
                dense_until=self.dense_until,
                output=output,
                lse=lse,
                kept=kept,
                statistics=statistics,
            )
        )
        state.accept(keys, kv, self.config)
        self._count_sparse(BlockGrid.of(query.shape[2] - short_rows, kv.tokens, self.config))

    def _dense_heads(self, rows: slice, output: Tensor, lse: Tensor | None) -> None:
        kv = self.kv
        group = self.query.shape[1] // kv.kv_heads
        for kv_head in range(kv.kv_heads):
            heads = [head for head in range(kv_head * group, (kv_head + 1) * group) if self.plan.dense[head]]
            if heads:
                self._attend_all(heads, rows, kv.kv_head(kv_head), output, lse, "head")

    def _attend_all(
        self, heads: Sequence[int], rows: slice, kv: KvView, all_output: Tensor, all_lse: Tensor | None, reason: str
    ) -> None:
        """Exact attention of some heads' rows; the heads share `kv`, or are all of them."""
        grid = BlockGrid.of(rows.stop - rows.start, kv.tokens, self.config)
        self._count_dense(grid, heads, reason)
        every_head = len(heads) == self.query.shape[1]
        with self._phase("dense"):
            if every_head and grid.query_tokens == self.query.shape[2]:
                self.backend.attend_all(self.query, kv, grid, self.scale, all_output, all_lse)
                return
            chosen = slice(None) if every_head else list(heads)
            query, output = self.query[:, chosen, rows], all_output[:, chosen, rows]
            lse = None if all_lse is None else all_lse[:, chosen, rows]
            self.backend.attend_all(query, kv, grid, self.scale, output, lse)
            if not every_head:
                all_output[:, chosen, rows] = output
                if all_lse is not None and lse is not None:
                    all_lse[:, chosen, rows] = lse

    def _dense(self, query: Tensor, kv: KvView, window: int | None) -> tuple[Tensor, Tensor | None]:
        batch, heads, rows, _ = query.shape
        exact = window is None and not self._wants_gradients()
        with self._phase("dense"):
            # A single row is a decoded token: the kernels of backends are made for blocks of rows.
            if exact and rows > 1 and self.backend.takes_dense(query, kv):
                output = self._new_output()
                sums = torch.empty(batch, heads, rows, device=query.device) if self.return_lse else None
                grid = BlockGrid.of(rows, kv.tokens, self.config)
                self.backend.attend_all(query, kv, grid, self.scale, output, sums)
                return output, sums
            output = dense_attention(query, kv, scale=self.scale, window=window)
            lse = dense_log_sum_exp(query, kv, scale=self.scale, window=window) if self.return_lse else None
        return output, lse

    def _count_dense(self, grid: BlockGrid, heads: Sequence[int], reason: str, explanation: str | None = None) -> None:
        if self.statistics is None or not grid.query_tokens:
            return
        batch, all_heads = self.query.shape[:2]
        blocks = [0] * all_heads
        for head in heads:
            blocks[head] = grid.causal_blocks() * batch
        self.statistics.count_blocks(self.layer, blocks, blocks)
        self.statistics.count_dense(grid.query_tokens, batch * len(heads), reason, explanation)

    def _count_sparse(self, grid: BlockGrid) -> None:
        """What is known before anything is selected; the backend counts what is kept."""
        if self.statistics is None:
            return
        batch = self.query.shape[0]
        always, causal = grid.always_attended_blocks() * batch, grid.causal_blocks() * batch
        sparse = [not dense for dense in self.plan.dense]
        self.statistics.count_blocks(self.layer, [always * head for head in sparse], [causal * head for head in sparse])

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.statistics is None else self.statistics.phase(name, self.query.device)


def _check_inputs(query: Tensor, kv: KvView, window: int | None) -> None:
    shape, keys = query.shape, kv.keys
    if len(shape) != 4 or shape[2] == 0:
        raise ValueError(f"query has shape {tuple(shape)}; it must be [batch, heads, rows >= 1, head_dim]")
    batch, heads, rows, head_dim = shape
    _, kv_heads, _, key_dim = keys.shape
    if batch != kv.batch or head_dim != key_dim or heads % kv_heads:
        raise ValueError(
            f"query {tuple(shape)} does not fit keys of batch {kv.batch}, {kv_heads} kv heads and head_dim "
            f"{key_dim}: batch and head_dim must be equal, heads a multiple of the kv heads"
        )
    if rows > kv.tokens:
        raise ValueError(f"{rows} query rows but only {kv.tokens} keys; rows stand at the end of the keys")
    dtype = query.dtype
    if dtype not in _DTYPES or dtype != keys.dtype or query.device != keys.device:
        raise ValueError(
            f"query is {dtype} on {query.device}, keys are {kv.dtype} on {kv.device}; they must agree, in "
            f"bfloat16, float16, float32 or float64"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 token, or None")
