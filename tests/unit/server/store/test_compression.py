"""Lossy forms: how much smaller, how much is lost, and that they never pass for the bytes as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sale_prefill_server.store.base import Block, BlocksLostError, Level
from sale_prefill_server.store.compression import RowScaledCodec, codec_named, compressed
from sale_prefill_server.store.events import BlocksWritten, StoreEvent
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.tiers import TieredStore, TierSettings
from tests.unit.server.store.samples import block_key, record
from tests.unit.server.store.stores import PATIENCE_SECONDS

ROWS, HEAD_DIM = 12, 64


def values(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, ROWS).view(-1, 1)
    return (torch.randn(ROWS, HEAD_DIM, generator=generator) * scale).to(dtype)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def kv_block(name: str, seed: int) -> Block:
    return Block(block_key(name), [as_bytes(values(seed + part)) for part in range(4)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("kind", "largest_error"), [("fp8", 1 / 16), ("int8", 1 / 254)])
def test_no_value_is_off_by_more_than_the_promise(kind: str, largest_error: float, dtype: str) -> None:
    codec = RowScaledCodec(kind, dtype, HEAD_DIM)
    true = values(1, getattr(torch, dtype))
    encoded = codec.encode(as_bytes(true))
    assert len(encoded) == ROWS * (4 + HEAD_DIM)
    decoded = bytearray(len(as_bytes(true)))
    codec.decode(encoded, decoded)
    got = torch.frombuffer(decoded, dtype=true.dtype).view(ROWS, HEAD_DIM).float()
    errors = (got - true.float()).abs() / true.float().abs().amax(1, keepdim=True)
    rounding = torch.finfo(true.dtype).eps
    assert errors.max() <= largest_error + rounding
    assert errors.max() > 0


def test_rows_of_zeros_stay_zeros() -> None:
    codec = RowScaledCodec("fp8", "bfloat16", HEAD_DIM)
    decoded = bytearray(b"x" * 2 * HEAD_DIM)
    codec.decode(codec.encode(bytes(2 * HEAD_DIM)), decoded)
    assert decoded == bytes(2 * HEAD_DIM)


def test_a_codec_is_found_again_by_its_name() -> None:
    codec = RowScaledCodec("int8", "float16", 128)
    assert (codec.name, codec_named(codec.name).name) == ("int8-float16-128", "int8-float16-128")
    for name in ("", "zstd", "fp8-bfloat16", "fp8-int4-64", "fp8-bfloat16-0"):
        with pytest.raises(ValueError, match="codec"):
            codec_named(name)


def test_a_block_of_another_size_is_refused() -> None:
    codec = RowScaledCodec("fp8", "bfloat16", HEAD_DIM)
    with pytest.raises(ValueError, match="do not hold"):
        codec.decode(bytes(100), bytearray(2 * HEAD_DIM))


@pytest.fixture
def codec() -> RowScaledCodec:
    return RowScaledCodec("fp8", "bfloat16", HEAD_DIM)


def read(store: TieredStore, name: str, *, lossless_required: bool) -> list[bytes] | None:
    located = store.locate([block_key(name)], lossless_required=lossless_required)
    if not located.num_blocks:
        return None
    parts = store.read(located, 2, ROWS * HEAD_DIM * 2)
    return [side for part in parts for side in (bytes(part.keys), bytes(part.values))]


def test_a_tier_with_a_codec_keeps_lossless_blocks_as_they_were(tmp_path: Path, codec: RowScaledCodec) -> None:
    events: list[StoreEvent] = []
    store = TieredStore([TierSettings(FileTier(tmp_path), codec=codec)], observer=events.append)
    store.put_blocks([kv_block("lossy", 1)], lossless_required=False)
    store.put_blocks([kv_block("exact", 9)])
    store.flush_all(PATIENCE_SECONDS)
    assert read(store, "exact", lossless_required=True) == kv_block("exact", 9).parts
    assert read(store, "lossy", lossless_required=True) is None
    lossy = read(store, "lossy", lossless_required=False)
    assert lossy is not None
    assert lossy != kv_block("lossy", 1).parts
    expected = bytearray(len(lossy[0]))
    codec.decode(compressed(kv_block("lossy", 1), codec).parts[0], expected)
    assert lossy[0] == expected
    assert {event.codec for event in events if isinstance(event, BlocksWritten)} == {"", "fp8-bfloat16-64"}
    assert not store.locate([block_key("lossy")], lossless_required=False).is_lossless
    store.close()


def test_a_lossless_record_is_never_promised_on_lossy_blocks(tmp_path: Path, codec: RowScaledCodec) -> None:
    store = TieredStore([TierSettings(FileTier(tmp_path), codec=codec)])
    store.put_blocks([kv_block("a", 1)], lossless_required=False)
    store.put_record(record("lossy", ("a",), lossless=False))
    store.flush(record("lossy").key, Level.LOCAL, PATIENCE_SECONDS)
    store.put_blocks([kv_block("a", 1)], lossless_required=True)
    store.put_record(record("exact", ("a",)))
    store.flush(record("exact").key, Level.LOCAL, PATIENCE_SECONDS)
    assert read(store, "a", lossless_required=True) == kv_block("a", 1).parts
    for name in ("lossy", "exact"):
        store.delete_record(record(name).key).result(PATIENCE_SECONDS)
    assert store.status()["disk"].num_blocks == 0
    store.close()


def test_a_damaged_lossy_block_is_found(tmp_path: Path, codec: RowScaledCodec) -> None:
    store = TieredStore([TierSettings(FileTier(tmp_path), codec=codec)])
    store.put_blocks([kv_block("a", 1)], lossless_required=False)
    store.flush_all(PATIENCE_SECONDS)
    file = next(tmp_path.glob("blocks/*/*/*.kv"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(BlocksLostError):
        read(store, "a", lossless_required=False)
    store.close()
