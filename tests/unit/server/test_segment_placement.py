"""KV in its place in a segment: the right bytes, the right digest, and no trust in what the peer can change."""

from __future__ import annotations

from collections.abc import Iterator

import crc32c
import numpy as np
import pytest
import torch
import xxhash

from sale_prefill_client.options import Checksum as ClientChecksum
from sale_prefill_client.segments import SharedSegment, digest_in_place
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.kv.pool import KvShape
from sale_prefill_server.transfer import segment_placement, streaming_copy
from sale_prefill_server.transfer.checksums import Checksum
from sale_prefill_server.transfer.chunks import KvRange, Layout
from sale_prefill_server.transfer.segment_placement import SegmentPlacement
from sale_prefill_server.transfer.segments import Segment
from tests.segments import SHM, broker_in, connected

SHAPE = KvShape(num_layers=4, num_kv_heads=3, head_dim=8, dtype=torch.bfloat16, device=torch.device("cpu"))
RANGE = KvRange(token_start=10, token_end=60, layer_start=1, layer_end=3)
DIGESTS = {
    Checksum.NONE: lambda data: 0,
    Checksum.CRC32C: crc32c.crc32c,
    Checksum.XXH3_64: xxhash.xxh3_64_intdigest,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Segment, SharedSegment]]:
    """A segment as a stream and as its owner have it."""
    with broker_in(tmp_path_factory.mktemp("run")) as broker:
        ticket = broker.open("a", SHM, 2**20)
        owner = connected(ticket)
        with broker.borrow("a", ticket.transfer_id) as segment:
            yield segment, owner
        owner.close()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """KV [count, kv_heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, SHAPE.num_kv_heads, SHAPE.head_dim, generator=generator).to(SHAPE.dtype)


def in_pieces(values: torch.Tensor, *, contiguous: bool) -> list[torch.Tensor]:
    """The values as a pool has them: in runs of several pages, or as views of another axis order."""
    runs = [values[:7], values[7:20], values[20:]]
    if contiguous:
        return [run.clone() for run in runs]
    return [run.transpose(0, 1).contiguous().transpose(0, 1) for run in runs]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("piece_bytes", [100, 2**19])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("checksum", list(Checksum))
@pytest.mark.parametrize("layout", list(Layout))
def test_a_chunk_comes_to_its_place_and_back(
    shared: tuple[Segment, SharedSegment],
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    checksum: Checksum,
    contiguous: bool,
    piece_bytes: int,
    native: bool,
) -> None:
    if not native:
        monkeypatch.setattr(streaming_copy, "_library", lambda: None)
    monkeypatch.setattr(segment_placement, "WRITE_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(segment_placement, "TAKE_PIECE_BYTES", piece_bytes)
    segment, owner = shared
    placement = SegmentPlacement(segment, SHAPE, RANGE, layout, checksum)
    rows = (50, 3) if layout is Layout.THD else (3, 50)
    array = owner.array((2, 2, *rows, 8 * 2))
    array[...] = 0xAA
    values = tokens(30)
    digest = placement.write(2, 1, 20, in_pieces(values, contiguous=contiguous))

    place = array[1, 1, 10:40] if layout is Layout.THD else array[1, 1, :, 10:40]
    expected = values if layout is Layout.THD else values.transpose(0, 1)
    data = expected.contiguous().view(torch.uint8).numpy()
    np.testing.assert_array_equal(place, data)
    assert digest == DIGESTS[checksum](data.tobytes())
    client_checksum: ClientChecksum = checksum.value
    assert digest_in_place(place, client_checksum) == digest
    place[...] = 0xAA
    assert (array == 0xAA).all()  # nothing beside the place was touched

    place[...] = data
    targets = in_pieces(torch.zeros_like(values), contiguous=contiguous)
    assert placement.take(2, 1, 20, targets) == digest
    assert torch.equal(torch.cat(targets), values)
    copy, copy_digest = placement.take_copy(2, 1, 20, 30)
    assert torch.equal(copy, values)
    assert copy_digest == digest


def test_a_digest_is_of_the_copy_that_was_taken(
    shared: tuple[Segment, SharedSegment], monkeypatch: pytest.MonkeyPatch
) -> None:
    segment, owner = shared
    placement = SegmentPlacement(segment, SHAPE, RANGE, Layout.THD, Checksum.CRC32C)
    values = tokens(50)
    placement.write(1, 0, 10, [values])
    place = owner.array((50, 3, 16))
    copy_to = np.copyto

    def copy_then_change(target: np.ndarray, source: np.ndarray) -> None:
        copy_to(target, source)
        place[...] ^= 0xFF  # the peer, at the worst moment

    monkeypatch.setattr(segment_placement.np, "copyto", copy_then_change)
    copy, digest = placement.take_copy(1, 0, 10, 50)
    assert digest == crc32c.crc32c(copy.view(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("layer", "kind", "token_start", "count"),
    [(0, 0, 10, 5), (3, 0, 10, 5), (1, 2, 10, 5), (1, 0, 9, 5), (1, 0, 56, 5)],
)
def test_nothing_is_written_beside_the_range(
    shared: tuple[Segment, SharedSegment], layer: int, kind: int, token_start: int, count: int
) -> None:
    placement = SegmentPlacement(shared[0], SHAPE, RANGE, Layout.THD, Checksum.CRC32C)
    with pytest.raises(PrefillError, match="chunk") as caught:
        placement.write(layer, kind, token_start, [tokens(count)])
    assert caught.value.reason is Reason.INVALID_FIELD
    with pytest.raises(PrefillError, match="chunk"):
        placement.take_copy(layer, kind, token_start, count)


def test_a_range_that_does_not_fit_is_refused(shared: tuple[Segment, SharedSegment]) -> None:
    with pytest.raises(PrefillError, match="1048576 bytes, the range 1536000"):
        SegmentPlacement(shared[0], SHAPE, KvRange(0, 4000, 0, 4), Layout.THD, Checksum.NONE)
