"""Chunks made in threads while earlier ones are on their way, a batch ahead."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import Any, TypeVar

_Made = TypeVar("_Made")

#: Bytes of chunks that a thread makes at a time. Handing work to a thread and back costs about 0.15 ms of processor
#: time whatever its size, as much as copying and digesting 1 MiB. A stream of messages holds two batches at most: the
#: one that is being sent and the next.
BATCH_BYTES = 4 * 2**20
#: The same where the bytes go to a segment and nothing is held.
SEGMENT_BATCH_BYTES = 16 * 2**20
#: Threads that copy and digest chunks of KV, and batches of a stream through a segment that are made at once: two on
#: two cores. A GPU's copies are faster than one core digests (13 GB/s), so hosts with more cores use more.
COPY_THREADS = max(2, min(8, (os.cpu_count() or 2) // 2))
SEGMENT_WRITERS = COPY_THREADS


async def read_ahead(
    make: Callable[[range], list[_Made]], start: int, end: int, *, executor: Executor, batch_chunks: int, ahead: int = 1
) -> AsyncGenerator[_Made, None]:
    """What `make` makes of the chunks [start, end), batch by batch, in order; `ahead` batches are made while the one
    before is read.

    The first batch is a single chunk, so that the stream begins at once. Nothing runs any more once this has ended,
    however it ends.
    """
    batches = _batches(start, end, batch_chunks)
    making = deque(executor.submit(make, batch) for batch in islice(batches, ahead))
    try:
        while making:
            made = await asyncio.wrap_future(making[0])
            making.popleft()
            making.extend(executor.submit(make, batch) for batch in islice(batches, 1))
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
