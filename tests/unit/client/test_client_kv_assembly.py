"""Pulled KV is in its place to the byte, or the pull fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crc32c
import numpy as np
import pytest
import xxhash

from sale_prefill.v1 import kv_pb2
from sale_prefill_client.errors import ChecksumMismatchError, ProtocolError
from sale_prefill_client.kv import KvCache
from sale_prefill_client.kv_assembly import KvAssembler

LAYERS, TOKENS, HEADS, DIM = 3, 10, 2, 4
LAYOUTS = {"THD": kv_pb2.KV_LAYOUT_THD, "HTD": kv_pb2.KV_LAYOUT_HTD}
Chunks = list[kv_pb2.KvChunk]


def problem(layout: str = "THD", checksum: str = "crc32c") -> tuple[np.ndarray, kv_pb2.KvManifest, Chunks]:
    """KV of random bits `[layers, 2, tokens, heads, dim]` uint16 (bfloat16), and its stream in chunks of 4 tokens."""
    kv = np.random.default_rng(0).integers(0, 1 << 16, (LAYERS, 2, TOKENS, HEADS, DIM), dtype=np.uint16)
    digest: dict[str, tuple[Any, Callable[[bytes], int]]] = {
        "crc32c": (kv_pb2.CHECKSUM_ALGORITHM_CRC32C, crc32c.crc32c),
        "xxh3_64": (kv_pb2.CHECKSUM_ALGORITHM_XXH3_64, xxhash.xxh3_64_intdigest),
        "none": (kv_pb2.CHECKSUM_ALGORITHM_NONE, lambda _: 0),
    }
    chunks: Chunks = []
    for layer in range(LAYERS):
        for kind in (kv_pb2.KV_KIND_KEY, kv_pb2.KV_KIND_VALUE):
            for start in range(0, TOKENS, 4):
                part = kv[layer, kind - 1, start : start + 4]
                data = (part if layout == "THD" else part.transpose(1, 0, 2)).tobytes()
                placed: dict[str, Any] = {"layer": layer, "kind": kind, "token_start": start, "num_tokens": len(part)}
                checksum_value = digest[checksum][1](data)
                chunks.append(kv_pb2.KvChunk(index=len(chunks), data=data, checksum=checksum_value, **placed))
    manifest = kv_pb2.KvManifest(
        spec=kv_pb2.KvSpec(
            model_fingerprint="m",
            element_type=kv_pb2.ELEMENT_TYPE_BFLOAT16,
            layout=LAYOUTS[layout],
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            rope_applied=True,
        ),
        range=kv_pb2.KvRange(token_end=TOKENS, layer_end=LAYERS),
        total_bytes=kv.nbytes,
        total_chunks=len(chunks),
        checksum_algorithm=digest[checksum][0],
        generation=7,
        token_digest=b"d" * 32,
    )
    return kv, manifest, chunks


def assemble(manifest: kv_pb2.KvManifest, chunks: Chunks, **asked: object) -> KvCache:
    options: dict[str, Any] = {"token_range": None, "layer_range": None, "layout": "THD", "checksum": "crc32c", **asked}
    assembler = KvAssembler("s-1", **options)
    assembler.add_manifest(manifest)
    for chunk in chunks:
        assembler.add_chunk(chunk)
    return assembler.finish()


@pytest.mark.parametrize("checksum", ["crc32c", "xxh3_64", "none"])
@pytest.mark.parametrize("layout", ["THD", "HTD"])
def test_every_byte_lands_in_its_place(layout: str, checksum: str) -> None:
    kv, manifest, chunks = problem(layout, checksum)
    cache = assemble(manifest, chunks, layout=layout, checksum=checksum)
    expected = kv if layout == "THD" else kv.transpose(0, 1, 3, 2, 4)
    np.testing.assert_array_equal(cache.numpy(), expected)
    assert (cache.session_id, cache.generation, cache.token_digest) == ("s-1", 7, b"d" * 32)
    assert (cache.num_tokens, cache.num_bytes) == (TOKENS, kv.nbytes)


def test_layers_and_kinds_may_come_in_any_order_that_the_server_plans() -> None:
    kv, manifest, chunks = problem()
    values_first = sorted(chunks, key=lambda chunk: (-chunk.layer, -chunk.kind, chunk.token_start))
    for index, chunk in enumerate(values_first):
        chunk.index = index
    np.testing.assert_array_equal(assemble(manifest, values_first).numpy(), kv)


def test_part_of_the_tokens_and_layers() -> None:
    kv, manifest, chunks = problem()
    kept = [chunk for chunk in chunks if chunk.layer == 1 and chunk.token_start >= 4]
    for index, chunk in enumerate(kept):
        chunk.index = index
    part = kv[1:2, :, 4:]
    manifest.range.CopyFrom(kv_pb2.KvRange(token_start=4, token_end=TOKENS, layer_start=1, layer_end=2))
    manifest.total_bytes, manifest.total_chunks = part.nbytes, len(kept)
    cache = assemble(manifest, kept, token_range=(4, None), layer_range=(1, 2))
    np.testing.assert_array_equal(cache.numpy(), part)
    assert (cache.token_start, cache.token_end, cache.layer_start, cache.layer_end) == (4, TOKENS, 1, 2)


@pytest.mark.parametrize("checksum", ["crc32c", "xxh3_64"])
@pytest.mark.parametrize("bit", [0, 77, 63 * 8 + 7])
def test_one_flipped_bit_is_caught_and_its_chunk_named(checksum: str, bit: int) -> None:
    _, manifest, chunks = problem(checksum=checksum)
    data = bytearray(chunks[5 - 1].data)
    data[bit // 8] ^= 1 << bit % 8
    chunks[5 - 1].data = bytes(data)
    with pytest.raises(ChecksumMismatchError, match="KV chunk 4") as caught:
        assemble(manifest, chunks, checksum=checksum)
    assert caught.value.metadata == {"chunk_index": "4"}


def edited(edit: Callable[[Chunks], Chunks | None]) -> tuple[kv_pb2.KvManifest, Chunks]:
    _, manifest, chunks = problem(checksum="none")
    return manifest, edit(chunks) or chunks


def set_chunk(chunks: Chunks, index: int, **fields: object) -> None:
    for name, value in fields.items():
        setattr(chunks[index], name, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c[:3] + c[4:], "chunk 4 came where 3 was due: chunks are missing"),
        (lambda c: c[:4] + c[3:], "chunk 3 came where 4 was due: chunks are repeated"),
        (lambda c: [c[1], c[0], *c[2:]], "chunk 1 came where 0 was due"),
        (lambda c: c[:-1], "ended after 17 of 18 chunks"),
        (lambda c: set_chunk(c, 1, token_start=5), "starts at token 5, but token 4 was due"),
        (lambda c: set_chunk(c, 1, token_start=3), "starts at token 3, but token 4 was due"),
        (lambda c: set_chunk(c, 1, layer=LAYERS), "outside the range"),
        (lambda c: set_chunk(c, 1, kind=0), "outside the range"),
        (lambda c: set_chunk(c, 1, num_tokens=0, data=b""), "holds 0 tokens"),
        (lambda c: set_chunk(c, 2, num_tokens=3), "the range ends at 10"),
        (lambda c: set_chunk(c, 1, data=c[1].data[:-1]), "holds 63 bytes"),
    ],
    ids=["missing", "repeated", "swapped", "early end", "gap", "overlap", "layer", "kind", "empty", "long", "short"],
)
def test_a_chunk_out_of_plan_is_refused(edit: Callable[[Chunks], Chunks | None], message: str) -> None:
    manifest, chunks = edited(edit)
    manifest.checksum_algorithm = kv_pb2.CHECKSUM_ALGORITHM_NONE
    with pytest.raises(ProtocolError, match=message):
        assemble(manifest, chunks, checksum="none")


def test_a_chunk_before_the_manifest_is_refused() -> None:
    assembler = KvAssembler("s", token_range=None, layer_range=None, layout="THD", checksum="crc32c")
    with pytest.raises(ProtocolError, match="before the manifest"):
        assembler.add_chunk(problem()[2][0])


@pytest.mark.parametrize(
    ("fields", "asked", "message"),
    [
        ({"total_bytes": 1}, {}, "names 1 bytes, but 3 layers of 10 tokens in its format are 960"),
        ({}, {"layout": "HTD"}, "layout is THD, but HTD"),
        ({}, {"checksum": "xxh3_64"}, "not xxh3_64"),
        ({}, {"token_range": (0, 5)}, "token range is 0..10; asked for: 0..5"),
        ({}, {"layer_range": (1, None)}, "layer range is 0..3; asked for: 1..end"),
        ({"range": kv_pb2.KvRange(token_end=TOKENS, layer_end=4)}, {}, "ends at 4 of 3 layers"),
        ({"range": kv_pb2.KvRange(layer_end=LAYERS)}, {}, "token range is 0..0"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_the_request_is_refused(
    fields: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    _, manifest, _ = problem()
    manifest.MergeFrom(kv_pb2.KvManifest(**{key: value for key, value in fields.items() if key != "range"}))
    if "range" in fields:
        manifest.range.CopyFrom(fields["range"])
    with pytest.raises(ProtocolError, match=message):
        assemble(manifest, [], **asked)


def test_a_resumed_stream_goes_on_where_the_first_one_stopped() -> None:
    kv, manifest, chunks = problem()
    assembler = KvAssembler("s", token_range=None, layer_range=None, layout="THD", checksum="crc32c")
    assembler.add_manifest(manifest)
    for chunk in chunks[:7]:
        assembler.add_chunk(chunk)
    assert (assembler.next_chunk_index, assembler.generation, assembler.complete) == (7, 7, False)
    assembler.add_manifest(manifest)
    for chunk in chunks[7:]:
        assembler.add_chunk(chunk)
    assert assembler.complete
    np.testing.assert_array_equal(assembler.finish().numpy(), kv)


def test_a_resumed_stream_of_other_contents_is_refused() -> None:
    _, manifest, _ = problem()
    assembler = KvAssembler("s", token_range=None, layer_range=None, layout="THD", checksum="crc32c")
    assembler.add_manifest(manifest)
    manifest = kv_pb2.KvManifest.FromString(manifest.SerializeToString())
    manifest.token_digest = b"e" * 32
    with pytest.raises(ProtocolError, match="another manifest"):
        assembler.add_manifest(manifest)
