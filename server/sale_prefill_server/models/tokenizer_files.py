"""The files that a client needs to turn text into this model's tokens and back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

#: Read by `tokenizers` and by chat templates. Weights, code and everything else stay here.
_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class TokenizerFile:
    """One file; `sha256` is hexadecimal."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerFiles:
    """The set; `digest` is SHA-256, hexadecimal, over names and contents."""

    files: tuple[TokenizerFile, ...]
    digest: str


def find_tokenizer_files(model: Path) -> TokenizerFiles:
    """The tokenizer files in a model directory; an empty set where there are none."""
    found = []
    digest = hashlib.sha256()
    for name in _NAMES:
        path = model / name
        if path.is_file():
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            found.append(TokenizerFile(path, path.stat().st_size, sha256))
            digest.update(f"{name}\0{sha256}\0".encode())
    return TokenizerFiles(tuple(found), digest.hexdigest())
