"""Who holds which page: nothing lost, nothing owned twice, whatever happens in whatever order."""

from __future__ import annotations

import random

import pytest

from sale_prefill_server.kv.pages import PageAllocator, PagesExhaustedError


def test_pages_taken_together_lie_together() -> None:
    pages = PageAllocator(8)
    assert pages.take(3) == [0, 1, 2]
    pages.release([1])
    assert pages.take(2) == [1, 3]


def test_too_many_pages_change_nothing() -> None:
    pages = PageAllocator(4)
    pages.take(3)
    with pytest.raises(PagesExhaustedError, match="2 pages needed, 1 free"):
        pages.take(2)
    pages.check([[0, 1, 2]])


def test_a_shared_page_is_free_when_its_last_holder_lets_go() -> None:
    pages = PageAllocator(2)
    taken = pages.take(2)
    pages.share(taken)
    pages.release(taken)
    assert pages.held == 2
    pages.release(taken)
    assert (pages.held, pages.kept) == (0, 0)
    with pytest.raises(ValueError, match="held by nobody"):
        pages.release([0])


def test_a_page_is_found_by_its_name_while_it_is_held_or_kept() -> None:
    pages = PageAllocator(2)
    (page,) = pages.take(1)
    pages.name(page, b"key")
    assert pages.find([b"key", b"other"]) == [page]
    pages.release([page])
    pages.release([page], keep=True)
    assert (pages.held, pages.kept) == (0, 1)
    assert pages.find([b"key"]) == [page]
    pages.release([page])
    assert pages.find([b"key"]) == []


def test_kept_pages_give_way_least_recently_used_first() -> None:
    pages = PageAllocator(3)
    taken = pages.take(3)
    for page in taken:
        pages.name(page, bytes([page]))
    pages.release(taken, keep=True)  # the end of a sequence goes before its beginning
    pages.take(1)
    assert pages.find([b"\2"]) == []
    assert pages.find([b"\0", b"\1"]) == [0, 1]


def test_a_page_with_one_holder_can_be_claimed_and_has_no_name_then() -> None:
    pages = PageAllocator(1)
    (page,) = pages.take(1)
    pages.name(page, b"key")
    pages.share([page])
    assert not pages.claim(page)
    pages.release([page])
    assert pages.claim(page)
    assert pages.find([b"key"]) == []


def test_the_first_page_keeps_a_name_that_two_would_have() -> None:
    pages = PageAllocator(2)
    first, second = pages.take(2)
    pages.name(first, b"key")
    pages.name(second, b"key")
    assert pages.find([b"key"]) == [first]


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_lose_no_page(seed: int) -> None:
    chance = random.Random(seed)
    pages, tables = PageAllocator(64), list[list[int]]()
    for step in range(3000):
        action = chance.choice(("take", "take", "share", "release", "name", "find", "claim"))
        if action == "take":
            try:
                tables.append(pages.take(chance.randrange(1, 9)))
            except PagesExhaustedError:
                pages.check(tables)
        elif action == "find":
            if found := pages.find([bytes([chance.randrange(16)]) for _ in range(3)]):
                if len(set(found)) == len(found):
                    tables.append(found)
                else:
                    pages.release(found, keep=True)
        elif tables:
            table = chance.choice(tables)
            if action == "share":
                pages.share(table)
                tables.append(list(table))
            elif action == "release":
                tables.remove(table)
                pages.release(table, keep=chance.random() < 0.5)
            elif action == "name":
                pages.name(chance.choice(table), bytes([chance.randrange(16)]))
            else:
                pages.claim(chance.choice(table))
        pages.check(tables)
        assert pages.held + pages.kept <= 64, step
