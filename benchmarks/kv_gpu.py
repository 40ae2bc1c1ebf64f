"""KV of a GPU handed to another process of its host, on one server of an 8B-shaped model.

    python -m benchmarks.kv_gpu [--tokens 65536] [--json FILE]

The server is a process of its own, this one is the reader. First the bytes: what comes through pinned shared memory and
through CUDA IPC is what comes in messages. Then pulls of a whole session (8 GiB at 64K tokens), and prefills that send
their KV through shared memory while they run, beside prefills alone, in turns. What is paid once a segment (memory
made, registered with the driver) is told apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.attention_traces import locate_traces
from benchmarks.gpu_rows import Row, print_rows, write_rows
from benchmarks.gpu_server import child_server
from benchmarks.gpu_service import LLAMA_8B, TINY
from sale_prefill_client import Client, InlineKv
from sale_prefill_client.cuda_segments import Segment
from sale_prefill_client.options import SegmentTransport

REQUIRED_GB_PER_SECOND = 15.0
REQUIRED_INLINE_RATIO = 1.2
_PULLS = 5
_ROUNDS = 3


def opened(client: Client, size_bytes: int, transport: SegmentTransport) -> tuple[Segment, float]:
    """A segment, and the seconds that making it took.

    Raises:
        SystemExit: there is none to be had.
    """
    started = time.perf_counter()
    segment = client.open_transfer(size_bytes=size_bytes, transports=[transport])
    if segment is None:
        raise SystemExit(f"no segment of {transport}")
    return segment, time.perf_counter() - started


def hand_over_rows(client: Client, session_id: str, transport: SegmentTransport, layers: int) -> list[Row]:
    """Pulls of a session through one segment; the first and the last layer are compared with messages' bytes."""
    size_bytes = client.get_session(session_id).num_tokens * client.get_server_info().kv_spec.layer_token_bytes
    size_bytes *= 2 * layers
    segment, open_seconds = opened(client, size_bytes, transport)
    times, right = [], True
    for pull in range(_PULLS):
        started = time.perf_counter()
        cache = client.pull_kv(session_id, segment=segment)
        times.append(time.perf_counter() - started)
        if pull == 0:
            for layer in (0, layers - 1):
                wanted = client.pull_kv(session_id, layer_range=(layer, layer + 1)).buffer[0]
                found = cache.buffer[layer]
                right &= np.array_equal(found if isinstance(found, np.ndarray) else found.cpu().numpy(), wanted)
        del cache
    client.close_transfer(segment)
    rate = size_bytes / statistics.median(times[1:]) / 1e9
    said = f"{rate:.1f} GB/s (first pull {size_bytes / times[0] / 1e9:.1f}; segment made in {open_seconds:.2f} s)"
    return [
        Row(f"hand-over through {transport}: first and last layer as in messages", "equal", "", str(right), right),
        Row(
            f"hand-over through {transport}, {size_bytes / 2**30:.1f} GiB",
            f">= {REQUIRED_GB_PER_SECOND:g} GB/s",
            "",
            said,
            rate >= REQUIRED_GB_PER_SECOND,
        ),
    ]


def inline_rows(client: Client, tokens: list[int], layers: int) -> list[Row]:
    """Prefills with KV sent through shared memory against prefills alone."""
    spec = client.get_server_info().kv_spec
    segment, open_seconds = opened(client, 2 * layers * len(tokens) * spec.layer_token_bytes, "shm")
    alone, inline = [], []
    for round_ in range(_ROUNDS + 1):
        started = time.perf_counter()
        client.prefill(tokens, lease_seconds=0)
        alone.append(time.perf_counter() - started)
        started = time.perf_counter()
        cache = client.prefill(tokens, lease_seconds=0, inline_kv=InlineKv(segment=segment)).kv
        inline.append(time.perf_counter() - started)
        assert cache is not None
        if round_ == 0:
            kept = client.prefill(tokens).session_id
            wanted = client.pull_kv(kept, layer_range=(layers - 1, layers)).buffer[0]
            right = np.array_equal(cache.buffer[layers - 1], wanted)
            client.delete_session(kept)
        del cache
    client.close_transfer(segment)
    ratio = statistics.median(b / a for a, b in zip(alone[1:], inline[1:], strict=True))
    said = f"{ratio:.3f}x: {statistics.median(inline[1:]):.2f} s, alone {statistics.median(alone[1:]):.2f} s"
    said += f" (first {inline[0]:.2f} s; segment made in {open_seconds:.2f} s)"
    return [
        Row("inline KV: last layer as pulled afterwards", "equal", "", str(right), right),
        Row(
            f"prefill of {len(tokens)} tokens with inline KV, against alone",
            f"<= {REQUIRED_INLINE_RATIO:g}x",
            "",
            said,
            ratio <= REQUIRED_INLINE_RATIO,
        ),
    ]


def measure(tokens: int, device: str, tiny: bool, traces: Path | None) -> list[Row]:
    """All rows."""
    base = TINY if tiny else LLAMA_8B
    model = base.__class__(**{**base.__dict__, "traces": () if tiny else tuple(locate_traces(traces))})
    settings = {
        "device": device,
        "model": "random-llama",
        "prefix_reuse": False,
        "transfer_memory": "1G" if tiny else "20G",
        "transfer_device_memory": "1G" if tiny else "10G",
        "kv_memory": "1G" if tiny else "24G",
    }
    generator = torch.Generator().manual_seed(0)
    prompt: list[int] = torch.randint(model.vocabulary, (tokens,), generator=generator).tolist()
    rows: list[Row] = []
    with child_server(settings, model) as server:
        client = server.client
        print(f"     server ready after {server.start_seconds:.1f} s", flush=True)
        client.prefill(prompt[: min(4096, tokens)], lease_seconds=0)
        rows += inline_rows(client, prompt, model.layers)
        print_rows(rows)
        session_id = client.prefill(prompt).session_id
        for transport in ("shm", "cuda_ipc") if device == "cuda" else ("shm",):
            rows += hand_over_rows(client, session_id, transport, model.layers)
    return rows


def main() -> int:
    """Measures, prints, writes. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this out")
    parser.add_argument("--traces", type=Path, help="folder of traces, whose queries and keys the model takes")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    rows = measure(arguments.tokens, arguments.device, arguments.tiny, arguments.traces)
    if arguments.json:
        write_rows(arguments.json, rows, "python -m benchmarks.kv_gpu")
    print_rows(rows)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
