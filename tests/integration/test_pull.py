"""KV on the wire: what the server sends is what the model computed."""

from __future__ import annotations

import threading
from pathlib import Path

import crc32c
import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM, DynamicCache

from sale_prefill.v1 import kv_pb2, session_service_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from tests.support import RunningServer, tokens_of

DENSE = session_service_pb2.AttentionOptions(mode=session_service_pb2.ATTENTION_MODE_DENSE)
TOKENS = 700


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> DynamicCache:
    """The KV of the same tokens, computed by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens_of(TOKENS)]), use_cache=True).past_key_values


@pytest.fixture
def session_id(tiny_server: RunningServer) -> str:
    return tiny_server.prefill_tokens(tokens_of(TOKENS), attention=DENSE).session.session_id


def pull(server: RunningServer, **fields: object) -> tuple[kv_pb2.KvManifest, list[kv_pb2.KvChunk]]:
    first, *rest = server.kv.PullKv(pb.PullKvRequest(**fields))
    return first.manifest, [frame.chunk for frame in rest]


@pytest.mark.parametrize("layout", [kv_pb2.KV_LAYOUT_THD, kv_pb2.KV_LAYOUT_HTD])
def test_chunks_hold_what_transformers_computes(
    tiny_server: RunningServer, session_id: str, expected: DynamicCache, layout: int
) -> None:
    manifest, chunks = pull(tiny_server, session_id=session_id, layout=layout, chunk_bytes=20_000)
    assert manifest.total_chunks == len(chunks) > 4
    assert manifest.total_bytes == sum(len(chunk.data) for chunk in chunks) == TOKENS * 512
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    for chunk in chunks:
        layer = expected.layers[chunk.layer]
        source = layer.keys if chunk.kind == kv_pb2.KV_KIND_KEY else layer.values
        part = source[0, :, chunk.token_start : chunk.token_start + chunk.num_tokens]
        part = part.transpose(0, 1) if layout == kv_pb2.KV_LAYOUT_THD else part
        received = torch.frombuffer(bytearray(chunk.data), dtype=torch.float32).view(part.shape)
        torch.testing.assert_close(received, part, atol=1e-5, rtol=1e-5)


def test_every_chunk_carries_its_checksum(tiny_server: RunningServer, session_id: str) -> None:
    manifest, chunks = pull(tiny_server, session_id=session_id)
    assert manifest.checksum_algorithm == kv_pb2.CHECKSUM_ALGORITHM_CRC32C
    assert all(chunk.checksum == crc32c.crc32c(chunk.data) for chunk in chunks)
    xxh3 = kv_pb2.CHECKSUM_ALGORITHM_XXH3_64
    _, chunks = pull(tiny_server, session_id=session_id, checksum_algorithm=xxh3)
    assert all(chunk.checksum == xxhash.xxh3_64_intdigest(chunk.data) for chunk in chunks)


def test_a_range_is_part_of_the_whole(tiny_server: RunningServer, session_id: str) -> None:
    part = kv_pb2.KvRange(token_start=100, token_end=200, layer_start=1)
    manifest, chunks = pull(tiny_server, session_id=session_id, range=part)
    assert (manifest.range.token_end, manifest.range.layer_end) == (200, 2)
    assert {(chunk.layer, chunk.token_start, chunk.num_tokens) for chunk in chunks} == {(1, 100, 100)}


def test_a_broken_stream_resumes_at_a_chunk(tiny_server: RunningServer, session_id: str) -> None:
    manifest, whole = pull(tiny_server, session_id=session_id, chunk_bytes=8192)
    _, rest = pull(
        tiny_server, session_id=session_id, chunk_bytes=8192, resume_from_chunk=5, generation=manifest.generation
    )
    assert rest == whole[5:]


def test_a_stream_reads_one_generation_while_the_session_grows_and_goes(tiny_server: RunningServer) -> None:
    session = tiny_server.prefill_tokens(tokens_of(TOKENS), attention=DENSE).session
    session_id = session.session_id
    _, calm = pull(tiny_server, session_id=session_id, chunk_bytes=4096)
    stream = iter(tiny_server.kv.PullKv(pb.PullKvRequest(session_id=session_id, chunk_bytes=4096)))
    manifest = next(stream).manifest
    tiny_server.decode_tokens(session_id, 4, ignore_eos=True)
    tiny_server.sessions.DeleteSession(session_service_pb2.DeleteSessionRequest(session_id=session_id))
    disturbed = [frame.chunk for frame in stream]
    assert manifest.generation == session.generation
    assert disturbed == calm


def test_many_readers_get_the_same_bytes(tiny_server: RunningServer, session_id: str) -> None:
    results: list[list[kv_pb2.KvChunk]] = []
    readers = [
        threading.Thread(target=lambda: results.append(pull(tiny_server, session_id=session_id)[1])) for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(results) == 4
    assert all(chunks == results[0] for chunks in results)
