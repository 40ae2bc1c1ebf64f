"""Prefill whose KV comes along, against prefill alone; and how soon the first layer is there.

    python -m benchmarks.kv_inline

Both kinds of prefill take turns at going first. The reader checks every chunk, as the client does by default.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from benchmarks.served import ServedModel, serving
from benchmarks.texts import english_reference
from sale_prefill_client import Client, KvCache, PrefillAccepted, PrefillResult
from sale_prefill_client.results import KvArrived

TOKENS = 8192
#: Tokens of a prefill chunk on a CPU; the first layer is complete for so many at first.
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Run:
    """One prefill with KV; seconds from the call on.

    Attributes:
        seconds: until the result and all KV were there.
        accepted_seconds: until the first event, that the request is accepted.
        first_layer_seconds: until keys and values of layer 0 were there, for all tokens of the first chunk.
        first_chunk_seconds: the same until every layer's were there.
    """

    seconds: float
    accepted_seconds: float
    first_layer_seconds: float
    first_chunk_seconds: float


@dataclass(frozen=True)
class Inline:
    """Runs in turn.

    Attributes:
        alone_seconds: of each prefill without KV, from the call to the result.
        runs: with KV.
        chunk_seconds: engine's time of each prefill of the first chunk's tokens alone.
        num_layers: of the model.
        same_kv: what came is, in every bit, what a pull brings afterwards.
    """

    alone_seconds: list[float]
    runs: list[Run]
    chunk_seconds: list[float]
    num_layers: int
    same_kv: bool

    @property
    def ratio(self) -> float:
        """With KV over without, neighbours; the median of them, so that a slow minute of the machine does not count."""
        pairs = zip(self.runs, self.alone_seconds, strict=True)
        return statistics.median(run.seconds / alone for run, alone in pairs)

    @property
    def first_layer_seconds(self) -> float:
        """Median."""
        return statistics.median(run.first_layer_seconds for run in self.runs)

    @property
    def layer_seconds(self) -> float:
        """What a layer of the first chunk takes: the chunk's time over all layers."""
        return statistics.median(self.chunk_seconds) / self.num_layers


def measure(served: ServedModel, tokens: list[int], *, chunk_tokens: int = CHUNK_TOKENS, rounds: int = 5) -> Inline:
    """`rounds` prefills of each kind; the first one of each warms the process and does not count."""
    client = served.client
    spec = client.get_server_info().kv_spec
    assert spec is not None
    chunk_tokens = min(chunk_tokens, len(tokens))
    alone, runs, chunks = [], [], []
    same: list[bool] = []
    for index in range(rounds + 1):
        for with_kv in (True, False) if index % 2 else (False, True):
            if with_kv:
                run, result = _run(client, tokens, chunk_tokens, spec.num_layers)
                runs.append(run)
                same += [] if same else [_same(result.kv, client.pull_kv(result.session_id))]
            else:
                started = time.perf_counter()
                result = client.prefill(tokens, prefix_reuse=False)
                alone.append(time.perf_counter() - started)
            client.delete_session(result.session_id)
        result = client.prefill(tokens[:chunk_tokens], prefix_reuse=False)
        chunks.append(result.stats.compute_seconds)
        client.delete_session(result.session_id)
    return Inline(alone[1:], runs[1:], chunks[1:], spec.num_layers, all(same))


def _run(client: Client, tokens: list[int], chunk_tokens: int, num_layers: int) -> tuple[Run, PrefillResult]:
    missing = {(layer, kind): chunk_tokens for layer in range(num_layers) for kind in (0, 1)}
    accepted = first_layer = first_chunk = 0.0
    started = time.perf_counter()
    for event in client.prefill_events(tokens, prefix_reuse=False, inline_kv=True):
        now = time.perf_counter()
        if isinstance(event, PrefillAccepted):
            accepted = now - started
        elif isinstance(event, KvArrived):
            missing[event.layer, event.kind] -= max(0, min(event.token_end, chunk_tokens) - event.token_start)
            if not first_layer and not missing[0, 0] and not missing[0, 1]:
                first_layer = now - started
            if not first_chunk and not any(missing.values()):
                first_chunk = now - started
        elif isinstance(event, PrefillResult):
            result = event
    if result.kv is None or not first_chunk:
        raise RuntimeError("no KV came with the prefill")
    return Run(now - started, accepted, first_layer, first_chunk), result


def _same(one: KvCache | None, other: KvCache) -> bool:
    return one is not None and one.buffer.tobytes() == other.buffer.tobytes()


def main() -> None:
    """Prints what was seen of the default model."""
    with serving() as served:
        seen = measure(served, english_reference(TOKENS, served.client.tokenizer()))
    print(f"with KV over alone: {seen.ratio:.3f}; {seen.alone_seconds} {[run.seconds for run in seen.runs]}")
    print(
        f"first layer after {1e3 * seen.first_layer_seconds:.0f} ms; a layer of the first chunk takes "
        f"{1e3 * seen.layer_seconds:.0f} ms, all of them {1e3 * seen.layer_seconds * seen.num_layers:.0f} ms"
    )


if __name__ == "__main__":
    main()
