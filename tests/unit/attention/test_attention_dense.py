"""Dense attention: transformers' bits, any chunking, windows, grouped heads, log-sum-exp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sale_attention import AttentionStatistics, KvView, LayerCall, LayerPolicy, attend
from sale_attention.dense import dense_attention, dense_log_sum_exp
from sale_attention.reference import ReferenceBackend
from tests.conformance.calls import registered
from tests.unit.attention.naive import SMALL, Shape, causal_mask, exact_attention, random_problem


class AttentionLayer(nn.Module):
    """What transformers reads from a model's attention layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def transformers_sdpa(query: torch.Tensor, kv: KvView, scale: float) -> torch.Tensor:
    layer = AttentionLayer(query.shape[1] // kv.kv_heads)
    output, _ = sdpa_attention_forward(layer, query, kv.keys, kv.values, None, scaling=scale)
    result: torch.Tensor = output.transpose(1, 2)
    return result


@pytest.mark.parametrize("groups", [1, 3, 6, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shape", [(1, 0), (1, 99), (1, 1500), (2, 0), (700, 0), (1300, 0)])
def test_prefill_in_one_go_and_decode_have_the_bits_of_transformers_sdpa(
    shape: tuple[int, int], groups: int, head_dim: int
) -> None:
    rows, offset = shape
    problem = Shape(rows, offset, 2 * groups, 2, head_dim)
    query, kv = random_problem(problem)
    # Models hand over transposed views, not contiguous tensors.
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    scale = head_dim**-0.5
    assert torch.equal(dense_attention(query, kv, scale=scale), transformers_sdpa(query, kv, scale))


@pytest.mark.parametrize("chunk", [512, 1024, 2048])
def test_chunks_have_the_bits_of_the_whole_prompt(chunk: int) -> None:
    query, kv = random_problem(Shape(4096, 0, 3, 1))
    whole = dense_attention(query, kv, scale=0.125)
    for start in range(0, 4096, chunk):
        part = dense_attention(query[:, :, start : start + chunk], kv.prefix(start + chunk), scale=0.125)
        assert torch.equal(part, whole[:, :, start : start + chunk])


@pytest.mark.parametrize("shape", [Shape(1, 300), Shape(33, 300, 6, 2, 96, 2), Shape(300, 37), Shape(1100, 77)])
@pytest.mark.parametrize("window", [None, 1, 40, 5000])
def test_output_and_lse_against_float64(shape: Shape, window: int | None) -> None:
    query, kv = random_problem(shape)
    exact, exact_lse = exact_attention(query, kv, causal_mask(shape, window), 0.1)
    output = dense_attention(query, kv, scale=0.1, window=window)
    torch.testing.assert_close(output.double(), exact, atol=2e-2, rtol=1e-2)
    lse = dense_log_sum_exp(query, kv, scale=0.1, window=window)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-6)


def test_values_may_be_narrower_than_keys() -> None:
    shape = Shape(100, 30, 4, 2, 96)
    query, kv = random_problem(shape, torch.float32)
    kv = KvView(kv.keys, kv.values[..., :64])
    exact, _ = exact_attention(query, kv, causal_mask(shape), 0.1)
    torch.testing.assert_close(dense_attention(query, kv, scale=0.1).double(), exact, atol=1e-5, rtol=1e-5)


def test_long_chunks_use_smaller_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    query, kv = random_problem(Shape(2048, 1024))
    expected = dense_attention(query, kv, scale=0.1)
    monkeypatch.setattr("sale_attention.dense._MASK_ELEMENTS", 1 << 20)
    assert torch.equal(dense_attention(query, kv, scale=0.1), expected)


class DenseTakingBackend(ReferenceBackend):
    """A backend whose kernel is faster than torch's SDPA, as it says; counts its calls."""

    name = "dense-taking"
    calls = 0

    def takes_dense(self, query: torch.Tensor, kv: KvView) -> bool:
        return True

    def attend_all(self, *arguments: Any) -> None:
        self.calls += 1
        super().attend_all(*arguments)


@pytest.mark.parametrize(("rows", "window", "taken"), [(300, None, True), (1, None, False), (300, 40, False)])
def test_a_backend_may_take_dense_calls_of_several_rows(rows: int, window: int | None, taken: bool) -> None:
    shape = Shape(rows, 137, 6, 2)
    query, kv = random_problem(shape)
    backend = DenseTakingBackend()
    with registered(backend) as name:
        result = attend(query, kv, scale=0.1, backend=name, dense=True, window=window)
    exact, exact_lse = exact_attention(query, kv, causal_mask(shape, window), 0.1)
    assert backend.calls == taken
    assert result.lse is not None
    assert torch.allclose(result.output.double(), exact, atol=2e-2)
    assert torch.allclose(result.lse.double(), exact_lse, atol=1e-3)


class LayerBackend(ReferenceBackend):
    """A backend that counts the layers it is handed as a whole."""

    name = "layer"
    calls = 0

    def attend_layer(self, call: LayerCall) -> None:
        self.calls += 1
        super().attend_layer(call)


@pytest.mark.parametrize(("rows", "offset", "layers"), [(300, 0, 1), (250, 37, 1), (200, 64, 1), (50, 0, 0)])
@pytest.mark.parametrize("dense_heads", [0, 1, 6])
def test_a_backend_is_handed_the_layer_as_a_whole_where_rows_are_sparse(
    rows: int, offset: int, layers: int, dense_heads: int
) -> None:
    query, kv = random_problem(Shape(rows, offset, 6, 2))
    policy = LayerPolicy(torch.tensor([0.0] * dense_heads + [0.1] * (6 - dense_heads)), torch.ones(6))
    backend, statistics = LayerBackend(), AttentionStatistics()
    with registered(backend) as name:
        result = attend(query, kv, policy=policy, config=SMALL, backend=name, statistics=statistics)
        silent = attend(query, kv, policy=policy, config=SMALL, backend=name, return_lse=False)
    assert backend.calls == (0 if dense_heads == 6 else 2 * layers)
    assert silent.lse is None
    assert torch.equal(silent.output, result.output)
    assert 0 < statistics.density <= 1
    assert statistics.rows == 6 * rows


def test_gradients_flow_though_a_backend_takes_dense_calls() -> None:
    query, kv = random_problem(Shape(40, 9))
    with registered(DenseTakingBackend()) as name:
        output = attend(query.requires_grad_(), kv, backend=name, dense=True, return_lse=False).output
    output.float().sum().backward()
    assert query.grad is not None
