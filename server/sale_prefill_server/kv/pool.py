"""KV memory: pages within a byte budget, and the sequences of pages that sessions hold.

A page holds 128 tokens of every layer: keys and values `[tokens, num_kv_heads, head_dim]`, so that the tokens of a run
of pages are one piece of memory (the order that KV travels in, and vLLM's NHD), and room for the key codes of sparse
attention. Page p is the same row of each layer's tensors, so one page table serves all layers. Memory is taken once, at
start; on the CPU the system gives it page by page when it is first written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sale_prefill_server.kv.gate import LayerGate
from sale_prefill_server.kv.pages import PageAllocator, PagesExhaustedError

#: A whole number of SALE key blocks (32) and query blocks (64, 128). Larger pages share less and copy more at a fork;
#: smaller ones make page tables long and transfers small: 128 tokens of a layer's K are 48 KiB in SmolLM2-135M.
PAGE_TOKENS = 128
_KEY_BLOCK = 32


@dataclass(frozen=True)
class KvShape:
    """What one token's KV looks like in this model.

    `head_dim` is that of keys and of values; `dtype` and `device` are the model's.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes that K and V of all layers take for one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: K, V and key codes with their scales, of all layers."""
        scales = self.num_layers * self.num_kv_heads * PAGE_TOKENS // _KEY_BLOCK * 4
        codes = self.num_layers * self.num_kv_heads * self.head_dim * PAGE_TOKENS
        return PAGE_TOKENS * self.bytes_per_token + codes + scales


class KvCapacityError(Exception):
    """The pool cannot hold that much more. Carries both numbers, in bytes."""

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{needed_bytes} bytes of KV needed, {free_bytes} free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class KvPool:
    """Memory for KV. Thread-safe but for the contents of pages, which belong to their holder.

    Attributes:
        keys, values: one tensor a layer, `[pages, tokens, num_kv_heads, head_dim]`.
        codes: int8, one a layer, `[pages, num_kv_heads, tokens, head_dim]`; see `sale_attention.quantise`.
        scales: float32, one a layer, `[pages, num_kv_heads, tokens / 32]`.
        pages: who holds what.
        coded: one a page: whether its key codes are final.

    Args:
        shape: the model's KV.
        capacity_bytes: budget; what does not fill a page is left.

    Raises:
        KvCapacityError: the budget holds no page, or the device cannot give it.
    """

    def __init__(self, shape: KvShape, capacity_bytes: int) -> None:
        count = capacity_bytes // shape.page_bytes
        if count < 1:
            raise KvCapacityError(shape.page_bytes, capacity_bytes)
        self.shape = shape
        self.pages = PageAllocator(count)
        self.coded = bytearray(count)
        kv_shape = (count, PAGE_TOKENS, shape.num_kv_heads, shape.head_dim)
        codes_shape = (count, shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)
        scales_shape = (count, shape.num_kv_heads, PAGE_TOKENS // _KEY_BLOCK)
        try:
            self.keys, self.values = self._tensors(kv_shape, shape.dtype), self._tensors(kv_shape, shape.dtype)
            self.codes = self._tensors(codes_shape, torch.int8)
            self.scales = self._tensors(scales_shape, torch.float32)
        except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
            raise KvCapacityError(capacity_bytes, 0) from error

    def _tensors(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device=self.shape.device) for _ in range(self.shape.num_layers)]

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all pages."""
        return self.pages.count * self.shape.page_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that sequences hold; a page that several hold counts once."""
        return self.pages.held * self.shape.page_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of pages that nobody holds, kept for a prompt that begins the same; they give way when needed."""
        return self.pages.kept * self.shape.page_bytes

    def create(self) -> SessionKv:
        """An empty KV cache; the caller owns its one reference."""
        return SessionKv(self, [], 0)

    def take(self, count: int) -> list[int]:
        """`count` pages.

        Raises:
            KvCapacityError: there are not so many.
        """
        try:
            pages = self.pages.take(count)
        except PagesExhaustedError as error:
            page_bytes = self.shape.page_bytes
            raise KvCapacityError(error.needed * page_bytes, error.free * page_bytes) from error
        for page in pages:
            self.coded[page] = False
        return pages

    def copy_page(self, source: int, target: int) -> None:
        """Everything that page `source` holds, to page `target`."""
        for tensors in (self.keys, self.values, self.codes, self.scales):
            for tensor in tensors:
                tensor[target].copy_(tensor[source])
        self.coded[target] = self.coded[source]


@dataclass(frozen=True)
class _Run:
    """`count` tokens from `token` on lie one after the other from `slot` on, where slot is page * PAGE_TOKENS + token
    within the page."""

    token: int
    slot: int
    count: int


_NO_RUNS: tuple[int, int, list[_Run]] = (0, 0, [])


class SessionKv:
    """KV of one sequence: a page table, and how many tokens each layer holds.

    One thread writes; others may read tokens below a length that they saw when they took a reference: nothing
    overwrites those. Pages are shared with forks and with sequences that begin the same; a page is written by its one
    holder only, so `reserve` copies a page that is about to be continued while others hold it or read what was cut off.
    """

    def __init__(self, pool: KvPool, pages: list[int], num_tokens: int) -> None:
        self._pool = pool
        self._references = 1
        self._lock = threading.Lock()
        self._pages = pages
        self._lengths = [num_tokens] * pool.shape.num_layers
        self._table: Tensor | None = None
        self._runs: tuple[int, int, list[_Run]] = _NO_RUNS
        self._left: list[int] = []  # pages that are no longer ours but that a reader may be at
        self._copies_from: int | None = None
        self._gate: LayerGate | None = None
        self._watchers: list[Callable[[], None]] = []
        self._written: dict[int, torch.cuda.Event] = {}
        self._keep = False

    @property
    def shape(self) -> KvShape:
        """Geometry of the model's KV."""
        return self._pool.shape

    @property
    def pool(self) -> KvPool:
        """Where the pages are."""
        return self._pool

    @property
    def pages(self) -> Sequence[int]:
        """Page ids in order, reserved ones included."""
        return self._pages

    @property
    def held_pages(self) -> Sequence[int]:
        """Page ids that it holds, those that only readers need included."""
        return [*self._pages, *self._left]

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is complete in all layers."""
        return self._lengths[-1]

    @property
    def size_bytes(self) -> int:
        """Bytes of its pages, shared ones included."""
        return len(self._pages) * self.shape.page_bytes

    @property
    def exclusive_bytes(self) -> int:
        """Bytes of pages that nobody else holds."""
        return self._pool.pages.exclusive(self._pages) * self.shape.page_bytes

    @property
    def page_table(self) -> Tensor:
        """int64 `[1, pages]` on the device, as `sale_attention.KvView` takes it; good until the next `reserve`."""
        if self._table is None:
            self._table = torch.tensor([self._pages], dtype=torch.int64, device=self.shape.device)
        return self._table

    def length(self, layer: int) -> int:
        """Tokens that one layer holds; within a step, earlier layers are ahead."""
        return self._lengths[layer]

    def reserve(self, num_tokens: int) -> None:
        """Takes pages for `num_tokens` in all, and makes the page that the next token goes to its own.

        Raises:
            KvCapacityError: over the pool's budget; nothing has changed then.
        """
        with self._lock:
            copied = self._pages_to_copy()
            missing = max(0, -(-num_tokens // PAGE_TOKENS) - len(self._pages))
            if not missing and not copied:
                return
            taken = self._pool.take(missing + len(copied))
            for index in copied:
                self._pool.copy_page(self._pages[index], taken[0])
                self._leave(index, index + 1, [taken.pop(0)])
            self._copies_from = None
            self._leave(len(self._pages), len(self._pages), taken)

    def _pages_to_copy(self) -> list[int]:
        """Indices of pages that may be written from now on and are not ours alone."""
        end = -(-self.num_tokens // PAGE_TOKENS)
        if self._copies_from is not None:
            return [
                index
                for index in range(self._copies_from, end)
                if self._references > 1 or not self._pool.pages.claim(self._pages[index])
            ]
        last = self.num_tokens // PAGE_TOKENS
        return [last] if last < end and not self._pool.pages.claim(self._pages[last]) else []

    def _leave(self, start: int, end: int, taken: list[int]) -> None:
        """Puts `taken` in place of pages [start, end), which go once no reader can be at them."""
        left = self._pages[start:end]
        self._pages[start:end] = taken
        self._table, self._runs = None, _NO_RUNS
        if self._references > 1:
            self._left.extend(left)
        else:
            self._pool.pages.release(left)

    def require_room(self, num_tokens: int) -> None:
        """Checks that so many more tokens fit what was reserved.

        Raises:
            ValueError: they do not.
        """
        reserved = len(self._pages) * PAGE_TOKENS
        if self.num_tokens + num_tokens > reserved:
            raise ValueError(f"{self.num_tokens + num_tokens} tokens do not fit the {reserved} reserved; call reserve")

    def trim(self) -> None:
        """Gives back pages that were reserved and not used."""
        with self._lock:
            self._leave(-(-max(self._lengths) // PAGE_TOKENS), len(self._pages), [])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [1, num_kv_heads, n, head_dim] to one layer.

        Returns:
            All pages of that layer, K and V `[pages, num_kv_heads, tokens, head_dim]`, to be read by `page_table`.

        Raises:
            ValueError: past what was reserved.
            LoadFailedError: see `load`.
        """
        if self._gate is not None:
            self._gate.wait(layer)
        start = self._lengths[layer]
        end = start + keys.shape[2]
        for run in self._writable_runs(layer, start, end):
            rows = slice(run.token - start, run.token - start + run.count)
            for source, tensors in ((keys, self._pool.keys), (values, self._pool.values)):
                _slots(tensors[layer])[run.slot : run.slot + run.count] = source[0, :, rows].transpose(0, 1)
        self._lengths[layer] = end
        self._tell(layer)
        return self.layer_pages(layer)

    @contextmanager
    def watched(self, callback: Callable[[], None]) -> Iterator[None]:
        """Calls `callback`, in the writer's thread and quickly, whenever some layer has more tokens or a load ends."""
        self._watchers.append(callback)
        try:
            yield
        finally:
            self._watchers.remove(callback)

    def written(self, layer: int) -> torch.cuda.Event | None:
        """On a GPU, after what a watched layer's last append has been written; None: after what is queued by now."""
        return self._written.get(layer)

    def _tell(self, layer: int | None = None) -> None:
        if not self._watchers:
            self._written.clear()
        elif layer is not None and self.shape.device.type == "cuda":
            self._written[layer] = event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        for callback in list(self._watchers):
            callback()

    def layer_pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """All pages of one layer, K and V `[pages, num_kv_heads, tokens, head_dim]`."""
        return self._pool.keys[layer].transpose(1, 2), self._pool.values[layer].transpose(1, 2)

    def write(self, layer: int, kind: int, start: int, values: Tensor) -> None:
        """Puts [n, num_kv_heads, head_dim], on any device, at tokens from `start` on; `extend_to` counts them.

        `kind` 0 is K, 1 is V.

        Raises:
            ValueError: past what was reserved.
        """
        tensor = (self._pool.keys, self._pool.values)[kind][layer]
        for run in self._writable_runs(layer, start, start + values.shape[0]):
            rows = values[run.token - start : run.token - start + run.count]
            _copy(_slots(tensor)[run.slot : run.slot + run.count], rows)

    def load(self, gate: LayerGate | None) -> None:
        """Tokens that are counted already are being written: `append` waits at the gate. None: all are there."""
        self._gate = gate
        if gate is None:
            self._tell()

    @property
    def is_loading(self) -> bool:
        """Whether some of what is counted may still be on its way."""
        return self._gate is not None

    def require_loaded(self) -> None:
        """Waits until everything that is counted is there.

        Raises:
            LoadFailedError: it will not come.
        """
        if (gate := self._gate) is not None:
            gate.wait(self.shape.num_layers - 1)

    def extend_to(self, num_tokens: int) -> None:
        """Counts tokens that were written to all layers."""
        self._lengths = [num_tokens] * self.shape.num_layers
        self._tell()

    def segments(self, layer: int, kind: int, start: int, end: int) -> list[Tensor]:
        """Tokens [start, end) of one layer's K (`kind` 0) or V (1), as views [n, num_kv_heads, head_dim] in order.

        Each is one piece of memory: as many tokens as lie one after the other.
        """
        slots = _slots((self._pool.keys, self._pool.values)[kind][layer])
        return [slots[run.slot : run.slot + run.count] for run in self._runs_of(start, end)]

    def _writable_runs(self, layer: int, start: int, end: int) -> list[_Run]:
        if end > len(self._pages) * PAGE_TOKENS:
            reserved = len(self._pages) * PAGE_TOKENS
            raise ValueError(f"layer {layer}: {end} tokens do not fit the {reserved} reserved; call reserve")
        found = self._runs
        if found[:2] != (start, end):  # every layer of a step asks the same
            found = self._runs = (start, end, self._runs_of(start, end))
        return found[2]  # its own: chunks of a push are written by several threads

    def _runs_of(self, start: int, end: int) -> list[_Run]:
        pages, runs = self._pages, list[_Run]()
        while start < end:
            first = last = start // PAGE_TOKENS
            while (last + 1) * PAGE_TOKENS < end and pages[last + 1] == pages[last] + 1:
                last += 1
            count = min(end, (last + 1) * PAGE_TOKENS) - start
            runs.append(_Run(start, pages[first] * PAGE_TOKENS + start % PAGE_TOKENS, count))
            start += count
        return runs

    def truncate(self, num_tokens: int, *, rewritten_from: int | None = None) -> None:
        """Forgets tokens from `num_tokens` on, in every layer. Room may shrink: `reserve` before the next append.

        Pages that hold tokens from `rewritten_from` on (by default `num_tokens`) may be written again, so the next
        `reserve` makes them its own.
        """
        with self._lock:
            if num_tokens >= max(self._lengths):
                return
            first = (num_tokens if rewritten_from is None else rewritten_from) // PAGE_TOKENS
            if self._references > 1 or rewritten_from is not None:
                self._copies_from = first if self._copies_from is None else min(first, self._copies_from)
            self._leave(-(-num_tokens // PAGE_TOKENS), -(-max(self._lengths) // PAGE_TOKENS), [])
            self._lengths = [min(length, num_tokens) for length in self._lengths]

    def fork(self, num_tokens: int, *, shared: bool = True) -> SessionKv:
        """Another sequence of the first `num_tokens` tokens, 1 or more.

        Pages are shared but for the last one, which is copied: the child can compute its last token again and go on
        from there. Without `shared` all are copied.

        Raises:
            KvCapacityError: no pages are left for the copies.
        """
        with self._lock:
            used = self._pages[: -(-num_tokens // PAGE_TOKENS)]
            kept = used[:-1] if shared else []
            own = self._pool.take(len(used) - len(kept))
            for source, target in zip(used[len(kept) :], own, strict=True):
                self._pool.copy_page(source, target)
            self._pool.pages.share(kept)
        return SessionKv(self._pool, [*kept, *own], num_tokens)

    def adopt(self, keys: Sequence[bytes], *, least_shared_tokens: int, copies: bool) -> int:
        """Takes pages by their names in place of its own from the first on, where there are more of them than it holds.

        Args:
            keys: names, from the first page on.
            least_shared_tokens: pages of fewer tokens are not shared but copied.
            copies: do so; else they are left.

        Returns:
            Tokens held then, all of them whole pages; 0 where nothing was gained.

        Raises:
            KvCapacityError: no pages are left for copies.
        """
        found = self._pool.pages.find(keys)
        tokens = len(found) * PAGE_TOKENS
        try:
            if tokens <= self.num_tokens or (tokens < least_shared_tokens and not copies):
                return 0
            if tokens < least_shared_tokens:
                self.reserve(tokens)
                for page, own in zip(found, self._pages, strict=False):
                    self._pool.copy_page(page, own)
                    self._pool.coded[own] = False
                self.extend_to(tokens)
                return tokens
            with self._lock:
                self._pool.pages.share(found)
                self._leave(0, len(found), found)
                self.extend_to(tokens)
            return tokens
        finally:
            self._pool.pages.release(found, keep=True)

    def name_pages(self, keys: Sequence[bytes], first: int) -> None:
        """Names whole pages from index `first` on."""
        for page, key in zip(self._pages[first:], keys, strict=False):
            self._pool.pages.name(page, key)

    def mark_coded(self, num_tokens: int) -> None:
        """The key codes of all layers are final for the first `num_tokens` tokens."""
        for page in self._pages[: num_tokens // PAGE_TOKENS]:
            self._pool.coded[page] = True

    @property
    def coded_tokens(self) -> int:
        """Tokens of the leading pages whose key codes are final."""
        count = 0
        for page in self._pages[: self.num_tokens // PAGE_TOKENS]:
            if not self._pool.coded[page]:
                break
            count += 1
        return count * PAGE_TOKENS

    def acquire(self) -> SessionKv:
        """One more reference, for a reader; pair it with `release`."""
        with self._lock:
            if self._references == 0:
                raise ValueError("KV cache was freed already; look the session up again")
            self._references += 1
        return self

    def release(self, *, keep: bool = False) -> None:
        """Drops one reference; the last one frees the pages. With `keep`, named ones may serve others afterwards."""
        with self._lock:
            self._keep = self._keep or keep
            self._references -= 1
            left, pages = ([], []) if self._references > 1 else (self._left, [])
            if left:
                self._left = []
            if not self._references:
                pages, self._pages, self._table = self._pages, [], None
        self._pool.pages.release(left)
        self._pool.pages.release(pages, keep=self._keep)


def _copy(target: Tensor, source: Tensor) -> None:
    """Copies rows; from host memory to host memory by one thread, the caller's.

    torch would wake all of its own for each copy: beside busy cores 1 MiB then takes ten times as long.
    """
    if target.is_cpu and source.is_cpu and source.is_contiguous() and target.dtype == source.dtype:
        target.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()
    else:
        target.copy_(source)


def _slots(tensor: Tensor) -> Tensor:
    """`[pages * tokens, num_kv_heads, head_dim]`."""
    return tensor.view(-1, *tensor.shape[2:])
