"""KV that comes with a prefill: the same bytes as a pull's, each layer's before later ones are computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sale_prefill.v1 import prefill_service_pb2 as prefill_pb
from sale_prefill_client import Client, InlineKv, KvArrived, PrefillResult
from sale_prefill_client.errors import KvSpecMismatchError
from tests.support import RunningServer, call_error, running_server, tokens_of


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[RunningServer]:
    with running_server(model=str(tiny_model), dtype="float32", chunk_tokens=256, prefix_reuse=True) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_the_kv_is_that_of_a_pull(client: Client, layout: str) -> None:
    prompt = tokens_of(700, seed=1)
    result = client.prefill(prompt, inline_kv=InlineKv(layout=layout, chunk_bytes=8192), prefix_reuse=False)  # type: ignore[arg-type]
    assert result.kv is not None
    pulled = client.pull_kv(result.session_id, layout=layout)  # type: ignore[arg-type]
    assert np.array_equal(result.kv.buffer, pulled.buffer)
    assert (result.kv.session_id, result.kv.generation) == (pulled.session_id, pulled.generation)
    assert (result.kv.token_digest, result.kv.num_tokens) == (pulled.token_digest, 700)


def test_parts_come_chunk_by_chunk_and_layer_by_layer(client: Client) -> None:
    events = list(client.prefill_events(tokens_of(600, seed=2), inline_kv=True, prefix_reuse=False))
    parts = [event for event in events if isinstance(event, KvArrived)]
    expected = [
        (layer, kind, start, min(start + 256, 600)) for start in (0, 256, 512) for layer in (0, 1) for kind in (0, 1)
    ]
    assert [(part.layer, part.kind, part.token_start, part.token_end) for part in parts] == expected
    assert parts[-1].received_bytes == parts[-1].total_bytes
    assert isinstance(events[-1], PrefillResult)


def test_what_was_there_before_comes_too(client: Client) -> None:
    prompt = tokens_of(600, seed=3)
    first = client.prefill(prompt)
    again = client.prefill(prompt[:512] + tokens_of(100, seed=4), inline_kv=True)
    appended = client.prefill(tokens_of(40, seed=5), session_id=first.session_id, inline_kv=True)
    assert again.stats.prefix_tokens == 512
    assert again.kv is not None
    assert appended.kv is not None
    assert appended.kv.num_tokens == 640
    assert np.array_equal(again.kv.buffer, client.pull_kv(again.session_id).buffer)
    assert np.array_equal(appended.kv.buffer, client.pull_kv(first.session_id).buffer)


def test_part_of_it_comes_where_part_is_asked_for(client: Client) -> None:
    inline = InlineKv(token_range=(100, 300), layer_range=(1, 2), checksum="xxh3_64")
    result = client.prefill(tokens_of(400, seed=6), inline_kv=inline, prefix_reuse=False)
    assert result.kv is not None
    whole = client.pull_kv(result.session_id, token_range=(100, 300), layer_range=(1, 2))
    assert np.array_equal(result.kv.buffer, whole.buffer)


def test_a_session_that_nobody_keeps_is_handed_over_all_the_same(client: Client, server: RunningServer) -> None:
    before = server.load().kv_used_bytes
    result = client.prefill(tokens_of(300, seed=7), inline_kv=True, lease_seconds=0)
    assert result.kv is not None
    kept = client.prefill(tokens_of(300, seed=7), prefix_reuse=False)
    assert np.array_equal(result.kv.buffer, client.pull_kv(kept.session_id).buffer)
    client.delete_session(kept.session_id)
    server.wait_for(lambda: server.load().kv_used_bytes == before)


@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_it_comes_through_shared_memory(client: Client, layout: str) -> None:
    prompt = tokens_of(700, seed=10)
    segment = client.open_transfer(size_bytes=1 << 22)
    assert segment is not None
    result = client.prefill(prompt, inline_kv=InlineKv(layout=layout, segment=segment), prefix_reuse=False)  # type: ignore[arg-type]
    assert result.kv is not None
    assert np.array_equal(result.kv.buffer, client.pull_kv(result.session_id, layout=layout).buffer)  # type: ignore[arg-type]
    client.close_transfer(segment)


def test_another_format_is_refused_before_anything_is_computed(client: Client, server: RunningServer) -> None:
    before = server.metric("sale_prefill_tokens_total", source="computed")
    spec = client.get_server_info().kv_spec
    other = type(spec)(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, "num_layers": 9})
    with pytest.raises(KvSpecMismatchError) as caught:
        client.prefill(tokens_of(300, seed=8), inline_kv=InlineKv(expected_spec=other))
    assert caught.value.metadata["field"] == "num_layers"
    assert server.metric("sale_prefill_tokens_total", source="computed") == before


def test_a_stream_that_broke_off_goes_on_from_its_chunk(server: RunningServer) -> None:
    request = prefill_pb.PrefillRequest(token_ids=tokens_of(600, seed=9), request_id="broken", session_id="broken")
    request.inline_kv.chunk_bytes = 8192
    chunks: dict[int, bytes] = {}
    call = server.prefill.Prefill(request, timeout=30)
    for event in call:
        if event.HasField("kv_chunk"):
            chunks[event.kv_chunk.index] = event.kv_chunk.data
        if len(chunks) == 5:
            call.cancel()
            break
    request.inline_kv.resume_from_chunk = 5
    events = list(server.prefill.Prefill(request, timeout=30))
    (manifest,) = [event.kv_manifest for event in events if event.HasField("kv_manifest")]
    rest = [event.kv_chunk.index for event in events if event.HasField("kv_chunk")]
    assert rest == list(range(5, manifest.total_chunks))
    assert events[-1].HasField("result")


def test_a_resume_past_the_end_is_a_mistake(server: RunningServer) -> None:
    request = prefill_pb.PrefillRequest(token_ids=[5, 6])
    request.inline_kv.resume_from_chunk = 99
    error = call_error(lambda: list(server.prefill.Prefill(request, timeout=30)))
    assert error.fields == ["inline_kv.resume_from_chunk"]
