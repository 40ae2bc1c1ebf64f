"""Segments for tests: a broker without a server around it, and processes that use its segments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client.segments import SharedSegment
from sale_prefill_server.transfer.segment_budget import SegmentLimits
from sale_prefill_server.transfer.segment_memory import SegmentTransport, SharedMemory
from sale_prefill_server.transfer.segments import Allocator, SegmentBroker, SegmentTicket, open_broker

SHM = SegmentTransport.SHM
ALLOCATORS: Mapping[SegmentTransport, Allocator] = {SHM: SharedMemory}

#: A process that has a segment, says so, does what it is told on standard input, and ends with that.
PEER = """
import sys
from sale_prefill_client.segments import SharedSegment
transfer_id, descriptor, size_bytes = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3])
segment = SharedSegment(transfer_id, descriptor, size_bytes)
array = segment.array((size_bytes,))
print("mapped", flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


@contextmanager
def broker_in(folder: Path, allowed_uids: frozenset[int] = frozenset(), **limits: float) -> Iterator[SegmentBroker]:
    """A broker of at most 64 MiB whose socket is in `folder`."""
    broker = open_broker(folder, SegmentLimits({SHM: 64 * 2**20}, **limits), ALLOCATORS, allowed_uids)
    try:
        yield broker
    finally:
        broker.close_all()


def descriptor_of(ticket: SegmentTicket) -> bytes:
    """As the server's response has it."""
    return pb.ShmDescriptor(socket_path=ticket.socket_path, token=ticket.token).SerializeToString()


def connected(ticket: SegmentTicket) -> SharedSegment:
    """The owner's side of a segment, in this process."""
    return SharedSegment(ticket.transfer_id, descriptor_of(ticket), ticket.size_bytes)


@contextmanager
def peer_process(ticket: SegmentTicket) -> Iterator[subprocess.Popen[str]]:
    """Another process that has mapped the segment as `array`; it evaluates the lines that it reads."""
    command = [sys.executable, "-c", PEER, ticket.transfer_id, descriptor_of(ticket).hex(), str(ticket.size_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "mapped\n"
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[str], expression: str) -> str:
    """What a peer process says to an expression."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(expression + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def open_descriptors() -> int:
    """File descriptors that this process has."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something that another thread or process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
