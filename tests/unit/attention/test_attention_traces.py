"""On a real model's queries and keys, density and error are those measured when the method was chosen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sale_attention import AttentionStatistics, KvView, LayerPolicy, LayerState, attend

TRACES = Path(os.environ.get("SALE_PREFILL_TRACES", Path(__file__).parents[4] / "shared" / "traces"))

# Density and L1 error of three heads a trace at tau 0.004, published with the traces.
PUBLISHED = {
    "layer09_kv0": ((0.054, 0.108, 0.056), (0.076, 0.039, 0.034)),
    "layer13_kv0": ((0.240, 0.032, 0.090), (0.028, 0.016, 0.101)),
    "layer17_kv1": ((0.159, 0.049, 0.199), (0.130, 0.026, 0.109)),
    "layer25_kv1": ((0.278, 0.379, 0.206), (0.069, 0.034, 0.050)),
}


def sampled_density_and_error(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Means by head over query blocks sampled from the last three quarters of the prompt, as the published figures."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    query, keys, values = (tensors[name].unsqueeze(0) for name in "qkv")
    state, policy = LayerState(), LayerPolicy.uniform(query.shape[1])
    densities, differences, magnitudes = [], [], []
    for end in range(8192 + 1024, keys.shape[2] + 1, 1024):
        rows, kv, statistics = query[:, :, end - 64 : end], KvView(keys, values, length=end), AttentionStatistics()
        sparse = attend(rows, kv, policy=policy, state=state, statistics=statistics, return_lse=False).output.float()
        dense = attend(rows, kv, dense=True, return_lse=False).output.float()
        densities.append(statistics.computed_blocks[0] / statistics.causal_blocks[0])
        differences.append((sparse - dense).abs().sum(dim=(0, 2, 3)))
        magnitudes.append(dense.abs().sum(dim=(0, 2, 3)))
    error = torch.stack(differences).sum(0) / torch.stack(magnitudes).sum(0)
    return torch.stack(densities).mean(0), error


def test_density_and_error_of_real_heads_at_the_default_threshold() -> None:
    paths = {name: TRACES / f"qwen2.5-coder-1.5b_code32k_{name}.safetensors" for name in PUBLISHED}
    missing = [path.name for path in paths.values() if not path.exists()]
    if missing:
        pytest.skip(f"no attention traces {missing} in {TRACES}; set SALE_PREFILL_TRACES to the folder that holds them")
    measured = [sampled_density_and_error(path) for path in paths.values()]
    density, error = (torch.cat([result[index] for result in measured]) for index in range(2))
    published_density, published_error = (
        torch.tensor([figure for figures in PUBLISHED.values() for figure in figures[index]]) for index in range(2)
    )
    # Other blocks were sampled then: heads scatter, their mean does not.
    assert density.mean().item() == pytest.approx(published_density.mean().item(), rel=0.1)
    assert error.mean().item() == pytest.approx(published_error.mean().item(), rel=0.15)
    assert bool(((density / published_density).log().abs() < 0.5).all())
