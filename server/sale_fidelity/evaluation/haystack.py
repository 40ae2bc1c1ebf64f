"""Real text to hide needles in, cut to a length in tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from importlib.resources import files

_BUNDLED = "haystack.txt"


def bundled_paragraphs() -> tuple[str, ...]:
    """Paragraphs of English prose that come with the package: the Python 3.11 language reference, 12,000 words."""
    return tuple(files(__package__).joinpath(_BUNDLED).read_text(encoding="utf-8").splitlines())


class Haystack:
    """Paragraphs of real text, and how many tokens each is.

    Args:
        paragraphs: the text; shorter haystacks than all of it start somewhere in it, longer ones repeat it.
        count_tokens: tokens of a text.

    Raises:
        ValueError: there are no paragraphs.
    """

    def __init__(self, paragraphs: Sequence[str], count_tokens: Callable[[str], int]) -> None:
        if not paragraphs:
            raise ValueError("the haystack has no paragraphs; name a text that has some, or leave --haystack out")
        self._paragraphs = paragraphs
        self._count_tokens = count_tokens
        self._tokens: dict[str, int] = {}

    def tokens(self, text: str) -> int:
        """Tokens of `text` with the line break behind it; counted once."""
        if text not in self._tokens:
            self._tokens[text] = max(1, self._count_tokens(text + "\n"))
        return self._tokens[text]

    def sample(self, source: random.Random, num_tokens: int) -> list[str]:
        """Paragraphs that follow one another, of `num_tokens` tokens at most and nearly so many."""
        start, total = source.randrange(len(self._paragraphs)), 0
        chosen: list[str] = []
        while True:
            paragraph = self._paragraphs[(start + len(chosen)) % len(self._paragraphs)]
            total += self.tokens(paragraph)
            if total > num_tokens:
                return chosen
            chosen.append(paragraph)


def planted(paragraphs: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """The text with each of `needles` between two paragraphs, at that share of its length (0 first, 1 last)."""
    ends = [0]
    for paragraph in paragraphs:
        ends.append(ends[-1] + len(paragraph))
    places: dict[int, list[str]] = {}
    for needle, depth in sorted(zip(needles, depths, strict=True), key=lambda pair: pair[1]):
        wanted = depth * ends[-1]
        nearest = min(range(len(ends)), key=lambda index: abs(ends[index] - wanted))
        places.setdefault(nearest, []).append(needle)
    lines: list[str] = []
    for index in range(len(ends)):
        lines += places.get(index, [])
        lines += paragraphs[index : index + 1]
    return "\n".join(lines)
