"""The "masked" backend equals the reference: same blocks, same outputs, in fewer and larger operations."""

from __future__ import annotations

import pytest
import torch

from sale_attention import AttentionStatistics, LayerPolicy, SaleConfig, attend
from sale_fidelity import masked
from tests.unit.attention.naive import SMALL, Shape, random_problem

POLICY = LayerPolicy(tau=torch.tensor([0.02, 0.1, 0.0, float("inf")]), query_stride=torch.tensor([1, 4, 1, 1]))


@pytest.mark.parametrize("shape", [Shape(333, heads=4, kv_heads=2), Shape(100, offset=413, heads=4, kv_heads=1)])
def test_blocks_and_outputs_are_the_references(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "_PIECE_SCORES", 128 * shape.tokens)  # several pieces
    query, kv = random_problem(shape)
    outputs, computed = [], []
    for backend in ("reference", masked.NAME):
        statistics = AttentionStatistics()
        result = attend(query, kv, policy=POLICY, config=SMALL, backend=backend, statistics=statistics)
        assert result.lse is not None
        outputs.append((result.output.float(), result.lse))
        computed.append(statistics.computed_blocks[0])
    assert torch.equal(*computed)
    assert int(computed[0].sum()) > 0
    for expected, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)


def test_four_bit_codes_are_refused_and_run_dense() -> None:
    query, kv = random_problem(Shape(256))
    statistics = AttentionStatistics()
    config = SaleConfig(local_tokens=64, dense_rows=64, centre_tokens=64, code_bits=4)
    attend(query, kv, config=config, backend=masked.NAME, statistics=statistics)
    assert any("8-bit" in reason for reason in statistics.unsupported_reasons)
