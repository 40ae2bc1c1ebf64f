"""Segments through gRPC: opened, connected to, closed, refused, done without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from sale_prefill.v1 import kv_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client import AsyncClient, Client, SegmentFallbackWarning
from sale_prefill_client.segments import SharedSegment
from sale_prefill_server.transfer.segments import SegmentBroker
from tests.segments import wait_until
from tests.support import RunningServer, call_error, running_server, tokens_of

KV_BYTES_PER_TOKEN = 512
MIB = 2**20


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("transfers")
    tokens = folder / "tokens"
    tokens.write_text("a:token-a\nb:token-b\n")
    with running_server(
        model=str(tiny_model),
        dtype="float32",
        transfer_memory="64M",
        transfer_directory=str(folder / "run"),
        auth_tokens_file=str(tokens),
    ) as server:
        yield server
    assert broker_of(server).budget.used_bytes() == 0
    assert [entry.name for entry in (folder / "run").iterdir()] == ["lock"]


def broker_of(server: RunningServer) -> SegmentBroker:
    service = server.server._service
    assert service is not None
    return service.segments


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target, token="token-a") as client:
        yield client
    wait_until(lambda: broker_of(server).budget.used_bytes() == 0)


def as_tenant(name: str) -> dict[str, object]:
    return {"metadata": [("authorization", f"Bearer token-{name}")], "timeout": 10}


def test_a_segment_is_opened_mapped_and_given_back(server: RunningServer, client: Client) -> None:
    segment = client.open_transfer(size_bytes=MIB)
    assert isinstance(segment, SharedSegment)
    array = segment.array((10,))
    with broker_of(server).borrow("a", segment.transfer_id) as mine, mine.memory() as memory:
        memory[:10] = 3
        del memory
    assert broker_of(server).budget.used_bytes() == MIB
    client.close_transfer(segment)
    wait_until(lambda: broker_of(server).budget.used_bytes() == 0)
    assert array.tolist() == [3] * 10
    client.close_transfer(segment)  # a second time does no harm


async def test_the_asyncio_client_has_the_same(server: RunningServer) -> None:
    async with AsyncClient(server.target, token="token-a") as client:
        segment = await client.open_transfer(size_bytes=MIB)
        assert isinstance(segment, SharedSegment)
        await client.close_transfer(segment)


def test_a_session_says_the_size(server: RunningServer, client: Client) -> None:
    session = client.prefill(tokens_of(300)).session
    request = pb.OpenTransferRequest(
        session_id=session.session_id,
        transports=[pb.TRANSPORT_NIXL, pb.TRANSPORT_SHM],
        range=kv_pb2.KvRange(token_start=100, layer_end=1),
    )
    response = server.kv.OpenTransfer(request, **as_tenant("a"))
    assert response.transport == pb.TRANSPORT_SHM
    assert response.manifest.total_bytes == 200 * KV_BYTES_PER_TOKEN // 2
    assert response.size_bytes >= response.manifest.total_bytes
    assert response.manifest.range == kv_pb2.KvRange(token_start=100, token_end=300, layer_end=1)
    assert response.manifest.generation == session.generation
    assert response.expire_time.ToDatetime().year > 2020
    server.kv.CloseTransfer(pb.CloseTransferRequest(transfer_id=response.transfer_id), **as_tenant("a"))


def test_messages_can_be_chosen_too(server: RunningServer) -> None:
    request = pb.OpenTransferRequest(transports=[pb.TRANSPORT_CUDA_IPC, pb.TRANSPORT_GRPC], size_bytes=MIB)
    response = server.kv.OpenTransfer(request, **as_tenant("a"))
    assert response.transport == pb.TRANSPORT_GRPC
    assert not response.transfer_id


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.OpenTransferRequest(size_bytes=MIB), "transports"),
        (pb.OpenTransferRequest(size_bytes=MIB, transports=[pb.TRANSPORT_NIXL, 99]), "transports"),
        (pb.OpenTransferRequest(transports=[pb.TRANSPORT_SHM]), "size_bytes"),
    ],
)
def test_a_request_that_cannot_be_met_names_its_field(
    server: RunningServer, request_: pb.OpenTransferRequest, field: str
) -> None:
    error = call_error(lambda: server.kv.OpenTransfer(request_, **as_tenant("a")))
    assert (error.code, error.reason, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", [field])


def test_a_session_that_is_not_there_has_no_size(server: RunningServer) -> None:
    request = pb.OpenTransferRequest(transports=[pb.TRANSPORT_SHM], session_id="nobody")
    assert call_error(lambda: server.kv.OpenTransfer(request, **as_tenant("a"))).reason == "SESSION_UNKNOWN"


def test_too_much_memory_is_refused_with_numbers(server: RunningServer) -> None:
    request = pb.OpenTransferRequest(transports=[pb.TRANSPORT_SHM], size_bytes=65 * MIB)
    error = call_error(lambda: server.kv.OpenTransfer(request, **as_tenant("a")))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_CAPACITY")
    assert error.metadata == {"needed_bytes": str(65 * MIB), "free_bytes": str(64 * MIB)}


def test_a_transfer_is_its_tenants(server: RunningServer, client: Client) -> None:
    segment = client.open_transfer(size_bytes=MIB)
    assert segment is not None
    request = pb.CloseTransferRequest(transfer_id=segment.transfer_id)
    error = call_error(lambda: server.kv.CloseTransfer(request, **as_tenant("b")))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TRANSFER_UNKNOWN")
    assert error.fields == ["transfer_id"]
    client.close_transfer(segment)


def test_a_client_that_cannot_reach_the_socket_does_without_and_says_so_once(
    server: RunningServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = broker_of(server)._listener
    assert listener is not None
    monkeypatch.setattr(listener, "path", "/nowhere/kv.sock")
    with pytest.warns(SegmentFallbackWarning, match=r"goes through messages: .*cannot be used from here"):
        assert client.open_transfer(size_bytes=MIB) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert client.open_transfer(size_bytes=MIB) is None
    assert broker_of(server).budget.used_bytes() == 0


def test_a_server_that_shares_no_memory_answers_so(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"transfer_memory": "0", "transfer_directory": str(tmp_path / "run")}
    with running_server(model=str(tiny_model), dtype="float32", **settings) as server:
        with Client(server.target) as client, pytest.warns(SegmentFallbackWarning, match="offers none of shm"):
            assert client.open_transfer(size_bytes=MIB) is None
        assert not (tmp_path / "run").exists()
