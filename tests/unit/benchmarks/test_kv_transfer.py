"""The benchmarks of segments run, on KV too small to mean anything, and their bytes are right."""

from __future__ import annotations

import pytest

from benchmarks import kv_gpu, kv_handover_rows, kv_shm
from benchmarks.kv_served import KvSize


@pytest.mark.parametrize("fragmented", [False, True])
def test_streams_come_with_a_memcpy_of_the_same_bytes(fragmented: bool) -> None:
    size = KvSize(layers=2, heads=2, head_dim=16, tokens=1024)
    rates = kv_shm.measure(size, "xxh3_64", chunk_bytes=2**16, pairs=2, fragmented=fragmented)
    assert min(rates.memcpy, rates.pull, rates.push, rates.push_in_place, rates.fresh, rates.memcpy_fresh) > 0
    first, *_ = kv_handover_rows.shared_memory_rows("small", rates)
    assert first.passed == (rates.pull_share >= 0.5)


def test_what_is_handed_over_beside_messages_is_what_comes_in_them() -> None:
    rows = kv_gpu.measure(600, "cpu", tiny=True, traces=None)
    assert [row.passed for row in rows if row.required == "equal"] == [True, True]
    assert len(rows) == 4
