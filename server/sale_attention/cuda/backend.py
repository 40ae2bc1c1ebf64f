"""SALE on NVIDIA GPUs by native kernels; what they do not cover runs on the reference, with the same results."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sale_attention.backends import LayerCall, register_backend
from sale_attention.config import HeadPlan, SaleConfig
from sale_attention.cuda import abi, library
from sale_attention.geometry import BlockGrid
from sale_attention.kv_view import KvView
from sale_attention.quantise import KeyCodes, QueryCodes
from sale_attention.reference import ReferenceBackend
from sale_attention.select import Selection
from sale_attention.statistics import ESTIMATION_PHASES

_MOST_HEADS = 512
#: What `SaleCudaLayer` times, in its order.
_PHASES = (*ESTIMATION_PHASES, "compute")
_NO_EVENTS = (0,) * (len(_PHASES) + 1)


class CudaBackend(ReferenceBackend):
    """Kernels for every GPU from sm_80 on, best on Hopper: bfloat16 or float16, head_dim 64 or 128.

    The reference serves everything else: older GPUs, other dtypes and head sizes, and machines without nvcc (said once,
    in the log). Nothing here makes the host wait for the device.
    """

    name = "cuda"
    query_block = 128

    @property
    def description(self) -> str:
        """The backend and its target, such as "cuda-sm90a"; "reference" where kernels could not be built."""
        return self._target(torch.device("cuda"))

    def runs_on(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
        """See `AttentionBackend.runs_on`."""
        covered = device.type == "cuda" and dtype in abi.DTYPES and head_dim in library.HEAD_DIMS
        return self._target(device) if covered else "reference"

    def _target(self, device: torch.device) -> str:
        if not torch.cuda.is_available():
            return "reference"
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if library.library_for(device) is None:
            return "reference"
        return f"cuda-sm{library.architecture_of(torch.cuda.get_device_capability(device))}"

    def _native(
        self, sample: Tensor, head_dim: int, value_dim: int, dtype: torch.dtype, scale: float = 1.0
    ) -> ctypes.CDLL | None:
        # Kernels take the maximum before they scale.
        if value_dim != head_dim or sample.shape[1] > _MOST_HEADS or not 0.0 < scale < math.inf:
            return None
        return library.kernels_for(sample.device, dtype, head_dim)

    def key_centre(self, kv: KvView, config: SaleConfig) -> Tensor:
        """See `quantise.default_key_centre`."""
        native = self._native(kv.keys, kv.head_dim, kv.head_dim, kv.dtype)
        if native is None:
            return super().key_centre(kv, config)
        keys = _aligned(kv.keys)
        centre = torch.empty(kv.batch, kv.kv_heads, kv.head_dim, device=kv.device)
        tokens = abi.tokens_of(keys, kv.page_table, kv.tokens)
        call = (*_key_grid(kv), *tokens, centre.data_ptr(), min(config.centre_tokens, kv.tokens))
        library.call(native, "key_centre", call, kv.device)
        return centre

    def takes_dense(self, query: Tensor, kv: KvView) -> bool:
        """On Hopper: torch's only kernel for rows behind a prefix there is FlashAttention-2, at half the speed."""
        native = self._native(query, kv.head_dim, kv.value_dim, query.dtype)
        return native is not None and self._target(query.device) == "cuda-sm90a"

    def quantise_query(self, query: Tensor, grid: BlockGrid, config: SaleConfig) -> QueryCodes:
        """See `quantise.quantise_query`."""
        native = self._native(query, query.shape[3], query.shape[3], query.dtype)
        if native is None:
            return super().quantise_query(query, grid, config)
        if config.code_bits == 4:
            return _centred_rows(native, query, grid)
        return _query_rows(native, query, grid)

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        """See `quantise.quantise_key_range`."""
        native = self._native(kv.keys, kv.head_dim, kv.head_dim, kv.dtype)
        if native is None:
            super().quantise_key_range(kv, config, start, out)
            return
        keys, centre = _aligned(kv.keys), out.centre.contiguous()
        tokens = abi.tokens_of(keys, kv.page_table, kv.tokens)
        call = (*_key_grid(kv), *tokens, *_code_tokens(out, kv.tokens), centre.data_ptr(), start)
        library.call(native, "quantise_key" if config.code_bits == 8 else "quantise_key_4bit", call, kv.device)

    def sink_local_lse(self, query: Tensor, kv: KvView, centre: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """See `sink_local.sink_local_log_sum_exp`."""
        native = self._native(query, kv.head_dim, kv.head_dim, query.dtype, scale)
        if native is None:
            return super().sink_local_lse(query, kv, centre, grid, scale)
        lse = torch.empty(query.shape[:3], device=query.device)
        _query_rows(native, query, grid, kv, centre, scale, codes=False, lse=lse)
        return lse

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
        """Codes, sums and thresholds in one pass over the queries, a sample in another."""
        native = self._native(query, kv.head_dim, kv.head_dim, query.dtype, scale)
        if native is None or config.code_bits != 8:
            return super().prepare_rows(query, kv, key_codes, plan, grid, config, log_tau, scale)
        thresholds, centre = torch.empty(query.shape[:3], device=query.device), key_codes.centre
        if not config.sample_stride:
            codes = _query_rows(native, query, grid, kv, centre, scale, log_tau=log_tau, thresholds=thresholds)
            return codes, thresholds
        lse = torch.empty(query.shape[:3], device=query.device)
        codes = _query_rows(native, query, grid, kv, centre, scale, lse=lse)
        _add_sampled(native, lse, codes, key_codes, plan, grid, config.sample_stride, scale, log_tau, thresholds)
        return codes, thresholds

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
        """See `sampled.add_sampled`; rows that do not vote are left as they are."""
        codes = query_codes.codes
        native = self._native(codes, codes.shape[3], codes.shape[3], torch.bfloat16, scale)
        if native is None:
            super().add_sampled(lse, query_codes, key_codes, plan, grid, sample_stride, scale)
            return
        _add_sampled(native, lse, query_codes, key_codes, plan, grid, sample_stride, scale)

    def select(
        self,
        query_codes: QueryCodes,
        key_codes: KeyCodes,
        thresholds: Tensor,
        plan: HeadPlan,
        grid: BlockGrid,
        kv: KvView,
    ) -> Selection:
        """See `select.select_blocks`."""
        codes, means = query_codes.codes.contiguous(), query_codes.block_means
        batch, heads, _, head_dim = codes.shape
        # Only the correction of centred queries reads keys.
        native = self._native(codes, head_dim, head_dim, torch.bfloat16 if means is None else kv.dtype)
        if native is None:
            return super().select(query_codes, key_codes, thresholds, plan, grid, kv)
        thresholds = thresholds.contiguous()
        words = torch.empty(batch, heads, grid.query_blocks, grid.mask_words, dtype=torch.int32, device=codes.device)
        shape, key_tokens = _grid(codes, grid, kv), _code_tokens(key_codes, kv.tokens)
        strides = _strides(plan.strides)
        rest = (
            thresholds.data_ptr(),
            ctypes.addressof(strides),
            plan.unstrided_from,
            words.data_ptr(),
            grid.mask_words,
        )
        if means is None:
            library.call(native, "select", (*shape, codes.data_ptr(), *key_tokens, *rest), codes.device)
            return Selection(words, grid.key_blocks)
        keys, scales, means = _aligned(kv.keys), query_codes.scales.contiguous(), means.contiguous()
        centre = key_codes.centre.contiguous()
        corrected = (
            *shape[:-1],
            abi.DTYPES[kv.dtype],
            *(tensor.data_ptr() for tensor in (codes, scales, means)),
            *key_tokens,
            *abi.tokens_of(keys, kv.page_table, kv.tokens),
            centre.data_ptr(),
            *rest,
        )
        library.call(native, "select_4bit", corrected, codes.device)
        return Selection(words, grid.key_blocks)

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
        """See `compute.compute_selected`."""
        native = self._native(query, kv.head_dim, kv.value_dim, query.dtype, scale)
        if native is None:
            super().compute(query, kv, selection, plan, grid, scale, output, lse)
            return
        skip = _flags(plan.dense, query.device) if any(plan.dense) else None
        _attend(native, query, kv, grid, scale, output, lse, selection.words.contiguous(), skip)

    def attend_layer(self, call: LayerCall) -> None:
        """See `AttentionBackend.attend_layer`: with 8-bit codes one call of the library, which launches all phases."""
        query, kv = call.query, call.kv
        native = self._native(query, kv.head_dim, kv.value_dim, query.dtype, call.scale)
        if native is None or call.config.code_bits != 8:
            super().attend_layer(call)
            return
        if call.statistics is None:
            _attend_layer(native, call, _NO_EVENTS)
            return
        events = call.statistics.timing_events(query.device, len(_PHASES) + 1)
        _attend_layer(native, call, [event.cuda_event for event in events])
        call.statistics.time_phases(_PHASES, events)

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        """Every causal block through the same kernel: unlike library kernels, it does not depend on chunks."""
        native = self._native(query, kv.head_dim, kv.value_dim, query.dtype, scale)
        if native is None:
            super().attend_all(query, kv, grid, scale, output, lse)
            return
        _attend(native, query, kv, grid, scale, output, lse, None, None)


def _query_rows(
    native: ctypes.CDLL,
    query: Tensor,
    grid: BlockGrid,
    kv: KvView | None = None,
    centre: Tensor | None = None,
    scale: float = 1.0,
    *,
    codes: bool = True,
    lse: Tensor | None = None,
    log_tau: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> QueryCodes:
    """Whatever is asked for, in one pass; `kv` and `centre` are needed for `lse` and `thresholds`."""
    query = _aligned(query)
    keys = None if kv is None else _aligned(kv.keys)
    centre = None if centre is None else centre.contiguous()
    result = QueryCodes(
        torch.empty(query.shape if codes else 0, dtype=torch.int8, device=query.device),
        torch.empty(query.shape[:3] if codes else 0, device=query.device),
    )
    call = (
        *_grid(query, grid, kv),
        *abi.rows_of(query),
        *(abi.NO_TOKENS if kv is None or keys is None else abi.tokens_of(keys, kv.page_table, kv.tokens)),
        abi.pointer(centre),
        abi.pointer(log_tau),
        abi.pointer(result.codes if codes else None),
        abi.pointer(result.scales if codes else None),
        abi.pointer(lse),
        abi.pointer(thresholds),
        scale,
    )
    library.call(native, "query_rows", call, query.device)
    return result


def _add_sampled(
    native: ctypes.CDLL,
    lse: Tensor,
    query_codes: QueryCodes,
    key_codes: KeyCodes,
    plan: HeadPlan,
    grid: BlockGrid,
    sample_stride: int,
    scale: float,
    log_tau: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> None:
    """Into `lse`, and `thresholds` where they are wanted, of rows that vote."""
    codes, scales = query_codes.codes.contiguous(), query_codes.scales.contiguous()
    strides = _strides(plan.strides)
    batch, heads = codes.shape[:2]
    kv_heads = key_codes.codes.shape[1]
    call = (
        *(batch, heads, kv_heads),
        *_grid(codes, grid)[3:],
        codes.data_ptr(),
        scales.data_ptr(),
        *_code_tokens(key_codes, grid.key_tokens),
        ctypes.addressof(strides),
        plan.unstrided_from,
        sample_stride,
        lse.data_ptr(),
        abi.pointer(log_tau),
        abi.pointer(thresholds),
        scale,
    )
    library.call(native, "sampled", call, codes.device)


def _centred_rows(native: ctypes.CDLL, query: Tensor, grid: BlockGrid) -> QueryCodes:
    """4-bit codes of rows less their query block's mean."""
    query = _aligned(query)
    codes = torch.empty(query.shape, dtype=torch.int8, device=query.device)
    scales = torch.empty(query.shape[:3], device=query.device)
    means = torch.empty(*query.shape[:2], grid.query_blocks, query.shape[3], device=query.device)
    pointers = (tensor.data_ptr() for tensor in (codes, scales, means))
    call = (*_grid(query, grid), *abi.rows_of(query), *pointers)
    library.call(native, "quantise_query_4bit", call, query.device)
    return QueryCodes(codes, scales, means)


def _attend(
    native: ctypes.CDLL,
    query: Tensor,
    kv: KvView,
    grid: BlockGrid,
    scale: float,
    output: Tensor,
    lse: Tensor | None,
    words: Tensor | None,
    skip_heads: Tensor | None,
) -> None:
    query, keys, values = _aligned(query), _aligned(kv.keys), _aligned(kv.values)
    counter = library.work_counter(query.device)
    call = (
        *_grid(query, grid, kv),
        *abi.rows_of(query),
        *abi.tokens_of(keys, kv.page_table, kv.tokens),
        *abi.tokens_of(values, kv.page_table, kv.tokens),
        abi.pointer(words),
        grid.mask_words,
        0,
        abi.pointer(skip_heads),
        *abi.rows_of(output),
        abi.pointer(lse),
        *((0, 0) if lse is None else lse.stride()[:2]),
        scale,
        counter.data_ptr(),
    )
    library.call(native, "attend", call, query.device)


def _attend_layer(native: ctypes.CDLL, call: LayerCall, events: Sequence[int]) -> None:
    query, kv = _aligned(call.query), call.kv
    keys, values = _aligned(kv.keys), _aligned(kv.values)
    batch, heads, all_rows, head_dim = query.shape
    rows = min(all_rows, kv.tokens - call.dense_until)
    grid = BlockGrid.of(rows, kv.tokens, call.config)
    scratch = _Scratch()
    query_codes = scratch.reserve(batch * heads * rows * head_dim)
    thresholds = scratch.reserve(batch * heads * rows * 4)
    words = scratch.reserve(batch * heads * grid.query_blocks * grid.mask_words * 4)
    sample_stride = call.config.sample_stride
    row_sums = 2 * [batch * heads * rows * 4 if sample_stride else 0]
    query_scales, row_lse = (scratch.reserve(size) for size in row_sums)
    held = torch.empty(scratch.size, dtype=torch.uint8, device=query.device)  # holds the memory until all is launched
    start, counter = held.data_ptr(), library.work_counter(query.device)
    codes, plan, lse = call.keys.codes, call.plan, call.lse
    strides = _strides(plan.strides)
    arguments = (
        *_grid(query, BlockGrid.of(all_rows, kv.tokens, call.config), kv),
        *abi.rows_of(query),
        *abi.rows_of(call.output),
        *abi.tokens_of(keys, kv.page_table, kv.tokens),
        *abi.tokens_of(values, kv.page_table, kv.tokens),
        *_code_tokens(codes, kv.tokens),
        codes.centre.data_ptr(),
        call.keys.centre_tokens,
        call.keys.start,
        call.dense_until,
        call.policy.log_tau(query.device).data_ptr(),
        ctypes.addressof(strides),
        abi.pointer(_flags(plan.dense, query.device) if any(plan.dense) else None),
        plan.unstrided_from,
        start + query_codes,
        start + thresholds,
        start + words,
        start + query_scales,
        start + row_lse,
        sample_stride,
        counter.data_ptr(),
        grid.mask_words,
        abi.pointer(call.kept),
        abi.pointer(lse),
        *((0, 0) if lse is None else lse.stride()[:2]),
        call.scale,
        *events,
    )
    library.call(native, "layer", arguments, query.device)


class _Scratch:
    """Offsets into one buffer, in bytes: every buffer of its own costs the host two microseconds a layer."""

    def __init__(self) -> None:
        self.size = 0

    def reserve(self, size: int) -> int:
        offset = self.size
        self.size += -(-size // 256) * 256
        return offset


@functools.lru_cache(maxsize=256)
def _strides(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)


@functools.lru_cache(maxsize=256)
def _flags(values: tuple[bool, ...], device: torch.device) -> Tensor:
    """uint8 `[H]` on the device, copied once: a copy from the host in every layer would make it wait."""
    return torch.tensor(values, dtype=torch.uint8, device=device)


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where kernels cannot read it."""
    return tensor if abi.is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _grid(query: Tensor, grid: BlockGrid, kv: KvView | None = None) -> abi.Numbers:
    batch, heads, rows, head_dim = query.shape
    return (
        batch,
        heads,
        heads if kv is None else kv.kv_heads,
        head_dim,
        rows,
        grid.offset,
        grid.query_block,
        grid.sink_blocks,
        grid.local_tokens,
        library.multiprocessors(query.device),
        abi.DTYPES.get(query.dtype, 0),
    )


def _key_grid(kv: KvView) -> abi.Numbers:
    """Keys alone, without queries."""
    return (kv.batch, kv.kv_heads, kv.kv_heads, kv.head_dim, kv.tokens, 0, 64, 0, 0, 0, abi.DTYPES[kv.dtype])


def _code_tokens(codes: KeyCodes, tokens: int) -> abi.Numbers:
    """Codes, then scales."""
    # A scale is one "token" of one element a block, so its own page table counts blocks.
    scales = abi.tokens_of(codes.scales, codes.page_table, -(-tokens // 32))
    return (*abi.tokens_of(codes.codes, codes.page_table, tokens), *scales)


register_backend(CudaBackend())
