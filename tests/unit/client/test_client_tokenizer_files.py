"""Tokenizer files are fetched once, checked, and never written outside their folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sale_prefill.v1 import server_service_pb2 as pb
from sale_prefill_client import AsyncClient, Client, errors
from sale_prefill_client.tokenizer_cache import cache_root
from tests.unit.client.scripted import FAST_RETRY, Script, break_connection, scripted_server
from tests.unit.client.texts import save_byte_tokenizer


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = save_byte_tokenizer(tmp_path / "model")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def manifest_of(files: dict[str, bytes]) -> pb.TokenizerManifest:
    entries = [
        pb.TokenizerFile(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    ]
    digest = hashlib.sha256(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
    return pb.TokenizerManifest(digest=digest, files=entries)


def sending(files: dict[str, bytes], manifest: pb.TokenizerManifest | None = None) -> Any:
    def handler(_: Any, __: grpc.ServicerContext) -> Iterator[pb.GetTokenizerFilesResponse]:
        yield pb.GetTokenizerFilesResponse(manifest=manifest or manifest_of(files))
        for index, content in enumerate(files.values()):
            for start in range(0, len(content), 1000):
                piece = pb.TokenizerFileChunk(file_index=index, data=content[start : start + 1000])
                yield pb.GetTokenizerFilesResponse(chunk=piece)

    return handler


def fetch(handler: Any, root: Path) -> list[int]:
    with scripted_server(GetTokenizerFiles=handler) as target, Client(target, retry=FAST_RETRY) as client:
        return client.tokenizer(cache_folder=root).encode("é")


def test_files_are_kept_under_their_digest(files: dict[str, bytes], tmp_path: Path) -> None:
    assert len(fetch(sending(files), tmp_path / "cache")) == 3
    folder = tmp_path / "cache" / manifest_of(files).digest
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert list((tmp_path / "cache").iterdir()) == [folder]


async def test_the_async_client_fetches_them_too(files: dict[str, bytes], tmp_path: Path) -> None:
    with scripted_server(GetTokenizerFiles=sending(files)) as target:
        async with AsyncClient(target) as client:
            tokenizer = await client.tokenizer(cache_folder=tmp_path / "cache")
            assert tokenizer is await client.tokenizer()
    assert tokenizer.decode(tokenizer.encode("é")) == "é"


def test_cached_files_are_not_sent_again(files: dict[str, bytes], tmp_path: Path) -> None:
    def manifest_only(_: Any, context: grpc.ServicerContext) -> Iterator[pb.GetTokenizerFilesResponse]:
        yield pb.GetTokenizerFilesResponse(manifest=manifest_of(files))
        context.abort(grpc.StatusCode.INTERNAL, "the contents were asked for")

    fetch(sending(files), tmp_path)
    assert len(fetch(manifest_only, tmp_path)) == 3


def test_a_damaged_copy_is_replaced(files: dict[str, bytes], tmp_path: Path) -> None:
    fetch(sending(files), tmp_path / "cache")
    folder = tmp_path / "cache" / manifest_of(files).digest
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert len(fetch(sending(files), tmp_path / "cache")) == 3
    assert (folder / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_broken_download_begins_anew(files: dict[str, bytes], tmp_path: Path) -> None:
    def broken(_: Any, context: grpc.ServicerContext) -> Iterator[pb.GetTokenizerFilesResponse]:
        yield pb.GetTokenizerFilesResponse(manifest=manifest_of(files))
        yield pb.GetTokenizerFilesResponse(chunk=pb.TokenizerFileChunk(file_index=0, data=b"{"))
        break_connection(context)

    script = Script([broken, sending(files)])
    assert len(fetch(script, tmp_path)) == 3
    assert len(script.requests) == 2


def test_a_file_that_differs_from_its_digest_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    changed = {**files, "tokenizer.json": files["tokenizer.json"].replace(b"begin", b"bogin")}
    with pytest.raises(errors.ChecksumMismatchError, match=r"tokenizer\.json differs") as caught:
        fetch(sending(changed, manifest_of(files)), tmp_path / "cache")
    assert caught.value.metadata == {"file": "tokenizer.json"}
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/b", "a\\b", "..", ".", "", ".hidden", "nul\0", "tokenizer.json", "C:evil", "a b"],
)
def test_a_name_that_is_not_plain_touches_no_disk(files: dict[str, bytes], tmp_path: Path, name: str) -> None:
    manifest = manifest_of(files)
    manifest.files.append(pb.TokenizerFile(name=name, size_bytes=0, sha256=hashlib.sha256(b"").hexdigest()))
    with pytest.raises(errors.ProtocolError, match="no plain or no single name"):
        fetch(sending(files, manifest), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("digest", ["../" * 20, "", "A" * 64, "0" * 63 + "\n"])
def test_a_digest_that_is_none_touches_no_disk(files: dict[str, bytes], tmp_path: Path, digest: str) -> None:
    manifest = manifest_of(files)
    manifest.digest = digest
    with pytest.raises(errors.ProtocolError, match="no hexadecimal SHA-256"):
        fetch(sending(files, manifest), tmp_path / "cache")


def test_a_set_of_files_that_would_fill_the_disk_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    manifest = manifest_of(files)
    manifest.files[0].size_bytes = 1 << 40
    with pytest.raises(errors.ProtocolError, match="this client takes"):
        fetch(sending(files, manifest), tmp_path / "cache")


def test_more_bytes_than_named_are_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    longer = {name: content + b"x" for name, content in files.items()}
    with pytest.raises(errors.ProtocolError, match="longer than its"):
        fetch(sending(longer, manifest_of(files)), tmp_path / "cache")


def test_a_model_without_a_tokenizer_says_to_send_ids(tmp_path: Path) -> None:
    with pytest.raises(errors.NoTokenizerError, match="send token ids"):
        fetch(sending({}), tmp_path)


def test_the_cache_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "sale-prefill" / "tokenizers"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == Path.home() / ".cache" / "sale-prefill" / "tokenizers"
