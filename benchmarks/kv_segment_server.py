"""A server process that has KV in pages and hands it over through segments, and no more of the service than that.

`kv_shm.py` and `kv_gpu_transfer.py` measure with it: real sockets, real gRPC announcements, the server's own modules.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import torch

from sale_prefill.v1 import kv_pb2, kv_transfer_service_pb2_grpc
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client.options import Checksum as ChecksumName
from sale_prefill_server.config import ServerConfig
from sale_prefill_server.kv.pool import KvShape
from sale_prefill_server.rpc.transfer_calls import descriptor_message
from sale_prefill_server.transfer.checksums import Checksum
from sale_prefill_server.transfer.chunks import KvRange, Layout
from sale_prefill_server.transfer.configured_segments import configured_broker
from sale_prefill_server.transfer.segment_memory import SegmentTransport
from sale_prefill_server.transfer.segment_placement import SegmentPlacement

_TENANT = "bench"
_PAGE_TOKENS = 128
#: Bytes that a thread writes at a time: a hop between threads costs as much as a message, so several chunks a hop where
#: chunks are small. And how many such groups are ready or being written beyond the one that is announced.
_GROUP_BYTES = 8 * 2**20
_TRANSPORTS = {pb.TRANSPORT_SHM: SegmentTransport.SHM, pb.TRANSPORT_CUDA_IPC: SegmentTransport.CUDA_IPC}


@dataclass(frozen=True)
class KvSize:
    """A session's KV, bfloat16; the defaults are 4K tokens of an 8B model (Llama 3.1): 512 MiB.

    `run_pages` adjacent pages follow each other in the pool; 0 means that all do.
    """

    layers: int = 32
    heads: int = 8
    head_dim: int = 128
    tokens: int = 4096
    run_pages: int = 0
    device: str = "cpu"
    threads: int = 2

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
        return KvShape(self.layers, self.heads, self.head_dim, torch.bfloat16, torch.device(self.device))

    def tensor(self, layer: int, kind: int) -> torch.Tensor:
        """K or V of a layer, [tokens, heads, head_dim], in order of tokens; the same in every process."""
        generator = torch.Generator(self.device).manual_seed(2 * layer + kind)
        shape = (self.tokens, self.heads, self.head_dim)
        kv = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=self.device, generator=generator)
        return kv.view(torch.bfloat16)


class _Pages:
    """KV in pages of a pool, runs of adjacent pages in an order where no two runs are adjacent."""

    def __init__(self, size: KvSize) -> None:
        run_tokens = (size.run_pages * _PAGE_TOKENS) or size.tokens
        runs = size.tokens // run_tokens
        self._run_tokens = run_tokens
        self._place = [run * 2 % runs + run * 2 // runs if runs % 2 == 0 else run for run in range(runs)]
        self._kv = {}
        for layer in range(size.layers):
            for kind in (0, 1):
                ordered = size.tensor(layer, kind)
                pool = torch.empty_like(ordered)
                for run, place in enumerate(self._place):
                    pool[place * run_tokens :][:run_tokens] = ordered[run * run_tokens :][:run_tokens]
                self._kv[layer, kind] = pool

    def segments(self, layer: int, kind: int, start: int, end: int) -> list[torch.Tensor]:
        """One element a run of adjacent pages, as `SessionKv.segments` has it."""
        tensor, found = self._kv[layer, kind], []
        while start < end:
            run, within = divmod(start, self._run_tokens)
            count = min(end - start, self._run_tokens - within)
            first = self._place[run] * self._run_tokens + within
            found.append(tensor[first : first + count])
            start += count
        return found


class _Servicer(kv_transfer_service_pb2_grpc.KvTransferServiceServicer):
    def __init__(self, size: KvSize, folder: Path) -> None:
        self._size = size
        self._pages = _Pages(size)
        capacity = str(2 * size.total_bytes)
        config = ServerConfig(transfer_memory=capacity, transfer_device_memory=capacity, transfer_directory=str(folder))
        self.broker = configured_broker(config, torch.device(size.device))
        self._threads = ThreadPoolExecutor(size.threads)

    async def OpenTransfer(  # noqa: N802
        self, request: pb.OpenTransferRequest, context: grpc.aio.ServicerContext
    ) -> pb.OpenTransferResponse:
        """A segment."""
        transport = _TRANSPORTS[request.transports[0]]
        ticket = await asyncio.to_thread(self.broker.open, _TENANT, transport, request.size_bytes)
        return pb.OpenTransferResponse(
            transfer_id=ticket.transfer_id,
            server_descriptor=descriptor_message(ticket).SerializeToString(),
            size_bytes=ticket.size_bytes,
        )

    async def PullKv(  # noqa: N802
        self, request: pb.PullKvRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PullKvResponse]:
        """All of the KV, chunk by chunk; session_id names the checksum."""
        size = self._size
        tokens = max(1, request.chunk_bytes // size.token_bytes)
        starts = range(0, size.tokens, tokens)
        plan = [(layer, kind, start) for layer in range(size.layers) for kind in (0, 1) for start in starts]
        group = max(1, _GROUP_BYTES // (tokens * size.token_bytes))
        groups = [plan[first : first + group] for first in range(0, len(plan), group)]
        with self.broker.borrow(_TENANT, request.transfer_id) as segment:
            range_ = KvRange(0, size.tokens, 0, size.layers)
            placement = SegmentPlacement(segment, size.shape, range_, Layout.THD, Checksum(request.session_id))

            def write(part: Sequence[tuple[int, int, int]]) -> list[pb.PullKvResponse]:
                return [self._write(placement, tokens, *planned) for planned in part]

            pending: deque[Future[list[pb.PullKvResponse]]] = deque()
            for index in range(len(groups) + size.threads):
                if index < len(groups):
                    pending.append(self._threads.submit(write, groups[index]))
                if index >= size.threads:
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
            servicer.broker.close_all()

    torch.set_num_threads(1)
    asyncio.run(run())


@contextmanager
def serving(size: KvSize) -> Iterator[kv_transfer_service_pb2_grpc.KvTransferServiceStub]:
    """A server process of such KV, and a stub of it."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_serve, args=(size, other))
    process.start()
    other.close()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{pipe.recv()}") as channel:
            yield kv_transfer_service_pb2_grpc.KvTransferServiceStub(channel)
    finally:
        if process.is_alive():
            pipe.send("stop")
        process.join()


def announced_chunks(
    stub: kv_transfer_service_pb2_grpc.KvTransferServiceStub,
    transfer_id: str,
    checksum: ChecksumName,
    chunk_bytes: int,
) -> Iterator[kv_pb2.KvChunk]:
    """Chunks as they come to be in their place."""
    request = pb.PullKvRequest(session_id=checksum, transfer_id=transfer_id, chunk_bytes=chunk_bytes)
    for frame in stub.PullKv(request):
        yield frame.chunk
