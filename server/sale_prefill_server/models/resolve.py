"""From the name that a user typed to a directory that transformers loads."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from sale_prefill_server.models.cache import CachedModel, ModelCache, Progress, default_cache_dir
from sale_prefill_server.models.convert import convert_gguf
from sale_prefill_server.models.errors import ModelInvalidError, ModelNotFoundError, ModelUnreadableError
from sale_prefill_server.models.hub import fetch_from_hub, looks_like_hub_id
from sale_prefill_server.models.packaged import SMOLLM2, PackagedModel, fetch_gguf

DEFAULT_MODEL = SMOLLM2.name
_PACKAGED = {model.name: model for model in (SMOLLM2,)}
_KEY_DIGITS = 12

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model made ready.

    Attributes:
        path: a Hugging Face model directory.
        name: short name to show: the packaged name, the hub id, or the directory's or file's own.
    """

    path: Path
    name: str


def resolve_model(name: str, cache_dir: Path | None = None, on_progress: Progress | None = None) -> ModelSource:
    """Make the model `name` ready for loading; what is ready already costs no download and no conversion.

    Args:
        name: a packaged model's name (`DEFAULT_MODEL`), a model directory, a `.gguf` file or a hub id. A path that
            exists wins over a hub id.
        cache_dir: instead of `default_cache_dir()`.
        on_progress: told, line by line, what takes time; the log by default.

    Raises:
        ModelError: see the subclasses in `errors.py`. `inspect_config` tells of the architecture.
    """
    progress = on_progress or logger.info
    cache = ModelCache(cache_dir or default_cache_dir())
    if packaged := _PACKAGED.get(name):
        return _packaged(packaged, cache, progress)
    path = Path(name).expanduser()
    if name and _exists(path):
        return _local(path, cache, progress)
    if looks_like_hub_id(name):
        return ModelSource(fetch_from_hub(name, progress), name)
    raise ModelNotFoundError(
        f"{name or repr(name)}: no such directory or file",
        f"Check the path, or take the default model {DEFAULT_MODEL!r}",
    )


def list_models(cache_dir: Path | None = None) -> list[CachedModel]:
    """Converted models in the cache, by name. Reads small files only and imports no torch."""
    return ModelCache(cache_dir or default_cache_dir()).entries()


def remove_model(name: str, cache_dir: Path | None = None) -> CachedModel:
    """Delete the converted model `name` from the cache; the source file of a GGUF stays.

    Returns:
        What was deleted.

    Raises:
        ModelNotFoundError: the cache holds no such model.
        ModelCacheError: it cannot be deleted.
    """
    cache = ModelCache(cache_dir or default_cache_dir())
    held = {model.name: model for model in cache.entries()}
    if name not in held:
        known = ", ".join(held) or "nothing"
        raise ModelNotFoundError(f"{name}: not in the model cache {cache.root}", f"It holds {known}")
    cache.remove(held[name])
    return held[name]


def _packaged(model: PackagedModel, cache: ModelCache, progress: Progress) -> ModelSource:
    def make(directory: Path) -> None:
        gguf = fetch_gguf(model, directory.parent, progress)
        convert_gguf(gguf, directory, progress)

    source = f"{model.requirement} {model.member} sha256:{model.sha256}"
    made = cache.get_or_make(model.name, name=model.name, source=source, make=make, on_progress=progress)
    return ModelSource(made.path, model.name)


def _local(path: Path, cache: ModelCache, progress: Progress) -> ModelSource:
    path = path.resolve()
    if path.is_dir():
        return ModelSource(path, path.name)
    if path.suffix != ".gguf":
        raise ModelInvalidError(f"{path} is neither a directory nor a .gguf file", "Name the model's directory")
    stat = path.stat()
    # Size and time stand for the content: hashing tens of gigabytes at every start would cost minutes.
    source = f"{path} {stat.st_size} bytes, modified {stat.st_mtime_ns} ns"
    key = f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:_KEY_DIGITS]}"
    made = cache.get_or_make(
        key,
        name=str(path),
        source=source,
        make=lambda directory: convert_gguf(path, directory, progress),
        on_progress=progress,
    )
    return ModelSource(made.path, path.stem)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ModelUnreadableError(f"{path}: {error.strerror}", "Check the permissions of its folders") from error
    return True
