import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from sale_prefill.v1 import kv_pb2 as _kv_pb2
from sale_prefill.v1 import session_service_pb2 as _session_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefixReuse(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PREFIX_REUSE_UNSPECIFIED: _ClassVar[PrefixReuse]
    PREFIX_REUSE_ON: _ClassVar[PrefixReuse]
    PREFIX_REUSE_OFF: _ClassVar[PrefixReuse]

class InterruptPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INTERRUPT_POLICY_UNSPECIFIED: _ClassVar[InterruptPolicy]
    INTERRUPT_POLICY_KEEP: _ClassVar[InterruptPolicy]
    INTERRUPT_POLICY_FREE: _ClassVar[InterruptPolicy]

class DenseReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DENSE_REASON_UNSPECIFIED: _ClassVar[DenseReason]
    DENSE_REASON_REQUESTED: _ClassVar[DenseReason]
    DENSE_REASON_SHORT: _ClassVar[DenseReason]
    DENSE_REASON_HEAD: _ClassVar[DenseReason]
    DENSE_REASON_UNSUPPORTED: _ClassVar[DenseReason]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CONTEXT: _ClassVar[FinishReason]
PREFIX_REUSE_UNSPECIFIED: PrefixReuse
PREFIX_REUSE_ON: PrefixReuse
PREFIX_REUSE_OFF: PrefixReuse
INTERRUPT_POLICY_UNSPECIFIED: InterruptPolicy
INTERRUPT_POLICY_KEEP: InterruptPolicy
INTERRUPT_POLICY_FREE: InterruptPolicy
DENSE_REASON_UNSPECIFIED: DenseReason
DENSE_REASON_REQUESTED: DenseReason
DENSE_REASON_SHORT: DenseReason
DENSE_REASON_HEAD: DenseReason
DENSE_REASON_UNSUPPORTED: DenseReason
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CONTEXT: FinishReason

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "session_id", "token_ids", "expected_prefix_tokens", "attention", "retention", "on_interrupt", "num_top_logits", "labels", "inline_kv", "prefix_reuse")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    ON_INTERRUPT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_LOGITS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    INLINE_KV_FIELD_NUMBER: _ClassVar[int]
    PREFIX_REUSE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    session_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    expected_prefix_tokens: int
    attention: _session_service_pb2.AttentionOptions
    retention: _session_service_pb2.RetentionPolicy
    on_interrupt: InterruptPolicy
    num_top_logits: int
    labels: _containers.ScalarMap[str, str]
    inline_kv: InlineKv
    prefix_reuse: PrefixReuse
    def __init__(self, request_id: _Optional[str] = ..., session_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., expected_prefix_tokens: _Optional[int] = ..., attention: _Optional[_Union[_session_service_pb2.AttentionOptions, _Mapping]] = ..., retention: _Optional[_Union[_session_service_pb2.RetentionPolicy, _Mapping]] = ..., on_interrupt: _Optional[_Union[InterruptPolicy, str]] = ..., num_top_logits: _Optional[int] = ..., labels: _Optional[_Mapping[str, str]] = ..., inline_kv: _Optional[_Union[InlineKv, _Mapping]] = ..., prefix_reuse: _Optional[_Union[PrefixReuse, str]] = ...) -> None: ...

class InlineKv(_message.Message):
    __slots__ = ("range", "layout", "chunk_bytes", "checksum_algorithm", "expected_spec", "transfer_id", "resume_from_chunk")
    RANGE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_SPEC_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_CHUNK_FIELD_NUMBER: _ClassVar[int]
    range: _kv_pb2.KvRange
    layout: _kv_pb2.KvLayout
    chunk_bytes: int
    checksum_algorithm: _kv_pb2.ChecksumAlgorithm
    expected_spec: _kv_pb2.KvSpec
    transfer_id: str
    resume_from_chunk: int
    def __init__(self, range: _Optional[_Union[_kv_pb2.KvRange, _Mapping]] = ..., layout: _Optional[_Union[_kv_pb2.KvLayout, str]] = ..., chunk_bytes: _Optional[int] = ..., checksum_algorithm: _Optional[_Union[_kv_pb2.ChecksumAlgorithm, str]] = ..., expected_spec: _Optional[_Union[_kv_pb2.KvSpec, _Mapping]] = ..., transfer_id: _Optional[str] = ..., resume_from_chunk: _Optional[int] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("accepted", "progress", "result", "kv_manifest", "kv_chunk")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    KV_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    KV_CHUNK_FIELD_NUMBER: _ClassVar[int]
    accepted: PrefillAccepted
    progress: PrefillProgress
    result: PrefillResult
    kv_manifest: _kv_pb2.KvManifest
    kv_chunk: _kv_pb2.KvChunk
    def __init__(self, accepted: _Optional[_Union[PrefillAccepted, _Mapping]] = ..., progress: _Optional[_Union[PrefillProgress, _Mapping]] = ..., result: _Optional[_Union[PrefillResult, _Mapping]] = ..., kv_manifest: _Optional[_Union[_kv_pb2.KvManifest, _Mapping]] = ..., kv_chunk: _Optional[_Union[_kv_pb2.KvChunk, _Mapping]] = ...) -> None: ...

class PrefillAccepted(_message.Message):
    __slots__ = ("session_id", "queue_position", "queued_tokens", "cached_tokens", "total_tokens", "joined")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    queue_position: int
    queued_tokens: int
    cached_tokens: int
    total_tokens: int
    joined: bool
    def __init__(self, session_id: _Optional[str] = ..., queue_position: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., joined: _Optional[bool] = ...) -> None: ...

class PrefillProgress(_message.Message):
    __slots__ = ("computed_tokens", "total_tokens", "completed_ratio", "elapsed_duration", "queued")
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_RATIO_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_DURATION_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    computed_tokens: int
    total_tokens: int
    completed_ratio: float
    elapsed_duration: _duration_pb2.Duration
    queued: bool
    def __init__(self, computed_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., completed_ratio: _Optional[float] = ..., elapsed_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., queued: _Optional[bool] = ...) -> None: ...

class PrefillResult(_message.Message):
    __slots__ = ("session", "top_logits", "stats")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGITS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    session: _session_service_pb2.Session
    top_logits: _containers.RepeatedCompositeFieldContainer[TokenLogit]
    stats: PrefillStats
    def __init__(self, session: _Optional[_Union[_session_service_pb2.Session, _Mapping]] = ..., top_logits: _Optional[_Iterable[_Union[TokenLogit, _Mapping]]] = ..., stats: _Optional[_Union[PrefillStats, _Mapping]] = ...) -> None: ...

class TokenLogit(_message.Message):
    __slots__ = ("token_id", "logit", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logit: float
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logit: _Optional[float] = ..., logprob: _Optional[float] = ...) -> None: ...

class PrefillStats(_message.Message):
    __slots__ = ("queue_duration", "compute_duration", "estimation_duration", "attention_duration", "other_duration", "computed_tokens", "cached_tokens", "computed_blocks", "causal_blocks", "density", "layers", "dense_fallbacks", "attention_backend", "profile", "guard", "prefix_tokens", "restored_tokens")
    QUEUE_DURATION_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DURATION_FIELD_NUMBER: _ClassVar[int]
    ESTIMATION_DURATION_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_DURATION_FIELD_NUMBER: _ClassVar[int]
    OTHER_DURATION_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DENSE_FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue_duration: _duration_pb2.Duration
    compute_duration: _duration_pb2.Duration
    estimation_duration: _duration_pb2.Duration
    attention_duration: _duration_pb2.Duration
    other_duration: _duration_pb2.Duration
    computed_tokens: int
    cached_tokens: int
    computed_blocks: int
    causal_blocks: int
    density: float
    layers: _containers.RepeatedCompositeFieldContainer[LayerStats]
    dense_fallbacks: _containers.RepeatedCompositeFieldContainer[DenseFallback]
    attention_backend: str
    profile: ProfileStats
    guard: GuardStats
    prefix_tokens: int
    restored_tokens: int
    def __init__(self, queue_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., compute_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., estimation_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., attention_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., other_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., computed_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., computed_blocks: _Optional[int] = ..., causal_blocks: _Optional[int] = ..., density: _Optional[float] = ..., layers: _Optional[_Iterable[_Union[LayerStats, _Mapping]]] = ..., dense_fallbacks: _Optional[_Iterable[_Union[DenseFallback, _Mapping]]] = ..., attention_backend: _Optional[str] = ..., profile: _Optional[_Union[ProfileStats, _Mapping]] = ..., guard: _Optional[_Union[GuardStats, _Mapping]] = ..., prefix_tokens: _Optional[int] = ..., restored_tokens: _Optional[int] = ...) -> None: ...

class ProfileStats(_message.Message):
    __slots__ = ("name", "digest", "error_budget", "expected_error", "sparse_heads", "streaming_heads", "dense_heads")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ERROR_BUDGET_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ERROR_FIELD_NUMBER: _ClassVar[int]
    SPARSE_HEADS_FIELD_NUMBER: _ClassVar[int]
    STREAMING_HEADS_FIELD_NUMBER: _ClassVar[int]
    DENSE_HEADS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    error_budget: float
    expected_error: float
    sparse_heads: int
    streaming_heads: int
    dense_heads: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., error_budget: _Optional[float] = ..., expected_error: _Optional[float] = ..., sparse_heads: _Optional[int] = ..., streaming_heads: _Optional[int] = ..., dense_heads: _Optional[int] = ...) -> None: ...

class GuardStats(_message.Message):
    __slots__ = ("num_tiles", "kept_mass", "mean_error", "max_error", "alerts")
    NUM_TILES_FIELD_NUMBER: _ClassVar[int]
    KEPT_MASS_FIELD_NUMBER: _ClassVar[int]
    MEAN_ERROR_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_FIELD_NUMBER: _ClassVar[int]
    ALERTS_FIELD_NUMBER: _ClassVar[int]
    num_tiles: int
    kept_mass: float
    mean_error: float
    max_error: float
    alerts: _containers.RepeatedCompositeFieldContainer[GuardAlert]
    def __init__(self, num_tiles: _Optional[int] = ..., kept_mass: _Optional[float] = ..., mean_error: _Optional[float] = ..., max_error: _Optional[float] = ..., alerts: _Optional[_Iterable[_Union[GuardAlert, _Mapping]]] = ...) -> None: ...

class GuardAlert(_message.Message):
    __slots__ = ("layer", "head", "dense", "mean_error", "expected_error")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    MEAN_ERROR_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ERROR_FIELD_NUMBER: _ClassVar[int]
    layer: int
    head: int
    dense: bool
    mean_error: float
    expected_error: float
    def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ..., dense: _Optional[bool] = ..., mean_error: _Optional[float] = ..., expected_error: _Optional[float] = ...) -> None: ...

class LayerStats(_message.Message):
    __slots__ = ("computed_blocks", "causal_blocks", "head_densities")
    COMPUTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DENSITIES_FIELD_NUMBER: _ClassVar[int]
    computed_blocks: int
    causal_blocks: int
    head_densities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, computed_blocks: _Optional[int] = ..., causal_blocks: _Optional[int] = ..., head_densities: _Optional[_Iterable[float]] = ...) -> None: ...

class DenseFallback(_message.Message):
    __slots__ = ("reason", "num_rows")
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    reason: DenseReason
    num_rows: int
    def __init__(self, reason: _Optional[_Union[DenseReason, str]] = ..., num_rows: _Optional[int] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "session_id", "token_ids", "expected_prefix_tokens", "max_new_tokens", "sampling", "stop_token_ids", "ignore_eos", "num_top_logprobs", "on_interrupt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ON_INTERRUPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    session_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    expected_prefix_tokens: int
    max_new_tokens: int
    sampling: SamplingOptions
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    num_top_logprobs: int
    on_interrupt: InterruptPolicy
    def __init__(self, request_id: _Optional[str] = ..., session_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., expected_prefix_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., sampling: _Optional[_Union[SamplingOptions, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., num_top_logprobs: _Optional[int] = ..., on_interrupt: _Optional[_Union[InterruptPolicy, str]] = ...) -> None: ...

class SamplingOptions(_message.Message):
    __slots__ = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "seed")
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    repetition_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    def __init__(self, repetition_penalty: _Optional[float] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("accepted", "progress", "tokens", "result")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    accepted: PrefillAccepted
    progress: PrefillProgress
    tokens: DecodedTokens
    result: DecodeResult
    def __init__(self, accepted: _Optional[_Union[PrefillAccepted, _Mapping]] = ..., progress: _Optional[_Union[PrefillProgress, _Mapping]] = ..., tokens: _Optional[_Union[DecodedTokens, _Mapping]] = ..., result: _Optional[_Union[DecodeResult, _Mapping]] = ...) -> None: ...

class DecodedTokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[DecodedToken]
    def __init__(self, tokens: _Optional[_Iterable[_Union[DecodedToken, _Mapping]]] = ...) -> None: ...

class DecodedToken(_message.Message):
    __slots__ = ("token_id", "logprob", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogit]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TokenLogit, _Mapping]]] = ...) -> None: ...

class DecodeResult(_message.Message):
    __slots__ = ("session", "finish_reason", "stats")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    session: _session_service_pb2.Session
    finish_reason: FinishReason
    stats: DecodeStats
    def __init__(self, session: _Optional[_Union[_session_service_pb2.Session, _Mapping]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stats: _Optional[_Union[DecodeStats, _Mapping]] = ...) -> None: ...

class DecodeStats(_message.Message):
    __slots__ = ("queue_duration", "prefill", "decode_duration", "decoded_tokens", "seed")
    QUEUE_DURATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_DURATION_FIELD_NUMBER: _ClassVar[int]
    DECODED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    queue_duration: _duration_pb2.Duration
    prefill: PrefillStats
    decode_duration: _duration_pb2.Duration
    decoded_tokens: int
    seed: int
    def __init__(self, queue_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., prefill: _Optional[_Union[PrefillStats, _Mapping]] = ..., decode_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decoded_tokens: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...
