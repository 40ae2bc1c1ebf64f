"""Which pages of a pool are free, held, or kept for whoever needs the same KV again. Numbers only, no memory.

A page is held by every sequence that has it in its page table. A page whose KV is complete may have a name, a key that
says what KV it holds (`kv/prefix.py`). When the last holder lets a named page go, the page may be kept: it can be taken
by its name again until its room is needed, least recently used first.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagesExhaustedError(Exception):
    """Fewer pages can be had than are needed."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} pages needed, {free} free")
        self.needed = needed
        self.free = free


class PageAllocator:
    """Pages 0 .. count - 1. Thread-safe; every operation is whole or has changed nothing.

    Args:
        count: pages there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.Lock()
        self._free = list(range(count))  # a heap: lowest first, so that pages taken together lie together
        self._holders = [0] * count
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def held(self) -> int:
        """Pages that someone holds."""
        return self.count - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that nobody holds and a name can still bring back."""
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """`count` pages for one holder, ascending as far as can be; kept ones give way where no other is free.

        Raises:
            PagesExhaustedError: there are not so many.
        """
        with self._lock:
            available = len(self._free) + len(self._kept)
            if count > available:
                raise PagesExhaustedError(count, available)
            while len(self._free) < count:
                page, _ = self._kept.popitem(last=False)
                self._forget(page)
                heapq.heappush(self._free, page)
            pages = [heapq.heappop(self._free) for _ in range(count)]
            for page in pages:
                self._holders[page] = 1
            return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each, all of which someone holds."""
        with self._lock:
            pages = list(pages)
            if free := [page for page in pages if not self._holders[page]]:
                raise ValueError(f"pages {free} are held by nobody; take them by their names")
            for page in pages:
                self._holders[page] += 1

    def release(self, pages: Sequence[int], *, keep: bool = False) -> None:
        """One holder less of each; with `keep`, pages that have a name stay as long as their room is not needed."""
        with self._lock:
            if free := [page for page in pages if not self._holders[page]]:
                raise ValueError(f"pages {free} are held by nobody")
            for page in reversed(pages):  # so that the end of a sequence goes before its beginning
                self._holders[page] -= 1
                if self._holders[page]:
                    continue
                if keep and page in self._names:
                    self._kept[page] = None
                else:
                    self._forget(page)
                    heapq.heappush(self._free, page)

    def exclusive(self, pages: Iterable[int]) -> int:
        """How many of them have one holder alone."""
        return sum(self._holders[page] == 1 for page in pages)

    def name(self, page: int, key: bytes) -> None:
        """Says what a held page has become; where another page has that name already, that one keeps it."""
        with self._lock:
            if self._holders[page] and page not in self._names and key not in self._named:
                self._names[page] = key
                self._named[key] = page

    def claim(self, page: int) -> bool:
        """Whether its one holder may write to it: nobody else holds it, and from now on nobody finds it by a name."""
        with self._lock:
            if self._holders[page] != 1:
                return False
            self._forget(page)
            return True

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the leading `keys` that have one, each with one holder more."""
        with self._lock:
            pages = []
            for key in keys:
                page = self._named.get(key)
                if page is None:
                    break
                self._kept.pop(page, None)
                self._holders[page] += 1
                pages.append(page)
            return pages

    def drop_kept(self) -> None:
        """Frees what is kept."""
        with self._lock:
            for page in self._kept:
                self._forget(page)
                heapq.heappush(self._free, page)
            self._kept.clear()

    def _forget(self, page: int) -> None:
        key = self._names.pop(page, None)
        if key is not None:
            del self._named[key]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Verifies that `tables`, the page tables of all holders, account for every page.

        Raises:
            AssertionError: a page is lost, doubly owned, or named by two keys.
        """
        with self._lock:
            holders = [0] * self.count
            for table in tables:
                assert len(set(table)) == len(table), f"a page table holds a page twice: {table}"
                for page in table:
                    holders[page] += 1
            wrong = [page for page in range(self.count) if holders[page] != self._holders[page]]
            assert not wrong, f"pages {wrong}: held by {[holders[page] for page in wrong]} tables, counted otherwise"
            idle = sorted([*self._free, *self._kept])
            assert idle == [page for page in range(self.count) if not holders[page]], "a page is lost, or twice free"
            assert all(self._named[key] == page for page, key in self._names.items())
            assert len(self._named) == len(self._names)
            assert not [page for page in self._free if page in self._names], "a free page has a name"
