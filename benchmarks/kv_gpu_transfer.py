"""KV of a GPU handed to another process of its host: `python -m benchmarks.kv_gpu_transfer`.

Correctness first: a reader process compares a pull through pinned shared memory, and one through CUDA IPC, with what
the KV must be. Then rates, of a session of 64K tokens of an 8B model (8 GiB) whose pages lie in runs that are not
adjacent. What is paid once a segment (memory made, registered with the driver, mapped) is told apart from the pulls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks.kv_segment_server import KvSize, announced_chunks, serving
from sale_prefill.v1 import kv_pb2, kv_transfer_service_pb2_grpc
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client.cuda_segments import CudaSegment
from sale_prefill_client.options import Checksum
from sale_prefill_client.segments import SharedSegment, digest_in_place

REQUIRED_GB_PER_SECOND = 15.0
_Stub = kv_transfer_service_pb2_grpc.KvTransferServiceStub
#: Threads of the reader that verify digests; one is not enough for crc32c at the bar.
_VERIFIERS = 4


class _Reader:
    """One open segment, and pulls through it."""

    def __init__(self, stub: _Stub, size: KvSize, transport: str) -> None:
        self._stub, self._size = stub, size
        value = pb.TRANSPORT_SHM if transport == "shm" else pb.TRANSPORT_CUDA_IPC
        request = pb.OpenTransferRequest(transports=[value], size_bytes=size.total_bytes)
        started = time.perf_counter()
        response = stub.OpenTransfer(request)
        self.open_seconds = time.perf_counter() - started
        kind: Callable[[str, bytes, int], SharedSegment | CudaSegment]
        kind = SharedSegment if transport == "shm" else CudaSegment
        started = time.perf_counter()
        self._segment = kind(response.transfer_id, response.server_descriptor, response.size_bytes)
        self.map_seconds = time.perf_counter() - started
        self._verifiers = ThreadPoolExecutor(_VERIFIERS)

    def close(self) -> None:
        """Gives the segment back."""
        self._verifiers.shutdown()
        self._segment.close()

    def kv(self) -> torch.Tensor:
        """All of the KV where it is, [layers, 2, tokens, heads, head_dim]; drop it before `close`."""
        size, segment = self._size, self._segment
        if isinstance(segment, SharedSegment):
            whole = torch.from_numpy(segment.array((size.total_bytes,)))
        else:
            whole = segment.tensor()[: size.total_bytes]
        shape = (size.layers, 2, size.tokens, size.heads, size.head_dim)
        return whole.view(torch.bfloat16).view(shape)

    def pull(self, checksum: Checksum, chunk_bytes: int) -> float:
        """Seconds of a pull, its digests verified.

        Raises:
            RuntimeError: a digest differs.
        """
        started = time.perf_counter()
        verified: list[Future[None]] = []
        for chunk in announced_chunks(self._stub, self._segment.transfer_id, checksum, chunk_bytes):
            if checksum != "none":
                verified.append(self._verifiers.submit(self._verify, chunk, checksum))
        for done in verified:
            done.result()
        return time.perf_counter() - started

    def _verify(self, chunk: kv_pb2.KvChunk, checksum: Checksum) -> None:
        size, segment = self._size, self._segment
        assert isinstance(segment, SharedSegment)
        array = segment.array((size.layers, 2, size.tokens, size.token_bytes))
        place = array[chunk.layer, chunk.kind - 1, chunk.token_start : chunk.token_start + chunk.num_tokens]
        if digest_in_place(place, checksum) != chunk.checksum:
            raise RuntimeError(f"layer {chunk.layer} from token {chunk.token_start} differs from its digest")


@contextmanager
def reading(stub: _Stub, size: KvSize, transport: str) -> Iterator[_Reader]:
    """A reader whose segment is closed with the block."""
    reader = _Reader(stub, size, transport)
    try:
        yield reader
    finally:
        reader.close()


def check(stub: _Stub, size: KvSize, transport: str, checksum: Checksum, chunk_bytes: int) -> bool:
    """Whether a pull brings every byte: all of the KV against the tensors that the server made its own from."""
    with reading(stub, size, transport) as reader:
        kv = reader.kv()
        kv.zero_()
        if kv.is_cuda:
            torch.cuda.synchronize()
        reader.pull(checksum, chunk_bytes)
        return all(
            torch.equal(kv[layer, kind].to(size.device).view(torch.int16), size.tensor(layer, kind).view(torch.int16))
            for layer in range(size.layers)
            for kind in (0, 1)
        )


def measure(
    stub: _Stub, size: KvSize, transport: str, checksum: Checksum, chunk_bytes: int, pulls: int
) -> dict[str, Any]:
    """What a segment costs once, its first pull, and the median of later ones."""
    with reading(stub, size, transport) as reader:
        first_seconds = reader.pull(checksum, chunk_bytes)
        rates = [size.total_bytes / 1e9 / reader.pull(checksum, chunk_bytes) for _ in range(pulls)]
        return {
            "transport": transport,
            "checksum": checksum,
            "chunk_mib": chunk_bytes / 2**20,
            "session_gib": round(size.total_bytes / 2**30, 2),
            "open_seconds": round(reader.open_seconds, 3),
            "map_seconds": round(reader.map_seconds, 3),
            "first_pull_gb_per_second": round(size.total_bytes / 1e9 / first_seconds, 2),
            "gb_per_second": round(statistics.median(rates), 2),
            "slowest_gb_per_second": round(min(rates), 2),
        }


CASES: tuple[tuple[str, Checksum], ...] = (("shm", "xxh3_64"), ("shm", "crc32c"), ("shm", "none"), ("cuda_ipc", "none"))


def main() -> int:
    """Command line: one JSON line a case. Returns 1 where bytes are wrong or the default cases are too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--run-pages", type=int, default=8, help="adjacent pages that follow each other in the pool")
    parser.add_argument("--chunk-mib", type=float, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, default=4, help="threads of the server that copy and digest")
    parser.add_argument("--pulls", type=int, default=5)
    parser.add_argument("--device", default="cuda:0", help="cpu tries the script itself, without CUDA IPC")
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    size = KvSize(
        layers=arguments.layers,
        tokens=arguments.tokens,
        run_pages=arguments.run_pages,
        device=arguments.device,
        threads=arguments.threads,
    )
    small = replace(size, layers=2, tokens=4096)
    passed = True
    with serving(small) as stub:
        for transport, checksum in CASES[: None if on_gpu else -1]:
            equal = check(stub, small, transport, checksum, 2**20)
            passed &= equal
            print(json.dumps({"transport": transport, "checksum": checksum, "every_byte_equal": equal}), flush=True)
    best: dict[str, float] = {}
    with serving(size) as stub:
        for transport, checksum in CASES[: None if on_gpu else -1]:
            for chunk_mib in arguments.chunk_mib:
                found = measure(stub, size, transport, checksum, int(chunk_mib * 2**20), arguments.pulls)
                print(json.dumps(found), flush=True)
                if checksum == "xxh3_64" or transport == "cuda_ipc":
                    best[transport] = max(best.get(transport, 0.0), found["gb_per_second"])
    for transport, rate in best.items() if on_gpu else ():
        passed &= rate >= REQUIRED_GB_PER_SECOND
        print(f"{transport}: {rate} GB/s, required {REQUIRED_GB_PER_SECOND}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
