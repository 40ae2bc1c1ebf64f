"""SALE on the CPU by native kernels; what they do not cover runs on the reference, with the same results."""

from __future__ import annotations

import logging
import math
import os
from functools import cached_property

import torch
from torch import Tensor

from sale_attention.backends import AttentionRequest, register_backend
from sale_attention.config import HeadPlan, SaleConfig
from sale_attention.cpu import abi
from sale_attention.cpu.library import ISA_VARIABLE, SLOWEST_ISA, CpuKernels, load_kernels
from sale_attention.geometry import BlockGrid
from sale_attention.jit import KernelBuildError
from sale_attention.kv_view import KvView
from sale_attention.quantise import KeyCodes, QueryCodes
from sale_attention.reference import ReferenceBackend
from sale_attention.select import Selection

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Kernels read rows in whole vectors of up to 16 values.
_DIM_UNIT = 16


class CpuBackend(ReferenceBackend):
    """Kernels for AVX-512, AVX2 or plain C++, chosen by CPUID.

    The reference serves float64, 4-bit codes, head sizes that are no multiple of 16, and machines without a compiler
    (said once, in the log). Outputs are bfloat16 products with float32 sums for bfloat16 inputs on AVX-512 BF16, and
    float32 throughout elsewhere.

    Args:
        isa: force one of `available_isas()`; default what `SALE_PREFILL_CPU_ISA` says, else the best.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self._isa = isa

    @cached_property
    def _kernels(self) -> CpuKernels | None:
        try:
            kernels = load_kernels(self._isa)
            if kernels.isa != SLOWEST_ISA or self._isa or os.environ.get(ISA_VARIABLE):
                return kernels
            logger.warning("no kernels for this processor's vector units: the torch reference computes, being faster")
            return None
        except KernelBuildError as error:
            logger.warning("no native CPU kernels, so the slow torch reference computes: %s", error)
            return None

    def supports(self, request: AttentionRequest) -> str | None:
        """Whatever the reference does, on CPU tensors."""
        if request.query.device.type != "cpu":
            return f"it computes on CPU tensors, not on {request.query.device.type} ones"
        return super().supports(request)

    @property
    def description(self) -> str:
        """The backend and what it runs on, such as "cpu-avx512"; "reference" where kernels could not be built."""
        return "reference" if self._kernels is None else f"cpu-{self._kernels.isa}"

    def runs_on(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
        """See `AttentionBackend.runs_on`."""
        return "reference" if self._native(head_dim, dtype=dtype) is None else self.description

    def _native(self, *dims: int, dtype: torch.dtype, scale: float = 1.0) -> CpuKernels | None:
        if dtype not in _DTYPES or any(dim % _DIM_UNIT for dim in dims) or not 0.0 < scale < math.inf:
            return None
        return self._kernels

    def quantise_query(self, query: Tensor, grid: BlockGrid, config: SaleConfig) -> QueryCodes:
        """See `quantise.quantise_query`."""
        kernels = self._native(query.shape[3], dtype=query.dtype)
        if kernels is None or config.code_bits != 8:
            return super().quantise_query(query, grid, config)
        query = _readable(query)
        codes = torch.empty(query.shape, dtype=torch.int8)
        scales = torch.empty(query.shape[:3])
        call = abi.QuantiseQuery(_grid(query, grid), abi.Rows.of(query), codes.data_ptr(), scales.data_ptr())
        kernels.call("quantise_query", call)
        return QueryCodes(codes, scales)

    def quantise_key_range(self, kv: KvView, config: SaleConfig, start: int, out: KeyCodes) -> None:
        """See `quantise.quantise_key_range`."""
        kernels = self._native(kv.head_dim, dtype=kv.dtype)
        if kernels is None or config.code_bits != 8:
            super().quantise_key_range(kv, config, start, out)
            return
        keys, centre = _readable(kv.keys), out.centre.contiguous()
        call = abi.QuantiseKey(
            _key_grid(kv),
            abi.Tokens.of(keys, kv.page_table),
            *_code_tokens(out),
            centre.data_ptr(),
            start,
        )
        kernels.call("quantise_key", call)

    def sink_local_lse(self, query: Tensor, kv: KvView, centre: Tensor, grid: BlockGrid, scale: float) -> Tensor:
        """See `sink_local.sink_local_log_sum_exp`."""
        kernels = self._native(kv.head_dim, dtype=query.dtype, scale=scale)
        if kernels is None:
            return super().sink_local_lse(query, kv, centre, grid, scale)
        query, keys, centre = _readable(query), _readable(kv.keys), centre.contiguous()
        lse = torch.empty(query.shape[:3])
        call = abi.SinkLocal(
            _grid(query, grid, kv),
            abi.Rows.of(query),
            abi.Tokens.of(keys, kv.page_table),
            centre.data_ptr(),
            lse.data_ptr(),
            scale,
        )
        kernels.call("sink_local", call)
        return lse

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
        """See `sampled.add_sampled`."""
        codes, scales = query_codes.codes.contiguous(), query_codes.scales.contiguous()
        kernels = self._native(codes.shape[3], dtype=torch.float32, scale=scale)
        if kernels is None:
            super().add_sampled(lse, query_codes, key_codes, plan, grid, sample_stride, scale)
            return
        strides = torch.tensor(plan.strides, dtype=torch.int32)
        call = abi.Sampled(
            _code_grid(codes, grid, key_codes),
            codes.data_ptr(),
            scales.data_ptr(),
            *_code_tokens(key_codes),
            strides.data_ptr(),
            plan.unstrided_from,
            sample_stride,
            lse.data_ptr(),
            scale,
        )
        kernels.call("sampled", call)

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
        codes = query_codes.codes.contiguous()
        kernels = self._native(codes.shape[3], dtype=torch.float32)
        if kernels is None or query_codes.block_means is not None:
            return super().select(query_codes, key_codes, thresholds, plan, grid, kv)
        batch, heads = codes.shape[:2]
        thresholds = thresholds.contiguous()
        strides = torch.tensor(plan.strides, dtype=torch.int32)
        words = torch.zeros(batch, heads, grid.query_blocks, grid.mask_words, dtype=torch.int32)
        call = abi.Select(
            _grid(codes, grid, kv),
            codes.data_ptr(),
            *_code_tokens(key_codes),
            thresholds.data_ptr(),
            strides.data_ptr(),
            plan.unstrided_from,
            words.data_ptr(),
            grid.mask_words,
        )
        kernels.call("select", call)
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
        kernels = self._native(kv.head_dim, kv.value_dim, dtype=query.dtype, scale=scale)
        if kernels is None:
            super().compute(query, kv, selection, plan, grid, scale, output, lse)
            return
        words = selection.words.contiguous()
        skip = torch.tensor(plan.dense, dtype=torch.uint8)
        _attend(kernels, query, kv, grid, scale, output, lse, words, skip)

    def attend_all(
        self, query: Tensor, kv: KvView, grid: BlockGrid, scale: float, output: Tensor, lse: Tensor | None
    ) -> None:
        """Every causal block through the same kernel, which is faster than SDPA on the CPU."""
        kernels = self._native(kv.head_dim, kv.value_dim, dtype=query.dtype, scale=scale)
        if kernels is None:
            super().attend_all(query, kv, grid, scale, output, lse)
            return
        _attend(kernels, query, kv, grid, scale, output, lse, None, None)


def _attend(
    kernels: CpuKernels,
    query: Tensor,
    kv: KvView,
    grid: BlockGrid,
    scale: float,
    output: Tensor,
    lse: Tensor | None,
    words: Tensor | None,
    skip_heads: Tensor | None,
) -> None:
    query, keys, values = _readable(query), _readable(kv.keys), _readable(kv.values)
    call = abi.Attend(
        _grid(query, grid, kv),
        abi.Rows.of(query),
        abi.Tokens.of(keys, kv.page_table),
        abi.Tokens.of(values, kv.page_table),
        None if words is None else words.data_ptr(),
        grid.mask_words,
        None if skip_heads is None else skip_heads.data_ptr(),
        abi.Rows.of(output),
        None if lse is None else lse.data_ptr(),
        *((0, 0) if lse is None else lse.stride()[:2]),
        scale,
    )
    kernels.call("attend", call)


def _readable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where its rows are not contiguous or, in 16 bits, not aligned to pairs."""
    paired = tensor.element_size() != 2 or all(stride % 2 == 0 for stride in tensor.stride()[:3])
    return tensor if tensor.stride(-1) == 1 and paired else tensor.contiguous()


def _grid(query: Tensor, grid: BlockGrid, kv: KvView | None = None) -> abi.Grid:
    batch, heads, rows, head_dim = query.shape
    return abi.Grid(
        batch,
        heads,
        heads if kv is None else kv.kv_heads,
        rows,
        grid.offset,
        grid.query_block,
        grid.sink_blocks,
        grid.local_tokens,
        head_dim,
        head_dim if kv is None else kv.value_dim,
        torch.get_num_threads(),
    )


def _code_grid(codes: Tensor, grid: BlockGrid, key_codes: KeyCodes) -> abi.Grid:
    """Where only codes are looked at."""
    call = _grid(codes, grid)
    call.kv_heads = key_codes.codes.shape[1]
    return call


def _key_grid(kv: KvView) -> abi.Grid:
    threads = torch.get_num_threads()
    return abi.Grid(kv.batch, kv.kv_heads, kv.kv_heads, kv.tokens, 0, 64, 0, 0, kv.head_dim, kv.value_dim, threads)


def _code_tokens(codes: KeyCodes) -> tuple[abi.Tokens, abi.Tokens]:
    # A scale is one "token" of one element a block, so its own page table counts blocks.
    scales = abi.Tokens.of(codes.scales.unsqueeze(3), codes.page_table)
    return abi.Tokens.of(codes.codes, codes.page_table), scales


register_backend(CpuBackend())
