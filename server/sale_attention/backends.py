"""The interface of a backend, and the registry: one class and one `register_backend` call add one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .config import HeadPlan, LayerPolicy, SaleConfig
from .geometry import BlockGrid
from .kv_view import KvView
from .quantise import KeyCodes, KeyExtension, QueryCodes, default_key_centre
from .select import Selection
from .sink_local import row_thresholds
from .statistics import AttentionStatistics


class AttentionRequest(NamedTuple):
    """What a backend is asked whether it can do.

    Attributes:
        query: `[B, H, Nq, d]`.
        kv: keys and values, contiguous or paged.
        policy: per-head settings.
        config: block geometry and code width.
    """

    query: Tensor
    kv: KvView
    policy: LayerPolicy
    config: SaleConfig


class LayerCall(NamedTuple):
    """A call of `attend` with sparse rows, its defaults filled in.

    Attributes:
        query: `[B, H, Nq, d]`, the last rows of the keys.
        kv: keys and values, contiguous or paged.
        keys: codes of the keys: those that are there, and room for the others.
        policy: per-head settings.
        plan: the policy resolved for this call; some head is not dense.
        config: block geometry and code width.
        scale: softmax scale.
        dense_until: absolute position; rows before it attend to everything, in all heads. Some row comes after it.
        output: `[B, H, Nq, d_v]`, written; its last dimension is contiguous.
        lse: float32 `[B, H, Nq]`, written; None: not wanted.
        kept: int64 `[H]`, to which the kept blocks of each head are added; None: not wanted.
        statistics: where phases are timed.
    """

    query: Tensor
    kv: KvView
    keys: KeyExtension
    policy: LayerPolicy
    plan: HeadPlan
    config: SaleConfig
    scale: float
    dense_until: int
    output: Tensor
    lse: Tensor | None
    kept: Tensor | None
    statistics: AttentionStatistics | None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times the block, where there are statistics."""
        return nullcontext() if self.statistics is None else self.statistics.phase(name, self.query.device)


class AttentionBackend(ABC):
    """The phases of the method, each callable on explicit inputs, so that a conformance kit can compare each.

    Rows are those at the end of the keys (`BlockGrid.offset`). `kv` may be paged in every phase. No phase may make the
    host wait for a device that the phase did not already have to wait for.
    """

    name: str
    #: Rows that share a list of key blocks where the kernels are at their best; see `SaleConfig.query_block`.
    query_block: int = 64

    @property
    def description(self) -> str:
        """The name, and what the backend found to run on, for reports."""
        return self.name

    def runs_on(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
        """What computes heads of this kind: the description, or "reference" where native kernels do not cover them."""
        return self.description

    @abstractmethod
    def supports(self, request: AttentionRequest) -> str | None:
        """None if this backend can run `request`, else the reason in words; the caller then runs it dense."""

    def key_centre(self, kv: KvView, config: SaleConfig) -> Tensor:
        """Mean of the first keys, float32 `[B, Hkv, d]`; see `quantise.default_key_centre`."""
        return default_key_centre(kv, config)

    def takes_dense(self, query: Tensor, kv: KvView) -> bool:
        """Whether several rows of a call that asks for dense attention go through `attend_all`, not torch's SDPA.

        A backend says so where its kernel is the faster one.
        """
        return False

    @abstractmethod
    def quantise_query(self, query: Tensor, grid: BlockGrid, config: SaleConfig) -> QueryCodes:
        """Row codes of `[B, H, Nq, d]`, bit-identical to `quantise.quantise_query`."""

    @abstractmethod
    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        """Codes of keys `[start, Nk)` written into `out`, bit-identical to `quantise.quantise_key_range`."""

    @abstractmethod
    def sink_local_lse(self, query: Tensor, kv: KvView, centre: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """Log-sum-exp of centred sink and local scores, float32 `[B, H, Nq]`; see `sink_local`."""

    @abstractmethod
    def add_sampled(
        self,
        lse: Tensor,
        query_codes: QueryCodes,
        key_codes: KeyCodes,
        plan: HeadPlan,
        grid: BlockGrid,
        sample_stride: int,
        scale: float,
    ) -> None:
        """Adds a sample of the keys between to `lse`, float32 `[B, H, Nq]`, in place; see `sampled.add_sampled`.

        At least rows that vote get theirs.
        """

    def prepare_rows(
        self,
        query: Tensor,
        kv: KvView,
        key_codes: KeyCodes,
        plan: HeadPlan,
        grid: BlockGrid,
        config: SaleConfig,
        log_tau: Tensor,
        scale: float,
    ) -> tuple[QueryCodes, Tensor]:
        """What `select` needs of the queries: codes, and thresholds float32 `[B, H, Nq]` as of `row_thresholds`.

        By default the phases above, one after the other; a backend may make one pass over the queries of several.
        """
        codes = self.quantise_query(query, grid, config)
        lse = self.sink_local_lse(query, kv, key_codes.centre, grid, scale)
        if config.sample_stride:
            self.add_sampled(lse, codes, key_codes, plan, grid, config.sample_stride, scale)
        return codes, row_thresholds(lse, codes, log_tau, scale)

    @abstractmethod
    def select(
        self,
        query_codes: QueryCodes,
        key_codes: KeyCodes,
        thresholds: Tensor,
        plan: HeadPlan,
        grid: BlockGrid,
        kv: KvView,
    ) -> Selection:
        """Kept blocks, bit-identical to `select.select_blocks` from the same codes, scales and thresholds."""

    @abstractmethod
    def compute(
        self,
        query: Tensor,
        kv: KvView,
        selection: Selection,
        plan: HeadPlan,
        grid: BlockGrid,
        scale: float,
        output: Tensor,
        lse: Tensor,
    ) -> None:
        """Attention over kept, sink and local blocks, into `output [B, H, Nq, d_v]` and float32 `lse [B, H, Nq]`.

        Rows of heads that `plan` calls dense are left as they are. The last dimension of `output` is contiguous.
        """

    @abstractmethod
    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        """Attention over every key that causality allows: short rows and dense heads of a SALE call.

        As everywhere, a row's bits must not depend on the call that it comes in, which library kernels do not promise.
        """

    def attend_layer(self, call: LayerCall) -> None:
        """All of a sparse call: every phase above, one after the other. A backend may make one launch of several.

        Writes output, log-sum-exp and the codes of new keys, and adds to `call.kept`; with dense heads, only their rows
        from `call.dense_until` on stay as they are. The result is bit for bit that of the phases.
        """
        rows = call.query.shape[2]
        offset = call.kv.tokens - rows
        short = min(max(0, call.dense_until - offset), rows)
        if short:
            self._attend_short_rows(call, short)
        grid = BlockGrid.of(rows - short, call.kv.tokens, call.config)
        query, kv, codes = call.query[:, :, short:], call.kv, call.keys.codes
        with call.phase("quantise"):
            if call.keys.centre_tokens:
                codes.centre.copy_(self.key_centre(kv, call.config))
            self.quantise_key_range(kv, call.config, call.keys.start, codes)
        with call.phase("sink_local"):
            log_tau = call.policy.log_tau(query.device)
            query_codes, thresholds = self.prepare_rows(
                query, kv, codes, call.plan, grid, call.config, log_tau, call.scale
            )
        with call.phase("select"):
            selection = self.select(query_codes, codes, thresholds, call.plan, grid, kv)
            if call.kept is not None:
                call.kept.add_(selection.kept_blocks())
        lse = query.new_empty(query.shape[:3], dtype=torch.float32) if call.lse is None else call.lse[:, :, short:]
        with call.phase("compute"):
            self.compute(query, kv, selection, call.plan, grid, call.scale, call.output[:, :, short:], lse)

    def _attend_short_rows(self, call: LayerCall, short: int) -> None:
        until = call.kv.tokens - call.query.shape[2] + short
        lse = None if call.lse is None else call.lse[:, :, :short]
        grid = BlockGrid.of(short, until, call.config)
        with call.phase("dense"):
            self.attend_all(
                call.query[:, :, :short], call.kv.prefix(until), grid, call.scale, call.output[:, :, :short], lse
            )


AUTO = "auto"
_REGISTRY: dict[str, AttentionBackend] = {}


def register_backend(backend: AttentionBackend) -> None:
    """Make `backend` available under its name.

    Raises:
        ValueError: if another backend has the name.
    """
    if backend.name in _REGISTRY:
        raise ValueError(f"an attention backend named {backend.name!r} is registered already; choose another name")
    _REGISTRY[backend.name] = backend


def get_backend(name: str, device: torch.device | None = None) -> AttentionBackend:
    """The backend registered as `name`; "auto" is the fastest one for `device`.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name == AUTO:
        name = {"cpu": "cpu", "cuda": "cuda"}.get("cpu" if device is None else device.type, "reference")
    try:
        return _REGISTRY[name]
    except KeyError:
        known = ", ".join((AUTO, *available_backends()))
        raise ValueError(f"no attention backend named {name!r}; available: {known}") from None


def available_backends() -> tuple[str, ...]:
    """Names of the registered backends, in the order of registration."""
    return tuple(_REGISTRY)
