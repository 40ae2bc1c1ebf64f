"""The interface of a backend, and the registry: one class and one `register_backend` call add one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import HeadPlan, LayerPolicy, SaleConfig
from .geometry import BlockGrid
from .kv_view import KvView
from .quantise import KeyCodes, QueryCodes, default_key_centre
from .select import Selection
from .sink_local import row_thresholds


@dataclass(frozen=True, eq=False)
class AttentionRequest:
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

    def prepare_rows(
        self,
        query: Tensor,
        kv: KvView,
        centre: Tensor,
        grid: BlockGrid,
        config: SaleConfig,
        log_tau: Tensor,
        scale: float,
    ) -> tuple[QueryCodes, Tensor]:
        """What `select` needs of the queries: codes, and thresholds float32 `[B, H, Nq]` as of `row_thresholds`.

        By default the two phases above, one after the other; a backend may do both in one pass over the queries.
        """
        codes = self.quantise_query(query, grid, config)
        lse = self.sink_local_lse(query, kv, centre, grid, scale)
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

    def joins_short_rows(self, query: Tensor, kv: KvView) -> bool:
        """Whether `compute_joined` is one launch where `attend_all` and `compute` are two."""
        return False

    def compute_joined(
        self,
        query: Tensor,
        kv: KvView,
        selection: Selection,
        plan: HeadPlan,
        grid: BlockGrid,
        scale: float,
        output: Tensor,
        lse: Tensor,
        dense_until: int,
    ) -> None:
        """`attend_all` for rows before absolute position `dense_until`, `compute` for the others.

        Args:
            query: `[B, H, Nq, d]`, all rows.
            kv: keys and values.
            selection: of the query blocks from `dense_until`, a multiple of the query block, on.
            plan: no head is dense.
            grid: the blocks of all rows.
            scale: softmax scale.
            output: `[B, H, Nq, d_v]`, written.
            lse: float32 `[B, H, Nq]`, written.
            dense_until: position of the first row that `selection` speaks of.
        """
        short = dense_until - grid.offset
        first = replace(grid, query_tokens=short, key_tokens=dense_until)
        rest = replace(grid, query_tokens=grid.query_tokens - short)
        before, after = slice(0, short), slice(short, None)
        self.attend_all(
            query[:, :, before], kv.prefix(dense_until), first, scale, output[:, :, before], lse[:, :, before]
        )
        self.compute(query[:, :, after], kv, selection, plan, rest, scale, output[:, :, after], lse[:, :, after])

    @abstractmethod
    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        """Attention over every key that causality allows: short rows and dense heads of a SALE call.

        As everywhere, a row's bits must not depend on the call that it comes in, which library kernels do not promise.
        """


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
