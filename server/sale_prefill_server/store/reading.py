"""Reads many blocks layer by layer, so that the first layer can be used while later ones are still coming."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from sale_prefill_server.store.base import (
    Block,
    BlockReader,
    BlocksLostError,
    Buffer,
    StoreError,
    UnavailableError,
)
from sale_prefill_server.store.events import BlocksRead
from sale_prefill_server.store.located import LayerPart, Located, Source
from sale_prefill_server.store.slot import TierSlot

#: Bytes handed out at a time, and bytes read ahead. 64 blocks of 2.9 MB in files, two busy cores, four threads: pieces
#: of 2, 4, 8 and 16 MiB took 101, 56, 70 and 61 ms from the page cache, and 170, 116, 146 and 173 ms from the disk.
PIECE_BYTES = 4 * 2**20
WINDOW_BYTES = 64 * 2**20
#: Blocks that one thread reads in a row.
_TASK_BLOCKS = 8


class _Piece:
    """A layer part that is being read. Work of an older `attempt` counts no more."""

    def __init__(self, layer: int, blocks: range) -> None:
        self.layer = layer
        self.blocks = blocks
        self.attempt = 0
        self.scratch: memoryview = memoryview(b"")
        self.owner: Buffer = b""
        self.outstanding: Counter[TierSlot] = Counter()
        self.started_seconds = 0.0


class _Place:
    """Where a block is read at present, and its reader once that is open. Given up when another takes its turn."""

    def __init__(self, sources: Sequence[Source], choice: int) -> None:
        self.choice = choice
        self.source = sources[choice] if choice < len(sources) else None
        self._opening = threading.Lock()
        self._reader: BlockReader | None = None
        self._given_up = False

    def reader(self) -> BlockReader:
        """The one reader of all layers."""
        assert self.source is not None
        with self._opening:
            if self._reader is None:
                reader = self.source.slot.open_block(self.source.key)
                self._reader = reader
                if self._given_up:
                    reader.close()
            return self._reader

    def give_up(self) -> None:
        """Closes the reader; where it is just being opened, maybe for ever, that is left to the opening thread."""
        self._given_up = True
        reader = self._reader
        if reader is not None:
            reader.close()


class LayeredRead:
    """One read: iterate over it once. The iteration owns its readers and ends them, however it ends.

    Args:
        located: what to read.
        layers: which layers, in order.
        part_bytes: bytes of one layer's K of a block.
        allocate: makes the buffers that parts are read into. A read that was given up may still write to one, so
            Python's references must decide when it is freed.
        deadline_seconds: time by which the whole read must be done, None for no limit; the consumer's time counts.
        on_complete: told when all layers were handed out; given the whole blocks that came, as they were, from a shared
            tier, where reading them again would cost most.

    Raises:
        BlocksLostError: by the iteration, as soon as a block is lost or the deadline passes (then block 0).
    """

    def __init__(
        self,
        located: Located,
        layers: range,
        part_bytes: int,
        *,
        allocate: Callable[[int], Buffer] = bytearray,
        deadline_seconds: float | None = None,
        on_complete: Callable[[list[Block]], None] | None = None,
        piece_bytes: int = PIECE_BYTES,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._located = located
        self._layers = layers
        self._part_bytes = part_bytes
        self._allocate = allocate
        self._deadline = None if deadline_seconds is None else time.monotonic() + deadline_seconds
        self._on_complete = on_complete
        blocks = located.num_blocks
        self._piece_blocks = max(1, min(blocks, piece_bytes // (2 * part_bytes)))
        self._window = max(2, window_bytes // (2 * part_bytes * self._piece_blocks))
        self._changed = threading.Condition()
        self._places = [_Place(sources, 0) for sources in located.sources]
        self._bad: set[TierSlot] = set()
        self._lost: BlocksLostError | None = None
        self._closed = False
        self._in_flight: deque[_Piece] = deque()
        self._free: list[Buffer] = []
        self._assembly: dict[int, dict[int, bytes]] = {}
        self._read_bytes: Counter[TierSlot] = Counter()

    def __iter__(self) -> Iterator[LayerPart]:
        started = time.monotonic()
        pieces = self._pieces()
        try:
            while True:
                while len(self._in_flight) < self._window and (piece := next(pieces, None)) is not None:
                    self._in_flight.append(piece)
                    self._start(piece)
                if not self._in_flight:
                    break
                self._wait(self._in_flight[0])
                piece = self._in_flight.popleft()
                half = len(piece.blocks) * self._part_bytes
                keys, values = piece.scratch[:half], piece.scratch[half : 2 * half]
                yield LayerPart(piece.layer, piece.blocks.start, len(piece.blocks), keys, values)
                self._free.append(piece.owner)
            self._hand_over()
        finally:
            self._close(time.monotonic() - started)

    def _pieces(self) -> Iterator[_Piece]:
        blocks = self._located.num_blocks
        for layer in self._layers:
            for first in range(0, blocks, self._piece_blocks):
                yield _Piece(layer, range(first, min(blocks, first + self._piece_blocks)))

    # -- the consumer's side

    def _start(self, piece: _Piece) -> None:
        """Asks for all blocks of a piece, into a buffer that nobody else writes to."""
        if self._free:
            piece.owner = self._free.pop()
        else:
            piece.owner = self._allocate(2 * self._part_bytes * self._piece_blocks)
        piece.scratch = memoryview(piece.owner).cast("B")
        piece.started_seconds = time.monotonic()
        with self._changed:
            self._submit(piece, list(piece.blocks))

    def _submit(self, piece: _Piece, blocks: Sequence[int]) -> None:
        by_slot: dict[TierSlot, list[int]] = {}
        for block in blocks:
            source = self._source(block)
            if source is None:
                return  # lost: the consumer will see
            by_slot.setdefault(source.slot, []).append(block)
        for slot, indices in by_slot.items():
            for first in range(0, len(indices), _TASK_BLOCKS):
                part = indices[first : first + _TASK_BLOCKS]
                piece.outstanding[slot] += 1
                slot.workers.submit(self._task(piece, piece.attempt, slot, part))

    def _source(self, block: int) -> Source | None:
        """The next place to read a block from; skips tiers that failed in this read."""
        while (source := self._places[block].source) is not None:
            if source.slot not in self._bad:
                return source
            self._go_on(block)
        self._lose(block, "no tier that has it works")
        return None

    def _go_on(self, block: int) -> None:
        place = self._places[block]
        place.give_up()
        self._places[block] = _Place(self._located.sources[block], place.choice + 1)

    def _lose(self, block: int, reason: str) -> None:
        if self._lost is None or block < self._lost.block_index:
            self._lost = BlocksLostError(block, self._in_flight[0].layer if self._in_flight else 0, reason)

    def _wait(self, piece: _Piece) -> None:
        """Waits for a piece; gives up on tiers that make no progress."""
        with self._changed:
            while True:
                if self._lost is not None:
                    raise self._lost
                if not piece.outstanding.total():
                    return
                now = time.monotonic()
                if self._deadline is not None and now >= self._deadline:
                    raise BlocksLostError(0, piece.layer, "the deadline of the read has passed")
                patience = {
                    slot: max(piece.started_seconds, slot.workers.last_progress_seconds)
                    + slot.settings.read_timeout_seconds
                    - now
                    for slot, count in piece.outstanding.items()
                    if count
                }
                for slot, left in patience.items():
                    if left <= 0:
                        self._abandon(slot)
                left = min(patience.values())
                if self._deadline is not None:
                    left = min(left, self._deadline - now)
                if left > 0:
                    self._changed.wait(left)

    def _abandon(self, slot: TierSlot) -> None:
        """Reads anew, into fresh buffers and from other tiers, whatever waits for a tier that hangs."""
        limit = slot.settings.read_timeout_seconds
        slot.failed_read(UnavailableError(slot.name, f"no progress in {limit:g} s"))
        self._bad.add(slot)
        for piece in self._in_flight:
            if piece.outstanding[slot]:
                piece.attempt += 1
                piece.outstanding.clear()
                piece.owner = self._allocate(2 * self._part_bytes * self._piece_blocks)
                piece.scratch = memoryview(piece.owner).cast("B")
                piece.started_seconds = time.monotonic()
                self._submit(piece, list(piece.blocks))

    def _hand_over(self) -> None:
        whole = []
        for block, parts in self._assembly.items():
            if len(parts) == 2 * len(self._layers) and self._layers.start == 0 and self._layers.step == 1:
                whole.append(Block(self._located.keys[block], [parts[index] for index in range(len(parts))]))
        self._assembly.clear()
        if self._on_complete is not None:
            self._on_complete(whole)

    def _close(self, duration_seconds: float) -> None:
        with self._changed:
            self._closed = True
            read = dict(self._read_bytes)
            for place in self._places:
                place.give_up()
        for slot, num_bytes in read.items():
            blocks = round(num_bytes / (2 * len(self._layers) * self._part_bytes))
            slot.observer(BlocksRead(slot.name, blocks, num_bytes, duration_seconds))

    # -- the tiers' threads

    def _task(self, piece: _Piece, attempt: int, slot: TierSlot, blocks: list[int]) -> Callable[[], None]:
        scratch = piece.scratch

        def run() -> None:
            failed = []
            for block in blocks:
                if self._closed or piece.attempt != attempt:
                    return
                place = self._places[block]
                try:
                    if place.source is None or place.source.slot is not slot:
                        raise UnavailableError(slot.name, "failed for another layer")
                    self._read(piece, block, scratch, place, slot)
                except StoreError as error:
                    self._failed(block, place, slot, error)
                    failed.append(block)
            with self._changed:
                if piece.attempt == attempt and not self._closed:
                    piece.outstanding[slot] -= 1
                    self._read_bytes[slot] += 2 * self._part_bytes * (len(blocks) - len(failed))
                    self._submit(piece, failed)
                self._changed.notify_all()
            if not failed:
                slot.reads.succeeded()

        return run

    def _read(self, piece: _Piece, block: int, scratch: memoryview, place: _Place, slot: TierSlot) -> None:
        if slot in self._bad:
            raise UnavailableError(slot.name, "failed earlier in this read")
        reader = place.reader()
        size, at = self._part_bytes, block - piece.blocks.start
        keys = scratch[at * size : (at + 1) * size]
        offset = (len(piece.blocks) + at) * size
        values = scratch[offset : offset + size]
        slot.read_parts(reader, 2 * piece.layer, [keys, values])
        if slot.is_shared and self._on_complete is not None and not reader.key.codec:
            parts = self._assembly.setdefault(block, {})
            parts[2 * piece.layer], parts[2 * piece.layer + 1] = bytes(keys), bytes(values)

    def _failed(self, block: int, place: _Place, slot: TierSlot, error: StoreError) -> None:
        with self._changed:
            source = place.source
            if self._closed or self._places[block] is not place or source is None or source.slot is not slot:
                return  # another layer's read was first to fail, and took the reader from under this one
            first = slot not in self._bad
            if isinstance(error, UnavailableError):
                self._bad.add(slot)
            self._go_on(block)
        if first:
            slot.failed_read(error, source.key)
