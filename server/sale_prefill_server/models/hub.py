"""Models of a Hugging Face hub, by id."""

from __future__ import annotations

import re
from pathlib import Path

from sale_prefill_server.models.cache import Progress
from sale_prefill_server.models.errors import ModelDownloadError, ModelNotFoundError

# Weights as safetensors only: other formats are pickles or belong to other frameworks.
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` can be a hub id (`owner/name` or `name`) and not only a path."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")


def fetch_from_hub(name: str, on_progress: Progress) -> Path:
    """Directory of the hub model `name`, fetched where the hub's own cache lacks it.

    Raises:
        ModelNotFoundError: the hub has no such model, or not for this user.
        ModelDownloadError: the hub cannot be reached and its cache lacks the model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    on_progress(f"{name}: no such directory here; asking the hub")
    remedy = "Name a model directory, a .gguf file, or the id of a model that this machine can fetch or has fetched"
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED_FILES))
    except GatedRepoError as error:
        raise ModelNotFoundError(f"{name}: the hub asks for a login", "Log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"{name}: no directory here and no such model on the hub", remedy) from error
    except (HfHubHTTPError, OSError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelDownloadError(
            f"{name}: no directory of that name here, and the hub could not be asked ({said})", remedy
        ) from error
