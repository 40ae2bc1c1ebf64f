"""The benchmarks of segments run, on KV too small to mean anything, and their bytes are right."""

from __future__ import annotations

import pytest

from benchmarks import kv_gpu_transfer, kv_shm
from benchmarks.kv_segment_server import KvSize, serving


def test_rates_of_shared_memory_come_with_those_of_memcpy() -> None:
    rates = kv_shm.measure("crc32c", KvSize(layers=1, tokens=512, run_pages=1), chunk_bytes=2**16, repeats=1)
    assert min(rates.fresh, rates.warm, rates.memcpy_fresh, rates.memcpy_warm) > 0
    assert rates.warm_share == rates.warm / rates.memcpy_warm


@pytest.mark.parametrize("run_pages", [0, 1, 2])
def test_every_byte_arrives_from_scattered_pages(run_pages: int) -> None:
    size = KvSize(layers=2, heads=2, head_dim=16, tokens=1024, run_pages=run_pages)
    with serving(size) as stub:
        assert kv_gpu_transfer.check(stub, size, "shm", "crc32c", 5000)
        found = kv_gpu_transfer.measure(stub, size, "shm", "none", 2**20, 1)
    assert found["gb_per_second"] > 0
