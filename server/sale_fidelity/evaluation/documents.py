"""Real documents to compare predictions on, none of which calibration reads."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..models import FidelityModel

# Most characters of these texts that one token stands for; only so much text is tokenized.
_CHARACTERS_PER_TOKEN = 12
# Characters into the language reference; calibration starts at 350,000, and 8K tokens are 33,000 characters.
_REFERENCE_OFFSETS = (0, 80_000, 160_000, 240_000)
_MODULES = ("argparse", "doctest", "inspect", "tarfile", "subprocess", "typing")


@dataclass(frozen=True)
class EvaluationDocument:
    """A prompt; `digest` is of its ids, since every Python version words its own texts a little differently."""

    name: str
    token_ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """The same for the same ids."""
        return hashlib.sha256(repr(self.token_ids).encode()).hexdigest()[:16]


def default_documents(model: FidelityModel, tokens: int, count: int | None = None) -> list[EvaluationDocument]:
    """Ten documents that every Python brings, English and code in turn, `tokens` tokens each; or the first `count`."""
    english = [(f"language reference from character {offset}", _reference()[offset:]) for offset in _REFERENCE_OFFSETS]
    code = [(f"{module}.py", _source(module)) for module in _MODULES]
    mixed = [text for pair in zip(english, code, strict=False) for text in pair] + code[len(english) :]
    return [_document(model, name, text, tokens) for name, text in mixed[:count]]


def user_documents(model: FidelityModel, files: Sequence[Path], tokens: int) -> list[EvaluationDocument]:
    """The first `tokens` tokens of each file.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is shorter.
    """
    texts = [(file.name, file.read_text(encoding="utf-8", errors="replace")) for file in files]
    return [_document(model, name, text, tokens) for name, text in texts]


def _document(model: FidelityModel, name: str, text: str, tokens: int) -> EvaluationDocument:
    ids = model.encode(text[: tokens * _CHARACTERS_PER_TOKEN])
    if len(ids) < tokens:
        raise ValueError(f"{name} has only {len(ids)} tokens; ask for fewer than {tokens} (--tokens)")
    return EvaluationDocument(name, tuple(ids[:tokens]))


@functools.cache
def _reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _source(module: str) -> str:
    return (Path(functools.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
