"""What several tests share: a real server on real sockets, a tiny real model, and errors as a caller sees them."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, LlamaConfig

from sale_prefill.v1 import (
    kv_transfer_service_pb2_grpc,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from sale_prefill_server.app import Server
from sale_prefill_server.config import ServerConfig

TINY_VOCABULARY = 320
TINY_CONTEXT = 4096


def save_tiny_llama(directory: Path, **changes: Any) -> Path:
    """A Llama with random weights, small enough to prefill thousands of tokens in well under a second."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": TINY_VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TINY_CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **changes}), dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


@dataclass
class RunningServer:
    """A server in its own thread and event loop."""

    server: Server
    loop: asyncio.AbstractEventLoop
    channel: grpc.Channel

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.server.metrics_port}/metrics"

    @property
    def prefill(self) -> Any:
        return prefill_service_pb2_grpc.PrefillServiceStub(self.channel)

    @property
    def sessions(self) -> Any:
        return session_service_pb2_grpc.SessionServiceStub(self.channel)

    @property
    def kv(self) -> Any:
        return kv_transfer_service_pb2_grpc.KvTransferServiceStub(self.channel)

    @property
    def info(self) -> Any:
        return server_service_pb2_grpc.ServerServiceStub(self.channel)

    def prefill_tokens(
        self, token_ids: list[int], *, token: str = "", **fields: Any
    ) -> prefill_service_pb2.PrefillResult:
        """The result of a prefill, its other events passed over."""
        request = prefill_service_pb2.PrefillRequest(token_ids=token_ids, **fields)
        return list(self.prefill.Prefill(request, timeout=60, metadata=_credentials(token)))[-1].result

    def decode_tokens(self, session_id: str, max_new_tokens: int, **fields: Any) -> list[int]:
        """The tokens of a decode."""
        request = prefill_service_pb2.DecodeRequest(session_id=session_id, max_new_tokens=max_new_tokens, **fields)
        events = list(self.prefill.Decode(request, timeout=60))
        return [token.token_id for event in events for token in event.tokens.tokens]

    def load(self) -> server_service_pb2.GetLoadResponse:
        """How full and busy it is."""
        return self.info.GetLoad(server_service_pb2.GetLoadRequest(), timeout=10)

    def metric(self, name: str, **labels: str) -> float:
        """One series of the metrics page, now."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        (value,) = [
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return float(value)

    @staticmethod
    def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Returns as soon as `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)

    def session(self, session_id: str) -> session_service_pb2.Session:
        """A session as the server describes it."""
        request = session_service_pb2.GetSessionRequest(session_id=session_id)
        return self.sessions.GetSession(request, timeout=10).session


def _credentials(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")] if token else []


@contextmanager
def running_server(*, ready: bool = True, **settings: Any) -> Iterator[RunningServer]:
    """A server with `settings`, on free ports; with `ready=False` its model never loads.

    Rows are sparse from 1024 on, whatever this machine measures.
    """
    fixed = {"port": 0, "metrics_port": 0, "kv_memory": "1G", "threads": 1, "dense_rows": 1024, "prefix_reuse": False}
    config = ServerConfig(**{**fixed, **settings})
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-server", daemon=True)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(120)

    async def make() -> Server:
        return Server(config)

    server = run(make())
    try:
        run(server.start())
        if ready:
            run(server.wait_ready())
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield RunningServer(server, loop, channel)
    finally:
        run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass(frozen=True)
class CallError:
    """A failed call as google.rpc details tell it."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]
    fields: list[str]
    retry_after_seconds: float | None


def call_error(call: Callable[[], Any]) -> CallError:
    """Runs `call`, which must fail (a stream is read to its end), and decodes how."""
    try:
        result = call()
        if hasattr(result, "__next__"):
            list(result)
    except grpc.RpcError as error:
        return decode_error(error)
    raise AssertionError("the call succeeded")


def decode_error(error: Any) -> CallError:
    """The details of a failed call."""
    status = rpc_status.from_call(error)
    reason, metadata, fields, retry = "", {}, [], None
    for detail in status.details if status is not None else ():
        info, bad, pause = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "sale-prefill"
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            fields = [violation.field for violation in bad.field_violations]
        elif detail.Unpack(pause):
            retry = pause.retry_delay.ToMilliseconds() / 1000
    return CallError(error.code(), reason, error.details(), metadata, fields, retry)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    """`count` token ids of the tiny model, the same for the same seed, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TINY_VOCABULARY, (count,), generator=generator).tolist()
