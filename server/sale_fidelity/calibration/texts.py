"""What a model is calibrated on: key-value retrieval, the user's own files, or texts that every Python brings."""

from __future__ import annotations

import functools
import json
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..models import FidelityModel

# Most characters of a text that one token stands for; only so much is tokenized.
_CHARACTERS_PER_TOKEN = 12
# The language reference up to here is for evaluation. It has 465,000 characters; 8K tokens are some 33,000.
_REFERENCE_OFFSETS = (350_000, 400_000)
# Modules of the standard library that no evaluation uses.
_MODULES = ("ipaddress", "pickletools", "mailbox", "optparse")


@dataclass(frozen=True)
class Document:
    """One prompt to calibrate on."""

    name: str
    token_ids: tuple[int, ...]


def default_documents(model: FidelityModel, tokens: int, seed: int) -> list[Document]:
    """Key-value retrieval, and English and code out of the Python installation: seven documents."""
    texts = {f"language reference from character {start}": _reference()[start:] for start in _REFERENCE_OFFSETS}
    texts |= {f"{module}.py": _source(module) for module in _MODULES}
    found = [_document(model, name, text, tokens) for name, text in texts.items()]
    return [key_value_document(model, tokens, seed), *found]


def user_documents(model: FidelityModel, files: Sequence[Path], tokens: int, seed: int) -> list[Document]:
    """Key-value retrieval and the first `tokens` tokens of each file.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is too short to calibrate on.
    """
    texts = [(file.name, file.read_text(encoding="utf-8", errors="replace")) for file in files]
    return [key_value_document(model, tokens, seed), *(_document(model, name, text, tokens) for name, text in texts)]


def key_value_document(model: FidelityModel, tokens: int, seed: int) -> Document:
    """A JSON object of random keys and values, as long as fits, and the question for one: exactly `tokens` ids."""
    generator = random.Random(seed)
    pairs = {_identifier(generator): _identifier(generator) for _ in range(max(2, tokens // 20))}
    asked = generator.choice(list(pairs)[: max(1, len(pairs) // 2)])
    head = model.encode("Extract the value corresponding to the specified key in the JSON object below.\n\n")
    tail = model.encode(f'\n\nKey: "{asked}"\nCorresponding value: "{pairs[asked]}"')
    body = model.encode(json.dumps(pairs, indent=0))
    room = tokens - len(head) - len(tail)
    if room < len(body) // 8:
        raise ValueError(f"{tokens} tokens are too few for key-value retrieval")
    return Document(f"key-value retrieval, seed {seed}", tuple([*head, *body[:room], *tail][:tokens]))


def _identifier(generator: random.Random) -> str:
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))


def _document(model: FidelityModel, name: str, text: str, tokens: int) -> Document:
    ids = model.encode(text[: tokens * _CHARACTERS_PER_TOKEN])[:tokens]
    return Document(name, tuple(ids))


@functools.cache
def _reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _source(module: str) -> str:
    return (Path(functools.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
