"""A reader of PullKv that knows nothing but the published .proto files, as any other gRPC client does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_tools import protoc

from benchmarks.report import ROOT

_PROTO = ROOT / "proto"
_METHOD = "/sale_prefill.v1.KvTransferService/PullKv"
_PACKAGE = "sale_prefill.v1"


def pull(target: str, session_id: str, *, chunk_bytes: int = 1 << 20) -> npt.NDArray[np.uint8]:
    """All of a session's KV as `[layers, 2, tokens, kv_heads, head_dim * element_bytes]`, as `KvCache.buffer` has it.

    Raises:
        RuntimeError: a frame has fields that the published files do not know, or bytes are missing.
    """
    request_class, response_class = _messages("PullKvRequest", "PullKvResponse")
    request = request_class(session_id=session_id, layout=2, chunk_bytes=chunk_bytes)
    with grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", 1 << 24)]) as channel:
        call = channel.unary_stream(_METHOD, request_class.SerializeToString, response_class.FromString)
        frames: Iterator[Any] = call(request)
        manifest = next(frames).manifest
        spec, tokens = manifest.spec, manifest.range.token_end - manifest.range.token_start
        token_bytes = manifest.total_bytes // (2 * spec.num_layers * tokens)
        whole = np.zeros((spec.num_layers, 2, tokens, token_bytes), np.uint8)
        received = 0
        for frame in frames:
            chunk = frame.chunk
            if len(UnknownFieldSet(frame)) or len(UnknownFieldSet(chunk)):
                raise RuntimeError(f"chunk {chunk.index} has fields that the published files do not know")
            rows = np.frombuffer(chunk.data, np.uint8).reshape(chunk.num_tokens, token_bytes)
            whole[chunk.layer, chunk.kind - 1, chunk.token_start : chunk.token_start + chunk.num_tokens] = rows
            received += len(chunk.data)
    if received != manifest.total_bytes:
        raise RuntimeError(f"{received} of {manifest.total_bytes} bytes came")
    return whole.reshape(spec.num_layers, 2, tokens, spec.num_kv_heads, -1)


def _messages(*names: str) -> list[Any]:
    """Message classes out of the .proto files, apart from those that the client uses."""
    files = sorted(_PROTO.glob("sale_prefill/v1/*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "published.binpb"
        words = [f"-I{_PROTO}", f"-I{include}", "--include_imports", f"--descriptor_set_out={output}"]
        if protoc.main(["protoc", *words, *map(str, files)]):
            raise RuntimeError("the published .proto files do not compile")
        found = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in found.file:
        pool.Add(file)
    return [message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in names]
