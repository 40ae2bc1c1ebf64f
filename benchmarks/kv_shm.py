"""KV through shared memory against a plain memcpy: `python -m benchmarks.kv_shm`.

A server process copies a session's KV from its pages into a segment, digests it and announces each chunk by gRPC; this
process verifies each digest in place (a pull), or the other way round (a push, whose bytes are copied into the segment
first, or lie there: "in place"). The bar is a memcpy between two mapped buffers, in this process, in turn with the
streams: that is what moving these bytes once costs where memory is there already, as it is from a segment's second
stream on. A segment's first stream also brings its pages into being (`fresh`): that depends on how fast the host hands
out memory far more than on anything else, as a memcpy into new memory shows (`memcpy_fresh`).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.kv_served import SESSION, KvSize, kv_server
from sale_prefill_client import Client, KvCache
from sale_prefill_client.options import SEGMENT_CHUNK_BYTES, Checksum
from sale_prefill_client.segments import SharedSegment

DEFAULT_MODEL = KvSize(layers=30, heads=3, head_dim=64, tokens=8192)
SIZES = {"default-model": (DEFAULT_MODEL, False), "8b": (KvSize(), False), "8b-fragmented": (KvSize(), True)}
#: The promise, for pulls and pushes with checksums.
REQUIRED_SHARE = 0.5
PAIRS = 15
_FRESH = 3
_PUSHED = "pushed"


@dataclass(frozen=True)
class Rates:
    """Medians, in GB/s; shares are medians over neighbours in time, of a stream's rate and the memcpy's."""

    checksum: str
    chunk_bytes: int
    memcpy: float
    pull: float
    push: float
    push_in_place: float
    fresh: float
    memcpy_fresh: float
    pull_share: float
    push_share: float
    push_in_place_share: float


class _Bench:
    """One server, one segment, and what goes through it."""

    def __init__(
        self, client: Client, size: KvSize, content: npt.NDArray[np.uint8], checksum: Checksum, chunk_bytes: int
    ) -> None:
        self._client, self._size, self._content = client, size, content
        self._options = {"checksum": checksum, "chunk_bytes": chunk_bytes}
        self._target = np.zeros_like(content)
        self.times: dict[str, list[float]] = {}
        self.shares: dict[str, list[float]] = {}

    def run(self, pairs: int) -> None:
        """Fresh segments first, then streams and memcpy in turn through the last of them."""
        client, size = self._client, self._size
        for number in range(_FRESH):
            self._time("fresh", self._open_and_pull)
            if not np.array_equal(self._segment.array((size.total_bytes,)), self._content):
                raise RuntimeError("the pull did not bring what the server has")
            fresh = _fresh_buffer(size.total_bytes)
            self._time("memcpy_fresh", partial(np.copyto, fresh, self._content))
            del fresh
            if number < _FRESH - 1:
                client.close_transfer(self._segment)
        own = size.cache(client, self._content)
        there = size.cache(client, self._segment.array((size.total_bytes,)))
        self._push(own)
        client.delete_session(_PUSHED)
        if not np.array_equal(self._segment.array((size.total_bytes,)), self._content):
            raise RuntimeError("the segment does not have what was pushed")
        for name, action in (
            ("pull", self._pull),
            ("push", partial(self._push, own)),
            ("push_in_place", partial(self._push, there)),
        ):
            for _ in range(pairs):
                before = self._time("memcpy", self._memcpy)
                seconds = self._time(name, action)
                if name != "pull":
                    client.delete_session(_PUSHED)
                after = self._time("memcpy", self._memcpy)
                self.shares.setdefault(name, []).append((before + after) / 2 / seconds)
        del there
        client.close_transfer(self._segment)

    def _open_and_pull(self) -> None:
        segment = self._client.open_transfer(session_id=SESSION)
        assert isinstance(segment, SharedSegment)
        self._segment = segment
        self._pull()

    def _pull(self) -> KvCache:
        return self._client.pull_kv(SESSION, segment=self._segment, **self._options)

    def _push(self, cache: KvCache) -> None:
        self._client.push_kv(cache, session_id=_PUSHED, segment=self._segment, **self._options)

    def _memcpy(self) -> None:
        np.copyto(self._target, self._content)

    def _time(self, name: str, action: Callable[[], object]) -> float:
        started = time.perf_counter()
        action()
        seconds = time.perf_counter() - started
        self.times.setdefault(name, []).append(seconds)
        return seconds


def _fresh_buffer(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Shared memory that nobody has written yet, as segments are."""
    descriptor = os.memfd_create("bench", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    mapping = mmap.mmap(descriptor, num_bytes)
    os.close(descriptor)
    return np.frombuffer(mapping, dtype=np.uint8)


def measure(
    size: KvSize = DEFAULT_MODEL,
    checksum: Checksum = "xxh3_64",
    *,
    chunk_bytes: int = SEGMENT_CHUNK_BYTES,
    pairs: int = PAIRS,
    fragmented: bool = False,
) -> Rates:
    """Rates of one kind of stream, from a server of its own.

    Raises:
        RuntimeError: what came is not what the server has.
    """
    content = size.random_bytes()
    with kv_server(size, content, fragmented=fragmented) as served:
        return measure_with(served.client, size, content, checksum, chunk_bytes=chunk_bytes, pairs=pairs)


def measure_with(
    client: Client,
    size: KvSize,
    content: npt.NDArray[np.uint8],
    checksum: Checksum,
    *,
    chunk_bytes: int = SEGMENT_CHUNK_BYTES,
    pairs: int = PAIRS,
) -> Rates:
    """Rates of one kind of stream, from a server whose session is `content`.

    Raises:
        RuntimeError: what came is not what the server has.
    """
    bench = _Bench(client, size, content, checksum, chunk_bytes)
    bench.run(pairs)
    rates = {name: size.total_bytes / 1e9 / statistics.median(seconds) for name, seconds in bench.times.items()}
    shares = {f"{name}_share": statistics.median(shares) for name, shares in bench.shares.items()}
    return Rates(checksum, chunk_bytes, **rates, **shares)


def main() -> None:
    """Command line: one line a size, checksum and chunk size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--chunk-mib", type=float, nargs="+", default=[SEGMENT_CHUNK_BYTES / 2**20])
    parser.add_argument("--checksums", nargs="+", default=["xxh3_64", "crc32c", "none"])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    arguments = parser.parse_args()
    for name in arguments.sizes:
        size, fragmented = SIZES[name]
        content = size.random_bytes()
        with kv_server(size, content, fragmented=fragmented) as served:
            for checksum in arguments.checksums:
                for chunk_mib in arguments.chunk_mib:
                    rates = measure_with(
                        served.client,
                        size,
                        content,
                        checksum,
                        chunk_bytes=int(chunk_mib * 2**20),
                        pairs=arguments.pairs,
                    )
                    shown = {
                        key: round(each, 2) if isinstance(each, float) else each for key, each in asdict(rates).items()
                    }
                    print(json.dumps({"size": name, "load": round(os.getloadavg()[0], 1), **shown}), flush=True)


if __name__ == "__main__":
    main()
