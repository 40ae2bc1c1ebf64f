"""A server process of its own for GPU benchmarks: real sockets, and a look inside that the wire does not give.

Besides models of the usual kinds it serves a Llama with random weights, made on the device, so that no checkpoint need
exist. Attention of random weights is not sparse, so such a model may take its queries and keys, after rotary embedding,
from attention traces (`benchmarks.attention_traces`): selection then does what it does on real text.

A prompt longer than a trace meets the trace again from its start, each time turned on to the positions where it then
stands, as rotary embedding would have turned it: so distances are what they are on real text. Copies left as they were
would look at each other as if they were neighbours: at 128K, stride 2, that keeps 0.27 of the blocks of layer 13, where
turned copies keep 0.06 and the trace's own 32K 0.13 (`turn_tiles=False` measures it).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

import sale_attention.transformers_integration  # noqa: F401 - registers attn_implementation="sale"
from sale_attention import AttentionStatistics
from sale_attention.cuda import CudaBackend
from sale_prefill_client import Client
from sale_prefill_server.app import Server
from sale_prefill_server.config import ServerConfig
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.model import LoadedModel, choose_device, wrap_module
from sale_prefill_server.observability.logging import set_up_logging

#: Rotary base of the model whose traces these usually are (Qwen2.5-Coder), where a file's metadata does not say.
TRACE_ROPE_THETA = 1e6
_START_SECONDS = 600
_STOP_SECONDS = 30


@dataclass(frozen=True)
class RandomLlama:
    """A Llama with random bfloat16 weights; `traces` are files whose queries and keys replace its own, by layer."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    traces: tuple[Path, ...] = ()
    turn_tiles: bool = True

    def build(self, device: torch.device) -> LoadedModel:
        """The model on `device`."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        )
        torch.manual_seed(0)
        with torch.device(device):
            module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sale")
        if self.traces:
            TraceInjection(self, device).install(module)
        return wrap_module(module, Path("random-llama"), "random-llama")


class TiledTrace:
    """One tensor of a trace, `[1, heads, tokens, head_dim]` after rotary embedding, repeated along a longer sequence.

    Args:
        source: the tensor; `heads` of it are written, in this order.
        heads: one a head of the target.
        rope_theta: base of the model that the trace is from, whose halves of a head turn together; None repeats the
            trace as it is.
    """

    def __init__(self, source: Tensor, heads: list[int], rope_theta: float | None) -> None:
        self._heads = torch.tensor(heads, device=source.device)
        self._rope_theta = rope_theta
        self._rounds = [source]

    def write(self, target: Tensor, start: int) -> None:
        """Fills `target` `[1, len(heads), rows, head_dim]`, whose first row stands at position `start`."""
        done, rows, tokens = 0, target.shape[2], self._rounds[0].shape[2]
        while done < rows:
            round_, at = divmod(start + done, tokens)
            count = min(rows - done, tokens - at)
            source = self._turned(round_)[:, :, at : at + count]
            target[:, :, done : done + count] = source.index_select(1, self._heads)
            done += count

    def _turned(self, round_: int) -> Tensor:
        if self._rope_theta is None:
            return self._rounds[0]
        while len(self._rounds) <= round_:
            source = self._rounds[0]
            half, moved = source.shape[3] // 2, len(self._rounds) * source.shape[2]
            frequencies = self._rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
            angles = (moved * frequencies).to(source.device)
            first, second = source.float().split(half, dim=3)
            cosine, sine = angles.cos().float(), angles.sin().float()
            turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=3)
            self._rounds.append(turned.to(source.dtype))
        return self._rounds[round_]


class TraceInjection:
    """Writes a trace's queries and keys over what rotary embedding gives, in prefill.

    The original embedding still runs, so a chunk costs what a real model's costs and two copies more. Query head h of
    the model takes head h modulo the trace's heads; all KV heads take the trace's one; layer l takes file l modulo the
    files. Values stay the model's.
    """

    def __init__(self, model: RandomLlama, device: torch.device) -> None:
        self._queries: list[TiledTrace] = []
        self._keys: list[TiledTrace] = []
        self._layer = self._start = 0
        self._original = modeling_llama.apply_rotary_pos_emb
        for path in model.traces:
            with safe_open(path, "pt") as file:
                queries, keys = (file.get_tensor(name).to(device, torch.bfloat16)[None] for name in "qk")
                theta = float((file.metadata() or {}).get("rope_theta", TRACE_ROPE_THETA))
            if queries.shape[3] != model.head_dim:
                raise SystemExit(f"{path}: head_dim {queries.shape[3]}, the model has {model.head_dim}")
            turns = theta if model.turn_tiles else None
            heads = [head % queries.shape[1] for head in range(model.heads)]
            self._queries.append(TiledTrace(queries, heads, turns))
            self._keys.append(TiledTrace(keys, [0] * model.kv_heads, turns))

    def install(self, module: Any) -> None:
        """Hooks into the model; for the life of this process."""
        for layer in module.model.layers:
            layer.self_attn.register_forward_pre_hook(self._enter, with_kwargs=True)
        modeling_llama.apply_rotary_pos_emb = self._embed

    def _enter(self, attention: Any, _: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        self._layer = attention.layer_idx
        cache = arguments.get("past_key_values")
        self._start = 0 if cache is None else cache.get_seq_length(attention.layer_idx)

    def _embed(self, query: Tensor, keys: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        query, keys = self._original(query, keys, *arguments, **options)
        if query.shape[2] > 1:  # a decoded token attends to everything whatever it is
            index = self._layer % len(self._keys)
            self._queries[index].write(query, self._start)
            self._keys[index].write(keys, self._start)
        return query, keys


@dataclass(frozen=True)
class Inside:
    """What a server process knows of the last prefill: seconds by phase, and bytes of device memory at their most."""

    phase_seconds: dict[str, float]
    peak_bytes: int
    reserved_bytes: int


class ChildServer:
    """A server in a process of its own, and a client of it."""

    def __init__(self, client: Client, pipe: Connection, start_seconds: float) -> None:
        self.client = client
        self.start_seconds = start_seconds
        self._pipe = pipe

    def inside(self) -> Inside:
        """Of the last prefill that is done."""
        self._pipe.send("inside")
        found: Inside = self._pipe.recv()
        return found


@contextmanager
def child_server(
    settings: dict[str, Any], model: RandomLlama | None = None, *, torch_dense: bool = False
) -> Iterator[ChildServer]:
    """A server with `settings` (of `ServerConfig`) on free ports; of `model` where one is given.

    With `torch_dense`, dense attention on a GPU is torch's SDPA even where this project's kernel would take it.

    Raises:
        SystemExit: it did not start; with what it said.
    """
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=_run, args=(settings, model, far_end, torch_dense), daemon=True)
    started = time.perf_counter()
    process.start()
    far_end.close()
    try:
        if not pipe.poll(_START_SECONDS):
            raise SystemExit(f"the server did not start in {_START_SECONDS} s")
        try:
            answer = pipe.recv()
        except EOFError:
            raise SystemExit("the server ended before it was ready") from None
        if isinstance(answer, str):
            raise SystemExit(f"the server did not start:\n{answer}")
        with Client(f"127.0.0.1:{answer}") as client:
            yield ChildServer(client, pipe, time.perf_counter() - started)
    finally:
        pipe.close()
        process.join(_STOP_SECONDS)
        if process.is_alive():
            process.kill()


def _run(settings: dict[str, Any], model: RandomLlama | None, pipe: Connection, torch_dense: bool) -> None:
    set_up_logging("info")
    if torch_dense:
        mock.patch.object(CudaBackend, "takes_dense", return_value=False).start()
    try:
        asyncio.run(_serve(ServerConfig(port=0, metrics_port=0, **settings), model, pipe))
    except (Exception, SystemExit):
        pipe.send(traceback.format_exc())


async def _serve(config: ServerConfig, model: RandomLlama | None, pipe: Connection) -> None:
    recorded: list[AttentionStatistics] = []

    def new_statistics(_: Engine) -> AttentionStatistics:
        recorded.append(AttentionStatistics())
        return recorded[-1]

    def build(config: ServerConfig) -> LoadedModel:
        assert model is not None
        return model.build(choose_device(config.device))

    with mock.patch.object(Engine, "new_statistics", new_statistics):
        server = Server(config, build if model else None)
        await server.start()
        try:
            await server.wait_ready()
            pipe.send(server.port)
            while await asyncio.to_thread(_asked, pipe):
                done = [statistics for statistics in recorded if statistics.rows]
                recorded[:] = done[-1:]
                phases = done[-1].phase_seconds if done else {}
                peak, reserved = 0, 0
                if torch.cuda.is_available():
                    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                pipe.send(Inside(phases, peak, reserved))
        finally:
            await server.stop()


def _asked(pipe: Connection) -> bool:
    try:
        pipe.recv()
    except EOFError:
        return False
    return True
