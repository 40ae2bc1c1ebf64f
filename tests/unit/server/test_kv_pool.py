"""KV memory: appended in place, within a budget, returned to the byte."""

from __future__ import annotations

import pytest
import torch

from sale_prefill_server.kv.pool import KvCapacityError, KvPool, KvShape

SHAPE = KvShape(num_layers=2, num_kv_heads=3, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 3, count, 4, generator=torch.Generator().manual_seed(seed))


def test_bytes_per_token_counts_keys_and_values_of_all_layers() -> None:
    assert SHAPE.bytes_per_token == 2 * 2 * 3 * 4 * 4


def test_what_is_appended_is_read_back_across_growth() -> None:
    kv = KvPool(SHAPE, 2**20).create()
    kv.reserve(100)
    first, second = rows(100, 1), rows(60, 2)
    for layer in range(2):
        kv.append(layer, first, -first)
    early_keys, _ = kv.view(0, 100)
    kv.reserve(160)
    keys, values = kv.append(0, second, -second)
    torch.testing.assert_close(keys, torch.cat([first, second], 2), rtol=0, atol=0)
    torch.testing.assert_close(values, -keys, rtol=0, atol=0)
    torch.testing.assert_close(early_keys, first, rtol=0, atol=0)
    assert (kv.length(0), kv.length(1), kv.num_tokens) == (160, 100, 100)


def test_memory_that_runs_out_in_the_middle_of_growth_leaves_keys_and_values_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kv = KvPool(SHAPE, 1 << 20).create()
    kv.reserve(128)
    kv.make_room(128)
    kv.reserve(256)
    allocate, calls = kv._allocate, []

    def second_fails(num_tokens: int) -> torch.Tensor:
        calls.append(num_tokens)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("none left")
        return allocate(num_tokens)

    monkeypatch.setattr(kv, "_allocate", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        kv.make_room(129)
    assert [buffer.shape[2] for buffer in kv.buffers(0)] == [128, 128]
    kv.make_room(129)
    assert [buffer.shape[2] for buffer in kv.buffers(0)] == [256, 256]


def test_truncation_forgets_half_written_layers() -> None:
    kv = KvPool(SHAPE, 2**20).create()
    kv.reserve(64)
    kv.append(0, rows(40, 1), rows(40, 2))
    kv.truncate(0)
    assert (kv.length(0), kv.num_tokens) == (0, 0)


def test_an_append_past_the_reservation_is_a_mistake() -> None:
    kv = KvPool(SHAPE, 2**20).create()
    kv.reserve(128)
    with pytest.raises(ValueError, match="129 tokens do not fit the 128 reserved"):
        kv.append(0, rows(129, 1), rows(129, 2))


def test_the_budget_holds_and_comes_back_whole() -> None:
    pool = KvPool(SHAPE, 256 * SHAPE.bytes_per_token)
    first, second = pool.create(), pool.create()
    first.reserve(1)
    second.reserve(128)
    assert pool.used_bytes == pool.capacity_bytes  # capacities go in steps of 128 tokens
    with pytest.raises(KvCapacityError) as caught:
        first.reserve(129)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (128 * SHAPE.bytes_per_token, 0)
    second.release()
    first.reserve(129)
    first.release()
    assert pool.used_bytes == 0


def test_a_freed_cache_cannot_be_taken_again() -> None:
    kv = KvPool(SHAPE, 2**20).create()
    kv.release()
    with pytest.raises(ValueError, match="freed already"):
        kv.acquire()
