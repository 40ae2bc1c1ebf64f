"""KV caches in safetensors files: written in one piece or not at all, read in place, every byte checked.

`docs/kv-format.md` describes the file. Any safetensors reader opens it; the checks are in its header's metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from .errors import ChecksumMismatchError
from .kv import KvCache
from .options import Attention
from .results import KvSpec

#: Entry of the metadata that says that a file is one of these, and its version.
FORMAT_KEY, FORMAT_VERSION = "sale_prefill_kv", "1"
_DIGEST_KEY = "header_sha256"
#: What stands in the digest's place while the header is digested.
_NO_DIGEST = "0" * 64
_LENGTH_BYTES = 8
#: Data begin at a multiple of this, for readers that map the file.
_ALIGNMENT_BYTES = 64
#: The format's own limit (safetensors 0.8).
_MAX_HEADER_BYTES = 100_000_000
_TYPE_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
}


def save(cache: KvCache, path: Path) -> None:
    """Write the cache; the file appears whole, on disk, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    header = _header(cache)
    handle, partial = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
            for _, tensor in _tensors(cache):
                file.write(np.ascontiguousarray(tensor).data)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
        _sync_folder(path.parent)
    finally:
        Path(partial).unlink(missing_ok=True)


def load(path: Path) -> KvCache:
    """Read a file that `save` wrote. The KV is mapped, not copied: memory is taken as it is used; writing to it changes
    nothing in the file.

    Raises:
        ChecksumMismatchError: the file is not as it was written; metadata: file, and tensor where that is known.
        ValueError: another kind of file.
        OSError: it cannot be read.
    """
    header, metadata, data_start = _read_header(path)
    cache = _cache(path, metadata, data_start)
    checksums = json.loads(metadata["checksums"])
    described = {name for name in header if name != "__metadata__"}
    if described != set(checksums) or described != {name for name, _ in _tensors(cache)}:
        raise _damaged(path, "its tensors are not those that its manifest names")
    for name, tensor in _tensors(cache):
        if f"{crc32c.crc32c(tensor.data):08x}" != checksums[name]:
            raise _damaged(path, f"{name} differs from its checksum", tensor=name)
    return cache


def _tensors(cache: KvCache) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Names and bytes, in the order of the file."""
    for offset, layer in enumerate(range(cache.layer_start, cache.layer_end)):
        yield f"layers.{layer}.key", cache.buffer[offset, 0]
        yield f"layers.{layer}.value", cache.buffer[offset, 1]


def _header(cache: KvCache) -> bytes:
    entries: dict[str, Any] = {}
    checksums, offset = {}, 0
    for name, tensor in _tensors(cache):
        checksums[name] = f"{crc32c.crc32c(np.ascontiguousarray(tensor).data):08x}"
        shape = [*tensor.shape[:2], cache.spec.head_dim]
        entries[name] = {
            "dtype": _TYPE_NAMES[cache.spec.element_type],
            "shape": shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps({"__metadata__": _metadata(cache, checksums), **entries}, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT_BYTES)
    return text.replace(_NO_DIGEST.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def _metadata(cache: KvCache, checksums: dict[str, str]) -> dict[str, str]:
    """The manifest, as the format wants it: texts. The digest comes first, so that nothing else can look like it."""
    spec = asdict(cache.spec)
    return {
        _DIGEST_KEY: _NO_DIGEST,
        FORMAT_KEY: FORMAT_VERSION,
        "session_id": cache.session_id,
        **{name: str(value) for name, value in spec.items()},
        "token_start": str(cache.token_start),
        "token_end": str(cache.token_end),
        "layer_start": str(cache.layer_start),
        "layer_end": str(cache.layer_end),
        "generation": str(cache.generation),
        "token_digest": cache.token_digest.hex(),
        "token_ids": json.dumps(None if cache.token_ids is None else cache.token_ids.tolist()),
        "attention": json.dumps(None if cache.attention is None else asdict(cache.attention)),
        "checksum_algorithm": "crc32c",
        "checksums": json.dumps(checksums),
    }


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The header, its metadata, and where data begin; checked against its digest."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        raw = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    if len(raw) != length or not length:
        raise _damaged(path, "its header is cut off, or it is no safetensors file")
    try:
        header = json.loads(raw)
        metadata = header["__metadata__"]
        digest, version = metadata.get(_DIGEST_KEY), metadata.get(FORMAT_KEY)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, "its header cannot be read, or it is no KV file") from None
    if digest is None and version is None:
        raise ValueError(f"{path} is a safetensors file without a KV manifest; sale-prefill pull writes those with one")
    if not isinstance(digest, str) or len(digest) != len(_NO_DIGEST):
        raise _damaged(path, "its header has no digest")
    undigested = raw.replace(digest.encode(), _NO_DIGEST.encode(), 1)
    if hashlib.sha256(undigested).hexdigest() != digest:
        raise _damaged(path, "its header differs from its digest")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is a KV file of version {version}; this client reads version {FORMAT_VERSION}")
    return header, metadata, _LENGTH_BYTES + length


def _cache(path: Path, metadata: dict[str, str], data_start: int) -> KvCache:
    spec = KvSpec(
        model_fingerprint=metadata["model_fingerprint"],
        element_type=metadata["element_type"],  # type: ignore[arg-type]  # as it was written
        layout=metadata["layout"],  # type: ignore[arg-type]
        num_layers=int(metadata["num_layers"]),
        num_kv_heads=int(metadata["num_kv_heads"]),
        head_dim=int(metadata["head_dim"]),
        rope_applied=metadata["rope_applied"] == "True",
        rope_fingerprint=metadata["rope_fingerprint"],
    )
    bounds = {name: int(metadata[name]) for name in ("token_start", "token_end", "layer_start", "layer_end")}
    tokens, layers = bounds["token_end"] - bounds["token_start"], bounds["layer_end"] - bounds["layer_start"]
    rows = (tokens, spec.num_kv_heads) if spec.layout == "THD" else (spec.num_kv_heads, tokens)
    shape = (layers, 2, *rows, spec.head_dim * spec.element_bytes)
    size_bytes, wanted_bytes = path.stat().st_size, data_start + int(np.prod(shape))
    if size_bytes != wanted_bytes:
        raise _damaged(path, f"it has {size_bytes} bytes, and its header tells of {wanted_bytes}")
    token_ids, attention = json.loads(metadata["token_ids"]), json.loads(metadata["attention"])
    return KvCache(
        session_id=metadata["session_id"],
        spec=spec,
        **bounds,
        generation=int(metadata["generation"]),
        token_digest=bytes.fromhex(metadata["token_digest"]),
        buffer=np.memmap(path, np.uint8, "c", data_start, shape).view(np.ndarray),
        token_ids=None if token_ids is None else np.array(token_ids, np.uint32),
        attention=None if attention is None else Attention(**attention),
    )


def _damaged(path: Path, problem: str, **details: str) -> ChecksumMismatchError:
    return ChecksumMismatchError(
        f"{path} is damaged: {problem}; pull or copy it again", metadata={"file": str(path), **details}
    )


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
