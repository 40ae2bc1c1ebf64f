"""KV through shared memory against a plain memcpy: `python -m benchmarks.kv_shm`.

A server process copies a session's KV from pages into a segment, digests it and announces each chunk by gRPC; a reader
process verifies each digest in place. The bar is a memcpy between two mapped buffers, in the reader's process, in the
same run: that is what moving these bytes once costs where memory is there already, as it is from a connection's second
stream on. A segment's first stream also brings its pages into being, so it is held against a memcpy into memory that is
as new (memfd, as segments are); that depends on how fast the host hands out pages far more than on either copy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import torch

from sale_prefill.v1 import kv_pb2, kv_transfer_service_pb2_grpc
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client.options import Checksum as ChecksumName
from sale_prefill_client.segments import SharedSegment, digest_in_place
from sale_prefill_server.kv.pool import KvShape
from sale_prefill_server.rpc.transfer_calls import descriptor_message
from sale_prefill_server.transfer.kv_stream import Checksum, KvRange, Layout
from sale_prefill_server.transfer.segment_budget import SegmentLimits
from sale_prefill_server.transfer.segment_memory import SegmentTransport, SharedMemory
from sale_prefill_server.transfer.segment_placement import SegmentPlacement
from sale_prefill_server.transfer.segments import open_broker

_TENANT = "bench"
_PAGE_TOKENS = 128
#: Bytes that the server writes at a time, and how many such groups of chunks it has ready beyond those it announces.
_GROUP_BYTES = 8 * 2**20
_AHEAD = 1


@dataclass(frozen=True)
class KvSize:
    """A session's KV; the defaults are the default model's (SmolLM2-135M), bfloat16, 8K tokens.

    `shuffled` puts the pages of a session in an order where no two are adjacent, as a pool that was used for long may.
    """

    layers: int = 30
    heads: int = 3
    head_dim: int = 64
    tokens: int = 8192
    shuffled: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K in one layer."""
        return self.heads * self.head_dim * 2

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return 2 * self.layers * self.tokens * self.token_bytes

    @property
    def shape(self) -> KvShape:
        """As the server has it."""
        return KvShape(self.layers, self.heads, self.head_dim, torch.bfloat16, torch.device("cpu"))


@dataclass(frozen=True)
class Rates:
    """Medians, in GB/s. `fresh` is a segment's first stream, `warm` any later one."""

    checksum: str
    chunk_bytes: int
    fresh: float
    warm: float
    memcpy_fresh: float
    memcpy_fresh_anonymous: float
    memcpy_warm: float

    @property
    def warm_share(self) -> float:
        """The promise: 0.5 at least."""
        return self.warm / self.memcpy_warm

    @property
    def fresh_share(self) -> float:
        """The same for memory that is new."""
        return self.fresh / self.memcpy_fresh


class _Pages:
    """KV in pages, [pages, page_tokens, heads, head_dim] a layer and kind, with random bytes."""

    def __init__(self, size: KvSize) -> None:
        self._size = size
        pages = size.tokens // _PAGE_TOKENS
        self._order = [page * 2 % pages + page * 2 // pages for page in range(pages)] if size.shuffled else None
        shape = (size.layers, 2, size.tokens, size.heads, size.head_dim)
        generator = torch.Generator().manual_seed(0)
        self._kv = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)

    def segments(self, layer: int, kind: int, start: int, end: int) -> list[torch.Tensor]:
        """One element a run of adjacent pages, as `SessionKv.segments` has it."""
        tensor = self._kv[layer, kind]
        if self._order is None:
            return [tensor[start:end]]
        found = []
        while start < end:
            page, within = divmod(start, _PAGE_TOKENS)
            count = min(end - start, _PAGE_TOKENS - within)
            first = self._order[page] * _PAGE_TOKENS + within
            found.append(tensor[first : first + count])
            start += count
        return found


class _Servicer(kv_transfer_service_pb2_grpc.KvTransferServiceServicer):
    """As much of the service as a pull through a segment needs."""

    def __init__(self, size: KvSize, folder: Path) -> None:
        self._size = size
        self._pages = _Pages(size)
        limits = SegmentLimits({SegmentTransport.SHM: 4 * size.total_bytes})
        self._broker = open_broker(folder, limits, {SegmentTransport.SHM: SharedMemory}, frozenset())
        self._threads = ThreadPoolExecutor(1)

    async def OpenTransfer(  # noqa: N802
        self, request: pb.OpenTransferRequest, context: grpc.aio.ServicerContext
    ) -> pb.OpenTransferResponse:
        """A segment."""
        ticket = await asyncio.to_thread(self._broker.open, _TENANT, SegmentTransport.SHM, request.size_bytes)
        return pb.OpenTransferResponse(
            transfer_id=ticket.transfer_id,
            server_descriptor=descriptor_message(ticket).SerializeToString(),
            size_bytes=ticket.size_bytes,
        )

    async def PullKv(  # noqa: N802
        self, request: pb.PullKvRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PullKvResponse]:
        """All of the KV, chunk by chunk."""
        size, checksum = self._size, Checksum(request.session_id)
        tokens = max(1, request.chunk_bytes // size.token_bytes)
        starts = range(0, size.tokens, tokens)
        plan = [(layer, kind, start) for layer in range(size.layers) for kind in (0, 1) for start in starts]
        with self._broker.borrow(_TENANT, request.transfer_id) as segment:
            range_ = KvRange(0, size.tokens, 0, size.layers)
            placement = SegmentPlacement(segment, size.shape, range_, Layout.THD, checksum)

            def write(part: Sequence[tuple[int, int, int]]) -> list[pb.PullKvResponse]:
                return [self._write(placement, tokens, *planned) for planned in part]

            # A hop between threads costs as much as a message: so several chunks a hop, where chunks are small.
            group = max(1, _GROUP_BYTES // (tokens * size.token_bytes))
            groups = [plan[first : first + group] for first in range(0, len(plan), group)]
            pending: deque[Future[list[pb.PullKvResponse]]] = deque()
            for index in range(len(groups) + _AHEAD):
                if index < len(groups):
                    pending.append(self._threads.submit(write, groups[index]))
                if index >= _AHEAD:
                    for message in await asyncio.wrap_future(pending.popleft()):
                        yield message

    def _write(self, placement: SegmentPlacement, tokens: int, layer: int, kind: int, start: int) -> pb.PullKvResponse:
        end = min(start + tokens, self._size.tokens)
        digest = placement.write(layer, kind, start, self._pages.segments(layer, kind, start, end))
        chunk = kv_pb2.KvChunk(
            layer=layer,
            kind=kv_pb2.KvKind.ValueType(kind + 1),
            token_start=start,
            num_tokens=end - start,
            checksum=digest,
        )
        return pb.PullKvResponse(chunk=chunk)


def _serve(size: KvSize, pipe: Connection) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            server = grpc.aio.server()
            servicer = _Servicer(size, Path(folder))
            kv_transfer_service_pb2_grpc.add_KvTransferServiceServicer_to_server(servicer, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            pipe.send(port)
            await asyncio.to_thread(pipe.recv)
            await server.stop(0)
            servicer._broker.close_all()

    torch.set_num_threads(1)
    asyncio.run(run())


@contextmanager
def serving(size: KvSize) -> Iterator[kv_transfer_service_pb2_grpc.KvTransferServiceStub]:
    """A server process of such KV, and a stub of it."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_serve, args=(size, other))
    process.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{pipe.recv()}") as channel:
            yield kv_transfer_service_pb2_grpc.KvTransferServiceStub(channel)
    finally:
        pipe.send("stop")
        process.join()


def open_segment(stub: kv_transfer_service_pb2_grpc.KvTransferServiceStub, size: KvSize) -> SharedSegment:
    """A new segment for all of the KV."""
    response = stub.OpenTransfer(pb.OpenTransferRequest(size_bytes=size.total_bytes))
    return SharedSegment(response.transfer_id, response.server_descriptor, response.size_bytes)


def pull(
    stub: kv_transfer_service_pb2_grpc.KvTransferServiceStub,
    segment: SharedSegment,
    size: KvSize,
    checksum: ChecksumName,
    chunk_bytes: int,
) -> npt.NDArray[np.uint8]:
    """All of the KV, verified where it is.

    Raises:
        RuntimeError: a digest differs.
    """
    array = segment.array((size.layers, 2, size.tokens, size.token_bytes))
    request = pb.PullKvRequest(session_id=checksum, transfer_id=segment.transfer_id, chunk_bytes=chunk_bytes)
    for frame in stub.PullKv(request):
        chunk = frame.chunk
        place = array[chunk.layer, chunk.kind - 1, chunk.token_start : chunk.token_start + chunk.num_tokens]
        if digest_in_place(place, checksum) != chunk.checksum:
            raise RuntimeError(f"layer {chunk.layer} from token {chunk.token_start} differs from its digest")
    return array


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _fresh_buffer(num_bytes: int, *, shared: bool) -> npt.NDArray[np.uint8]:
    if not shared:
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(mapping, dtype=np.uint8)
    descriptor = os.memfd_create("bench", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    mapping = mmap.mmap(descriptor, num_bytes)
    os.close(descriptor)
    return np.frombuffer(mapping, dtype=np.uint8)


def measure(
    checksum: ChecksumName, size: KvSize | None = None, *, chunk_bytes: int = 4 * 2**20, repeats: int = 7
) -> Rates:
    """Rates of pulls and of memcpy, taken in turn."""
    size = KvSize() if size is None else size
    times: dict[str, list[float]] = {
        name: [] for name in Rates.__dataclass_fields__ if name not in ("checksum", "chunk_bytes")
    }
    source = np.random.default_rng(0).integers(0, 256, size.total_bytes, dtype=np.uint8)
    warm_target = np.zeros_like(source)
    with serving(size) as stub:
        for _ in range(repeats):
            segment: list[SharedSegment] = []

            def fresh() -> None:
                segment.append(open_segment(stub, size))  # noqa: B023 - called at once
                pull(stub, segment[0], size, checksum, chunk_bytes)  # noqa: B023

            times["fresh"].append(_seconds(fresh))
            times["warm"] += [_seconds(lambda: pull(stub, segment[0], size, checksum, chunk_bytes)) for _ in range(2)]  # noqa: B023
            segment[0].close()
            for name, shared in (("memcpy_fresh", True), ("memcpy_fresh_anonymous", False)):
                target = _fresh_buffer(size.total_bytes, shared=shared)
                times[name].append(_seconds(partial(np.copyto, target, source)))
                del target
            times["memcpy_warm"] += [_seconds(lambda: np.copyto(warm_target, source)) for _ in range(2)]
    rates = {name: size.total_bytes / 1e9 / statistics.median(values) for name, values in times.items()}
    return Rates(checksum, chunk_bytes, **rates)


def main() -> None:
    """Command line: one line a checksum and chunk size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk-mib", type=float, nargs="+", default=[1, 4, 8])
    parser.add_argument("--checksums", nargs="+", default=["crc32c", "xxh3_64", "none"])
    parser.add_argument("--shuffled", action="store_true", help="no two pages of the session adjacent")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    for checksum in arguments.checksums:
        for chunk_mib in arguments.chunk_mib:
            size = KvSize(shuffled=arguments.shuffled)
            rates = measure(checksum, size, chunk_bytes=int(chunk_mib * 2**20), repeats=arguments.repeats)
            rounded = {
                name: round(value, 2) if isinstance(value, float) else value for name, value in asdict(rates).items()
            }
            shares = {"warm_share": round(rates.warm_share, 2), "fresh_share": round(rates.fresh_share, 2)}
            print(json.dumps(rounded | shares), flush=True)


if __name__ == "__main__":
    main()
