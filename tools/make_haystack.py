"""Writes the haystack text that `sale-prefill evaluate` hides needles in: prose of the Python language reference.

    python3.11 tools/make_haystack.py

The text is kept in the package, and not taken from the Python that runs, because every Python version words it a little
differently, and an item that was scored on one machine must be the same item on another. Calibration reads the
reference from character 350,000 on, so this stops before.
"""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

TARGET = Path(__file__).resolve().parent.parent / "server" / "sale_fidelity" / "evaluation" / "haystack.txt"
_REFERENCE_CHARACTERS = 340_000
_CHARACTERS = range(120, 901)
_MOST_QUOTES = 14


def prose(paragraph: str) -> str | None:
    """The paragraph on one line, or None where it is code, grammar, a list or a heading."""
    lines = paragraph.split("\n")
    indents = {len(line) - len(line.lstrip()) for line in lines}
    text = " ".join(line.strip() for line in lines)
    if len(indents) > 1 or max(indents) > 5 or len(text) not in _CHARACTERS or not text.isascii():
        return None
    if not re.match(r"[A-Z]", text) or not text.endswith("."):
        return None
    if any(mark in text for mark in ("::=", ">>>", "Source code:")) or text.count('"') > _MOST_QUOTES:
        return None
    return text


def main() -> None:
    """Writes the file: one paragraph a line, each once, in the order of the topics' names."""
    reference = "\n\n".join(topics[name].strip() for name in sorted(topics))
    found = (prose(paragraph) for paragraph in reference[:_REFERENCE_CHARACTERS].split("\n\n"))
    lines = list(dict.fromkeys(text for text in found if text is not None))
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
