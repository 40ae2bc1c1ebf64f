"""The backend for long measurements: float32 in and out, attention in float16."""

from __future__ import annotations

import pytest
import torch

from sale_attention import AttentionStatistics, KvView, LayerPolicy, attend
from sale_fidelity import half
from tests.unit.attention.naive import SMALL, Shape, random_problem


@pytest.mark.parametrize("dense", [False, True])
def test_results_are_those_of_float16_in_the_dtype_that_came_in(dense: bool) -> None:
    query, kv = random_problem(Shape(300, 0, 4, 2))
    query, kv = query.float(), KvView(kv.keys.float(), kv.values.float())
    policy, found, expected = LayerPolicy.uniform(4, tau=0.5), AttentionStatistics(), AttentionStatistics()
    result = attend(query, kv, policy=policy, config=SMALL, backend=half.NAME, dense=dense, statistics=found)
    rounded = KvView(kv.keys.half(), kv.values.half())
    kernels = attend(
        query.half(), rounded, policy=policy, config=SMALL, backend="cuda", dense=dense, statistics=expected
    )
    assert result.output.dtype == torch.float32
    assert found.density == expected.density
    assert torch.allclose(result.output, kernels.output.float(), atol=2e-3)
