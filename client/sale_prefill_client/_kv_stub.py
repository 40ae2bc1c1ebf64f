"""The streams that carry KV, with messages as bytes, which `sale_prefill.kv_frames` writes and reads."""

from __future__ import annotations

from typing import Any

from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill.v1 import prefill_service_pb2

_SERVICE = f"/{pb.DESCRIPTOR.services_by_name['KvTransferService'].full_name}"


class RawKvStub:
    """In place of the generated stub, for PullKv's responses and PushKv's requests."""

    def __init__(self, channel: Any) -> None:
        self.PullKv = channel.unary_stream(f"{_SERVICE}/PullKv", request_serializer=pb.PullKvRequest.SerializeToString)
        self.PushKv = channel.stream_unary(f"{_SERVICE}/PushKv", response_deserializer=pb.PushKvResponse.FromString)


class RawPrefillStub:
    """In place of the generated stub, for Prefill's responses."""

    def __init__(self, channel: Any) -> None:
        service = prefill_service_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name
        serializer = prefill_service_pb2.PrefillRequest.SerializeToString
        self.Prefill = channel.unary_stream(f"/{service}/Prefill", request_serializer=serializer)
