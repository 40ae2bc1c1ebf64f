"""Copies past the caches: the same bytes, whatever their number and alignment, with or without a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sale_attention.jit import KernelBuildError
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
