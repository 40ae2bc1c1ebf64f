"""KV over gRPC against a bare grpcio byte stream: the same chunk size, the same kind of server and client, loopback.

    python -m benchmarks.kv_wire [--runs N] [--chunk-bytes N ...]

`measure` returns the numbers; `stalled_reader` what a reader that stops reading costs. The bare stream sends one block
of memory over and over and its reader counts bytes: no session, no checksum, no place to put anything. Each side has a
client process of its own, and they take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import numpy as np

from benchmarks.served import serving
from sale_prefill.v1 import kv_transfer_service_pb2, kv_transfer_service_pb2_grpc
from sale_prefill_client import AsyncClient, Client, KvCache

Direction = Literal["pull", "push"]
ClientKind = Literal["sync", "aio"]

KV_TOKENS = 4096
LAYERS, KV_HEADS, HEAD_DIM = 16, 8, 128  # bfloat16: 64 KiB a token, 256 MiB in all
VOCABULARY = 320
CHUNK_BYTES = (2**18, 2**20, 2**22)
#: Alternating runs whose median counts; one more before them warms both sides up.
RUNS = 7
STALL_SECONDS = 60.0
_LIMITS = [("grpc.max_receive_message_length", 2**24), ("grpc.max_send_message_length", 2**24)]
_SESSION = "wire"


@dataclass(frozen=True)
class WireRates:
    """Bytes of payload a second, medians over alternating runs, and the median ratio of neighbouring runs."""

    direction: Direction
    client: ClientKind
    chunk_bytes: int
    bare_bytes_per_second: float
    kv_bytes_per_second: float
    ratio: float


def measure(
    *,
    runs: int = RUNS,
    chunk_bytes: tuple[int, ...] = CHUNK_BYTES,
    directions: tuple[Direction, ...] = ("pull", "push"),
) -> list[WireRates]:
    """Every direction with both clients and each chunk size."""
    with _both_sides() as sides:
        return [
            _alternating(sides, direction, client, size, runs)
            for direction in directions
            for size in chunk_bytes
            for client in ("sync", "aio")
        ]


@dataclass(frozen=True)
class _Sides:
    """A bare server and a real one, each with the process that calls it."""

    bare: Executor
    bare_target: str
    kv: Executor
    kv_target: str


@contextmanager
def _both_sides() -> Iterator[_Sides]:
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        bare_target = stack.enter_context(_bare_server())
        kv_target = stack.enter_context(wide_server())
        bare = stack.enter_context(ProcessPoolExecutor(1, spawn))
        kv = stack.enter_context(ProcessPoolExecutor(1, spawn))
        kv.submit(_push, kv_target, "sync", 2**20, keep=True).result()
        for _ in range(2):  # until every page of the pool has been written once
            kv.submit(_push, kv_target, "sync", 2**20).result()
        yield _Sides(bare, bare_target, kv, kv_target)


def _alternating(sides: _Sides, direction: Direction, client: ClientKind, size: int, runs: int) -> WireRates:
    bare, moved = (_bare_pull, _pull) if direction == "pull" else (_bare_push, _push)
    pairs = []
    for _ in range(runs + 1):
        seconds = sides.bare.submit(bare, sides.bare_target, client, size).result()
        pairs.append((seconds, sides.kv.submit(moved, sides.kv_target, client, size).result()))
    pairs = pairs[1:]
    bare_seconds, kv_seconds = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(bare / kv for bare, kv in pairs)
    total_bytes = _kv_bytes()
    return WireRates(direction, client, size, total_bytes / bare_seconds, total_bytes / kv_seconds, ratio)


def _kv_bytes() -> int:
    return 2 * LAYERS * KV_TOKENS * KV_HEADS * HEAD_DIM * 2


@contextmanager
def wide_server(*arguments: str) -> Iterator[str]:
    """A server process of a model with much KV and little else; yields its target."""
    with wide_server_process(*arguments) as served:
        yield served.client.target


@contextmanager
def wide_server_process(*arguments: str) -> Iterator[Any]:
    """The same, as a `ServedModel`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=KV_HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=2 * KV_TOKENS,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        with serving("--model", directory, "--profile", "none", "--kv-memory", "768M", *arguments) as served:
            yield served


# --- what the two client processes run: each returns seconds --------------------------------------------------------

_memory: dict[str, Any] = {}


def _buffer() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory for the bytes, touched once: fresh pages cost more than the wire, on a virtual machine above all."""
    if "buffer" not in _memory:
        _memory["buffer"] = np.random.default_rng(0).integers(0, 256, _kv_bytes(), np.uint8)
    buffer: np.ndarray[Any, np.dtype[np.uint8]] = _memory["buffer"]
    return buffer


def _tokens() -> list[int]:
    return [token % VOCABULARY for token in range(KV_TOKENS)]


def _pull(target: str, client: ClientKind, size: int) -> float:
    if client == "sync":
        with Client(target) as sync:
            sync.get_session(_SESSION)
            memory, started = _buffer(), time.perf_counter()
            sync.pull_kv(_SESSION, chunk_bytes=size, into=memory)
            return time.perf_counter() - started

    async def run() -> float:
        async with AsyncClient(target) as aio:
            await aio.get_session(_SESSION)
            memory, started = _buffer(), time.perf_counter()
            await aio.pull_kv(_SESSION, chunk_bytes=size, into=memory)
            return time.perf_counter() - started

    return asyncio.run(run())


def _push(target: str, client: ClientKind, size: int, keep: bool = False) -> float:
    session_id = _SESSION if keep else "pushed"
    with Client(target) as sync:
        spec = sync.get_server_info().kv_spec
        assert spec is not None
        array = _buffer().view(np.uint16).reshape(LAYERS, 2, KV_TOKENS, KV_HEADS, HEAD_DIM)
        cache = KvCache.from_numpy(array, spec, token_ids=[token % VOCABULARY for token in range(KV_TOKENS)])
        started = time.perf_counter()
        if client == "sync":
            sync.push_kv(cache, session_id=session_id, chunk_bytes=size, lease_seconds=3600)
            seconds = time.perf_counter() - started
        else:
            seconds = asyncio.run(_push_aio(target, cache, session_id, size))
        if not keep:
            sync.delete_session(session_id)
        return seconds


async def _push_aio(target: str, cache: KvCache, session_id: str, size: int) -> float:
    async with AsyncClient(target) as aio:
        await aio.get_server_info()
        started = time.perf_counter()
        await aio.push_kv(cache, session_id=session_id, chunk_bytes=size)
        return time.perf_counter() - started


def _bare_pull(target: str, client: ClientKind, size: int) -> float:
    request = f"{size} {_kv_bytes() // size}".encode()
    if client == "sync":
        with grpc.insecure_channel(target, options=_LIMITS) as channel:
            grpc.channel_ready_future(channel).result()
            started = time.perf_counter()
            received = sum(len(block) for block in channel.unary_stream(_BARE_PULL)(request))
            seconds = time.perf_counter() - started
    else:
        received, seconds = asyncio.run(_bare_pull_aio(target, request))
    assert received == _kv_bytes()
    return seconds


async def _bare_pull_aio(target: str, request: bytes) -> tuple[int, float]:
    async with grpc.aio.insecure_channel(target, options=_LIMITS) as channel:
        await channel.channel_ready()
        received, started = 0, time.perf_counter()
        call = channel.unary_stream(_BARE_PULL)(request)
        while (block := await call.read()) is not grpc.aio.EOF:
            received += len(block)
        return received, time.perf_counter() - started


def _bare_push(target: str, client: ClientKind, size: int) -> float:
    block, count = bytes(size), _kv_bytes() // size
    if client == "sync":
        with grpc.insecure_channel(target, options=_LIMITS) as channel:
            grpc.channel_ready_future(channel).result()
            started = time.perf_counter()
            channel.stream_unary(_BARE_PUSH)(block for _ in range(count))
            return time.perf_counter() - started

    async def run() -> float:
        async with grpc.aio.insecure_channel(target, options=_LIMITS) as channel:
            await channel.channel_ready()
            started = time.perf_counter()
            await channel.stream_unary(_BARE_PUSH)(block for _ in range(count))
            return time.perf_counter() - started

    return asyncio.run(run())


# --- the bare server ------------------------------------------------------------------------------------------------

_BARE_PULL, _BARE_PUSH = "/bare.Bytes/Pull", "/bare.Bytes/Push"


@contextmanager
def _bare_server() -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.kv_wire", "--serve-bare"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(30)


async def _serve_bare() -> None:
    async def pull(request: bytes, _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        size, count = map(int, request.split())
        block = bytes(size)
        for _index in range(count):
            yield block

    async def push(requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext) -> bytes:
        async for _block in requests:
            pass
        return b""

    server = grpc.aio.server(options=_LIMITS)
    handlers = {
        "Pull": grpc.unary_stream_rpc_method_handler(pull),
        "Push": grpc.stream_unary_rpc_method_handler(push),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bytes", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


# --- a reader that stalls -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stall:
    """What readers that stopped reading did to the server, and to a neighbour that asks for sessions meanwhile.

    `held_bytes` is the growth of the server's resident memory for one of `readers`; the others are 99th percentiles.
    """

    readers: int
    held_bytes: int
    calm_p99_seconds: float
    stalled_p99_seconds: float


def stalled_reader(stall_seconds: float = STALL_SECONDS, readers: int = 8) -> Stall:
    """Opens `readers` pulls of 256 MiB, takes one message of each, and no more.

    Nothing was pulled before, so that memory that the server keeps for the next messages counts, too.
    """
    with wide_server_process() as served, ExitStack() as stack:
        target = served.client.target
        _push(target, "sync", 2**20, keep=True)
        calm = _p99(served.client, stall_seconds)
        before = served.memory_bytes("VmRSS")
        stub_class = kv_transfer_service_pb2_grpc.KvTransferServiceStub
        for _ in range(readers):
            channel = stack.enter_context(grpc.insecure_channel(target, options=_OWN_CONNECTION))
            call = stub_class(channel).PullKv(kv_transfer_service_pb2.PullKvRequest(session_id=_SESSION))
            stack.callback(call.cancel)
            next(call)
        stalled = _p99(served.client, stall_seconds)
        held_bytes = (served.memory_bytes("VmRSS") - before) // readers
        return Stall(readers, max(0, held_bytes), calm, stalled)


_OWN_CONNECTION = [*_LIMITS, ("grpc.use_local_subchannel_pool", 1)]


def _p99(client: Client, seconds: float) -> float:
    """99th percentile of the time of a small call, asked for a hundred times a second."""
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        client.get_session(_SESSION)
        times.append(time.perf_counter() - started)
        time.sleep(0.01)
    return float(np.percentile(times, 99))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--chunk-bytes", type=int, nargs="+", default=CHUNK_BYTES)
    parser.add_argument("--stall-seconds", type=float, default=STALL_SECONDS, help="0 leaves the stalled reader out")
    parser.add_argument("--serve-bare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_bare:
        asyncio.run(_serve_bare())
        return
    for rates in measure(runs=arguments.runs, chunk_bytes=tuple(arguments.chunk_bytes)):
        print(
            f"{rates.direction} {rates.client:<5} {rates.chunk_bytes // 1024:>5} KiB  "
            f"bare {rates.bare_bytes_per_second / 1e9:5.2f} GB/s  KV {rates.kv_bytes_per_second / 1e9:5.2f} GB/s  "
            f"ratio {rates.ratio:.2f}",
            flush=True,
        )
    if arguments.stall_seconds:
        print(stalled_reader(arguments.stall_seconds))


if __name__ == "__main__":
    main()
