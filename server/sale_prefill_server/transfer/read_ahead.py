"""Chunks made in threads while earlier ones are on their way, a batch ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

#: Bytes of chunks that a thread makes at a time. Handing work to a thread and back costs about 0.15 ms of processor
#: time whatever its size, as much as copying and digesting 1 MiB. A stream holds two batches at most: the one that is
#: being sent and the next.
BATCH_BYTES = 4 * 2**20


async def read_ahead(
    make: Callable[[int], bytes], start: int, end: int, *, executor: Executor, batch_chunks: int
) -> AsyncGenerator[bytes, None]:
    """`make(index)` for each index of [start, end), in order; a batch is made while the one before is read.

    The first batch is a single chunk, so that the stream begins at once. Nothing runs any more once this has ended,
    however it ends.
    """
    batches = _batches(start, end, batch_chunks)
    ahead = _submit(executor, make, batches)
    try:
        while ahead is not None:
            made = await asyncio.wrap_future(ahead)
            ahead = _submit(executor, make, batches)
            while made:
                yield made.pop(0)
    finally:
        await stopped(ahead)


async def stopped(future: Future[Any] | None) -> None:
    """Cancels what has not begun and waits for what has, whatever comes of it."""
    if future is not None and not future.done() and not future.cancel():
        await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)


def _batches(start: int, end: int, batch_chunks: int) -> Iterator[range]:
    edge = start + 1
    while start < end:
        yield range(start, min(edge, end))
        start, edge = edge, edge + batch_chunks


def _submit(executor: Executor, make: Callable[[int], bytes], batches: Iterator[range]) -> Future[list[bytes]] | None:
    batch = next(batches, None)
    return None if batch is None else executor.submit(lambda: [make(index) for index in batch])
