import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from sale_prefill.v1 import kv_pb2 as _kv_pb2
from sale_prefill.v1 import kv_transfer_service_pb2 as _kv_transfer_service_pb2
from sale_prefill.v1 import session_service_pb2 as _session_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("server_id", "server_version", "model_name", "kv_spec", "max_sequence_tokens", "max_message_bytes", "vocabulary_size", "eos_token_ids", "default_attention", "default_retention", "device", "attention_backend", "transports", "num_query_heads", "max_top_logits", "profile", "page_tokens", "tiers")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    KV_SPEC_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_RETENTION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_LOGITS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    server_version: str
    model_name: str
    kv_spec: _kv_pb2.KvSpec
    max_sequence_tokens: int
    max_message_bytes: int
    vocabulary_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    default_attention: _session_service_pb2.AttentionOptions
    default_retention: _session_service_pb2.RetentionPolicy
    device: str
    attention_backend: str
    transports: _containers.RepeatedScalarFieldContainer[_kv_transfer_service_pb2.Transport]
    num_query_heads: int
    max_top_logits: int
    profile: ProfileInfo
    page_tokens: int
    tiers: _containers.RepeatedScalarFieldContainer[_session_service_pb2.KvTier]
    def __init__(self, server_id: _Optional[str] = ..., server_version: _Optional[str] = ..., model_name: _Optional[str] = ..., kv_spec: _Optional[_Union[_kv_pb2.KvSpec, _Mapping]] = ..., max_sequence_tokens: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., default_attention: _Optional[_Union[_session_service_pb2.AttentionOptions, _Mapping]] = ..., default_retention: _Optional[_Union[_session_service_pb2.RetentionPolicy, _Mapping]] = ..., device: _Optional[str] = ..., attention_backend: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[_kv_transfer_service_pb2.Transport, str]]] = ..., num_query_heads: _Optional[int] = ..., max_top_logits: _Optional[int] = ..., profile: _Optional[_Union[ProfileInfo, _Mapping]] = ..., page_tokens: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[_session_service_pb2.KvTier, str]]] = ...) -> None: ...

class ProfileInfo(_message.Message):
    __slots__ = ("name", "digest", "error_budgets")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ERROR_BUDGETS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    error_budgets: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., error_budgets: _Optional[_Iterable[float]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("running_requests", "queued_requests", "queued_tokens", "prefill_tokens_per_second", "kv_used_bytes", "kv_capacity_bytes", "sessions", "draining")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    KV_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    queued_requests: int
    queued_tokens: int
    prefill_tokens_per_second: float
    kv_used_bytes: int
    kv_capacity_bytes: int
    sessions: int
    draining: bool
    def __init__(self, running_requests: _Optional[int] = ..., queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., prefill_tokens_per_second: _Optional[float] = ..., kv_used_bytes: _Optional[int] = ..., kv_capacity_bytes: _Optional[int] = ..., sessions: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class GetTokenizerFilesRequest(_message.Message):
    __slots__ = ("known_digest",)
    KNOWN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    known_digest: str
    def __init__(self, known_digest: _Optional[str] = ...) -> None: ...

class GetTokenizerFilesResponse(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: TokenizerManifest
    chunk: TokenizerFileChunk
    def __init__(self, manifest: _Optional[_Union[TokenizerManifest, _Mapping]] = ..., chunk: _Optional[_Union[TokenizerFileChunk, _Mapping]] = ...) -> None: ...

class TokenizerManifest(_message.Message):
    __slots__ = ("digest", "files")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    files: _containers.RepeatedCompositeFieldContainer[TokenizerFile]
    def __init__(self, digest: _Optional[str] = ..., files: _Optional[_Iterable[_Union[TokenizerFile, _Mapping]]] = ...) -> None: ...

class TokenizerFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class TokenizerFileChunk(_message.Message):
    __slots__ = ("file_index", "data")
    FILE_INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file_index: int
    data: bytes
    def __init__(self, file_index: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout",)
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    timeout: _duration_pb2.Duration
    def __init__(self, timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("running_requests", "resident_sessions")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    resident_sessions: int
    def __init__(self, running_requests: _Optional[int] = ..., resident_sessions: _Optional[int] = ...) -> None: ...
