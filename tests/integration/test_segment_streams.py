"""Pulls and pushes through shared memory: the same bytes as in messages, and nothing that is not verified."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sale_prefill.v1 import kv_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client import AsyncClient, Client, KvCache, RetryPolicy, SegmentFallbackWarning, errors, segment_kv
from sale_prefill_client.cuda_segments import Segment
from sale_prefill_client.segments import SharedSegment
from sale_prefill_server.transfer.segments import SegmentBroker
from tests.integration.test_kv_interruptions import breaking_proxy
from tests.segments import wait_until
from tests.support import RunningServer, call_error, running_server, tokens_of

TOKENS = tokens_of(700)
KV_BYTES = len(TOKENS) * 512
RETRY = RetryPolicy(max_attempts=8, initial_backoff_seconds=0.05, max_backoff_seconds=0.5)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("streams")
    with running_server(model=str(tiny_model), dtype="float32", transfer_directory=str(folder / "run")) as server:
        yield server
    assert broker_of(server).budget.used_bytes() == 0


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> KvCache:
    """KV of the session `computed`, in messages."""
    server.prefill_tokens(TOKENS, session_id="computed", retention={"lease_duration": {"seconds": 3600}})
    with Client(server.target) as client:
        return client.pull_kv("computed")


@pytest.fixture
def client(server: RunningServer, expected: KvCache) -> Iterator[Client]:
    with Client(server.target, retry=RETRY) as client:
        yield client
    wait_until(lambda: broker_of(server).budget.used_bytes() == 0)


@pytest.fixture
def segment(client: Client) -> Iterator[SharedSegment]:
    segment = client.open_transfer(session_id="computed")
    assert isinstance(segment, SharedSegment)
    yield segment
    client.close_transfer(segment)


def broker_of(server: RunningServer) -> SegmentBroker:
    service = server.server._service
    assert service is not None
    return service.segments


def used_kv_bytes(server: RunningServer) -> int:
    return server.server._service.engine.pool.used_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize("checksum", ["crc32c", "xxh3_64", "none", None])
@pytest.mark.parametrize("chunk_bytes", [4096, 30_000, None])
@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_a_pull_is_that_of_messages_and_views_the_segment(
    client: Client, segment: SharedSegment, layout: Any, chunk_bytes: int | None, checksum: Any
) -> None:
    plain = client.pull_kv("computed", layout=layout)
    cache = client.pull_kv("computed", segment=segment, layout=layout, chunk_bytes=chunk_bytes, checksum=checksum)
    assert np.array_equal(cache.buffer, plain.buffer)
    assert segment.has(cache.buffer)
    assert (cache.session_id, cache.generation, cache.token_digest) == (
        plain.session_id,
        plain.generation,
        plain.token_digest,
    )


@pytest.mark.parametrize(
    ("token_range", "layer_range"), [((100, 357), None), (None, (1, 2)), ((699, None), (0, 1)), ((0, 128), (1, None))]
)
def test_a_part_begins_at_the_segments_first_byte(
    client: Client, segment: SharedSegment, token_range: Any, layer_range: Any
) -> None:
    ranges = {"token_range": token_range, "layer_range": layer_range}
    plain = client.pull_kv("computed", **ranges)
    cache = client.pull_kv("computed", segment=segment, chunk_bytes=8192, **ranges)
    assert np.array_equal(cache.buffer, plain.buffer)
    assert (cache.token_start, cache.layer_start) == (plain.token_start, plain.layer_start)
    assert segment.has(cache.buffer)


def test_the_asyncio_client_pulls_and_pushes_the_same(server: RunningServer, expected: KvCache) -> None:
    async def run() -> None:
        async with AsyncClient(server.target) as client:
            segment = await client.open_transfer(session_id="computed")
            assert segment is not None
            cache = await client.pull_kv("computed", segment=segment, chunk_bytes=4096)
            assert np.array_equal(cache.buffer, expected.buffer)
            await client.push_kv(cache, session_id="again", segment=segment)
            again = await client.pull_kv("again", transports=["shm"])
            await client.close_transfer(segment)
            assert np.array_equal(again.buffer, expected.buffer)
            await client.delete_session("again")

    asyncio.run(run())


def test_a_segment_for_one_pull_is_closed_and_its_arrays_stay(
    client: Client, server: RunningServer, expected: KvCache
) -> None:
    cache = client.pull_kv("computed", transports=("cuda_ipc", "shm"), token_range=(10, 300))
    wait_until(lambda: broker_of(server).budget.used_bytes() == 0)
    assert np.array_equal(cache.buffer, expected.buffer[:, :, 10:300])
    cache.buffer[...] = 0  # this process's own


def test_a_client_that_takes_no_groups_gets_a_message_a_chunk(
    server: RunningServer, expected: KvCache, segment: SharedSegment
) -> None:
    request = pb.PullKvRequest(session_id="computed", transfer_id=segment.transfer_id, chunk_bytes=8192)
    first, *rest = server.kv.PullKv(request)
    assert len(rest) == first.manifest.total_chunks > 40
    assert [frame.chunk.index for frame in rest] == list(range(len(rest)))
    assert np.array_equal(segment.array((KV_BYTES,)), expected.buffer.reshape(-1))
    request.group_chunks = True
    _, *groups = server.kv.PullKv(request)
    assert [len(frame.chunks.chunks) for frame in groups] == [1, len(rest) - 1]
    assert [chunk for frame in groups for chunk in frame.chunks.chunks] == [frame.chunk for frame in rest]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_a_pushed_session_is_the_one_that_was_pulled(
    client: Client, segment: SharedSegment, expected: KvCache, layout: Any, in_place: bool
) -> None:
    cache = client.pull_kv("computed", segment=segment if in_place else None, layout=layout)
    session = client.push_kv(cache, segment=segment, chunk_bytes=10_000)
    assert np.array_equal(client.pull_kv(session.session_id).buffer, expected.buffer)
    options: Any = {"max_new_tokens": 8, "ignore_eos": True}
    original = client.fork_session("computed")
    assert (
        client.generate(session.session_id, **options).token_ids
        == client.generate(original.session_id, **options).token_ids
    )
    for each in (session, original):
        client.delete_session(each.session_id)


def test_kv_that_lies_elsewhere_in_the_segment_is_not_pushed_over_itself(client: Client, expected: KvCache) -> None:
    segment = client.open_transfer(size_bytes=2 * KV_BYTES)
    assert isinstance(segment, SharedSegment)
    elsewhere = (
        segment.array((2 * KV_BYTES,))[4096 : 4096 + KV_BYTES].view("<f4").reshape(*expected.buffer.shape[:-1], -1)
    )
    cache = KvCache.from_numpy(elsewhere, expected.spec, token_ids=TOKENS)
    with pytest.raises(ValueError, match="elsewhere in the segment"):
        client.push_kv(cache, segment=segment)
    client.close_transfer(segment)


@contextmanager
def breaking_client(server: RunningServer, break_after_bytes: int) -> Iterator[Client]:
    """A client whose connection breaks, once, when so many bytes have passed."""
    with breaking_proxy(server, break_after_bytes) as proxy:
        with Client(proxy.target, retry=RETRY) as client:
            yield client
        assert proxy.breaks == 1


@pytest.mark.parametrize("break_after_bytes", [900, 2200, 3000])
def test_a_pull_goes_on_after_a_broken_connection(
    server: RunningServer, client: Client, segment: SharedSegment, expected: KvCache, break_after_bytes: int
) -> None:
    segment.array((KV_BYTES,))[:] = 0
    with breaking_client(server, break_after_bytes) as breaking:
        cache = breaking.pull_kv("computed", segment=segment, chunk_bytes=4096)
    assert np.array_equal(cache.buffer, expected.buffer)


def test_a_push_goes_on_after_a_broken_connection(
    server: RunningServer,
    client: Client,
    segment: SharedSegment,
    expected: KvCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segment_kv, "_GROUP_BYTES", 20_000)
    with breaking_client(server, 4000) as breaking:
        session = breaking.push_kv(expected, segment=segment, chunk_bytes=4096)
    assert np.array_equal(client.pull_kv(session.session_id).buffer, expected.buffer)
    client.delete_session(session.session_id)


def test_a_pull_waits_until_the_server_has_noticed_that_its_first_attempt_broke(
    server: RunningServer, segment: SharedSegment, expected: KvCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    borrowed = broker_of(server).borrow
    calls = 0

    def lingering(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            wait_until(lambda: not broker_of(server)._records[segment.transfer_id].user)
            first = borrowed(*given)
            first.__enter__()
            threading.Timer(0.3, lambda: first.__exit__(None, None, None)).start()
        return borrowed(*given)

    monkeypatch.setattr(broker_of(server), "borrow", lingering)
    with breaking_client(server, 2200) as breaking:
        cache = breaking.pull_kv("computed", segment=segment, chunk_bytes=4096)
    assert calls > 2
    assert np.array_equal(cache.buffer, expected.buffer)


def test_a_segment_that_another_stream_uses_is_busy(
    server: RunningServer, client: Client, segment: SharedSegment, expected: KvCache
) -> None:
    with broker_of(server).borrow("anonymous", segment.transfer_id):
        with pytest.raises(errors.SessionBusyError, match="another stream uses transfer"):
            client.pull_kv("computed", segment=segment)
        with pytest.raises(errors.SessionBusyError, match="another stream uses transfer"):
            client.push_kv(expected, segment=segment)
    assert np.array_equal(client.pull_kv("computed", segment=segment).buffer, expected.buffer)


def test_a_segment_that_is_too_small_is_refused(client: Client) -> None:
    small = client.open_transfer(session_id="computed", layer_range=(0, 1))
    assert small is not None
    with pytest.raises(errors.InvalidFieldError, match="open a larger one"):
        client.pull_kv("computed", segment=small)
    client.close_transfer(small)


@pytest.mark.parametrize("options", [{"stripes": 2}, {"into": np.empty(KV_BYTES, np.uint8)}])
def test_a_segment_is_one_streams_and_the_only_memory(client: Client, segment: Segment, options: Any) -> None:
    with pytest.raises(ValueError, match="leave out"):
        client.pull_kv("computed", segment=segment, **options)


def test_what_changes_between_digest_and_copy_is_not_taken(
    server: RunningServer,
    client: Client,
    segment: SharedSegment,
    expected: KvCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.server._uploads.close()  # other tests'
    used_bytes = used_kv_bytes(server)
    put = segment_kv.put_in_place

    def put_and_change(place: Any, source: Any, checksum: Any) -> int:
        digest = put(place, source, checksum)
        place[-1, 0, 3] ^= 0x20
        return digest

    monkeypatch.setattr(segment_kv, "put_in_place", put_and_change)
    for checksum in ("xxh3_64", "crc32c"):
        with pytest.raises(errors.ChecksumMismatchError, match="chunk 0"):
            client.push_kv(expected, session_id="changed", segment=segment, checksum=checksum)  # type: ignore[arg-type]
        assert call_error(lambda: server.session("changed")).reason == "SESSION_UNKNOWN"
    server.server._uploads.close()
    assert used_kv_bytes(server) == used_bytes


def test_what_changes_in_the_segment_during_a_pull_is_noticed(
    client: Client, segment: SharedSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = segment_kv.SegmentAssembler.add_chunks

    def change_and_add(assembler: Any, chunks: Any) -> None:
        segment.array((KV_BYTES,))[123] ^= 1
        added(assembler, chunks)
        segment.array((KV_BYTES,))[123] ^= 1

    monkeypatch.setattr(segment_kv.SegmentAssembler, "add_chunks", change_and_add)
    monkeypatch.setattr(segment_kv.SegmentAssembler, "_verify_on", verify_now)
    with pytest.raises(errors.ChecksumMismatchError, match="chunk 0"):
        client.pull_kv("computed", segment=segment)


def verify_now(assembler: Any) -> None:
    assembler._verify(assembler._unverified)


def test_a_chunk_with_data_beside_its_segment_is_refused(
    server: RunningServer, segment: SharedSegment, expected: KvCache
) -> None:
    manifest = kv_pb2.KvManifest(
        spec=expected.spec.to_proto(),
        range=kv_pb2.KvRange(token_end=len(TOKENS), layer_end=2),
        total_bytes=KV_BYTES,
        total_chunks=4,
        checksum_algorithm=kv_pb2.CHECKSUM_ALGORITHM_NONE,
        token_digest=expected.token_digest,
    )
    header = pb.PushKvHeader(token_ids=TOKENS, manifest=manifest, transfer_id=segment.transfer_id)
    chunk = kv_pb2.KvChunk(kind=1, num_tokens=len(TOKENS), data=bytes(KV_BYTES // 4))
    for message in (pb.PushKvRequest(chunk=chunk), pb.PushKvRequest(chunks=kv_pb2.KvChunks(chunks=[chunk]))):
        frames = [pb.PushKvRequest(header=header), message]
        error = call_error(lambda frames=frames: server.kv.PushKv(iter(frames), timeout=10))  # type: ignore[misc]
        assert (error.reason, error.fields) == ("INVALID_FIELD", ["chunk.data"])


def test_streams_are_counted_by_how_they_went(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny_model), "dtype": "float32", "transfer_directory": str(tmp_path / "run")}
    with running_server(**settings) as server, Client(server.target) as client:
        assert client.get_server_info().transports == ("grpc", "shm")
        session_id = client.prefill(TOKENS).session_id
        segment = client.open_transfer(session_id=session_id)
        assert segment is not None
        assert server.metric("sale_prefill_transfer_segment_bytes", transport="shm") == segment.size_bytes
        cache = client.pull_kv(session_id, segment=segment)
        client.push_kv(cache, segment=segment)
        client.pull_kv(session_id, layer_range=(0, 1))
        moved = {
            (transport, direction): server.metric(
                "sale_prefill_kv_transfer_bytes_total", transport=transport, direction=direction
            )
            for transport in ("grpc", "shm")
            for direction in ("pull", "push")
        }
        assert moved == {
            ("shm", "pull"): KV_BYTES,
            ("shm", "push"): KV_BYTES,
            ("grpc", "pull"): KV_BYTES // 2,
            ("grpc", "push"): 0,
        }
        with pytest.raises(errors.InvalidFieldError):
            client.pull_kv(session_id, segment=segment, chunk_bytes=1)
        assert server.metric("sale_prefill_kv_transfer_failures_total", transport="shm", reason="invalid_field") == 1
        client.close_transfer(segment)
        assert server.metric("sale_prefill_transfer_segment_bytes", transport="shm") == 0


def test_without_segments_a_pull_goes_through_messages_and_says_so_once(tiny_model: Path) -> None:
    settings = {"model": str(tiny_model), "dtype": "float32", "transfer_memory": "0"}
    with running_server(**settings) as server, Client(server.target) as client:
        assert client.get_server_info().transports == ("grpc",)
        session_id = client.prefill(TOKENS).session_id
        with pytest.warns(SegmentFallbackWarning, match="offers none of cuda_ipc, shm"):
            cache = client.pull_kv(session_id, transports=("cuda_ipc", "shm"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = client.pull_kv(session_id, transports=("shm",))
        assert np.array_equal(cache.buffer, client.pull_kv(session_id).buffer)
        assert np.array_equal(cache.buffer, again.buffer)


def test_a_server_that_started_anew_has_no_segment_of_its_predecessor(tiny_model: Path, tmp_path: Path) -> None:
    settings: Any = {"model": str(tiny_model), "dtype": "float32", "transfer_directory": str(tmp_path / "run")}
    with running_server(**settings) as first, Client(first.target, retry=RETRY) as client:
        client.prefill(TOKENS, session_id="s")
        segment = client.open_transfer(session_id="s")
        assert isinstance(segment, SharedSegment)
        cache = client.pull_kv("s", segment=segment)
        port = first.server.port
    kept = cache.buffer.copy()
    with running_server(**{**settings, "port": port}) as second, Client(second.target, retry=RETRY) as client:
        assert not segment.connected
        assert np.array_equal(cache.buffer, kept)
        client.push_kv(cache, session_id="s")
        with pytest.raises(errors.TransferUnknownError):
            client.pull_kv("s", segment=segment)
        assert np.array_equal(client.pull_kv("s", transports=("shm",)).buffer, kept)
        client.close_transfer(segment)


def test_a_segment_that_goes_in_the_middle_ends_in_messages_where_it_was_the_pulls_own(
    server: RunningServer, client: Client, expected: KvCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = broker_of(server)
    borrowed = broker.borrow
    transfers: list[str] = []

    def closing(tenant: str, transfer_id: str) -> Any:
        if transfer_id in transfers:  # the second attempt
            broker.close(tenant, transfer_id)
        transfers.append(transfer_id)
        return borrowed(tenant, transfer_id)

    monkeypatch.setattr(broker, "borrow", closing)
    with breaking_client(server, 2600) as breaking, pytest.warns(SegmentFallbackWarning, match="no transfer"):
        cache = breaking.pull_kv("computed", transports=["shm"], chunk_bytes=4096)
    assert len(transfers) == 2
    assert np.array_equal(cache.buffer, expected.buffer)
