"""Client of sale-prefill, a service that prefills long contexts with sparse attention and keeps the KV caches.

    from sale_prefill_client import Client

    with Client("127.0.0.1:50051") as client:
        session = client.prefill(text="...").session
        for piece in client.decode_text(session.session_id, max_new_tokens=64):
            ...

`AsyncClient` offers the same calls for asyncio. The base install needs no torch; text needs the extra `[text]`, tensors
and transformers caches the extra `[torch]`.
"""

from . import errors
from ._async.client import AsyncClient
from ._async.decode import AsyncDecodeStream, AsyncTextStream
from ._channel import InsecureTokenWarning
from ._sync.client import Client
from ._sync.decode import DecodeStream, TextStream
from ._version import __version__
from .detokenizer import IncrementalDecoder
from .errors import SalePrefillError
from .extras import MissingExtraError
from .kv import KvCache
from .options import Attention, DecodeOptions, InlineKv, Keepalive, PrefillOptions, RetryPolicy, Sampling, TlsOptions
from .results import (
    DecodedToken,
    DecodeResult,
    DecodeStats,
    DenseFallback,
    Generation,
    GuardAlert,
    GuardStats,
    KvArrived,
    KvSpec,
    LayerStats,
    Load,
    PrefillAccepted,
    PrefillEvent,
    PrefillProgress,
    PrefillResult,
    PrefillStats,
    ProfileInfo,
    ProfileStats,
    RenewResult,
    ServerInfo,
    Session,
    TokenLogit,
)
from .segments import SegmentFallbackWarning
from .tokenizer import Tokenizer
from .tokens import parse_token_ids, token_digest

__all__ = [
    "AsyncClient",
    "AsyncDecodeStream",
    "AsyncTextStream",
    "Attention",
    "Client",
    "DecodeOptions",
    "DecodeResult",
    "DecodeStats",
    "DecodeStream",
    "DecodedToken",
    "DenseFallback",
    "Generation",
    "GuardAlert",
    "GuardStats",
    "IncrementalDecoder",
    "InlineKv",
    "InsecureTokenWarning",
    "Keepalive",
    "KvArrived",
    "KvCache",
    "KvSpec",
    "LayerStats",
    "Load",
    "MissingExtraError",
    "PrefillAccepted",
    "PrefillEvent",
    "PrefillOptions",
    "PrefillProgress",
    "PrefillResult",
    "PrefillStats",
    "ProfileInfo",
    "ProfileStats",
    "RenewResult",
    "RetryPolicy",
    "SalePrefillError",
    "Sampling",
    "SegmentFallbackWarning",
    "ServerInfo",
    "Session",
    "TextStream",
    "TlsOptions",
    "TokenLogit",
    "Tokenizer",
    "__version__",
    "errors",
    "parse_token_ids",
    "token_digest",
]
