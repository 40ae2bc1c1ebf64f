"""KV from elsewhere: a pushed session goes on as one that was computed here, or it is not there at all."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crc32c
import grpc
import pytest

from sale_prefill.v1 import kv_pb2, session_service_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client import AsyncClient, Attention, Client, KvCache, errors, token_digest
from tests.support import RunningServer, call_error, running_server, tokens_of

TOKENS = tokens_of(700)
DENSE = session_service_pb2.AttentionOptions(mode=session_service_pb2.ATTENTION_MODE_DENSE)


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Iterator[RunningServer]:
    """A second server of the same model, where KV is pushed to."""
    with running_server(
        model=str(tiny_model), dtype="float32", chunk_tokens=512, upload_idle_seconds=1, kv_memory="8M"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def computed(tiny_server: RunningServer) -> KvCache:
    """KV of `TOKENS`, computed by the first server."""
    session = tiny_server.prefill_tokens(TOKENS, attention=DENSE, session_id="computed").session
    with Client(tiny_server.target) as client:
        return client.pull_kv(session.session_id)


@pytest.fixture
def client(target: RunningServer) -> Iterator[Client]:
    with Client(target.target) as connected:
        yield connected
        for session in list(connected.list_sessions()):
            connected.delete_session(session.session_id)
    wait_until_free(target)


def used_bytes(server: RunningServer) -> int:
    return server.server._service.engine.pool.used_bytes  # type: ignore[union-attr]


def wait_until_free(server: RunningServer) -> None:
    """Every byte of KV is back, uploads that nobody goes on with included."""
    server.wait_for(lambda: used_bytes(server) == 0)


def header_of(cache: KvCache, **changes: Any) -> pb.PushKvHeader:
    """A header for a push of `cache` in chunks of one tensor each."""
    layers = cache.spec.num_layers
    manifest = kv_pb2.KvManifest(
        spec=cache.spec.to_proto(),
        range=kv_pb2.KvRange(token_end=cache.num_tokens, layer_end=layers),
        total_bytes=cache.num_bytes,
        total_chunks=2 * layers,
        checksum_algorithm=kv_pb2.CHECKSUM_ALGORITHM_CRC32C,
        token_digest=token_digest(TOKENS),
    )
    return pb.PushKvHeader(**{"session_id": "pushed", "token_ids": TOKENS, "manifest": manifest, **changes})


def chunks_of(cache: KvCache) -> list[kv_pb2.KvChunk]:
    """Chunks of one tensor each, written by protobuf."""
    chunks = []
    for layer in range(cache.spec.num_layers):
        for kind in range(2):
            data = cache.buffer[layer, kind].tobytes()
            place = {"layer": layer, "kind": kind + 1, "num_tokens": cache.num_tokens}
            chunks.append(kv_pb2.KvChunk(index=len(chunks), checksum=crc32c.crc32c(data), data=data, **place))
    return chunks


def push(server: RunningServer, header: pb.PushKvHeader, chunks: list[kv_pb2.KvChunk]) -> pb.PushKvResponse:
    frames = [pb.PushKvRequest(header=header), *(pb.PushKvRequest(chunk=chunk) for chunk in chunks)]
    return server.kv.PushKv(iter(frames), timeout=20)


def test_any_grpc_client_pushes_with_the_published_contract(target: RunningServer, computed: KvCache) -> None:
    response = push(target, header_of(computed), chunks_of(computed))
    assert response.accepted_chunks == 4
    assert response.session.state == session_service_pb2.SESSION_STATE_READY
    assert response.session.token_digest == token_digest(TOKENS)
    assert target.session("pushed").num_tokens == len(TOKENS)
    target.sessions.DeleteSession(session_service_pb2.DeleteSessionRequest(session_id="pushed"))


@pytest.mark.parametrize("layout", ["THD", "HTD"])
@pytest.mark.parametrize("stripes", [1, 3])
def test_a_pushed_session_decodes_and_grows_as_one_computed_here(
    client: Client, target: RunningServer, tiny_server: RunningServer, layout: str, stripes: int
) -> None:
    with Client(tiny_server.target) as source:
        session_id = source.prefill(TOKENS, attention=Attention.dense()).session_id
        cache = source.pull_kv(session_id, layout=layout, stripes=stripes)
        pushed = client.push_kv(cache, chunk_bytes=20_000, stripes=stripes, attention=Attention.dense())
        assert (pushed.state, pushed.num_tokens, pushed.generation) == ("ready", len(TOKENS), 1)
        again = client.pull_kv(pushed.session_id, layout=layout)
        assert (again.buffer == cache.buffer).all()
        for step in range(2):
            expected = source.generate(session_id, max_new_tokens=12, ignore_eos=True)
            found = client.generate(pushed.session_id, max_new_tokens=12, ignore_eos=True)
            assert found.token_ids == expected.token_ids
            more = tokens_of(600, seed=step + 1)
            source_logits = source.prefill(more, session_id=session_id).top_logits
            logits = client.prefill(more, session_id=pushed.session_id).top_logits
            assert [entry.token_id for entry in logits] == [entry.token_id for entry in source_logits]
        source.delete_session(session_id)


def test_the_asyncio_client_pushes_too(client: Client, target: RunningServer, computed: KvCache) -> None:
    async def run() -> str:
        async with AsyncClient(target.target) as connected:
            session = await connected.push_kv(
                computed, stripes=2, chunk_bytes=8192, lease_seconds=60, labels={"a": "b"}
            )
            return session.session_id

    session = client.get_session(asyncio.run(run()))
    assert (session.labels, session.lease_seconds) == ({"a": "b"}, 60.0)
    assert (client.pull_kv(session.session_id).buffer == computed.buffer).all()


def test_a_pull_in_stripes_is_the_pull(tiny_server: RunningServer, computed: KvCache) -> None:
    with Client(tiny_server.target) as client:
        striped = client.pull_kv("computed", stripes=5, token_range=(100, None), chunk_bytes=4096)
    assert (striped.buffer == computed.buffer[:, :, 100:]).all()
    assert striped.token_digest == computed.token_digest
    assert striped.token_ids is not None
    assert striped.token_ids.tolist() == TOKENS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "another"),
        ("element_type", kv_pb2.ELEMENT_TYPE_FLOAT16),
        ("num_layers", 3),
        ("num_kv_heads", 4),
        ("head_dim", 32),
        ("rope_applied", False),
        ("rope_fingerprint", "another"),
    ],
)
def test_another_format_is_refused_before_a_byte_moves(
    target: RunningServer, tiny_server: RunningServer, computed: KvCache, field: str, value: Any
) -> None:
    header = header_of(computed)
    setattr(header.manifest.spec, field, value)
    opened = call_error(lambda: target.kv.OpenPush(pb.OpenPushRequest(request_id="r", header=header), timeout=10))
    streamed = call_error(lambda: push(target, header, []))
    for error in (opened, streamed):
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KV_SPEC_MISMATCH")
        assert error.metadata["field"] == field
        assert error.metadata["expected"] != error.metadata["actual"]
    assert used_bytes(target) == 0
    if value:
        expected = kv_pb2.KvSpec(**{field: value})
        request = pb.PullKvRequest(session_id="computed", expected_spec=expected)
        assert call_error(lambda: tiny_server.kv.PullKv(request)).metadata["field"] == field


def flipped(chunk: kv_pb2.KvChunk) -> None:
    chunk.data = chunk.data[:100] + bytes([chunk.data[100] ^ 4]) + chunk.data[101:]


@pytest.mark.parametrize(
    ("edit", "reason", "field"),
    [
        (lambda c: flipped(c[2]), "CHECKSUM_MISMATCH", None),
        (lambda c: c.append(c[1]), "INVALID_FIELD", "chunk.index"),
        (lambda c: c.insert(2, c[1]), "INVALID_FIELD", "chunk.index"),
        (lambda c: c.reverse(), "INVALID_FIELD", "chunk.index"),
        (lambda c: c.pop(), "INVALID_FIELD", "header.manifest.total_chunks"),
        (lambda c: setattr(c[3], "index", 9), "INVALID_FIELD", "chunk.index"),
        (lambda c: setattr(c[3], "layer", 0), "INVALID_FIELD", "chunk.token_start"),
        (lambda c: setattr(c[3], "layer", 2), "INVALID_FIELD", "chunk.layer"),
        (lambda c: setattr(c[3], "kind", 0), "INVALID_FIELD", "chunk.layer"),
        (lambda c: setattr(c[3], "token_start", 1), "INVALID_FIELD", "chunk.num_tokens"),
        (lambda c: setattr(c[3], "num_tokens", 699), "INVALID_FIELD", "chunk.data"),
        (lambda c: setattr(c[3], "data", c[3].data[:-256]), "INVALID_FIELD", "chunk.data"),
    ],
    ids=["flip", "replay", "twice", "reorder", "drop", "index", "overlap", "layer", "kind", "start", "count", "cut"],
)
def test_a_chunk_that_is_not_what_it_should_be_leaves_nothing_behind(
    target: RunningServer, computed: KvCache, edit: Any, reason: str, field: str | None
) -> None:
    chunks = chunks_of(computed)
    edit(chunks)
    error = call_error(lambda: push(target, header_of(computed), chunks))
    assert error.reason == reason
    assert error.fields == ([field] if field else [])
    if reason == "CHECKSUM_MISMATCH":
        assert (error.code, error.metadata) == (grpc.StatusCode.DATA_LOSS, {"chunk_index": "2"})
    assert call_error(lambda: target.session("pushed")).reason == "SESSION_UNKNOWN"
    target.wait_for(lambda: used_bytes(target) == 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": []}, "INVALID_FIELD"),
        ({"token_ids": [*TOKENS[:-1], 0]}, "CHECKSUM_MISMATCH"),
        ({"token_ids": TOKENS[:-1]}, "INVALID_FIELD"),
        ({"session_id": "no spaces"}, "INVALID_FIELD"),
        ({"upload_id": "gone", "token_ids": [], "session_id": "", "manifest": None}, "TRANSFER_UNKNOWN"),
        ({"upload_id": "gone"}, "INVALID_FIELD"),
        ({"transfer_id": "gone"}, "TRANSFER_UNKNOWN"),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    target: RunningServer, computed: KvCache, changes: dict[str, Any], reason: str
) -> None:
    error = call_error(lambda: push(target, header_of(computed, **changes), []))
    assert error.reason == reason
    target.wait_for(lambda: used_bytes(target) == 0)


def test_a_session_that_exists_is_never_pushed_over(client: Client, target: RunningServer, computed: KvCache) -> None:
    client.push_kv(computed, session_id="mine")
    with pytest.raises(errors.PrefixMismatchError):
        client.push_kv(computed, session_id="mine")
    assert client.get_session("mine").generation == 1


def test_kv_that_does_not_fit_is_refused_before_a_byte_moves(client: Client, computed: KvCache) -> None:
    for _ in range(3):
        client.push_kv(computed)
    with pytest.raises(errors.KvCapacityError):
        collections.deque(map(client.push_kv, [computed] * 100), maxlen=0)


def open_push(server: RunningServer, header: pb.PushKvHeader, request_id: str = "one") -> pb.OpenPushResponse:
    return server.kv.OpenPush(pb.OpenPushRequest(request_id=request_id, header=header), timeout=10)


def test_an_upload_goes_on_where_it_broke_off(client: Client, target: RunningServer, computed: KvCache) -> None:
    header, chunks = header_of(computed), chunks_of(computed)
    upload = open_push(target, header)
    assert [(run.start, run.end) for run in upload.missing_chunks] == [(0, 4)]
    streams = pb.PushKvHeader(upload_id=upload.upload_id)
    assert not push(target, streams, [chunks[1]]).HasField("session")
    again = open_push(target, header)
    assert again.upload_id == upload.upload_id
    assert [(run.start, run.end) for run in again.missing_chunks] == [(0, 1), (2, 4)]
    assert call_error(lambda: target.session("pushed")).reason == "SESSION_UNKNOWN"
    last = push(target, streams, [chunks[0], *chunks[1:]])  # one that is there already is passed over
    assert last.session.session_id == "pushed"
    done = open_push(target, header)
    assert (done.session.session_id, len(done.missing_chunks)) == ("pushed", 0)
    assert call_error(lambda: open_push(target, header_of(computed, session_id="x"))).reason == "REQUEST_ID_REUSED"


def test_an_idle_upload_ends_and_its_memory_comes_back(target: RunningServer, computed: KvCache) -> None:
    upload = open_push(target, header_of(computed), "idle")
    assert used_bytes(target) > 0
    wait_until_free(target)
    error = call_error(lambda: push(target, pb.PushKvHeader(upload_id=upload.upload_id), chunks_of(computed)))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TRANSFER_UNKNOWN")


def test_a_push_that_is_cancelled_leaves_nothing(target: RunningServer, computed: KvCache) -> None:
    def frames() -> Iterator[pb.PushKvRequest]:
        yield pb.PushKvRequest(header=header_of(computed))
        yield pb.PushKvRequest(chunk=chunks_of(computed)[0])
        target.wait_for(lambda: used_bytes(target) > 0)
        call.cancel()

    call = target.kv.PushKv.future(frames())
    with pytest.raises(grpc.FutureCancelledError):
        call.result(10)
    wait_until_free(target)


def test_tenants_never_see_each_others_uploads(tiny_model: Path, computed: KvCache, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("a:alpha\nb:beta\n")
    with running_server(model=str(tiny_model), dtype="float32", auth_tokens_file=str(tokens)) as server:
        mine, others = ([("authorization", f"Bearer {token}")] for token in ("alpha", "beta"))
        request = pb.OpenPushRequest(request_id="same", header=header_of(computed))
        upload = server.kv.OpenPush(request, metadata=mine)
        assert server.kv.OpenPush(request, metadata=others).upload_id != upload.upload_id
        header = pb.PushKvRequest(header=pb.PushKvHeader(upload_id=upload.upload_id))
        error = call_error(lambda: server.kv.PushKv(iter([header]), metadata=others))
        assert error.reason == "TRANSFER_UNKNOWN"
