"""SALE sparse attention for long-context prefill, as a library on torch tensors.

The method: "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling", arXiv 2505.24179.
`attend` is the one call; `sale_attention.transformers_integration` registers it as `attn_implementation="sale"`.
"""

from . import cpu as _cpu  # registers the backends of this package
from . import cuda as _cuda
from . import reference as _reference
from .attention import AttentionResult, attend
from .audit import Audit, Tile, TileResult
from .backends import AttentionBackend, AttentionRequest, LayerCall, available_backends, get_backend, register_backend
from .config import DEFAULT_TAU, HeadPlan, LayerPolicy, SaleConfig
from .decode import DecodeStep, decode_attention, has_decode_kernel
from .fingerprint import ModelFingerprint
from .geometry import BlockGrid
from .kv_view import KvView
from .profile import Profile, ProfileError, load_profile, save_profile, shipped_profile
from .quantise import KeyCodes, KeyExtension, QueryCodes
from .select import Selection
from .state import LayerState
from .statistics import AttentionStatistics

del _cpu, _cuda, _reference

__all__ = [
    "DEFAULT_TAU",
    "AttentionBackend",
    "AttentionRequest",
    "AttentionResult",
    "AttentionStatistics",
    "Audit",
    "BlockGrid",
    "DecodeStep",
    "HeadPlan",
    "KeyCodes",
    "KeyExtension",
    "KvView",
    "LayerCall",
    "LayerPolicy",
    "LayerState",
    "ModelFingerprint",
    "Profile",
    "ProfileError",
    "QueryCodes",
    "SaleConfig",
    "Selection",
    "Tile",
    "TileResult",
    "attend",
    "available_backends",
    "decode_attention",
    "get_backend",
    "has_decode_kernel",
    "load_profile",
    "register_backend",
    "save_profile",
    "shipped_profile",
]
