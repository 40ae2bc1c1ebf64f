"""The pinned quantiser: hand-computed codes, special values, Hadamard, centres, chunk independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sale_attention import KvView, SaleConfig
from sale_attention.quantise import (
    default_key_centre,
    hadamard_transform,
    quantise_groups,
    quantise_key,
    quantise_query,
    query_block_means,
)
from tests.unit.attention.naive import SMALL, Shape, grid_of, random_problem

FOUR_BIT = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64, code_bits=4)
TINY = torch.finfo(torch.float32).tiny


def codes_of(values: list[float], limit: int) -> tuple[list[int], float]:
    tensor = torch.tensor([values])
    codes, scales = quantise_groups(tensor, tensor.abs().amax(-1), limit)
    return codes[0].tolist(), scales[0].item()


def test_codes_of_a_row_worked_out_by_hand() -> None:
    # amax 127, scale 1: ties go to the even neighbour.
    assert codes_of([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], 127) == ([127, 0, 2, 2, 0, -2, -2, 126], 1.0)
    # amax 14, limit 7, scale 2.
    assert codes_of([14.0, -14.0, 1.0, 3.0, 5.0, -7.0], 7) == ([7, -7, 0, 2, 2, -4], 2.0)


def test_scale_is_the_ieee_quotient_not_a_product_with_the_reciprocal() -> None:
    values = torch.linspace(0.01, 3.0, 4001)
    _, scales = quantise_groups(values.unsqueeze(1), values, 127)
    assert np.array_equal(scales.numpy(), values.numpy() / np.float32(127))
    assert not np.array_equal(scales.numpy(), values.numpy() * (np.float32(1) / np.float32(127)))


def test_zero_and_subnormal_rows_get_the_smallest_normal_scale() -> None:
    assert codes_of([0.0, -0.0], 127) == ([0, 0], TINY)
    codes, scale = codes_of([1e-45, 0.0], 127)
    assert (codes, scale) == ([0, 0], TINY)


def test_non_finite_elements_show_in_the_scale_and_give_code_zero() -> None:
    codes, scale = codes_of([1.0, math.nan, 3.0], 127)
    assert codes == [0, 0, 0]
    assert math.isnan(scale)
    codes, scale = codes_of([1.0, -math.inf, 3.0], 127)
    assert codes == [0, 0, 0]
    assert scale == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_keys_are_centred_and_scaled_by_32_key_block(dtype: torch.dtype) -> None:
    _, kv = random_problem(Shape(rows=75, heads=2, kv_heads=2, batch=2), dtype)
    centre = default_key_centre(kv, SMALL)
    result = quantise_key(kv, centre, SMALL)
    keys = kv.keys.float().numpy() - centre.numpy()[:, :, None]
    for block in range(3):
        group = keys[:, :, block * 32 : block * 32 + 32]
        scale = np.maximum(np.abs(group).max(axis=(2, 3)) / np.float32(127), TINY)
        assert np.array_equal(result.scales[:, :, block].numpy(), scale)
        codes = np.clip(np.rint(group / scale[:, :, None, None]), -127, 127).astype(np.int8)
        assert np.array_equal(result.codes[:, :, block * 32 : block * 32 + 32].numpy(), codes)


def test_keys_longer_than_one_piece_are_quantised_as_if_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, kv = random_problem(Shape(rows=300))
    centre = default_key_centre(kv, SMALL)
    whole = quantise_key(kv, centre, SMALL)
    monkeypatch.setattr("sale_attention.quantise._PIECE_TOKENS", 64)
    pieces = quantise_key(kv, centre, SMALL)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scales, pieces.scales)


def test_eight_bit_queries_are_scaled_by_row_and_not_centred() -> None:
    shape = Shape(rows=70, offset=33)
    query, _ = random_problem(shape)
    result = quantise_query(query, grid_of(shape), SMALL)
    rows = query.float().numpy()
    scale = np.abs(rows).max(axis=-1) / np.float32(127)
    assert result.block_means is None
    assert np.array_equal(result.scales.numpy(), scale)
    assert np.array_equal(result.codes.numpy(), np.rint(rows / scale[..., None]).astype(np.int8))


def test_four_bit_queries_lose_the_mean_of_their_own_block_and_are_rotated() -> None:
    shape = Shape(rows=70, offset=33)
    query, _ = random_problem(shape)
    result = quantise_query(query, grid_of(shape), FOUR_BIT)
    assert result.block_means is not None
    assert int(result.codes.abs().max()) == 7
    for index, (start, end) in enumerate([(0, 31), (31, 70)]):
        block = query[:, :, start:end].float()
        mean = block.mean(2, keepdim=True)
        torch.testing.assert_close(result.block_means[:, :, index], mean.squeeze(2))
        back = result.codes[:, :, start:end].float() * result.scales[:, :, start:end, None]
        bound = (result.scales[:, :, start:end, None] * 0.501).expand_as(back)
        assert bool(((back - hadamard_transform(block - mean)).abs() <= bound).all())


@pytest.mark.parametrize(("dim", "size"), [(64, 64), (128, 128), (256, 256), (96, 32), (80, 16), (8, 8)])
def test_hadamard_is_the_orthonormal_matrix_of_the_largest_power_of_two(dim: int, size: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = torch.kron(torch.eye(dim // size, dtype=torch.float64), matrix / math.sqrt(size))
    values = torch.randn(5, dim, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hadamard_transform(values).double(), values.double() @ blocks, atol=1e-5, rtol=1e-5)


def test_rotation_keeps_inner_products() -> None:
    a, b = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close((hadamard_transform(a) * hadamard_transform(b)).sum(-1), (a * b).sum(-1))


def test_default_centre_is_the_mean_of_the_first_keys_whatever_follows() -> None:
    _, kv = random_problem(Shape(rows=200))
    expected = kv.keys[:, :, :64].double().mean(2).float()
    assert torch.equal(default_key_centre(kv, SMALL), expected)
    assert torch.equal(default_key_centre(kv.prefix(100), SMALL), expected)
    strided = KvView(kv.keys.transpose(1, 2).contiguous().transpose(1, 2), kv.values)
    assert torch.equal(default_key_centre(strided, SMALL), expected)


def test_query_block_means_do_not_depend_on_the_chunk() -> None:
    shape = Shape(rows=256)
    query, _ = random_problem(shape)
    whole = query_block_means(query, grid_of(shape))
    second = query_block_means(query[:, :, 128:], grid_of(Shape(rows=128, offset=128)))
    assert torch.equal(whole[:, :, 2:], second)
