"""Real long texts that every CPython installation carries: the language reference and the standard library's source.

They are the same for the same Python version, so that a figure measured on them can be measured again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Most characters of these texts that one token stands for; only so much text is tokenized.
_CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class Fact:
    """A sentence to plant in a document, and a question that only it answers.

    Attributes:
        sentence: what the document then says.
        question: asks for it.
        answer: words that a right answer contains.
    """

    sentence: str
    question: str
    answer: str


# The default model, small as it is, finds both of these in 6,600 tokens of the language reference.
PASSWORD = Fact(
    sentence='The password of the documentation server is "amber heron 42".',
    question="What is the password of the documentation server?",
    answer="amber heron 42",
)
RESTAURANT = Fact(
    sentence="Our favourite restaurant in Lisbon is called The Blue Lantern.",
    question="What is our favourite restaurant in Lisbon called?",
    answer="The Blue Lantern",
)


@functools.cache
def english_reference_text() -> str:
    """The Python language reference, about 700,000 characters of English; topics in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


@functools.cache
def python_source_text(module: str) -> str:
    """The source of the standard library's module `module`, such as "argparse"."""
    return (Path(functools.__file__).parent / f"{module}.py").read_text(encoding="utf-8")


def english_reference(num_tokens: int, tokenizer: Any, offset: int = 0) -> list[int]:
    """`num_tokens` token ids of the language reference, from character `offset` on.

    Args:
        num_tokens: how many.
        tokenizer: has `encode(text, add_special_tokens=False)`, as those of transformers and of the client do.
        offset: where to start, in characters; moved on to the next paragraph.

    Raises:
        ValueError: the text is shorter than that.
    """
    return _tokens(english_reference_text(), num_tokens, tokenizer, offset)


def python_source(num_tokens: int, tokenizer: Any, module: str = "argparse", offset: int = 0) -> list[int]:
    """As `english_reference`, of the source of `module`."""
    return _tokens(python_source_text(module), num_tokens, tokenizer, offset)


def documents(num_tokens: int, tokenizer: Any) -> dict[str, list[int]]:
    """Three different documents of `num_tokens` token ids each, by name; up to 20,000 tokens with the default model."""
    makers: dict[str, Callable[[], list[int]]] = {
        "language reference (English)": lambda: english_reference(num_tokens, tokenizer),
        "argparse.py (code)": lambda: python_source(num_tokens, tokenizer),
        "doctest.py (code and English)": lambda: python_source(num_tokens, tokenizer, "doctest"),
    }
    return {name: make() for name, make in makers.items()}


def reference_with_facts(num_tokens: int, tokenizer: Any, facts: Sequence[Fact], offset: int = 0) -> str:
    """About `num_tokens` tokens of the language reference, with `facts` planted between paragraphs, evenly spread."""
    paragraphs = tokenizer.decode(english_reference(num_tokens, tokenizer, offset)).split("\n\n")
    for index, fact in reversed(list(enumerate(facts, 1))):
        paragraphs.insert(len(paragraphs) * index // (len(facts) + 1), fact.sentence)
    return "\n\n".join(paragraphs)


def _tokens(text: str, num_tokens: int, tokenizer: Any, offset: int) -> list[int]:
    start = offset + len(text[offset:].partition("\n\n")[0]) if offset else 0
    start = len(text) - len(text[start:].lstrip("\n"))
    piece = text[start : start + num_tokens * _CHARACTERS_PER_TOKEN]
    ids: list[int] = list(tokenizer.encode(piece, add_special_tokens=False))
    if len(ids) < num_tokens:
        raise ValueError(f"only {len(ids)} tokens from character {start} on: ask for fewer than {num_tokens}")
    return ids[:num_tokens]
