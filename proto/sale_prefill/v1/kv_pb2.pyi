from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ELEMENT_TYPE_UNSPECIFIED: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT32: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT16: _ClassVar[ElementType]
    ELEMENT_TYPE_BFLOAT16: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT8_E4M3FN: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT8_E5M2: _ClassVar[ElementType]
    ELEMENT_TYPE_INT8: _ClassVar[ElementType]

class KvLayout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_LAYOUT_UNSPECIFIED: _ClassVar[KvLayout]
    KV_LAYOUT_HTD: _ClassVar[KvLayout]
    KV_LAYOUT_THD: _ClassVar[KvLayout]

class KvKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_KIND_UNSPECIFIED: _ClassVar[KvKind]
    KV_KIND_KEY: _ClassVar[KvKind]
    KV_KIND_VALUE: _ClassVar[KvKind]

class ChecksumAlgorithm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKSUM_ALGORITHM_UNSPECIFIED: _ClassVar[ChecksumAlgorithm]
    CHECKSUM_ALGORITHM_NONE: _ClassVar[ChecksumAlgorithm]
    CHECKSUM_ALGORITHM_CRC32C: _ClassVar[ChecksumAlgorithm]
    CHECKSUM_ALGORITHM_XXH3_64: _ClassVar[ChecksumAlgorithm]
ELEMENT_TYPE_UNSPECIFIED: ElementType
ELEMENT_TYPE_FLOAT32: ElementType
ELEMENT_TYPE_FLOAT16: ElementType
ELEMENT_TYPE_BFLOAT16: ElementType
ELEMENT_TYPE_FLOAT8_E4M3FN: ElementType
ELEMENT_TYPE_FLOAT8_E5M2: ElementType
ELEMENT_TYPE_INT8: ElementType
KV_LAYOUT_UNSPECIFIED: KvLayout
KV_LAYOUT_HTD: KvLayout
KV_LAYOUT_THD: KvLayout
KV_KIND_UNSPECIFIED: KvKind
KV_KIND_KEY: KvKind
KV_KIND_VALUE: KvKind
CHECKSUM_ALGORITHM_UNSPECIFIED: ChecksumAlgorithm
CHECKSUM_ALGORITHM_NONE: ChecksumAlgorithm
CHECKSUM_ALGORITHM_CRC32C: ChecksumAlgorithm
CHECKSUM_ALGORITHM_XXH3_64: ChecksumAlgorithm

class KvSpec(_message.Message):
    __slots__ = ("model_fingerprint", "element_type", "layout", "num_layers", "num_kv_heads", "head_dim", "rope_applied", "rope_fingerprint")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    ROPE_APPLIED_FIELD_NUMBER: _ClassVar[int]
    ROPE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    element_type: ElementType
    layout: KvLayout
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_applied: bool
    rope_fingerprint: str
    def __init__(self, model_fingerprint: _Optional[str] = ..., element_type: _Optional[_Union[ElementType, str]] = ..., layout: _Optional[_Union[KvLayout, str]] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., rope_applied: _Optional[bool] = ..., rope_fingerprint: _Optional[str] = ...) -> None: ...

class KvRange(_message.Message):
    __slots__ = ("token_start", "token_end", "layer_start", "layer_end")
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    token_start: int
    token_end: int
    layer_start: int
    layer_end: int
    def __init__(self, token_start: _Optional[int] = ..., token_end: _Optional[int] = ..., layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ...) -> None: ...

class KvManifest(_message.Message):
    __slots__ = ("spec", "range", "total_bytes", "total_chunks", "checksum_algorithm", "generation", "token_digest", "token_ids")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    spec: KvSpec
    range: KvRange
    total_bytes: int
    total_chunks: int
    checksum_algorithm: ChecksumAlgorithm
    generation: int
    token_digest: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, spec: _Optional[_Union[KvSpec, _Mapping]] = ..., range: _Optional[_Union[KvRange, _Mapping]] = ..., total_bytes: _Optional[int] = ..., total_chunks: _Optional[int] = ..., checksum_algorithm: _Optional[_Union[ChecksumAlgorithm, str]] = ..., generation: _Optional[int] = ..., token_digest: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class KvChunk(_message.Message):
    __slots__ = ("index", "layer", "kind", "token_start", "num_tokens", "checksum", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    layer: int
    kind: KvKind
    token_start: int
    num_tokens: int
    checksum: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., layer: _Optional[int] = ..., kind: _Optional[_Union[KvKind, str]] = ..., token_start: _Optional[int] = ..., num_tokens: _Optional[int] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class KvChunks(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[KvChunk]
    def __init__(self, chunks: _Optional[_Iterable[_Union[KvChunk, _Mapping]]] = ...) -> None: ...
