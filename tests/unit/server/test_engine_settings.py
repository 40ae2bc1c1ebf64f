"""What a session's settings make of the engine's geometry."""

from __future__ import annotations

from pathlib import Path

import torch

from sale_attention import SaleConfig
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.model import load_model
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings
from sale_prefill_server.kv.pool import KvPool

OWN = AttentionSettings(AttentionMode.SALE, 0.004, 1)


def test_a_threshold_of_the_callers_means_the_same_with_a_profile_and_without(tiny_model: Path) -> None:
    """A profile's thresholds may be relative to a sample of the whole row; a caller's are the paper's."""
    model = load_model(tiny_model, "tiny", device=torch.device("cpu"), dtype="float32")
    with_profile = SaleConfig(sample_stride=32)
    for crossover in (False, True):
        engine = Engine(
            model,
            KvPool(model.kv_shape, 1 << 28),
            OWN,
            with_profile,
            chunk_tokens=512,
            attention_backend="auto",
            crossover=crossover,
        )
        assert engine.geometry(OWN).sample_stride == 0
        assert engine.config.sample_stride == 32
