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
    __slots__ = ("session_id", "range", "layout", "element_type", "chunk_bytes", "checksum_algorithm", "resume_from_chunk", "generation", "expected_spec", "transfer_id", "include_token_ids", "group_chunks")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_CHUNK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_SPEC_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GROUP_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    range: _kv_pb2.KvRange
    layout: _kv_pb2.KvLayout
    element_type: _kv_pb2.ElementType
    chunk_bytes: int
    checksum_algorithm: _kv_pb2.ChecksumAlgorithm
    resume_from_chunk: int
    generation: int
    expected_spec: _kv_pb2.KvSpec
    transfer_id: str
    include_token_ids: bool
    group_chunks: bool
    def __init__(self, session_id: _Optional[str] = ..., range: _Optional[_Union[_kv_pb2.KvRange, _Mapping]] = ..., layout: _Optional[_Union[_kv_pb2.KvLayout, str]] = ..., element_type: _Optional[_Union[_kv_pb2.ElementType, str]] = ..., chunk_bytes: _Optional[int] = ..., checksum_algorithm: _Optional[_Union[_kv_pb2.ChecksumAlgorithm, str]] = ..., resume_from_chunk: _Optional[int] = ..., generation: _Optional[int] = ..., expected_spec: _Optional[_Union[_kv_pb2.KvSpec, _Mapping]] = ..., transfer_id: _Optional[str] = ..., include_token_ids: _Optional[bool] = ..., group_chunks: _Optional[bool] = ...) -> None: ...

class PullKvResponse(_message.Message):
    __slots__ = ("manifest", "chunk", "chunks")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    manifest: _kv_pb2.KvManifest
    chunk: _kv_pb2.KvChunk
    chunks: _kv_pb2.KvChunks
    def __init__(self, manifest: _Optional[_Union[_kv_pb2.KvManifest, _Mapping]] = ..., chunk: _Optional[_Union[_kv_pb2.KvChunk, _Mapping]] = ..., chunks: _Optional[_Union[_kv_pb2.KvChunks, _Mapping]] = ...) -> None: ...

class OpenPushRequest(_message.Message):
    __slots__ = ("request_id", "header")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    header: PushKvHeader
    def __init__(self, request_id: _Optional[str] = ..., header: _Optional[_Union[PushKvHeader, _Mapping]] = ...) -> None: ...

class OpenPushResponse(_message.Message):
    __slots__ = ("upload_id", "missing_chunks", "session")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    MISSING_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    missing_chunks: _containers.RepeatedCompositeFieldContainer[ChunkRun]
    session: _session_service_pb2.Session
    def __init__(self, upload_id: _Optional[str] = ..., missing_chunks: _Optional[_Iterable[_Union[ChunkRun, _Mapping]]] = ..., session: _Optional[_Union[_session_service_pb2.Session, _Mapping]] = ...) -> None: ...

class ChunkRun(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class PushKvRequest(_message.Message):
    __slots__ = ("header", "chunk", "chunks")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    header: PushKvHeader
    chunk: _kv_pb2.KvChunk
    chunks: _kv_pb2.KvChunks
    def __init__(self, header: _Optional[_Union[PushKvHeader, _Mapping]] = ..., chunk: _Optional[_Union[_kv_pb2.KvChunk, _Mapping]] = ..., chunks: _Optional[_Union[_kv_pb2.KvChunks, _Mapping]] = ...) -> None: ...

class PushKvHeader(_message.Message):
    __slots__ = ("session_id", "token_ids", "manifest", "retention", "attention", "labels", "upload_id", "transfer_id")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    manifest: _kv_pb2.KvManifest
    retention: _session_service_pb2.RetentionPolicy
    attention: _session_service_pb2.AttentionOptions
    labels: _containers.ScalarMap[str, str]
    upload_id: str
    transfer_id: str
    def __init__(self, session_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., manifest: _Optional[_Union[_kv_pb2.KvManifest, _Mapping]] = ..., retention: _Optional[_Union[_session_service_pb2.RetentionPolicy, _Mapping]] = ..., attention: _Optional[_Union[_session_service_pb2.AttentionOptions, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., upload_id: _Optional[str] = ..., transfer_id: _Optional[str] = ...) -> None: ...

class PushKvResponse(_message.Message):
    __slots__ = ("session", "accepted_chunks")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    session: _session_service_pb2.Session
    accepted_chunks: int
    def __init__(self, session: _Optional[_Union[_session_service_pb2.Session, _Mapping]] = ..., accepted_chunks: _Optional[int] = ...) -> None: ...

class OpenTransferRequest(_message.Message):
    __slots__ = ("session_id", "transports", "range", "client_descriptor", "size_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    transports: _containers.RepeatedScalarFieldContainer[Transport]
    range: _kv_pb2.KvRange
    client_descriptor: bytes
    size_bytes: int
    def __init__(self, session_id: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[Transport, str]]] = ..., range: _Optional[_Union[_kv_pb2.KvRange, _Mapping]] = ..., client_descriptor: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class OpenTransferResponse(_message.Message):
    __slots__ = ("transfer_id", "transport", "manifest", "server_descriptor", "expire_time", "size_bytes")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SERVER_DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    transport: Transport
    manifest: _kv_pb2.KvManifest
    server_descriptor: bytes
    expire_time: _timestamp_pb2.Timestamp
    size_bytes: int
    def __init__(self, transfer_id: _Optional[str] = ..., transport: _Optional[_Union[Transport, str]] = ..., manifest: _Optional[_Union[_kv_pb2.KvManifest, _Mapping]] = ..., server_descriptor: _Optional[bytes] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ShmDescriptor(_message.Message):
    __slots__ = ("socket_path", "token")
    SOCKET_PATH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    socket_path: str
    token: bytes
    def __init__(self, socket_path: _Optional[str] = ..., token: _Optional[bytes] = ...) -> None: ...

class CudaIpcDescriptor(_message.Message):
    __slots__ = ("handle", "device_uuid", "connection")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    CONNECTION_FIELD_NUMBER: _ClassVar[int]
    handle: bytes
    device_uuid: bytes
    connection: ShmDescriptor
    def __init__(self, handle: _Optional[bytes] = ..., device_uuid: _Optional[bytes] = ..., connection: _Optional[_Union[ShmDescriptor, _Mapping]] = ...) -> None: ...

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
