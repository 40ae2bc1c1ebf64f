"""GGUF to a Hugging Face directory: bfloat16 safetensors, config and tokenizer.

transformers reads GGUF weights but keeps them packed unless told otherwise; unpacking takes seconds each time, so it
is done once and the result is loaded from then on.
"""

from __future__ import annotations

from pathlib import Path

from sale_prefill_server.models.cache import Progress
from sale_prefill_server.models.errors import ModelInvalidError, ModelUnsupportedError

_GGUF_MAGIC = b"GGUF"


def convert_gguf(source: Path, target: Path, on_progress: Progress) -> None:
    """Unpack the GGUF file `source` into the empty directory `target`.

    Raises:
        ModelInvalidError: not a GGUF file, or one cut short.
        ModelUnsupportedError: transformers cannot read its architecture.
    """
    with source.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise ModelInvalidError(f"{source} is not a GGUF file: it starts with {magic!r}", "Download it again")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    on_progress(f"{source.name}: converting to bfloat16 safetensors, once")
    folder, file_name = str(source.parent), source.name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file_name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
    except NotImplementedError as error:
        raise ModelUnsupportedError(f"{source}: {error}", "Name a Hugging Face directory of this model") from error
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OSError) as error:
        raise ModelInvalidError(
            f"{source} cannot be read as GGUF: {type(error).__name__}: {error}",
            "Check that the file is whole and its architecture known to transformers",
        ) from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
