"""KV as numpy arrays, torch tensors and a transformers cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from sale_prefill_client import KvCache, KvSpec

LAYERS, TOKENS, HEADS, DIM = 2, 5, 3, 4


def cache_of(element_type: str, layout: str = "THD", **part: Any) -> tuple[torch.Tensor, KvCache]:
    """Random KV `[layers, 2, tokens, heads, dim]`, and the cache that holds it in `layout`."""
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(LAYERS, 2, TOKENS, HEADS, DIM, generator=generator).to(getattr(torch, element_type))
    stored = kv if layout == "THD" else kv.transpose(2, 3).contiguous()
    spec = KvSpec("m", element_type, layout, LAYERS, HEADS, DIM, True, "r")  # type: ignore[arg-type]
    place = {"token_start": 0, "token_end": TOKENS, "layer_start": 0, "layer_end": LAYERS, **part}
    return kv, KvCache("s", spec, generation=1, token_digest=b"", buffer=stored.view(torch.uint8).numpy(), **place)


@pytest.mark.parametrize("element_type", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_torch_views_have_the_native_type_and_share_memory(element_type: str) -> None:
    kv, cache = cache_of(element_type)
    assert cache.torch().dtype is getattr(torch, element_type)
    assert torch.equal(cache.torch().view(torch.uint8), kv.view(torch.uint8))
    assert cache.torch().data_ptr() == cache.buffer.ctypes.data


def test_bfloat16_in_numpy_is_bit_patterns_or_float32() -> None:
    kv, cache = cache_of("bfloat16")
    assert cache.numpy().dtype == np.uint16
    np.testing.assert_array_equal(cache.numpy(), kv.view(torch.uint16).numpy())
    np.testing.assert_array_equal(cache.numpy(as_float32=True), kv.float().numpy())


def test_other_types_in_numpy() -> None:
    kv, cache = cache_of("float16")
    np.testing.assert_array_equal(cache.numpy(), kv.numpy())
    np.testing.assert_array_equal(cache.numpy(as_float32=True), kv.float().numpy())
    with pytest.raises(ValueError, match=r"use torch\(\).float\(\)"):
        cache_of("float8_e4m3fn")[1].numpy(as_float32=True)


@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_layers_go_by_their_number_in_the_model(layout: str) -> None:
    kv, cache = cache_of("float32", layout, layer_start=4, layer_end=6)
    keys, values = cache.layer(5)
    expected = kv[1] if layout == "THD" else kv[1].transpose(1, 2)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    with pytest.raises(IndexError, match=r"layer 1 is not held; this cache has layers 4\.\.5"):
        cache.layer(1)


@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_a_dynamic_cache_holds_batch_1_heads_first(layout: str) -> None:
    kv, cache = cache_of("bfloat16", layout)
    dynamic = cache.to_dynamic_cache()
    assert isinstance(dynamic, DynamicCache)
    assert dynamic.get_seq_length() == TOKENS
    for layer, expected in zip(dynamic.layers, kv, strict=True):
        assert torch.equal(layer.keys, expected[0].transpose(0, 1)[None])
        assert torch.equal(layer.values, expected[1].transpose(0, 1)[None])


@pytest.mark.parametrize(
    "part", [{"token_start": 1, "token_end": 6}, {"layer_start": 1, "layer_end": 3}, {"layer_end": 1}]
)
def test_part_of_a_session_makes_no_dynamic_cache(part: dict[str, Any]) -> None:
    _, cache = cache_of("float32", **part)
    with pytest.raises(ValueError, match="Pull the whole session"):
        cache.to_dynamic_cache()
