"""Text out of a stream of token ids, piece by piece."""

from __future__ import annotations

from collections.abc import Callable

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDecoder:
    """Turns token ids into text as they come, never emitting half a character.

    A token may hold only some bytes of a UTF-8 character, which decode to U+FFFD until the rest comes; text that ends
    so is held back. Each new token is decoded together with those before it back to the last piece, so that decoders
    that look at neighbours (leading blanks, byte fallback) give the same text as decoding everything at once, at a cost
    that does not grow with the answer.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while it completes none."""
        self._pending.append(token_id)
        return self._take(final=False)

    def flush(self) -> str:
        """The text held back so far, with U+FFFD for bytes that make no character. Call it after the last token."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        if not final and (text.endswith(_REPLACEMENT) or len(text) <= len(before)):
            return ""
        self._context, self._pending = self._pending, []
        return text[len(before) :]
