"""KV that is changed on its way: streams through a proxy that tampers with one message, files with one change.

    python -m benchmarks.kv_tampering [--tries N] [--target HOST:PORT]

`tamper` returns how many changes were made and how many were caught. A change is caught where the reader of a pull or a
file gets an error, and where a push ends with an error and no session, or is repaired by sending again what is missing.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.served import serving
from sale_prefill_client import Client, KvCache, RetryPolicy
from sale_prefill_client.errors import SalePrefillError, SessionNotFoundError

TRIES = 1002
SEED = 6
#: Small chunks of a short session: a dozen messages and more, and every position in one is hit sooner or later.
CHUNK_BYTES, TOKENS = 4096, 96
CHANGES = ("flip", "truncate", "reorder", "replay", "drop")
_SERVICE = "/sale_prefill.v1.KvTransferService/"
_PASSED_ON = ("x-", "authorization")
_NO_RETRY = RetryPolicy(max_attempts=3, initial_backoff_seconds=0.01)

Change = Callable[[list[bytes]], list[bytes]]


@dataclass(frozen=True)
class Tally:
    """Changes of one medium: how many were made, and those that nobody noticed, in words."""

    medium: str
    tried: int
    unnoticed: list[str]

    @property
    def caught(self) -> int:
        """Changes that were noticed."""
        return self.tried - len(self.unnoticed)


def tamper(target: str, tries: int = TRIES, seed: int = SEED) -> list[Tally]:
    """Makes `tries` changes, the same for the same seed, to pulls, pushes and files of a server's KV.

    Args:
        target: a server that holds nothing of value; sessions come and go.
        tries: changes, a third of them in each medium.
        seed: of the random numbers that choose them.
    """
    with ExitStack() as stack:
        direct = stack.enter_context(Client(target))
        proxy, address = stack.enter_context(_proxy(target))
        through = stack.enter_context(Client(address, retry=_NO_RETRY))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache = _random_cache(direct)
        direct.push_kv(cache, session_id="tampered")
        stack.callback(partial(direct.delete_session, "tampered", allow_missing=True))
        _require_quiet_proxy(through, cache)
        media: dict[str, Callable[[random.Random, str], str]] = {
            "pull": lambda chance, name: _pull(proxy, through, chance, name),
            "push": lambda chance, name: _push(proxy, through, direct, cache, chance, name),
            "file": lambda chance, name: _file(folder / "kv.safetensors", cache, chance, name),
        }
        return [_tally(medium, attempt, tries // len(media), seed) for medium, attempt in media.items()]


def _require_quiet_proxy(through: Client, cache: KvCache) -> None:
    """Where nothing is changed nothing fails: else every change would count as caught."""
    session = through.push_kv(cache, chunk_bytes=CHUNK_BYTES)
    if not np.array_equal(through.pull_kv(session.session_id, chunk_bytes=CHUNK_BYTES).buffer, cache.buffer):
        raise RuntimeError("the proxy changes KV by itself")
    through.delete_session(session.session_id)


def _tally(medium: str, attempt: Callable[[random.Random, str], str], tries: int, seed: int) -> Tally:
    unnoticed = []
    for number in range(tries):
        chance = random.Random(f"{seed} {medium} {number}")
        name = CHANGES[number % len(CHANGES)]
        if complaint := attempt(chance, name):
            unnoticed.append(f"{medium} {number} ({name}): {complaint}")
    return Tally(medium, tries, unnoticed)


def _random_cache(client: Client) -> KvCache:
    spec = client.get_server_info().kv_spec
    assert spec is not None
    shape = (spec.num_layers, 2, TOKENS, spec.num_kv_heads, spec.head_dim * spec.element_bytes)
    generator = np.random.default_rng(SEED)
    whole = generator.integers(0, 256, shape, np.uint8)
    numpy_type = {4: "<f4", 2: "<u2" if spec.element_type == "bfloat16" else "<f2"}[spec.element_bytes]
    return KvCache.from_numpy(whole.view(numpy_type), spec, token_ids=[3 + token % 7 for token in range(TOKENS)])


def _pull(proxy: _Proxy, through: Client, chance: random.Random, name: str) -> str:
    proxy.change = partial(_changed, chance, name)
    try:
        through.pull_kv("tampered", chunk_bytes=CHUNK_BYTES)
    except SalePrefillError:
        return ""
    return "the pull succeeded"


def _push(proxy: _Proxy, through: Client, direct: Client, cache: KvCache, chance: random.Random, name: str) -> str:
    proxy.change = partial(_changed, chance, name)
    failed = False
    try:
        through.push_kv(cache, session_id="pushed", chunk_bytes=CHUNK_BYTES)
    except SalePrefillError:
        failed = True
    try:
        found = direct.pull_kv("pushed")
    except SessionNotFoundError:
        return "" if failed else "the push succeeded, and there is no session"
    direct.delete_session("pushed")
    if failed:
        return "the push failed, and there is a session"
    return "" if np.array_equal(found.buffer, cache.buffer) else "the session holds other KV"


def _file(path: Path, cache: KvCache, chance: random.Random, name: str) -> str:
    cache.save(path)
    raw = path.read_bytes()
    size = chance.randrange(1, 64)
    start = chance.randrange(len(raw) - 2 * size)
    other = chance.randrange(start + size, len(raw) - size + 1)
    if name == "flip":
        raw = _flipped(chance, raw)
    elif name == "truncate":
        raw = raw[: chance.randrange(len(raw))]
    elif name == "drop":
        raw = raw[:start] + raw[start + size :]
    elif name == "replay":
        raw = raw[: start + size] + raw[start : start + size] + raw[start + size :]
    elif raw[start : start + size] != raw[other : other + size]:
        here, there = raw[start : start + size], raw[other : other + size]
        raw = raw[:start] + there + raw[start + size : other] + here + raw[other + size :]
    else:
        raw = _flipped(chance, raw)
    path.write_bytes(raw)
    try:
        KvCache.load(path)
    except (SalePrefillError, ValueError):
        return ""
    return "the file was loaded"


def _changed(chance: random.Random, name: str, messages: list[bytes]) -> list[bytes]:
    """One message of a stream flipped in a bit, cut off, sent again later, dropped, or two of them in turned order."""
    changed = list(messages)
    place = chance.randrange(len(messages))
    if name == "flip":
        changed[place] = _flipped(chance, messages[place])
    elif name == "truncate":
        changed[place] = messages[place][: chance.randrange(len(messages[place]))]
    elif name == "drop":
        del changed[place]
    elif name == "replay":
        changed.insert(chance.randrange(place, len(messages)) + 1, messages[place])
    else:
        other = (place + chance.randrange(1, len(messages))) % len(messages)
        changed[place], changed[other] = changed[other], changed[place]
    return changed


def _flipped(chance: random.Random, raw: bytes) -> bytes:
    position = chance.randrange(len(raw))
    return raw[:position] + bytes([raw[position] ^ 1 << chance.randrange(8)]) + raw[position + 1 :]


class _Proxy(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio is not typed
    """Passes every call on as bytes. `change` is made once, to the next KV stream, which is gathered whole for it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.change: Change | None = None

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method."""
        metadata = [pair for pair in details.invocation_metadata if pair[0].startswith(_PASSED_ON)]
        if details.method == f"{_SERVICE}PullKv":
            return grpc.unary_stream_rpc_method_handler(partial(self._pull, details.method, metadata))
        if details.method == f"{_SERVICE}PushKv":
            return grpc.stream_unary_rpc_method_handler(partial(self._push, details.method, metadata))
        return grpc.unary_unary_rpc_method_handler(partial(self._unary, details.method, metadata))

    def _unary(self, method: str, metadata: Any, request: bytes, context: grpc.ServicerContext) -> bytes:
        with _passing_errors_on(context):
            response: bytes = self._channel.unary_unary(method)(request, metadata=metadata)
        return response

    def _pull(self, method: str, metadata: Any, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        with _passing_errors_on(context):
            call = self._channel.unary_stream(method)(request, metadata=metadata)
            messages = list(call)
            context.send_initial_metadata([pair for pair in call.initial_metadata() if pair[0].startswith(_PASSED_ON)])
        yield from self._tampered_with(messages)

    def _push(self, method: str, metadata: Any, requests: Iterable[bytes], context: grpc.ServicerContext) -> bytes:
        with _passing_errors_on(context):
            messages = self._tampered_with(list(requests))
            response: bytes = self._channel.stream_unary(method)(iter(messages), metadata=metadata)
        return response

    def _tampered_with(self, messages: list[bytes]) -> list[bytes]:
        change, self.change = self.change, None
        return messages if change is None else change(messages)


@contextmanager
def _passing_errors_on(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        context.set_trailing_metadata(error.trailing_metadata())
        context.abort(error.code(), error.details())


@contextmanager
def _proxy(target: str) -> Iterator[tuple[_Proxy, str]]:
    with grpc.insecure_channel(target) as channel:
        server = grpc.server(ThreadPoolExecutor(4))
        proxy = _Proxy(channel)
        server.add_generic_rpc_handlers((proxy,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield proxy, f"127.0.0.1:{port}"
        finally:
            server.stop(grace=None).wait()


def main() -> int:
    """Command line; the exit code says whether every change was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=TRIES)
    parser.add_argument("--target", help="a running server; one of the default model is started where left out")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        target = arguments.target or stack.enter_context(serving()).client.target
        tallies = tamper(target, arguments.tries)
    for tally in tallies:
        print(f"{tally.medium:<6} {tally.caught} of {tally.tried} caught", *tally.unnoticed, sep="\n  ")
    return int(any(tally.unnoticed for tally in tallies))


if __name__ == "__main__":
    raise SystemExit(main())
