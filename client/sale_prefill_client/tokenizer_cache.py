"""Tokenizer files on disk: `$XDG_CACHE_HOME/sale-prefill/tokenizers/<digest>/`, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from sale_prefill.v1 import server_service_pb2

from .errors import ChecksumMismatchError, ProtocolError

MAX_TOTAL_BYTES = 256 << 20


def cache_root() -> Path:
    """Folder of all cached tokenizers (XDG Base Directory Specification: an unset or relative variable does not
    count)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "sale-prefill" / "tokenizers"


def check_manifest(manifest: server_service_pb2.TokenizerManifest) -> None:
    """Refuse what must not touch the disk.

    Raises:
        ProtocolError: a digest that is no SHA-256, a name that is no plain file name or comes twice, or more than
            `MAX_TOTAL_BYTES`.
    """
    for digest in (manifest.digest, *(entry.sha256 for entry in manifest.files)):
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ProtocolError(f"the tokenizer manifest holds the digest {digest!r}, which is no hexadecimal SHA-256")
    names = [entry.name for entry in manifest.files]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or names.count(name) > 1:
            raise ProtocolError(f"the tokenizer manifest names a file {name!r}, which is no plain or no single name")
    total_bytes = sum(entry.size_bytes for entry in manifest.files)
    if total_bytes > MAX_TOTAL_BYTES:
        raise ProtocolError(f"the tokenizer files are {total_bytes} bytes; this client takes {MAX_TOTAL_BYTES}")


def find(manifest: server_service_pb2.TokenizerManifest, root: Path) -> Path | None:
    """The folder that holds this set of files, each checked against its SHA-256; None where there is none."""
    folder = root / manifest.digest
    for entry in manifest.files:
        try:
            content = (folder / entry.name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            return None
    return folder


class TokenizerDownload:
    """Takes the chunks of one set of files and stores them when all are there.

    Args:
        manifest: checked by `check_manifest`.
    """

    def __init__(self, manifest: server_service_pb2.TokenizerManifest) -> None:
        self._manifest = manifest
        self._contents = [bytearray() for _ in manifest.files]

    def add(self, chunk: server_service_pb2.TokenizerFileChunk) -> None:
        """Take the next piece.

        Raises:
            ProtocolError: of no file in the manifest, or past its end.
        """
        if chunk.file_index >= len(self._contents):
            raise ProtocolError(f"a tokenizer chunk is of file {chunk.file_index} of {len(self._contents)}")
        content, entry = self._contents[chunk.file_index], self._manifest.files[chunk.file_index]
        content += chunk.data
        if len(content) > entry.size_bytes:
            raise ProtocolError(f"the tokenizer file {entry.name} is longer than its {entry.size_bytes} bytes")

    def store(self, root: Path) -> Path:
        """Check every file and move the set into the cache in one step.

        Returns:
            Path: its folder.

        Raises:
            ChecksumMismatchError: a file differs from its size or SHA-256; metadata: file.
        """
        for entry, content in zip(self._manifest.files, self._contents, strict=True):
            if len(content) != entry.size_bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
                raise ChecksumMismatchError(
                    f"the tokenizer file {entry.name} differs from its SHA-256 {entry.sha256}; try again",
                    metadata={"file": entry.name},
                )
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".incoming-", dir=root))
        try:
            for entry, content in zip(self._manifest.files, self._contents, strict=True):
                (staging / entry.name).write_bytes(content)
            return self._publish(staging, root)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, staging: Path, root: Path) -> Path:
        folder = root / self._manifest.digest
        try:
            staging.rename(folder)
        except OSError:
            # Another process was first, or an earlier copy is damaged: keep a good one, replace a bad one.
            if find(self._manifest, root) is None:
                damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=root))
                folder.rename(damaged / "files")
                staging.rename(folder)
                shutil.rmtree(damaged, ignore_errors=True)
        return folder
