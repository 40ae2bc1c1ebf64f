"""Which block goes first, and what tenants have pinned."""

from __future__ import annotations

import random

from sale_prefill_server.store.base import BlockKey, Pin
from sale_prefill_server.store.index import BlockIndex, Rank
from sale_prefill_server.store.references import References
from tests.unit.server.store.samples import TENANT, block_key, record


def test_the_index_counts_bytes_exactly_through_random_changes() -> None:
    chance = random.Random(1)
    ranks: dict[BlockKey, Rank] = {}
    index = BlockIndex(lambda key: ranks.get(key, Rank.CACHE))
    held: dict[BlockKey, int] = {}
    for _ in range(3000):
        key = block_key(chance.randrange(40))
        action = chance.choice(("add", "remove", "touch", "rerank", "evict"))
        if action == "add":
            held[key] = chance.randint(1, 100)
            index.add(key, held[key])
        elif action == "remove":
            assert index.remove(key) == (held.pop(key, None) is not None)
        elif action == "touch":
            index.touch(key)
        elif action == "rerank":
            ranks[key] = chance.choice(list(Rank))
            index.rerank(key)
        else:
            for victim in index.victims(chance.randint(0, 150)):
                assert held.pop(victim.key) == victim.size_bytes
                assert ranks.get(victim.key, Rank.CACHE) == victim.rank != Rank.HARD
                index.remove(victim.key)
        assert (len(index), index.used_bytes) == (len(held), sum(held.values()))
        assert sum(index.rank_bytes(rank) for rank in Rank) == index.used_bytes


def test_victims_are_no_more_than_needed() -> None:
    index = BlockIndex(lambda key: Rank.CACHE)
    for name in "abc":
        index.add(block_key(name), 10)
    assert [victim.key for victim in index.victims(11)] == [block_key("a"), block_key("b")]
    assert index.victims(0) == []


def test_a_block_is_kept_for_the_most_that_a_record_asks() -> None:
    references = References(lambda key: 10, None)
    references.add(record("plain", ("a", "b")))
    references.add(record("hard", ("a",), pin=Pin.HARD))
    assert (references.rank(block_key("a")), references.rank(block_key("b"))) == (Rank.HARD, Rank.NEEDED)
    references.remove(record("hard").key)
    assert references.rank(block_key("a")) is Rank.NEEDED
    references.add(record("plain", ("b",), pin=Pin.SOFT))
    assert (references.rank(block_key("a")), references.rank(block_key("b"))) == (Rank.CACHE, Rank.SOFT)
    assert references.rank(block_key("b")._replace(codec="fp8-float32-4")) is Rank.SOFT


def test_pinned_bytes_return_to_nothing_after_random_records() -> None:
    chance = random.Random(2)
    references = References(lambda key: 10, None)
    for _ in range(500):
        name = chance.randrange(10)
        if chance.random() < 0.4:
            references.remove(record(name).key)
        else:
            needed = tuple(chance.sample(range(12), 4))
            references.add(record(name, needed, pin=chance.choice(list(Pin))))
    for name in range(10):
        references.remove(record(name).key)
    assert references.pinned_bytes(TENANT) == 0
    assert not any(references.is_needed(block_key(name)) for name in range(12))
