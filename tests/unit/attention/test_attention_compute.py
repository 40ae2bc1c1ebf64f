"""The computation pass and `attend` as a whole: accuracy, log-sum-exp, chunks, appends, pages, non-finite input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_memory import measure_in_fresh_process
from sale_attention import (
    BlockGrid,
    HeadPlan,
    KeyCodes,
    KvView,
    LayerPolicy,
    LayerState,
    QueryCodes,
    SaleConfig,
    Selection,
    attend,
    register_backend,
)
from sale_attention.backends import _REGISTRY
from sale_attention.compute import compute_selected
from sale_attention.reference import ReferenceBackend
from sale_attention.select import pack_mask
from tests.unit.attention.naive import (
    SMALL,
    Shape,
    attended,
    causal_mask,
    exact_attention,
    grid_of,
    plan_for,
    random_problem,
)


class RecordingBackend(ReferenceBackend):
    """The reference, remembering what it selected, by absolute query block."""

    name = "recording"

    def __init__(self) -> None:
        self.words: dict[int, Tensor] = {}

    def select(
        self,
        query_codes: QueryCodes,
        key_codes: KeyCodes,
        thresholds: Tensor,
        plan: HeadPlan,
        grid: BlockGrid,
        kv: KvView,
    ) -> Selection:
        selection = super().select(query_codes, key_codes, thresholds, plan, grid, kv)
        for index in range(grid.query_blocks):
            end = max(1, grid.selectable(index)[1])
            self.words[grid.first_query_block + index] = selection.mask()[:, :, index, :end]
        return selection


@pytest.fixture
def recording() -> RecordingBackend:
    """A fresh recording backend, registered for the duration of a test: one class and one call."""
    _REGISTRY.pop("recording", None)
    backend = RecordingBackend()
    register_backend(backend)
    return backend


def random_selection(shape: Shape, density: float = 0.2) -> Selection:
    grid = grid_of(shape)
    generator = torch.Generator().manual_seed(shape.tokens)
    mask = torch.rand(shape.batch, shape.heads, grid.query_blocks, grid.key_blocks, generator=generator) < density
    for index in range(grid.query_blocks):
        start, end = grid.selectable(index)
        mask[:, :, index, :start] = False
        mask[:, :, index, end:] = False
    return Selection(pack_mask(mask), grid.key_blocks)


SHAPES = [
    *(Shape(rows, offset) for rows, offset in itertools.product((1, 31, 64, 65, 200), (0, 37, 300))),
    *(Shape(130, 101, 2 * group, 2, dim, batch=2) for group, dim in ((1, 96), (3, 128), (6, 64), (8, 256))),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_output_and_lse_on_the_selected_set(shape: Shape, dtype: torch.dtype) -> None:
    query, kv = random_problem(shape, dtype)
    scale = shape.head_dim**-0.5
    _, plan = plan_for(shape)
    selection = random_selection(shape)
    output, lse = query.new_full(query.shape, math.nan), torch.full(query.shape[:3], math.nan)
    compute_selected(query, kv, selection, plan, grid_of(shape), scale, output, lse)
    mask = torch.from_numpy(attended(selection.mask().numpy(), shape, SMALL))
    exact, exact_lse = exact_attention(query, kv, mask, scale)
    assert output.dtype == dtype
    group = shape.heads // shape.kv_heads
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (kv.keys, kv.values))
    torch_output = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    error, torch_error = ((result.double() - exact).abs().max() for result in (output, torch_output))
    assert error <= 2 * torch_error + torch.finfo(dtype).eps
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("tau", [0.0, 0.05, math.inf])
def test_attend_equals_float64_on_what_it_selected(rows: int, tau: float, recording: RecordingBackend) -> None:
    shape = Shape(rows, 333, heads=6, kv_heads=2, batch=2)
    query, kv = random_problem(shape)
    result = attend(query, kv, policy=LayerPolicy.uniform(6, tau), config=SMALL, backend="recording")
    grid = grid_of(shape)
    kept = torch.ones(2, 6, grid.query_blocks, grid.key_blocks, dtype=torch.bool)
    if tau > 0:
        kept.zero_()
        for index in range(grid.query_blocks):
            words = recording.words[grid.first_query_block + index]
            kept[:, :, index, : words.shape[-1]] = words
    mask = torch.from_numpy(attended(kept.numpy(), shape, SMALL))
    exact, exact_lse = exact_attention(query, kv, mask, shape.head_dim**-0.5)
    torch.testing.assert_close(result.output.double(), exact, atol=2e-2, rtol=1e-2)
    assert result.lse is not None
    torch.testing.assert_close(result.lse.double(), exact_lse, atol=2e-5, rtol=1e-6)


def test_heads_of_one_layer_may_be_dense_sparse_and_streaming() -> None:
    shape = Shape(300, 100, heads=6, kv_heads=2)
    query, kv = random_problem(shape)
    tau = torch.tensor([0.0, 0.05, math.inf, 0.05, 0.0, 0.0])
    policy = LayerPolicy(tau=tau, query_stride=torch.tensor([1, 2, 4, 1, 2, 4]))
    mixed = attend(query, kv, policy=policy, config=SMALL)
    for head in range(6):
        one = LayerPolicy(tau=tau[head : head + 1], query_stride=policy.query_stride[head : head + 1])
        own = slice(head // 3, head // 3 + 1)
        alone = attend(query[:, head : head + 1], KvView(kv.keys[:, own], kv.values[:, own]), policy=one, config=SMALL)
        torch.testing.assert_close(mixed.output[:, head], alone.output[:, 0], atol=1e-2, rtol=1e-2)
        assert mixed.lse is not None
        assert alone.lse is not None
        torch.testing.assert_close(mixed.lse[:, head], alone.lse[:, 0], atol=1e-5, rtol=1e-6)


def in_chunks(
    query: Tensor, kv: KvView, chunk: int, policy: LayerPolicy, config: SaleConfig, with_state: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    backend = RecordingBackend()
    _REGISTRY["recording"] = backend
    state = LayerState() if with_state else None
    outputs = []
    for start in range(0, kv.tokens, chunk):
        end = min(start + chunk, kv.tokens)
        part = attend(
            query[:, :, start:end],
            kv.prefix(end),
            policy=policy,
            config=config,
            state=state,
            prompt_end=kv.tokens,
            backend="recording",
            return_lse=False,
        )
        outputs.append(part.output)
    return torch.cat(outputs, dim=2), backend.words


@pytest.mark.parametrize("bits", [8, 4])
def test_chunks_of_512_and_2048_select_what_the_whole_selects_bit_for_bit(bits: int) -> None:
    shape = Shape(rows=4200, heads=3, kv_heads=1)
    query, kv = random_problem(shape)
    config = SaleConfig(code_bits=bits)
    policy = LayerPolicy(tau=torch.tensor([0.1, 0.2, 0.1]), query_stride=torch.tensor([1, 2, 4]))
    output, words = in_chunks(query, kv, 4200, policy, config, with_state=False)
    assert 0 < sum(int(bits.sum()) for bits in words.values()) < 3 * 66 * 131 // 4
    for chunk, with_state in ((512, True), (2048, True), (512, False)):
        chunk_output, chunk_words = in_chunks(query, kv, chunk, policy, config, with_state)
        assert chunk_words.keys() == words.keys()
        assert all(torch.equal(chunk_words[block], words[block]) for block in words)
        assert torch.equal(chunk_output, output)


def test_an_append_at_an_odd_position_continues_the_session() -> None:
    shape = Shape(rows=500)
    query, kv = random_problem(shape)
    state, policy = LayerState(), LayerPolicy.uniform(2, 0.05)
    for start, end in ((0, 301), (301, 302), (302, 415), (415, 500)):
        part = attend(query[:, :, start:end], kv.prefix(end), policy=policy, config=SMALL, state=state)
        fresh = attend(query[:, :, start:end], kv.prefix(end), policy=policy, config=SMALL)
        assert torch.equal(part.output, fresh.output)


@pytest.mark.parametrize("page_tokens", [32, 96])
@pytest.mark.parametrize("bits", [8, 4])
def test_pages_in_any_order_give_what_contiguous_keys_give(page_tokens: int, bits: int) -> None:
    shape = Shape(200, 150, heads=2, kv_heads=1, batch=2)
    query, kv = random_problem(shape)
    config = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64, code_bits=bits)
    pages_each = -(-shape.tokens // page_tokens)
    order = torch.randperm(2 * pages_each + 3, generator=torch.Generator().manual_seed(0))
    table = order[: 2 * pages_each].view(2, pages_each)
    keys, values = (torch.full((len(order), 1, page_tokens, 64), math.nan, dtype=kv.dtype) for _ in range(2))
    for row, page in itertools.product(range(2), range(pages_each)):
        start = page * page_tokens
        length = min(page_tokens, shape.tokens - start)
        keys[table[row, page], :, :length] = kv.keys[row, :, start : start + length]
        values[table[row, page], :, :length] = kv.values[row, :, start : start + length]
    paged = KvView(keys, values, table, shape.tokens)
    policy = LayerPolicy(tau=torch.tensor([0.05, 0.0]), query_stride=torch.tensor([1, 1]))
    expected = attend(query, kv, policy=policy, config=config)
    result = attend(query, paged, policy=policy, config=config, state=LayerState())
    assert torch.equal(result.output, expected.output)
    assert result.lse is not None
    assert expected.lse is not None
    assert torch.equal(result.lse, expected.lse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_key_shows_in_the_rows_where_exact_softmax_shows_it(value: float) -> None:
    shape = Shape(rows=500, heads=1)
    query, kv = random_problem(shape)
    kv.keys[0, 0, 100, 3] = value
    # So high a threshold keeps nothing but what cannot be judged.
    result = attend(query, kv, policy=LayerPolicy.uniform(1, tau=1e4), config=SMALL).output
    exact, _ = exact_attention(query, kv, causal_mask(shape), shape.head_dim**-0.5)
    assert torch.equal(result.isfinite(), exact.isfinite())
    assert not bool(result[:, :, 300:].isfinite().all())


def test_a_non_finite_query_shows_in_its_own_row_only() -> None:
    shape = Shape(rows=500, heads=1)
    query, kv = random_problem(shape)
    query[0, 0, 300, 3] = math.nan
    output = attend(query, kv, policy=LayerPolicy.uniform(1, 0.05), config=SMALL).output
    rows_with_nan = output[0, 0].isnan().any(-1).nonzero().flatten().tolist()
    assert rows_with_nan == [300]


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    growth = {n: measure_in_fresh_process(n, 64, tau=10.0)["peak_growth_bytes"] for n in (8192, 16384)}
    assert 1e6 < growth[16384] < 2.5 * growth[8192]
    # One byte a pair would be 268 MB.
    assert growth[16384] < 100e6


def test_everything_dense_equals_exact_attention() -> None:
    shape = Shape(rows=70, offset=20, heads=4, kv_heads=2)
    query, kv = random_problem(shape)
    exact, exact_lse = exact_attention(query, kv, causal_mask(shape), 0.2)
    for arguments in ({"dense": True}, {"backend": "dense"}, {"config": SaleConfig()}):
        result = attend(query, kv, scale=0.2, **arguments)
        torch.testing.assert_close(result.output.double(), exact, atol=2e-2, rtol=1e-2)
        assert result.lse is not None
        torch.testing.assert_close(result.lse.double(), exact_lse, atol=1e-5, rtol=1e-6)


def test_gradients_flow_because_the_call_goes_dense() -> None:
    query, kv = random_problem(Shape(rows=200), torch.float32)
    query.requires_grad_()
    output = attend(query, kv, config=SMALL, return_lse=False).output
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert bool(gradient.isfinite().all())
