"""KV in files: what is read is what was written, or an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from transformers import DynamicCache

from sale_prefill_client import Attention, KvCache, KvSpec, errors, token_digest

LAYERS, TOKENS, HEADS, DIM = 2, 5, 3, 4
SPEC = KvSpec("model", "bfloat16", None, LAYERS, HEADS, DIM, True, "rope")
IDS = [5, 1, 4, 2, 3]


def random_kv(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """`[layers, 2, tokens, heads, dim]`."""
    return torch.randn(LAYERS, 2, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


def cache_of(**options: Any) -> KvCache:
    return KvCache.from_torch(random_kv(), SPEC, **{"token_ids": IDS, **options})


@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_a_saved_cache_is_loaded_as_it_was(tmp_path: Path, layout: str) -> None:
    tensor = random_kv() if layout == "THD" else random_kv().transpose(2, 3)
    cache = KvCache.from_torch(
        tensor, SPEC, token_ids=IDS, layout=layout, session_id="s", attention=Attention.sale(0.01, 2)
    )
    cache.save(tmp_path / "kv.safetensors")
    loaded = KvCache.load(tmp_path / "kv.safetensors")
    assert torch.equal(loaded.torch(), tensor)
    for name in ("session_id", "spec", "token_start", "token_end", "layer_start", "layer_end", "generation"):
        assert getattr(loaded, name) == getattr(cache, name)
    assert loaded.attention == cache.attention
    assert loaded.token_digest == token_digest(IDS)
    assert loaded.token_ids is not None
    assert loaded.token_ids.tolist() == IDS
    assert [path.name for path in tmp_path.iterdir()] == ["kv.safetensors"]


def test_any_safetensors_reader_finds_the_layers(tmp_path: Path) -> None:
    cache_of().save(tmp_path / "kv.safetensors")
    with safetensors.safe_open(tmp_path / "kv.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["layers.0.key", "layers.0.value", "layers.1.key", "layers.1.value"]
        assert torch.equal(file.get_tensor("layers.1.value"), random_kv()[1, 1])
        assert file.metadata()["model_fingerprint"] == "model"


def test_a_loaded_file_is_mapped_and_never_written_to(tmp_path: Path) -> None:
    cache_of().save(tmp_path / "kv.safetensors")
    before = (tmp_path / "kv.safetensors").read_bytes()
    loaded = KvCache.load(tmp_path / "kv.safetensors")
    base: Any = loaded.buffer
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert loaded.buffer.ctypes.data % 64 == 0
    loaded.torch()[:] = 0
    assert (tmp_path / "kv.safetensors").read_bytes() == before


def test_every_flipped_and_every_missing_byte_is_caught(tmp_path: Path) -> None:
    file = tmp_path / "kv.safetensors"
    cache_of().save(file)
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        with pytest.raises(errors.ChecksumMismatchError):
            KvCache.load(file)
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(errors.ChecksumMismatchError):
            KvCache.load(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(errors.ChecksumMismatchError, match="its header tells of"):
        KvCache.load(file)


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kv.safetensors"
    cache_of().save(file)
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(errors.ChecksumMismatchError) as caught:
        KvCache.load(file)
    assert caught.value.metadata == {"file": str(file), "tensor": "layers.1.value"}


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    safetensors.serialize_file({}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="without a KV manifest"):
        KvCache.load(tmp_path / "other.safetensors")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_of().save(tmp_path / "kv.safetensors")
    before = (tmp_path / "kv.safetensors").read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        cache_of(session_id="other").save(tmp_path / "kv.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["kv.safetensors"]
    assert (tmp_path / "kv.safetensors").read_bytes() == before


def test_numpy_and_torch_share_their_memory() -> None:
    tensor = random_kv()
    assert KvCache.from_torch(tensor, SPEC).torch().data_ptr() == tensor.data_ptr()
    array = tensor.view(torch.uint16).numpy()
    assert KvCache.from_numpy(array, SPEC).buffer.ctypes.data == array.ctypes.data


def test_a_dynamic_cache_goes_both_ways() -> None:
    cache = cache_of()
    back = KvCache.from_dynamic_cache(cache.to_dynamic_cache(), SPEC, token_ids=IDS)
    assert np.array_equal(back.buffer, cache.buffer)
    assert back.spec.layout == "THD"
    assert back.token_digest == token_digest(IDS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KvCache.from_torch(random_kv(torch.float32), SPEC), "the tensor is torch.float32"),
        (lambda: KvCache.from_torch(random_kv()[:1], SPEC), r"with 3 heads"),
        (lambda: KvCache.from_torch(random_kv(), SPEC, layout="HTD"), r"heads, tokens"),
        (lambda: KvCache.from_numpy(np.zeros(3, np.uint16), SPEC), r"the array is uint16 \[3\]"),
        (lambda: cache_of(token_ids=[1]), "there are 1 token ids, and the array holds 5"),
        (lambda: KvCache.from_dynamic_cache(DynamicCache(), SPEC), "the cache has 0 layers"),
    ],
)
def test_kv_of_another_shape_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
