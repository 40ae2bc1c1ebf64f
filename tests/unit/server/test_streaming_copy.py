"""Copies past the caches: the same bytes, whatever their number and alignment, with or without a compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from sale_attention.jit import BuildPlan, KernelBuildError, build, kernel_source_root
from sale_prefill_server.transfer import streaming_copy


@pytest.fixture
def built_anew() -> Iterator[None]:
    """Nothing is remembered of this test's build."""
    streaming_copy._library.cache_clear()
    yield
    streaming_copy._library.cache_clear()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 127, 128, 129, 1000, 65536, 65599])
@pytest.mark.parametrize("offset", [0, 1, 31, 32, 63])
def test_what_is_copied_is_all_of_it_and_nothing_else(size: int, offset: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size + 8, dtype=np.uint8)[7 : 7 + size]
    memory = np.full(size + 256, 0xAA, dtype=np.uint8)
    target = memory[offset : offset + size]
    streaming_copy.streaming_copy(target, source)
    np.testing.assert_array_equal(target, source)
    assert (memory[:offset] == 0xAA).all()
    assert (memory[offset + size :] == 0xAA).all()


def test_without_a_compiler_copies_are_plain_and_that_is_said(
    built_anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(plan: object) -> None:
        raise KernelBuildError("no compiler")

    monkeypatch.setattr(streaming_copy, "build", fails)
    target = np.zeros(100, dtype=np.uint8)
    for _ in range(2):
        streaming_copy.streaming_copy(target, np.ones(100, dtype=np.uint8))
    assert target.all()
    assert not streaming_copy.can_gather()
    assert caplog.text.count("no compiler") == 1


def test_pieces_are_gathered_in_order() -> None:
    generator = np.random.default_rng(0)
    pieces = [generator.integers(0, 256, size, dtype=np.uint8) for size in (5, 0, 1000, 64, 1)]
    target = np.full(1080, 0xAA, dtype=np.uint8)
    addresses = [piece.ctypes.data for piece in pieces]
    streaming_copy.gather(target.ctypes.data, addresses, [piece.size for piece in pieces])
    np.testing.assert_array_equal(target[:1070], np.concatenate(pieces))
    assert (target[1070:] == 0xAA).all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sizes", [(241,), (0, 300, 1, 64), (1024,), (1024, 1024), (1025, 63, 5000), (70_000, 3, 4096)])
def test_runs_are_copied_and_digested_in_one_call(sizes: tuple[int, ...], shared: bool) -> None:
    generator = np.random.default_rng(sum(sizes))
    sources = [generator.integers(0, 256, size + 8, dtype=np.uint8)[7 : 7 + size] for size in sizes]
    memory = np.full(sum(sizes) + 128 * len(sizes), 0xAA, dtype=np.uint8)
    starts = np.cumsum([33, *(size + 65 for size in sizes[:-1])])
    targets = [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    digest = streaming_copy.copy_digested(
        [target.ctypes.data for target in targets],
        [source.ctypes.data for source in sources],
        sizes,
        shared=shared,
    )
    assert digest == xxhash.xxh3_64_intdigest(np.concatenate(sources))
    for target, source in zip(targets, sources, strict=True):
        np.testing.assert_array_equal(target, source)
        target[:] = 0xAA
    assert (memory == 0xAA).all()


HARNESS = """
#include "xxh3.h"
using namespace sale_prefill::xxh3;
extern "C" void accumulate(int way, std::uint64_t* acc, const std::uint8_t* data) {
#if defined(__x86_64__)
  if (way == 1) return accumulate_avx2(acc, data, 3, 9);
  if (way == 2) return accumulate_avx512(acc, data, 3, 9);
#endif
  accumulate_portable(acc, data, 3, 9);
}
"""


def test_every_instruction_set_digests_the_same(tmp_path: Path) -> None:
    (tmp_path / "harness.cpp").write_text(HARNESS)
    (tmp_path / "xxh3.h").write_bytes((kernel_source_root() / "transfer" / "xxh3.h").read_bytes())
    plan = BuildPlan("xxh3_harness", ("harness.cpp",), tmp_path, (".",), ("-std=c++17", "-O2"))
    library = ctypes.CDLL(str(build(plan)))
    data = np.random.default_rng(0).integers(0, 256, 9 * 64, dtype=np.uint8)
    ways = [way for way, flag in ((1, "avx2"), (2, "avx512f")) if flag in Path("/proc/cpuinfo").read_text().split()]
    found = []
    for way in (0, *ways):
        acc = np.arange(8, dtype=np.uint64) * 0x123456789ABCDEF
        library.accumulate(way, ctypes.c_void_p(acc.ctypes.data), ctypes.c_void_p(data.ctypes.data))
        found.append(acc.tolist())
    assert all(each == found[0] for each in found)
