"""Where a case's tensors lie: contiguous with room to spare or in shuffled pages, poison wherever no token is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sale_attention import KeyCodes, KvView
from tests.conformance.cases import Case
from tests.conformance.inputs import Problem

KEY_BLOCK = 32
_SPARE_PAGES = 3
_GUARD = 3
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: A NaN in every format of its size.
_PATTERNS = {2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FFA5A5A5A5A5A5A}
#: What a byte of codes holds where no code belongs; the quantiser never makes it.
CODE_POISON = -128


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of `batch` sequences of `tokens` tokens in a buffer.

    Attributes:
        table: int64 `[B, pages]`, shuffled, its last column a page that no token uses; None for contiguous buffers.
        page_tokens: page size; for contiguous buffers, their capacity.
        pages: pages of the pool, or sequences.
    """

    tokens: int
    table: Tensor | None
    page_tokens: int
    pages: int

    @classmethod
    def of(cls, case: Case, page_tokens: int | None, seed: int) -> Layout:
        """Contiguous with `case.spare_tokens` behind the last token, or paged."""
        if page_tokens is None:
            return cls(case.tokens, None, case.tokens + case.spare_tokens, case.batch)
        used = -(-case.tokens // page_tokens)
        pages = case.batch * used + _SPARE_PAGES
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
        table = torch.cat([order[: case.batch * used].view(case.batch, used), order[-1].expand(case.batch, 1)], dim=1)
        if case.transposed_table:
            table = table.t().contiguous().t()
        return cls(case.tokens, table, page_tokens, pages)

    def buffer(self, heads: int, tail: tuple[int, ...], dtype: torch.dtype, poison: float, unit: int = 1) -> Tensor:
        """A poisoned buffer `[pages, heads, entries a page, *tail]`; an entry holds `unit` tokens."""
        return torch.full((self.pages, heads, -(-self.page_tokens // unit), *tail), poison, dtype=dtype)

    def put(self, buffer: Tensor, source: Tensor, start: int = 0, unit: int = 1) -> None:
        """Write entries `[start, end)` of `source [B, heads, entries, ...]` to where they belong."""
        end = source.shape[2]
        if self.table is None:
            buffer[:, :, start:end] = source[:, :, start:]
            return
        size = self.page_tokens // unit
        for sequence in range(source.shape[0]):
            for index in range(start // size, -(-end // size)):
                first, last = max(start, index * size), min(end, (index + 1) * size)
                page = int(self.table[sequence, index])
                buffer[page, :, first - index * size : last - index * size] = source[sequence, :, first:last]


def kv_layout(problem: Problem) -> Layout:
    """Where keys and values lie."""
    case = problem.case
    return Layout.of(case, case.page_tokens, case.seed)


def code_layout(problem: Problem) -> Layout:
    """Where codes and scales lie: in pages of their own, even where they are as large as those of the keys."""
    case = problem.case
    return Layout.of(case, case.code_page_tokens, case.seed + 1)


def placed_query(problem: Problem, device: str) -> Tensor:
    """The query `[B, H, Nq, d]` on `device`, token-major where the case says so."""
    return _ordered(problem.query, problem.case.token_major).to(device)


def placed_kv(problem: Problem, device: str) -> KvView:
    """Keys and values on `device`, NaN wherever no token is."""
    layout, case = kv_layout(problem), problem.case
    tensors = []
    for source in (problem.kv.keys, problem.kv.values):
        buffer = layout.buffer(case.kv_heads, (source.shape[3],), case.dtype, math.nan)
        layout.put(buffer, source)
        tensors.append(_ordered(buffer, case.token_major).to(device))
    return KvView(tensors[0], tensors[1], None if layout.table is None else layout.table.to(device), case.tokens)


def empty_key_codes(problem: Problem) -> KeyCodes:
    """Poisoned buffers for codes and scales, on the CPU."""
    layout, case = code_layout(problem), problem.case
    codes = layout.buffer(case.kv_heads, (case.head_dim,), torch.int8, CODE_POISON)
    scales = layout.buffer(case.kv_heads, (), torch.float32, math.nan, KEY_BLOCK)
    return KeyCodes(codes, scales, problem.centre, layout.table)


def written_key_codes(problem: Problem, key_codes: KeyCodes, start: int = 0) -> KeyCodes:
    """Poisoned buffers with the contiguous `key_codes` of tokens `[start, Nk)` in them, on the CPU."""
    layout, result = code_layout(problem), empty_key_codes(problem)
    layout.put(result.codes, key_codes.codes, start)
    layout.put(result.scales, key_codes.scales, start // KEY_BLOCK, KEY_BLOCK)
    return result


def moved_key_codes(key_codes: KeyCodes, device: str) -> KeyCodes:
    """A copy on `device`."""
    table = key_codes.page_table
    return KeyCodes(
        key_codes.codes.to(device, copy=True),
        key_codes.scales.to(device, copy=True),
        key_codes.centre.to(device),
        None if table is None else table.to(device),
    )


class GuardedResults:
    """Output and log-sum-exp to be written into: views of larger buffers, every element a NaN of one bit pattern.

    Attributes:
        output: `[B, H, Nq, d_v]`, its memory `[B, Nq, H, d_v]` with room between rows, heads and batches.
        lse: float32 `[B, H, Nq]` with room between its rows.
    """

    def __init__(self, problem: Problem, device: str) -> None:
        case, value_dim = problem.case, problem.kv.value_dim
        self._output = _unwritten((case.batch, case.rows + _GUARD, case.heads + 1, value_dim + 16), case.dtype, device)
        self._lse = _unwritten((case.batch, case.heads + 1, case.rows + _GUARD), torch.float32, device)
        self.output = self._output[:, : case.rows, : case.heads, :value_dim].transpose(1, 2)
        self.lse = self._lse[:, : case.heads, : case.rows]

    def written_outside(self) -> int:
        """Elements that changed outside `output` and `lse`."""
        pairs = ((self._output, self.output), (self._lse, self.lse))
        return sum(int(is_written(buffer).sum()) - int(is_written(view).sum()) for buffer, view in pairs)


def bits_of(tensor: Tensor) -> Tensor:
    """The elements' bit patterns, as integers of their size."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def is_written(tensor: Tensor) -> Tensor:
    """bool: where a tensor of `GuardedResults` no longer holds what it was made with."""
    return bits_of(tensor) != _PATTERNS[tensor.element_size()]


def _unwritten(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    result = torch.empty(size, dtype=dtype, device=device)
    bits_of(result).fill_(_PATTERNS[result.element_size()])
    return result


def _ordered(tensor: Tensor, token_major: bool) -> Tensor:
    """`tensor` `[B, heads, tokens, ...]`, in memory `[B, tokens, heads, ...]` if `token_major`."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if token_major else tensor.contiguous()
