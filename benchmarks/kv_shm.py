"""KV through shared memory against a plain memcpy: `python -m benchmarks.kv_shm`.

A server process copies a session's KV from pages into a segment, digests it and announces each chunk by gRPC; a reader
process verifies each digest in place. The bar is a memcpy between two mapped buffers, in the reader's process, in the
same run: that is what moving these bytes once costs where memory is there already, as it is from a connection's second
stream on. A segment's first stream also brings its pages into being, so it is held against a memcpy into memory that is
as new (memfd, as segments are); that depends on how fast the host hands out pages far more than on either copy.
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

from benchmarks.kv_segment_server import KvSize, announced_chunks, serving
from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill.v1 import kv_transfer_service_pb2_grpc
from sale_prefill_client.options import Checksum
from sale_prefill_client.segments import SharedSegment, digest_in_place

SIZES = {
    "8b": KvSize(),
    "8b-scattered": KvSize(run_pages=1),
    "default-model": KvSize(layers=30, heads=3, head_dim=64, tokens=8192),
}
_WARM_PULLS = 2


@dataclass(frozen=True)
class Rates:
    """Medians, in GB/s. `fresh` is a segment's first stream with its opening, `warm` any later one."""

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


def open_segment(stub: kv_transfer_service_pb2_grpc.KvTransferServiceStub, size: KvSize) -> SharedSegment:
    """A new segment for all of the KV."""
    request = pb.OpenTransferRequest(transports=[pb.TRANSPORT_SHM], size_bytes=size.total_bytes)
    response = stub.OpenTransfer(request)
    return SharedSegment(response.transfer_id, response.server_descriptor, response.size_bytes)


def pull(
    stub: kv_transfer_service_pb2_grpc.KvTransferServiceStub,
    segment: SharedSegment,
    size: KvSize,
    checksum: Checksum,
    chunk_bytes: int,
) -> npt.NDArray[np.uint8]:
    """All of the KV, verified where it is.

    Raises:
        RuntimeError: a digest differs.
    """
    array = segment.array((size.layers, 2, size.tokens, size.token_bytes))
    for chunk in announced_chunks(stub, segment.transfer_id, checksum, chunk_bytes):
        place = array[chunk.layer, chunk.kind - 1, chunk.token_start : chunk.token_start + chunk.num_tokens]
        if digest_in_place(place, checksum) != chunk.checksum:
            raise RuntimeError(f"layer {chunk.layer} from token {chunk.token_start} differs from its digest")
    return array


def measure(checksum: Checksum, size: KvSize | None = None, *, chunk_bytes: int = 8 * 2**20, repeats: int = 7) -> Rates:
    """Rates of pulls and of memcpy, taken in turn."""
    size = KvSize() if size is None else size
    times: dict[str, list[float]] = {}
    source = np.random.default_rng(0).integers(0, 256, size.total_bytes, dtype=np.uint8)
    warm_target = np.zeros_like(source)
    with serving(size) as stub:
        for _ in range(repeats):
            started = time.perf_counter()
            segment = open_segment(stub, size)
            pull(stub, segment, size, checksum, chunk_bytes)
            times.setdefault("fresh", []).append(time.perf_counter() - started)
            for _ in range(_WARM_PULLS):
                again = partial(pull, stub, segment, size, checksum, chunk_bytes)
                times.setdefault("warm", []).append(_seconds(again))
                times.setdefault("memcpy_warm", []).append(_seconds(partial(np.copyto, warm_target, source)))
            segment.close()
            for name, shared in (("memcpy_fresh", True), ("memcpy_fresh_anonymous", False)):
                target = _fresh_buffer(size.total_bytes, shared=shared)
                times.setdefault(name, []).append(_seconds(partial(np.copyto, target, source)))
                del target
    rates = {name: size.total_bytes / 1e9 / statistics.median(values) for name, values in times.items()}
    return Rates(checksum, chunk_bytes, **rates)


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


def main() -> None:
    """Command line: one line a size, checksum and chunk size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--chunk-mib", type=float, nargs="+", default=[8])
    parser.add_argument("--checksums", nargs="+", default=["xxh3_64", "crc32c", "none"])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    for name in arguments.sizes:
        for checksum in arguments.checksums:
            for chunk_mib in arguments.chunk_mib:
                chunk_bytes = int(chunk_mib * 2**20)
                rates = measure(checksum, SIZES[name], chunk_bytes=chunk_bytes, repeats=arguments.repeats)
                shown = {
                    "size": name,
                    **asdict(rates),
                    "warm_share": rates.warm_share,
                    "fresh_share": rates.fresh_share,
                }
                print(
                    json.dumps(
                        {key: round(value, 2) if isinstance(value, float) else value for key, value in shown.items()}
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
