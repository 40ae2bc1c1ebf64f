"""Chunks made in threads while earlier ones are on their way, a batch ahead."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import Any

#: Bytes of chunks that a thread makes at a time. Handing work to a thread and back costs about 0.15 ms of processor
#: time whatever its size, as much as copying and digesting 1 MiB. A stream of messages holds two batches at most: the
#: one that is being sent and the next.
BATCH_BYTES = 4 * 2**20
#: The same where the bytes go to a segment and nothing is held.
SEGMENT_BATCH_BYTES = 8 * 2**20
#: Batches of a stream through a segment that are made at once.
SEGMENT_WRITERS = 2


async def read_ahead(
    make: Callable[[int], bytes], start: int, end: int, *, executor: Executor, batch_chunks: int, ahead: int = 1
) -> AsyncGenerator[bytes, None]:
    """`make(index)` for each index of [start, end), in order; `ahead` batches are made while the one before is read.

    The first batch is a single chunk, so that the stream begins at once. Nothing runs any more once this has ended,
    however it ends.
    """
    batches = _batches(start, end, batch_chunks)
    making = deque(_submit(executor, make, batch) for batch in islice(batches, ahead))
    try:
        while making:
            made = await asyncio.wrap_future(making[0])
            making.popleft()
            making.extend(_submit(executor, make, batch) for batch in islice(batches, 1))
            while made:
                yield made.pop(0)
    finally:
        for future in making:
            future.cancel()
        for future in making:
            await stopped(future)


async def stopped(future: Future[Any] | None) -> None:
    """Cancels what has not begun and waits for what has, whatever comes of it."""
    if future is not None and not future.done() and not future.cancel():
        await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)


def _batches(start: int, end: int, batch_chunks: int) -> Iterator[range]:
    edge = start + 1
    while start < end:
        yield range(start, min(edge, end))
        start, edge = edge, edge + batch_chunks


def _submit(executor: Executor, make: Callable[[int], bytes], batch: range) -> Future[list[bytes]]:
    return executor.submit(lambda: [make(index) for index in batch])
