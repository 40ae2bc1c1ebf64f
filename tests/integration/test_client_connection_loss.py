"""A real TCP connection is cut in the middle; the caller gets what it would have got anyway."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from sale_prefill_client import Client, PrefillAccepted, PrefillResult, RetryPolicy, Sampling
from tests.support import RunningServer, tokens_of

RETRY = RetryPolicy(max_attempts=8, initial_backoff_seconds=0.05, max_backoff_seconds=0.5)
PROMPT = tokens_of(2500)


class CuttingProxy:
    """Passes bytes on to a server, and cuts each of the first connections once it has carried so many bytes back.

    Args:
        target: `host:port` of the server.
        cut_after_bytes: one number a connection; later connections are left alone.
    """

    def __init__(self, target: str, cut_after_bytes: list[int]) -> None:
        host, port = target.rsplit(":", 1)
        self._server = (host, int(port))
        self._limits = cut_after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                limit = self._limits[self.connections] if self.connections < len(self._limits) else None
                self.connections += 1
                server = socket.create_connection(self._server)
                threading.Thread(target=self._pass_on, args=(caller, server, None), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, caller, limit), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        carried = 0
        with suppress(OSError):
            while data := source.recv(4096):
                carried += len(data)
                if limit is not None and carried > limit:
                    self.cuts += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting(server: RunningServer, *cut_after_bytes: int) -> Iterator[tuple[Client, CuttingProxy]]:
    proxy = CuttingProxy(server.target, list(cut_after_bytes))
    try:
        with Client(proxy.target, retry=RETRY) as client:
            yield client, proxy
    finally:
        proxy.close()


@pytest.mark.parametrize("cut_after_bytes", [150, 250, 400])
def test_a_prefill_is_joined_and_not_computed_twice(tiny_server: RunningServer, cut_after_bytes: int) -> None:
    with cutting(tiny_server, cut_after_bytes) as (client, proxy):
        events = list(client.prefill_events(PROMPT))
        assert proxy.cuts == 1
        result = events[-1]
        assert isinstance(events[0], PrefillAccepted)
        assert isinstance(result, PrefillResult)
        assert result.session.num_tokens == len(PROMPT)
        with Client(tiny_server.target) as direct:
            assert [each.session_id for each in direct.list_sessions()].count(result.session_id) == 1
            direct.delete_session(result.session_id)


def test_decoded_tokens_come_once_each_and_in_order(tiny_server: RunningServer) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    with Client(tiny_server.target) as direct:
        session_id = direct.prefill(PROMPT).session_id
        expected = direct.generate(session_id, max_new_tokens=200, sampling=sampling, ignore_eos=True).token_ids
        direct.delete_session(session_id)
        session_id = direct.prefill(PROMPT).session_id
        with cutting(tiny_server, 1000, 3000) as (client, proxy):
            stream = client.decode(session_id, max_new_tokens=200, sampling=sampling, ignore_eos=True)
            assert [token.token_id for token in stream] == expected
            assert proxy.cuts == 2
        assert direct.get_session(session_id).num_tokens == len(PROMPT) + 200
        direct.delete_session(session_id)


def test_a_pull_goes_on_and_every_byte_is_right(tiny_server: RunningServer) -> None:
    with Client(tiny_server.target) as direct:
        session_id = direct.prefill(PROMPT).session_id
        expected = direct.pull_kv(session_id)
        with cutting(tiny_server, 200_000, 300_000, 10_000) as (client, proxy):
            pulled = client.pull_kv(session_id, chunk_bytes=32 << 10)
            assert proxy.cuts == 3
        assert torch.equal(pulled.torch(), expected.torch())
        direct.delete_session(session_id)
