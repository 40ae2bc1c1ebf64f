"""Names of KV pages: a chain of digests over everything that the KV of a page depends on.

A page's key is the digest of the key before it and of the page's own tokens, so that equal keys mean equal tokens from
the first on. The chain starts at a root that holds the rest: tenant, model, attention settings. Two tenants therefore
never have a key in common, in any tier.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator, Sequence

_KEY_BYTES = 32


def chain_root(*parts: str | bytes) -> bytes:
    """The start of a chain; `parts` name everything but tokens that KV depends on, in a fixed order."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES, person=b"sale-kv-root")
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def page_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of the page that holds `token_ids` (all of a page, or the last ones of a sequence) after `previous`."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    digest = hashlib.blake2b(previous, digest_size=_KEY_BYTES, person=b"sale-kv-page")
    digest.update(packed.tobytes())
    return digest.digest()


def page_keys(previous: bytes, token_ids: Sequence[int], page_tokens: int) -> Iterator[bytes]:
    """Keys of the whole pages that `token_ids` fill from a page's first token on."""
    for start in range(0, len(token_ids) // page_tokens * page_tokens, page_tokens):
        previous = page_key(previous, token_ids[start : start + page_tokens])
        yield previous


class PrefixChain:
    """Keys of one sequence's whole pages, extended as its tokens grow.

    Args:
        root: from `chain_root`.
        page_tokens: tokens of a page.
    """

    def __init__(self, root: bytes, page_tokens: int) -> None:
        self.root = root
        self.page_tokens = page_tokens
        self.keys: list[bytes] = []

    @property
    def end(self) -> bytes:
        """The last key, or the root."""
        return self.keys[-1] if self.keys else self.root

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds keys for the whole pages of a sequence that holds `token_ids` now."""
        self.keys.extend(page_keys(self.end, token_ids[len(self.keys) * self.page_tokens :], self.page_tokens))

    def truncate(self, num_tokens: int) -> None:
        """Forgets pages that are not whole within the first `num_tokens`."""
        del self.keys[num_tokens // self.page_tokens :]

    def tail_key(self, token_ids: Sequence[int]) -> bytes:
        """The key of the last page of a sequence that holds `token_ids` now, where that page is not whole."""
        return page_key(self.end, token_ids[len(self.keys) * self.page_tokens :])
