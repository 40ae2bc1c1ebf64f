"""Models by name: the packaged default, a directory, a GGUF file or a hub id, made ready for loading.

`resolve_model` turns what a user typed into a directory that `AutoModelForCausalLM.from_pretrained` reads;
`inspect_config` says before any weight is loaded whether that model can run here; `list_models` shows what the cache
holds. Nothing here imports torch until a model has to be converted or inspected.
"""

from sale_prefill_server.models.cache import CachedModel, default_cache_dir
from sale_prefill_server.models.errors import (
    ModelCacheError,
    ModelCorruptError,
    ModelDownloadError,
    ModelError,
    ModelInvalidError,
    ModelNotFoundError,
    ModelUnreadableError,
    ModelUnsupportedError,
)
from sale_prefill_server.models.inspection import inspect_config
from sale_prefill_server.models.resolve import (
    DEFAULT_MODEL,
    ModelSource,
    list_models,
    remove_model,
    resolve_model,
)

__all__ = [
    "DEFAULT_MODEL",
    "CachedModel",
    "ModelCacheError",
    "ModelCorruptError",
    "ModelDownloadError",
    "ModelError",
    "ModelInvalidError",
    "ModelNotFoundError",
    "ModelSource",
    "ModelUnreadableError",
    "ModelUnsupportedError",
    "default_cache_dir",
    "inspect_config",
    "list_models",
    "remove_model",
    "resolve_model",
]
