"""KV transfers over connections that break or stand still."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill.v1 import kv_transfer_service_pb2_grpc
from sale_prefill_client import AsyncClient, Client, KvCache
from sale_prefill_server.transfer.kv_reader import KvReader
from tests.support import RunningServer, running_server, save_tiny_llama, tokens_of

TOKENS = 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model with much KV, 64 KiB a token, and little else."""
    directory: Path = save_tiny_llama(
        tmp_path_factory.mktemp("wide"), num_hidden_layers=8, num_key_value_heads=4, head_dim=256
    )
    with running_server(model=str(directory), dtype="float32", kv_memory="300M") as running:
        yield running


@pytest.fixture(scope="module")
def cache(server: RunningServer) -> KvCache:
    """KV of random bits; its session is `held`."""
    with Client(server.target) as client:
        spec = client.get_server_info().kv_spec
        assert spec is not None
        shape = (spec.num_layers, 2, TOKENS, spec.num_kv_heads, spec.head_dim)
        array = np.random.default_rng(0).integers(0, 1 << 32, shape, np.uint32).view("<f4")
        cache = KvCache.from_numpy(array, spec, token_ids=tokens_of(TOKENS))
        client.push_kv(cache, session_id="held")
        return cache


class BreakingProxy:
    """Passes bytes on to a server; breaks the connection once when so many have passed, and counts all."""

    def __init__(self, target: str, break_after_bytes: int) -> None:
        self._address = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._break_after_bytes = break_after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.passed_bytes = 0
        self.breaks = 0
        self._lock = threading.Lock()

    def accept(self) -> None:
        """Serves connections until the listener is closed."""
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._address)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    self.passed_bytes += len(data)
                    breaks = not self.breaks and self.passed_bytes > self._break_after_bytes
                    self.breaks += breaks
                if breaks:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Accepts no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def breaking_proxy(server: RunningServer, break_after_bytes: int) -> Iterator[BreakingProxy]:
    proxy = BreakingProxy(server.target, break_after_bytes)
    thread = threading.Thread(target=proxy.accept)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()


def call(kind: str, target: str, method: str, *arguments: Any, **options: Any) -> Any:
    """A call through either client."""
    if kind == "sync":
        with Client(target) as client:
            return getattr(client, method)(*arguments, **options)

    async def run() -> Any:
        async with AsyncClient(target) as client:
            return await getattr(client, method)(*arguments, **options)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["sync", "aio"])
@pytest.mark.parametrize("stripes", [1, 2])
def test_a_pull_goes_on_where_its_connection_broke(
    server: RunningServer, cache: KvCache, kind: str, stripes: int
) -> None:
    with breaking_proxy(server, cache.num_bytes // 2) as proxy:
        pulled = call(kind, proxy.target, "pull_kv", "held", stripes=stripes)
    assert np.array_equal(pulled.buffer, cache.buffer)
    assert proxy.breaks == 1
    assert proxy.passed_bytes < 1.4 * cache.num_bytes


@pytest.mark.parametrize("kind", ["sync", "aio"])
@pytest.mark.parametrize("stripes", [1, 2])
def test_a_push_goes_on_where_its_connection_broke(
    server: RunningServer, cache: KvCache, kind: str, stripes: int
) -> None:
    with breaking_proxy(server, cache.num_bytes // 2) as proxy:
        session = call(kind, proxy.target, "push_kv", cache, stripes=stripes)
    with Client(server.target) as client:
        assert np.array_equal(client.pull_kv(session.session_id).buffer, cache.buffer)
        client.delete_session(session.session_id)
    assert proxy.breaks == 1
    assert proxy.passed_bytes < 1.4 * cache.num_bytes


def test_a_reader_that_stands_still_holds_little_and_is_in_nobodys_way(
    server: RunningServer, cache: KvCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    frame = KvReader.frame

    def counted(reader: KvReader, index: int) -> bytes:
        made.append(index)
        return frame(reader, index)

    with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        monkeypatch.setattr(KvReader, "frame", counted)
        stalled = kv_transfer_service_pb2_grpc.KvTransferServiceStub(channel).PullKv(
            pb.PullKvRequest(session_id="held", chunk_bytes=1 << 20)
        )
        next(stalled)
        seen = -1
        while len(made) != seen:
            seen = len(made)
            time.sleep(0.5)
        # What the kernel and the reader's own window took is not the server's, so that this is an upper bound.
        assert seen <= 32
        monkeypatch.undo()
        with Client(server.target) as client:
            started = time.monotonic()
            assert np.array_equal(client.pull_kv("held").buffer, cache.buffer)
            assert time.monotonic() - started < 10
        stalled.cancel()
