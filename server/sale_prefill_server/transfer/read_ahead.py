"""Chunks made in threads while earlier ones are on their way, a few at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future

#: Bytes that a stream may hold ready beyond the chunk that is being sent.
READ_AHEAD_BYTES = 4 * 2**20
#: And chunks: more do not help, one thread is ahead of the wire by then.
READ_AHEAD_CHUNKS = 2


def read_ahead_chunks(chunk_bytes: int) -> int:
    """Chunks of that size to hold ready; at least one."""
    return max(1, min(READ_AHEAD_CHUNKS, READ_AHEAD_BYTES // max(1, chunk_bytes)))


async def read_ahead(
    make: Callable[[int], bytes], start: int, end: int, *, executor: Executor, depth: int
) -> AsyncIterator[bytes]:
    """`make(index)` for each index of [start, end), in order, up to `depth` of them ahead of the reader.

    Nothing runs any more once this has ended, however it ends.
    """
    pending: deque[Future[bytes]] = deque()
    try:
        for index in range(start, end + depth):
            if index < end:
                pending.append(executor.submit(make, index))
            if index >= start + depth:
                yield await asyncio.wrap_future(pending.popleft())
    finally:
        running = [asyncio.wrap_future(future) for future in pending if not future.cancel()]
        if running:
            await asyncio.wait(running)
