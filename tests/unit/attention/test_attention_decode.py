"""Decode attention over lengths on the device, against float64 softmax: on the CPU and, where there is one, a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sale_attention import AttentionResult, KvView, decode_attention
from sale_attention.cuda import decode as native
from sale_attention.transformers_integration import AttentionContext, DecodeStep, attention_context

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    """Sequences of one call; `page_tokens` 0 is contiguous."""

    lengths: tuple[int, ...]
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page_tokens: int = 0
    capacity: int = 0

    @property
    def tokens(self) -> int:
        return self.capacity or -(-max(self.lengths) // 256) * 256


CASES = [
    Case((1,)),
    Case((1, 31, 32, 33, 127, 128, 129)),
    Case((700, 3, 512), heads=32, kv_heads=8),
    Case((300, 80), heads=2, kv_heads=2, head_dim=64),
    Case((300, 80), heads=9, kv_heads=3, head_dim=64, dtype=torch.float16),
    Case((300, 80), heads=7, kv_heads=1),
    Case((300, 80), heads=16, kv_heads=2, dtype=torch.float16),
    Case((300, 80), heads=24, kv_heads=2),
    Case((300, 80), heads=20, kv_heads=1, head_dim=64),
    Case((260, 17), dtype=torch.float32),
    Case((260, 17), head_dim=96),
    Case((300, 1, 64), page_tokens=32),
    Case((300, 1, 64, 129), heads=12, kv_heads=4, head_dim=64, page_tokens=64, dtype=torch.float16),
    Case((1000, 400), page_tokens=128),
    Case((5000, 130, 4097), capacity=8192),
    Case((33000, 1025), heads=4, kv_heads=1, head_dim=64),
    Case((1500, 5000), heads=32, kv_heads=32, head_dim=64, page_tokens=256),
]


def problem(case: Case) -> tuple[Tensor, KvView, Tensor]:
    """Query, keys and values with NaN behind every length, and lengths."""
    generator = torch.Generator().manual_seed(len(case.lengths))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(case.dtype)

    batch = len(case.lengths)
    query = normal(batch, case.heads, 1, case.head_dim)
    keys, values = (normal(batch, case.kv_heads, case.tokens, case.head_dim) for _ in range(2))
    for row, length in enumerate(case.lengths):
        keys[row, :, length:] = float("nan")
        values[row, :, length:] = float("nan")
    kv = KvView(keys, values)
    return query, in_pages(kv, case, generator) if case.page_tokens else kv, torch.tensor(case.lengths)


def in_pages(kv: KvView, case: Case, generator: torch.Generator) -> KvView:
    """Pages in random order among foreign ones full of NaN; table entries behind a length point nowhere."""
    size, batch = case.page_tokens, len(case.lengths)
    pages = case.tokens // size
    table = torch.randperm(batch * pages + 3, generator=generator)[: batch * pages].view(batch, pages)
    pools = []
    for source in (kv.keys, kv.values):
        pool = source.new_full((batch * pages + 3, case.kv_heads, size, case.head_dim), float("nan"))
        pool[table] = source.unflatten(2, (pages, size)).transpose(1, 2)
        pools.append(pool)
    used = torch.arange(pages) * size < torch.tensor(case.lengths).unsqueeze(1)
    return KvView(*pools, torch.where(used, table, -(2**40)), case.tokens)


def exact(query: Tensor, kv: KvView, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    outputs, sums = [], []
    for row, length in enumerate(lengths.tolist()):
        table = None if kv.page_table is None else kv.page_table[row : row + 1, : -(-length // kv.keys.shape[2])]
        one = KvView(kv.keys[row : row + 1], kv.values[row : row + 1]) if table is None else None
        one = KvView(kv.keys, kv.values, table, length) if one is None else one
        group = query.shape[1] // kv.kv_heads
        keys = one.keys_between(0, length)[0].double().repeat_interleave(group, 0)
        values = one.values_between(0, length)[0].double().repeat_interleave(group, 0)
        scores = (keys @ query[row].double().transpose(1, 2)).squeeze(2) * scale
        outputs.append(scores.softmax(1).unsqueeze(1) @ values)
        sums.append(scores.logsumexp(1))
    return torch.stack(outputs), torch.stack(sums).unsqueeze(2)


def on(device: str, query: Tensor, kv: KvView, lengths: Tensor) -> tuple[Tensor, KvView, Tensor]:
    table = None if kv.page_table is None else kv.page_table.to(device)
    return query.to(device), KvView(kv.keys.to(device), kv.values.to(device), table, kv.length), lengths.to(device)


def run(device: str, query: Tensor, kv: KvView, lengths: Tensor, scale: float | None = None) -> AttentionResult:
    return decode_attention(*on(device, query, kv, lengths), scale=scale)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, device: str) -> None:
    query, kv, lengths = problem(case)
    scale = 0.1
    output, lse = exact(query, kv, lengths, scale)
    result = run(device, query, kv, lengths, scale)
    assert result.lse is not None
    assert result.output.dtype == case.dtype
    torch.testing.assert_close(result.output.cpu().double(), output, atol=TOLERANCES[case.dtype], rtol=1e-2)
    torch.testing.assert_close(result.lse.cpu().double(), lse, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_scale_defaults_and_the_log_sum_exp_can_be_left_out(device: str) -> None:
    query, kv, lengths = problem(CASES[1])
    expected = run(device, query, kv, lengths, 128**-0.5)
    result = decode_attention(*on(device, query, kv, lengths.to(torch.int32)), return_lse=False)
    assert result.lse is None
    assert torch.equal(result.output, expected.output)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_an_empty_sequence_gets_zeros(device: str) -> None:
    query, kv, _ = problem(Case((40, 50)))
    result = run(device, query, kv, torch.tensor([0, 50]))
    assert result.lse is not None
    assert torch.equal(result.output[0].cpu(), torch.zeros_like(query[0]))
    assert bool((result.lse[0] == float("-inf")).all())
    assert bool(result.output[1].isfinite().all())


@pytest.mark.parametrize("capacity", [1, 128, 129, 4096, 32768, 65536, 1 << 20])
@pytest.mark.parametrize("kv_heads", [1, 3, 8, 32, 96])
def test_chunks_do_not_depend_on_the_capacity(capacity: int, kv_heads: int) -> None:
    def chunk(length: int, limit: int) -> int:  # as the kernel cuts
        share = -(-length // native.splits_of(limit, kv_heads))
        return max(128, -(-share // 32) * 32)

    splits = native.splits_of(capacity, kv_heads)
    for length in {1, capacity // 2 + 1, max(1, capacity - 1), capacity}:
        assert chunk(length, capacity) == chunk(length, 1 << 24)
        assert -(-length // chunk(length, capacity)) <= splits <= 1024


def test_what_does_not_fit_is_refused() -> None:
    query, kv, lengths = problem(Case((40, 50)))
    with pytest.raises(ValueError, match="heads a multiple of 2"):
        decode_attention(query[:, :3], kv, lengths)
    with pytest.raises(ValueError, match=r"lengths are torch\.float32"):
        decode_attention(query, kv, lengths.float())
    with pytest.raises(ValueError, match="they must agree"):
        decode_attention(query.float(), kv, lengths)


def test_a_decode_context_refuses_what_needs_a_mask() -> None:
    from sale_attention.transformers_integration import sale_attention_forward

    query, kv, lengths = problem(Case((40,)))
    step = AttentionContext(decode=DecodeStep(lengths))
    module = torch.nn.Module()
    with attention_context(step), pytest.raises(ValueError, match="no mask, dropout or sliding window"):
        sale_attention_forward(module, query, kv.keys, kv.values, None, sliding_window=16)
    with attention_context(step):
        output, _ = sale_attention_forward(module, query, kv.keys, kv.values, None)
    expected = decode_attention(query, kv, lengths).output
    assert torch.equal(output, expected.transpose(1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnTheGpu:
    @pytest.mark.parametrize("case", [case for case in CASES if case.head_dim != 96 and case.dtype != torch.float32])
    def test_the_kernel_runs(self, case: Case) -> None:
        query, kv, _ = on("cuda", *problem(case))
        assert native.covers(query, kv)

    def test_bits_depend_on_neither_batch_nor_capacity_nor_pages(self) -> None:
        case = Case((5000, 130, 4097), heads=32, kv_heads=8, page_tokens=64)
        query, kv, lengths = problem(case)
        together = run("cuda", query, kv, lengths)
        again = run("cuda", query, kv, lengths)
        assert torch.equal(together.output, again.output)
        assert kv.page_table is not None
        for row, length in enumerate(case.lengths):
            table = kv.page_table[row : row + 1].clamp(0)
            one = KvView(kv.keys, kv.values, table, kv.length).prefix(-(-length // 32) * 32).gathered()
            alone = run("cuda", query[row : row + 1], one, lengths[row : row + 1])
            assert torch.equal(alone.output[0], together.output[row])

    def test_a_captured_call_follows_the_lengths(self) -> None:
        query, kv, lengths = on("cuda", *problem(Case((3000, 2500), heads=32, kv_heads=8, capacity=4096)))
        decode_attention(query, kv, lengths)
        graph = torch.cuda.CUDAGraph()
        held = lengths.clone()
        with torch.cuda.graph(graph):
            captured = decode_attention(query, kv, held)
        for step in ((1, 2500), (2000, 129), (3000, 2500)):
            held.copy_(torch.tensor(step))
            graph.replay()
            assert torch.equal(captured.output, decode_attention(query, kv, held).output)
