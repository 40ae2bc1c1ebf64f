import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sale_prefill.v1 import kv_pb2 as _kv_pb2
from sale_prefill.v1 import session_service_pb2 as _session_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_GRPC: _ClassVar[Transport]
    TRANSPORT_SHM: _ClassVar[Transport]
    TRANSPORT_CUDA_IPC: _ClassVar[Transport]
    TRANSPORT_NIXL: _ClassVar[Transport]
    TRANSPORT_MOONCAKE: _ClassVar[Transport]
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_GRPC: Transport
TRANSPORT_SHM: Transport
TRANSPORT_CUDA_IPC: Transport
TRANSPORT_NIXL: Transport
TRANSPORT_MOONCAKE: Transport

class PullKvRequest(_message.Message):
    __slots__ = ("session_id", "range", "layout", "element_type", "chunk_bytes", "checksum_algorithm", "resume_from_chunk", "generation")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_CHUNK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    range: _kv_pb2.KvRange
    layout: _kv_pb2.KvLayout
    element_type: _kv_pb2.ElementType
    chunk_bytes: int
    checksum_algorithm: _kv_pb2.ChecksumAlgorithm
    resume_from_chunk: int
    generation: int
    def __init__(self, session_id: _Optional[str] = ..., range: _Optional[_Union[_kv_pb2.KvRange, _Mapping]] = ..., layout: _Optional[_Union[_kv_pb2.KvLayout, str]] = ..., element_type: _Optional[_Union[_kv_pb2.ElementType, str]] = ..., chunk_bytes: _Optional[int] = ..., checksum_algorithm: _Optional[_Union[_kv_pb2.ChecksumAlgorithm, str]] = ..., resume_from_chunk: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class PullKvResponse(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: _kv_pb2.KvManifest
    chunk: _kv_pb2.KvChunk
    def __init__(self, manifest: _Optional[_Union[_kv_pb2.KvManifest, _Mapping]] = ..., chunk: _Optional[_Union[_kv_pb2.KvChunk, _Mapping]] = ...) -> None: ...

class PushKvRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PushKvHeader
    chunk: _kv_pb2.KvChunk
    def __init__(self, header: _Optional[_Union[PushKvHeader, _Mapping]] = ..., chunk: _Optional[_Union[_kv_pb2.KvChunk, _Mapping]] = ...) -> None: ...

class PushKvHeader(_message.Message):
    __slots__ = ("session_id", "token_ids", "manifest", "retention")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    manifest: _kv_pb2.KvManifest
    retention: _session_service_pb2.RetentionPolicy
    def __init__(self, session_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., manifest: _Optional[_Union[_kv_pb2.KvManifest, _Mapping]] = ..., retention: _Optional[_Union[_session_service_pb2.RetentionPolicy, _Mapping]] = ...) -> None: ...

class PushKvResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: _session_service_pb2.Session
    def __init__(self, session: _Optional[_Union[_session_service_pb2.Session, _Mapping]] = ...) -> None: ...

class OpenTransferRequest(_message.Message):
    __slots__ = ("session_id", "transports", "range", "client_descriptor")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    transports: _containers.RepeatedScalarFieldContainer[Transport]
    range: _kv_pb2.KvRange
    client_descriptor: bytes
    def __init__(self, session_id: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[Transport, str]]] = ..., range: _Optional[_Union[_kv_pb2.KvRange, _Mapping]] = ..., client_descriptor: _Optional[bytes] = ...) -> None: ...

class OpenTransferResponse(_message.Message):
    __slots__ = ("transfer_id", "transport", "manifest", "server_descriptor", "expire_time")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SERVER_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    transport: Transport
    manifest: _kv_pb2.KvManifest
    server_descriptor: bytes
    expire_time: _timestamp_pb2.Timestamp
    def __init__(self, transfer_id: _Optional[str] = ..., transport: _Optional[_Union[Transport, str]] = ..., manifest: _Optional[_Union[_kv_pb2.KvManifest, _Mapping]] = ..., server_descriptor: _Optional[bytes] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CloseTransferRequest(_message.Message):
    __slots__ = ("transfer_id", "completed")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    completed: bool
    def __init__(self, transfer_id: _Optional[str] = ..., completed: _Optional[bool] = ...) -> None: ...

class CloseTransferResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
