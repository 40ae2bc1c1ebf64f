"""A reader that stops reading in the middle of a pull: what it holds on the server, and whether others notice.

    python -m benchmarks.kv_stalled

The other client asks for small things, one after the other; blocks with and without a stalled reader take turns.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from benchmarks.served import ServedModel, serving
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill.v1 import kv_transfer_service_pb2_grpc
from sale_prefill_client import Client

#: Chunks that the reader takes before it stops.
_CHUNKS_READ = 2
_SAMPLE_SECONDS = 0.2
#: The reader has a connection of its own: streams of one connection share its flow control.
_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 16 * 2**20)]


@dataclass
class Stall:
    """What was seen.

    Attributes:
        session_bytes: KV that the stalled reader asked for.
        longest_stall_seconds: of one reader.
        held_bytes: most resident memory of the server during a stall, less what it had just before it.
        quiet_seconds, stalled_seconds: each small request's time, without and with a stalled reader.
        finished: after its stall, the reader got the rest.
    """

    session_bytes: int
    longest_stall_seconds: float = 0.0
    held_bytes: int = 0
    quiet_seconds: list[float] = field(default_factory=list)
    stalled_seconds: list[float] = field(default_factory=list)
    finished: bool = True

    @property
    def p99_ratio(self) -> float:
        """p99 with a stalled reader over p99 without."""
        return p99(self.stalled_seconds) / p99(self.quiet_seconds)


def p99(seconds: Sequence[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(seconds, n=100)[-1]


class _StalledReader:
    """Begins a pull of everything, reads a little, stops."""

    def __init__(self, target: str, session_id: str) -> None:
        self._channel = grpc.insecure_channel(target, options=_OWN_CONNECTION)
        stub = kv_transfer_service_pb2_grpc.KvTransferServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._stream = stub.PullKv(pb.PullKvRequest(session_id=session_id))
        self.total_bytes = next(self._stream).manifest.total_bytes
        self._received = sum(len(next(self._stream).chunk.data) for _ in range(_CHUNKS_READ))

    def rest(self) -> bool:
        """Reads on to the end; whether everything came."""
        self._received += sum(len(frame.chunk.data) for frame in self._stream)
        return bool(self._received == self.total_bytes)

    def close(self) -> None:
        """Ends the stream."""
        self._stream.cancel()
        self._channel.close()


class _MemoryPeak:
    """The most resident memory that a server is seen to have, looked at in a thread of its own."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._done = threading.Event()
        self.bytes = 0
        self._thread = threading.Thread(target=self._watch, name="memory-peak")

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, self._served.memory_bytes("VmRSS"))

    def __enter__(self) -> _MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@contextmanager
def _stalled_reader(served: ServedModel, session_id: str, seen: Stall) -> Iterator[None]:
    before = served.memory_bytes("VmRSS")
    reader = _StalledReader(served.client.target, session_id)
    started = time.perf_counter()
    try:
        with _MemoryPeak(served) as peak:
            yield
        seen.longest_stall_seconds = max(seen.longest_stall_seconds, time.perf_counter() - started)
        seen.held_bytes = max(seen.held_bytes, peak.bytes - before)
        seen.finished = reader.rest() and seen.finished
    finally:
        reader.close()


def small_requests(client: Client, session_id: str, seconds: float) -> list[float]:
    """Seconds of each GetSession with one decoded token after it, one after the other for so long."""
    times = []
    until = time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        client.get_session(session_id)
        child = client.fork_session(session_id).session_id
        client.generate(child, max_new_tokens=1, ignore_eos=True)
        client.delete_session(child)
        times.append(time.perf_counter() - started)
    return times


def measure(
    served: ServedModel, tokens: list[int], *, long_seconds: float = 60.0, block_seconds: float = 10.0, pairs: int = 6
) -> Stall:
    """One long stall between two quiet halves, then pairs of shorter blocks.

    Args:
        served: the server.
        tokens: of the large session.
        long_seconds: of the long stall.
        block_seconds: of each block of a pair.
        pairs: how many pairs; which block comes first alternates.
    """
    client = served.client
    large = client.prefill(tokens, lease_seconds=3600).session_id
    small = client.prefill(tokens[:100], lease_seconds=3600).session_id
    warm_up = _StalledReader(client.target, large)  # a first pull brings buffers into being that stay
    seen = Stall(warm_up.total_bytes, finished=warm_up.rest())
    warm_up.close()
    small_requests(client, small, block_seconds)
    seen.quiet_seconds += small_requests(client, small, long_seconds / 2)
    with _stalled_reader(served, large, seen):
        seen.stalled_seconds += small_requests(client, small, long_seconds)
    seen.quiet_seconds += small_requests(client, small, long_seconds / 2)
    for pair in range(pairs):
        for stalled in (True, False) if pair % 2 else (False, True):
            if stalled:
                with _stalled_reader(served, large, seen):
                    seen.stalled_seconds += small_requests(client, small, block_seconds)
            else:
                seen.quiet_seconds += small_requests(client, small, block_seconds)
    for session in (large, small):
        client.delete_session(session)
    return seen


def main() -> None:
    """Prints what was seen, with the default model."""
    from benchmarks.texts import english_reference

    with serving() as served:
        seen = measure(served, english_reference(8000, served.client.tokenizer()))
    print(
        f"{seen.session_bytes / 2**20:.0f} MiB asked for, {seen.held_bytes / 2**20:.1f} MiB held; p99 "
        f"{1e3 * p99(seen.stalled_seconds):.1f} ms of {len(seen.stalled_seconds)} with a stalled reader, "
        f"{1e3 * p99(seen.quiet_seconds):.1f} ms of {len(seen.quiet_seconds)} without"
    )


if __name__ == "__main__":
    main()
