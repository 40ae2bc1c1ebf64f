"""KV memory: paged, within a budget, shared without being overwritten, returned to the byte."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sale_prefill_server.kv.pool import PAGE_TOKENS, KvCapacityError, KvPool, KvShape, SessionKv

SHAPE = KvShape(num_layers=2, num_kv_heads=3, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))
KEYS = [bytes([index]) * 4 for index in range(64)]


def pool_of(pages: int) -> KvPool:
    return KvPool(SHAPE, pages * SHAPE.page_bytes)


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 3, count, 4, generator=torch.Generator().manual_seed(seed))


def append(kv: SessionKv, states: torch.Tensor) -> None:
    kv.reserve(kv.num_tokens + states.shape[2])
    for layer in range(SHAPE.num_layers):
        kv.append(layer, states + layer, -states)


def contents(kv: SessionKv, layer: int = 0, kind: int = 0) -> torch.Tensor:
    """[num_tokens, heads, head_dim]."""
    return torch.cat([torch.empty(0, 3, 4), *kv.segments(layer, kind, 0, kv.num_tokens)])


def same(kv: SessionKv, *parts: torch.Tensor) -> None:
    expected = torch.cat(parts, 2)[0].transpose(0, 1)
    assert torch.equal(contents(kv, 0, 0), expected)
    assert torch.equal(contents(kv, 1, 0), expected + 1)
    assert torch.equal(contents(kv, 1, 1), -expected)


def test_a_page_counts_keys_values_codes_and_scales_of_all_layers() -> None:
    assert SHAPE.bytes_per_token == 2 * 2 * 3 * 4 * 4
    assert SHAPE.page_bytes == PAGE_TOKENS * SHAPE.bytes_per_token + 2 * 3 * (PAGE_TOKENS * 4 + PAGE_TOKENS // 32 * 4)


def test_what_is_appended_is_read_back_across_pages() -> None:
    kv = pool_of(8).create()
    first, second = rows(100, 1), rows(160, 2)
    append(kv, first)
    early = kv.segments(0, 0, 0, 100)[0].clone()
    append(kv, second)
    same(kv, first, second)
    assert torch.equal(early, first[0].transpose(0, 1))
    assert kv.num_tokens == 260


def test_attention_reads_pages_by_the_page_table() -> None:
    pool = pool_of(8)
    other, kv = pool.create(), pool.create()
    for seed in range(3):  # taking turns, so that pages do not lie together
        append(other, rows(PAGE_TOKENS, seed))
        append(kv, rows(PAGE_TOKENS, 10 + seed))
    keys, _ = kv.layer_pages(0)
    read = keys[kv.page_table].transpose(1, 2).flatten(2, 3)
    assert torch.equal(read, torch.cat([rows(PAGE_TOKENS, 10 + seed) for seed in range(3)], 2))
    assert len(kv.segments(0, 0, 0, 384)) == 3


def test_tokens_can_be_written_in_any_order_and_counted_at_the_end() -> None:
    kv, states = pool_of(4).create(), rows(300, 1)[0].transpose(0, 1)
    kv.reserve(300)
    for layer in range(2):
        for start, end in ((200, 300), (0, 60), (60, 200)):
            kv.write(layer, 0, start, states[start:end] + layer)
            kv.write(layer, 1, start, -states[start:end])
    assert kv.num_tokens == 0
    kv.extend_to(300)
    same(kv, rows(300, 1))


def test_threads_write_side_by_side() -> None:
    kv = pool_of(2).create()
    kv.reserve(2 * PAGE_TOKENS)
    whole = rows(2 * PAGE_TOKENS, 1)[0].transpose(0, 1)

    def write(first: int) -> None:
        for _ in range(20):
            for start in range(first, 2 * PAGE_TOKENS, 4):
                kv.write(0, 0, start, whole[start : start + 2])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(write, (0, 2)))
    finally:
        sys.setswitchinterval(interval)
    kv.extend_to(2 * PAGE_TOKENS)
    assert torch.equal(contents(kv), whole)


def test_truncation_forgets_half_written_layers() -> None:
    kv = pool_of(2).create()
    kv.reserve(64)
    kv.append(0, rows(40, 1), rows(40, 2))
    kv.truncate(0)
    assert (kv.length(0), kv.num_tokens) == (0, 0)


def test_an_append_past_the_reservation_is_a_mistake() -> None:
    kv = pool_of(4).create()
    kv.reserve(128)
    with pytest.raises(ValueError, match="129 tokens do not fit the 128 reserved"):
        kv.append(0, rows(129, 1), rows(129, 2))
    with pytest.raises(ValueError, match="129 tokens do not fit the 128 reserved"):
        kv.require_room(129)


def test_the_budget_holds_and_comes_back_whole() -> None:
    pool = pool_of(2)
    first, second = pool.create(), pool.create()
    first.reserve(1)
    second.reserve(128)
    assert pool.used_bytes == pool.capacity_bytes
    with pytest.raises(KvCapacityError) as caught:
        first.reserve(129)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (SHAPE.page_bytes, 0)
    second.release()
    first.reserve(129)
    first.release()
    assert pool.used_bytes == 0


def test_a_budget_below_a_page_is_refused() -> None:
    with pytest.raises(KvCapacityError):
        KvPool(SHAPE, SHAPE.page_bytes - 1)


def test_pages_that_were_reserved_for_nothing_go_back() -> None:
    pool = pool_of(8)
    kv = pool.create()
    append(kv, rows(130, 1))
    kv.reserve(1000)
    assert pool.used_bytes == 8 * SHAPE.page_bytes
    kv.trim()
    assert pool.used_bytes == kv.size_bytes == 2 * SHAPE.page_bytes
    same(kv, rows(130, 1))


def test_a_fork_shares_pages_and_neither_disturbs_the_other() -> None:
    pool = pool_of(8)
    parent = pool.create()
    append(parent, rows(300, 1))
    child = parent.fork(270)
    assert pool.used_bytes == 4 * SHAPE.page_bytes  # two shared, the third copied
    append(parent, rows(200, 2))
    append(child, rows(100, 3))
    same(parent, rows(300, 1), rows(200, 2))
    same(child, rows(300, 1)[:, :, :270], rows(100, 3))
    parent.release()
    same(child, rows(300, 1)[:, :, :270], rows(100, 3))
    child.release()
    assert pool.used_bytes == 0


def test_a_fork_at_a_page_s_end_can_rewrite_its_last_token() -> None:
    pool = pool_of(8)
    parent = pool.create()
    append(parent, rows(256, 1))
    child = parent.fork(256)
    child.truncate(255)
    append(child, rows(1, 9))
    same(parent, rows(256, 1))
    same(child, rows(256, 1)[:, :, :255], rows(1, 9))


def test_what_a_page_is_named_others_take_instead_of_computing_it() -> None:
    pool = pool_of(8)
    first, second = pool.create(), pool.create()
    append(first, rows(300, 1))
    first.name_pages(KEYS[:2], 0)
    second.reserve(500)
    assert second.adopt(KEYS[:3], least_shared_tokens=0, copies=False) == 256
    assert second.pages[:2] == first.pages[:2]
    append(second, rows(50, 2))
    same(second, rows(300, 1)[:, :, :256], rows(50, 2))
    assert second.adopt(KEYS[:2], least_shared_tokens=0, copies=False) == 0  # nothing to gain


def test_a_short_match_is_copied_or_left() -> None:
    pool = pool_of(8)
    first, second = pool.create(), pool.create()
    append(first, rows(128, 1))
    first.name_pages(KEYS[:1], 0)
    first.mark_coded(128)
    assert second.adopt(KEYS[:1], least_shared_tokens=256, copies=False) == 0
    assert second.adopt(KEYS[:1], least_shared_tokens=256, copies=True) == 128
    assert second.pages != first.pages
    assert (first.coded_tokens, second.coded_tokens) == (128, 0)  # codes belong to the centre of the first
    same(second, rows(128, 1))


def test_a_shared_page_that_is_cut_into_is_copied_before_it_is_written() -> None:
    pool = pool_of(8)
    first, second = pool.create(), pool.create()
    append(first, rows(256, 1))
    first.name_pages(KEYS[:2], 0)
    second.adopt(KEYS[:2], least_shared_tokens=0, copies=False)
    first.truncate(200)
    append(first, rows(56, 5))
    same(second, rows(256, 1))
    same(first, rows(256, 1)[:, :, :200], rows(56, 5))


def test_a_page_that_is_written_again_has_lost_its_name() -> None:
    pool = pool_of(8)
    first, second = pool.create(), pool.create()
    append(first, rows(256, 1))
    first.name_pages(KEYS[:2], 0)
    first.truncate(200)
    append(first, rows(56, 5))
    assert second.adopt(KEYS[:2], least_shared_tokens=0, copies=False) == 128


def test_a_reader_s_tokens_stay_when_they_are_cut_off_and_written_anew() -> None:
    pool = pool_of(8)
    kv = pool.create()
    append(kv, rows(200, 1))
    reader = kv.acquire()
    seen = reader.segments(0, 0, 0, 200)
    kv.truncate(100)
    append(kv, rows(60, 2))
    assert torch.equal(torch.cat(seen), rows(200, 1)[0].transpose(0, 1))
    reader.release()
    same(kv, rows(200, 1)[:, :, :100], rows(60, 2))
    kv.release()
    assert pool.used_bytes == 0


def test_a_freed_cache_cannot_be_taken_again() -> None:
    kv = pool_of(1).create()
    kv.release()
    with pytest.raises(ValueError, match="freed already"):
        kv.acquire()


def test_ten_thousand_random_operations_lose_no_page_and_change_no_token() -> None:
    """Create, append, fork, adopt, truncate, read, delete: after each, every page is accounted for."""
    chance, pool = random.Random(6), KvPool(SHAPE, 96 * SHAPE.page_bytes)
    live: list[tuple[SessionKv, list[int]]] = []
    readers: list[tuple[SessionKv, torch.Tensor, list[torch.Tensor]]] = []
    made = 0

    def states(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 3, -1, 4)

    def check(kv: SessionKv, numbers: list[int]) -> None:
        assert torch.equal(contents(kv)[:, 0, 0], torch.tensor(numbers, dtype=torch.float32))

    def names(numbers: list[int]) -> list[bytes]:
        return [str(numbers[:end]).encode() for end in range(PAGE_TOKENS, len(numbers) + 1, PAGE_TOKENS)]

    for _ in range(10_000):
        action = chance.choice(("create", "append", "append", "fork", "adopt", "truncate", "read", "unread", "delete"))
        try:
            if action == "create":
                live.append((pool.create(), []))
            elif action == "unread" and readers:
                kv, expected, seen = readers.pop(chance.randrange(len(readers)))
                assert torch.equal(torch.cat(seen), expected)
                kv.release()
            elif live:
                index = chance.randrange(len(live))
                kv, numbers = live[index]
                if action == "append":
                    new = [made + offset for offset in range(chance.choice((1, 5, 128, 200, 300)))]
                    append(kv, states(new))
                    made += len(new)
                    numbers += new
                    kv.name_pages(names(numbers), 0)
                elif action == "fork" and numbers:
                    count = chance.randrange(1, len(numbers) + 1)
                    live.append((kv.fork(count, shared=chance.random() < 0.8), numbers[:count]))
                elif action == "adopt" and not numbers:
                    _, wanted = chance.choice(live)
                    gained = kv.adopt(names(wanted), least_shared_tokens=256, copies=True)
                    numbers += wanted[:gained]
                elif action == "truncate" and numbers:
                    count = chance.randrange(len(numbers) + 1)
                    kv.truncate(count, rewritten_from=0 if chance.random() < 0.2 else None)
                    del numbers[count:]
                elif action == "read" and numbers:
                    readers.append((kv.acquire(), contents(kv), kv.segments(0, 0, 0, len(numbers))))
                elif action == "delete":
                    live.pop(index)
                    kv.release(keep=chance.random() < 0.5)
                    continue
                check(kv, numbers)
        except KvCapacityError:
            kv, _ = live.pop(chance.randrange(len(live)))
            kv.release()
        held = {id(kv): kv for kv, *_ in [*live, *readers]}
        pool.pages.check([kv.held_pages for kv in held.values()])
    for kv, *_ in [*live, *readers]:
        kv.release()
    assert pool.used_bytes == 0
    pool.pages.drop_kept()
    pool.pages.check([])
