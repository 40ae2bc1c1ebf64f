"""`attend`: quantise -> sink-local log-sum-exp -> select -> compute, and dense attention where SALE does not apply."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .audit import Audit
from .backends import AUTO, AttentionBackend, AttentionRequest, get_backend
from .config import HeadPlan, LayerPolicy, SaleConfig
from .dense import dense_attention, dense_log_sum_exp
from .geometry import BlockGrid
from .kv_view import KvView
from .quantise import KeyCodes
from .select import Selection
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

    Rows below `config.dense_rows`, heads with tau = 0, and calls that SALE or the backend does not cover run dense;
    `statistics` says which and why. Results do not depend on how a prompt is split into calls if the splits lie at
    multiples of 128 and `prompt_end` is the same in each. What is asked to be dense may take other kernels for one row
    than for several, with the last bits that these give.

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
    call = _Call(
        query=query,
        kv=kv,
        policy=policy,
        config=config,
        state=state,
        scale=1.0 / math.sqrt(query.shape[3]) if scale is None else scale,
        plan=HeadPlan.resolve(policy, config, kv.tokens if prompt_end is None else prompt_end),
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


@dataclass(frozen=True, eq=False)
class _Call:
    """One `attend`, its defaults filled in."""

    query: Tensor
    kv: KvView
    policy: LayerPolicy
    config: SaleConfig
    state: LayerState | None
    scale: float
    plan: HeadPlan
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
        tensors = (self.query, self.kv.keys, self.kv.values)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def all_dense(self, reason: str, explanation: str | None, window: int | None) -> AttentionResult:
        """Everything through dense attention."""
        batch, heads, rows, _ = self.query.shape
        self._count_dense(BlockGrid.of(rows, self.kv.tokens, self.config), list(range(heads)), reason, explanation)
        if self.statistics is not None:
            self.statistics.count_rows(rows, batch * heads)
        return AttentionResult(*self._dense(self.query, self.kv, window))

    def run(self) -> AttentionResult:
        """Short rows first, then the sparse ones."""
        batch, heads, rows, _ = self.query.shape
        offset = self.kv.tokens - rows
        short_rows = min(max(0, self.config.dense_rows - offset), rows)
        if self.statistics is not None:
            self.statistics.count_rows(rows, batch * heads)
        # Laid out as models want it next, [B, Nq, H, d_v], so that joining the heads copies nothing.
        output = self.query.new_empty(batch, rows, heads, self.kv.value_dim).transpose(1, 2)
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=self.query.device)
        joined = 0 < short_rows < rows and self._joins_short_rows()
        if joined:
            self._count_dense(BlockGrid.of(short_rows, offset + short_rows, self.config), list(range(heads)), "short")
        elif short_rows:
            kv = self.kv.prefix(offset + short_rows)
            self._attend_all(range(heads), slice(0, short_rows), kv, output, lse, "short")
        if short_rows < rows:
            self._sparse(slice(short_rows, rows), output, lse, joined)
            if self.audit is not None:
                self.audit.observe(self.layer, self.query, self.kv, output, lse, self.scale)
        return AttentionResult(output, lse if self.return_lse else None)

    def _joins_short_rows(self) -> bool:
        whole_blocks = self.config.dense_rows % self.config.query_block == 0
        return whole_blocks and not any(self.plan.dense) and self.backend.joins_short_rows(self.query, self.kv)

    def _sparse(self, rows: slice, all_output: Tensor, all_lse: Tensor, joined: bool) -> None:
        query, output, lse = self.query[:, :, rows], all_output[:, :, rows], all_lse[:, :, rows]
        grid = BlockGrid.of(query.shape[2], self.kv.tokens, self.config)
        kv, plan, backend, scale = self.kv, self.plan, self.backend, self.scale
        if not all(plan.dense):
            with self._phase("quantise"):
                key_codes = self._key_codes()
            with self._phase("sink_local"):
                query_codes, thresholds = backend.prepare_rows(
                    query, kv, key_codes.centre, grid, self.config, self.policy.log_tau(query.device), scale
                )
            with self._phase("select"):
                selection = backend.select(query_codes, key_codes, thresholds, plan, grid, kv)
            with self._phase("compute"):
                if joined:
                    whole = BlockGrid.of(self.query.shape[2], kv.tokens, self.config)
                    start = self.config.dense_rows
                    backend.compute_joined(self.query, kv, selection, plan, whole, scale, all_output, all_lse, start)
                else:
                    backend.compute(query, kv, selection, plan, grid, scale, output, lse)
            self._count_sparse(grid, selection)
        group = query.shape[1] // kv.kv_heads
        for kv_head in range(kv.kv_heads):
            heads = [head for head in range(kv_head * group, (kv_head + 1) * group) if plan.dense[head]]
            if heads:
                self._attend_all(heads, rows, kv.kv_head(kv_head), all_output, all_lse, "head")

    def _key_codes(self) -> KeyCodes:
        state = LayerState() if self.state is None else self.state
        return state.update(self.kv, self.policy, self.config, self.backend)

    def _attend_all(
        self, heads: Iterable[int], rows: slice, kv: KvView, all_output: Tensor, all_lse: Tensor, reason: str
    ) -> None:
        """Exact attention of some heads' rows; the heads share `kv`, or are all of them."""
        chosen = list(heads)
        whole = len(chosen) == self.query.shape[1]
        query, output, lse = (
            tensor[:, :, rows] if whole else tensor[:, chosen, rows] for tensor in (self.query, all_output, all_lse)
        )
        grid = BlockGrid.of(query.shape[2], kv.tokens, self.config)
        self._count_dense(grid, chosen, reason)
        with self._phase("dense"):
            self.backend.attend_all(query, kv, grid, self.scale, output, lse if self.return_lse else None)
            if not whole:
                all_output[:, chosen, rows], all_lse[:, chosen, rows] = output, lse

    def _dense(self, query: Tensor, kv: KvView, window: int | None) -> tuple[Tensor, Tensor | None]:
        batch, heads, rows, _ = query.shape
        exact = window is None and not self._wants_gradients()
        with self._phase("dense"):
            # A single row is a decoded token: the kernels of backends are made for blocks of rows.
            if exact and rows > 1 and self.backend.takes_dense(query, kv):
                output = query.new_empty(batch, rows, heads, kv.value_dim).transpose(1, 2)
                sums = torch.empty(batch, heads, rows, device=query.device) if self.return_lse else None
                grid = BlockGrid.of(rows, kv.tokens, self.config)
                self.backend.attend_all(query, kv, grid, self.scale, output, sums)
                return output, sums
            output = dense_attention(query, kv, scale=self.scale, window=window)
            lse = dense_log_sum_exp(query, kv, scale=self.scale, window=window) if self.return_lse else None
        return output, lse

    def _count_dense(self, grid: BlockGrid, heads: list[int], reason: str, explanation: str | None = None) -> None:
        if self.statistics is None:
            return
        batch, all_heads = self.query.shape[:2]
        blocks = torch.zeros(all_heads, dtype=torch.int64)
        blocks[heads] = grid.causal_blocks() * batch
        blocks = blocks.to(self.query.device, non_blocking=True)
        self.statistics.count_blocks(self.layer, blocks, blocks)
        self.statistics.count_dense(grid.query_tokens, batch * len(heads), reason, explanation)

    def _count_sparse(self, grid: BlockGrid, selection: Selection) -> None:
        if self.statistics is None:
            return
        kept_blocks = selection.kept_blocks()
        batch = self.query.shape[0]
        sparse = torch.tensor([not dense for dense in self.plan.dense]).to(kept_blocks.device, non_blocking=True)
        computed = (kept_blocks + grid.always_attended_blocks() * batch) * sparse
        self.statistics.count_blocks(self.layer, computed, sparse * (grid.causal_blocks() * batch))

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.statistics is None else self.statistics.phase(name, self.query.device)


def _check_inputs(query: Tensor, kv: KvView, window: int | None) -> None:
    if query.ndim != 4 or query.shape[2] == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; it must be [batch, heads, rows >= 1, head_dim]")
    if query.shape[0] != kv.batch or query.shape[3] != kv.head_dim or query.shape[1] % kv.kv_heads:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit keys of batch {kv.batch}, {kv.kv_heads} kv heads and head_dim "
            f"{kv.head_dim}: batch and head_dim must be equal, heads a multiple of the kv heads"
        )
    if query.shape[2] > kv.tokens:
        raise ValueError(f"{query.shape[2]} query rows but only {kv.tokens} keys; rows stand at the end of the keys")
    if query.dtype not in _DTYPES or query.dtype != kv.dtype or query.device != kv.device:
        raise ValueError(
            f"query is {query.dtype} on {query.device}, keys are {kv.dtype} on {kv.device}; they must agree, in "
            f"bfloat16, float16, float32 or float64"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 token, or None")
