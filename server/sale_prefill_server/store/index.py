"""Which blocks a tier holds, in the order in which they would go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from sale_prefill_server.store.base import BlockKey


class Rank(IntEnum):
    """What a block is kept for, least first."""

    CACHE = 0  #: no record needs it
    NEEDED = 1
    SOFT = 2
    HARD = 3  #: never evicted


class Victim(NamedTuple):
    """A block to evict."""

    key: BlockKey
    size_bytes: int
    rank: Rank


class BlockIndex:
    """Blocks by rank, and within a rank by when they were last used. Not thread-safe.

    Args:
        rank_of: what a block is kept for now; call `rerank` when that changes.
    """

    def __init__(self, rank_of: Callable[[BlockKey], Rank]) -> None:
        self._rank_of = rank_of
        self._ranks: dict[BlockKey, Rank] = {}
        self._by_rank: dict[Rank, OrderedDict[BlockKey, int]] = {rank: OrderedDict() for rank in Rank}
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._ranks

    def size_bytes(self, key: BlockKey) -> int | None:
        """Bytes that a block takes, or None where it is not held."""
        rank = self._ranks.get(key)
        return None if rank is None else self._by_rank[rank][key]

    def rank_bytes(self, rank: Rank) -> int:
        """Bytes of all blocks of a rank."""
        return sum(self._by_rank[rank].values())

    def add(self, key: BlockKey, size_bytes: int) -> None:
        """Counts a block, as the one used last."""
        self.remove(key)
        rank = self._rank_of(key)
        self._ranks[key] = rank
        self._by_rank[rank][key] = size_bytes
        self.used_bytes += size_bytes

    def remove(self, key: BlockKey) -> bool:
        """Forgets a block. Returns whether it was held."""
        rank = self._ranks.pop(key, None)
        if rank is None:
            return False
        self.used_bytes -= self._by_rank[rank].pop(key)
        return True

    def touch(self, key: BlockKey) -> None:
        """The block was used."""
        rank = self._ranks.get(key)
        if rank is not None:
            self._by_rank[rank].move_to_end(key)

    def rerank(self, key: BlockKey) -> None:
        """The block is kept for something else now."""
        rank = self._ranks.get(key)
        if rank is not None and (new_rank := self._rank_of(key)) != rank:
            self._by_rank[new_rank][key] = self._by_rank[rank].pop(key)
            self._ranks[key] = new_rank

    def victims(self, freed_bytes: int) -> list[Victim]:
        """Blocks to evict for that many bytes: fewer where what is left is pinned hard."""
        chosen: list[Victim] = []
        for rank in (Rank.CACHE, Rank.NEEDED, Rank.SOFT):
            for key, size in self._by_rank[rank].items():
                if freed_bytes <= 0:
                    return chosen
                chosen.append(Victim(key, size, rank))
                freed_bytes -= size
        return chosen
