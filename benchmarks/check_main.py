"""`make check-main`: every promise of the main job, measured on the default model with real text.

    python -m benchmarks.check_main [--only NAME ...]

Takes about half an hour on two cores; nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import ROOT, Report
from benchmarks.texts import documents
from sale_attention import AttentionStatistics, ModelFingerprint, SaleConfig, shipped_profile
from sale_attention.transformers_integration import AttentionContext, attention_context
from sale_prefill.v1 import kv_transfer_service_pb2_grpc
from sale_prefill.v1.kv_transfer_service_pb2_grpc import add_KvTransferServiceServicer_to_server
from sale_prefill_client import Client
from sale_prefill_client.errors import ChecksumMismatchError
from sale_prefill_server.config import ServerConfig
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.model import load_model
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings, Sequence
from sale_prefill_server.kv.pool import KvPool
from sale_prefill_server.models import DEFAULT_MODEL, resolve_model

DOCUMENT_TOKENS = 7680
AGREEMENT_FROM = 2048
#: Prompts of the comparison with `generate`: shorter than a chunk, several chunks, and past 4K.
GENERATE_LENGTHS = (1000, 3000, 5000)
CHUNK_CHECK_TOKENS = 4500
#: One unit in the last place of bfloat16.
BF16_TOLERANCE = 2.0**-7


@contextmanager
def server(*arguments: str) -> Iterator[Client]:
    """A server process of the default model, and a client of it."""
    executable = str(Path(sys.executable).parent / "sale-prefill")
    command = [executable, "serve", "--port", "0", "--metrics-port", "0", "--log-level", "warning"]
    command += ["--no-prefix-reuse", *arguments]  # prompts come again, and every time counts
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if not ready:
            raise SystemExit(f"the server did not start: run {' '.join(command)}")
        with Client(ready.split()[3]) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def plain_transformers() -> Any:
    """The default model as transformers runs it by itself."""
    path = resolve_model(DEFAULT_MODEL).path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def greedy_tokens(model: Any, token_ids: list[int], count: int, **options: Any) -> list[int]:
    """What `transformers.generate` says next."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([token_ids]), max_new_tokens=count, do_sample=False, eos_token_id=[], pad_token_id=0, **options
        )
    result: list[int] = output[0, len(token_ids) :].tolist()
    return result


def check_newcomer(report: Report) -> None:
    """A clean clone: set up, demo, tests."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "sale-prefill"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {**os.environ, "SALE_PREFILL_CACHE": str(Path(folder) / "cache")}
        environment.pop("VIRTUAL_ENV", None)

        def make(target: str) -> tuple[int, float, str]:
            started = time.perf_counter()
            run = subprocess.run(
                ["make", target],
                cwd=clone,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            return run.returncode, time.perf_counter() - started, run.stdout

        code, total_seconds, output = make("demo")
        report.add(
            "make demo in a clean clone, downloads included", "exit 0", f"exit {code}", code == 0, output=output[-4000:]
        )
        code, seconds, output = make("demo")
        downloads = len(re.findall(r"(?i)downloading|converting", output))
        report.add(
            "make demo again, after downloads",
            "exit 0, 360 s at most",
            f"exit {code}, {seconds:.0f} s",
            code == 0 and seconds <= 360,
            first_run_seconds=round(total_seconds),
        )
        report.add("... downloads and conversions of the second run", "0", str(downloads), downloads == 0)
        code, seconds, output = make("test")
        summary = output.strip().splitlines()[-1].strip("= ")
        report.add("make test in the same clone", "exit 0", f"exit {code}: {summary}", code == 0, output=output[-4000:])


def check_generate(report: Report) -> None:
    """Dense prefill and greedy decode against `transformers.generate`."""
    model = plain_transformers()
    with server("--attention", "dense") as client:
        prompts = documents(max(GENERATE_LENGTHS), client.tokenizer())
        for (name, tokens), length in zip(prompts.items(), GENERATE_LENGTHS, strict=True):
            expected = greedy_tokens(model, tokens[:length], 64)
            session = client.prefill(tokens[:length]).session_id
            got = client.generate(session, max_new_tokens=64, ignore_eos=True).token_ids
            same = next((i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), 64)
            report.add(
                f"greedy decode after dense prefill = generate: {name}, {length} tokens",
                "64 of 64 tokens",
                f"{same} of 64 tokens",
                same == 64,
            )


class LocalModel:
    """The default model in this process, for what the wire does not carry: logits of all positions."""

    def __init__(self) -> None:
        source = resolve_model(DEFAULT_MODEL)
        self.model = load_model(source.path, source.name, device=torch.device("cpu"))
        self.profile = shipped_profile(ModelFingerprint.of(self.model.module))

    @property
    def _error_budget(self) -> float | None:
        """What a server gives those who ask for nothing."""
        return None if self.profile is None else self.profile.levels[self.profile.default_level].error_budget

    def _engine(self, chunk_tokens: int, *, dense: bool) -> Engine:
        mode = AttentionMode.DENSE if dense else AttentionMode.SALE
        return Engine(
            self.model,
            KvPool(self.model.kv_shape, 2**33),
            AttentionSettings(mode, ServerConfig.threshold, ServerConfig.query_stride, self._error_budget),
            SaleConfig() if self.profile is None else self.profile.geometry.applied_to(SaleConfig()),
            chunk_tokens=chunk_tokens,
            attention_backend="auto",
            crossover=True,
            profile=self.profile,
        )

    def _sequence(self, engine: Engine, num_tokens: int) -> Sequence:
        sequence = engine.open(engine.defaults)
        sequence.kv.reserve(num_tokens)
        return sequence

    @torch.inference_mode()
    def predictions(self, tokens: list[int], *, dense: bool) -> tuple[torch.Tensor, AttentionStatistics]:
        """The next token's argmax [len(tokens)] at every position, at default settings, and what attention did."""
        module = self.model.module
        statistics = AttentionStatistics()
        sequence = self._sequence(self._engine(2048, dense=dense), len(tokens))
        context = AttentionContext(
            policies=sequence.policies,
            states=sequence.states,
            dense=dense,
            prompt_end=len(tokens),
            statistics=statistics,
        )
        best = []
        for start in range(0, len(tokens), 2048):
            piece = torch.tensor([tokens[start : start + 2048]])
            with attention_context(context):
                hidden = module.model(piece, past_key_values=sequence.cache, use_cache=True).last_hidden_state[0]
            best += [module.lm_head(rows).argmax(-1) for rows in hidden.split(256)]
        sequence.release()
        return torch.cat(best), statistics

    def prefilled_kv(
        self, tokens: list[int], *, chunk_tokens: int, dense: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V [tokens, kv heads, head_dim] of every layer after a prefill in chunks."""
        engine = self._engine(chunk_tokens, dense=dense)
        sequence = self._sequence(engine, len(tokens))
        position = 0
        while position < len(tokens):
            end = engine.next_boundary(position, len(tokens))
            engine.prefill_chunk(
                sequence, tokens[position:end], prompt_end=len(tokens), statistics=engine.new_statistics()
            )
            position = end
        layers, count = range(self.model.kv_shape.num_layers), len(tokens)
        keys, values = ([torch.cat(sequence.kv.segments(layer, kind, 0, count)) for layer in layers] for kind in (0, 1))
        return list(zip(keys, values, strict=True))


def check_agreement(report: Report) -> None:
    """SALE at default settings against dense: the next token at every position from 2K on."""
    local = LocalModel()
    agreed = total = 0
    densities, rows = [], {}
    for name, tokens in documents(DOCUMENT_TOKENS, _tokenizer()).items():
        dense, _ = local.predictions(tokens, dense=True)
        sale, statistics_ = local.predictions(tokens, dense=False)
        same = (dense == sale)[AGREEMENT_FROM:]
        agreed, total = agreed + int(same.sum()), total + same.numel()
        densities.append(statistics_.density)
        rows[name] = {"agreement": round(float(same.float().mean()), 4), "density": round(statistics_.density, 4)}
        print(f"     {name}: {rows[name]}", flush=True)
    report.add(
        "SALE at default settings: next-token argmax agrees with dense, 2K to 7,680",
        ">= 96 %",
        f"{100 * agreed / total:.2f} %, mean density {statistics.mean(densities):.3f}",
        agreed / total >= 0.96,
        documents=rows,
    )


def check_chunks(report: Report) -> None:
    """The KV does not depend on the chunk size."""
    local = LocalModel()
    name, tokens = next(iter(documents(CHUNK_CHECK_TOKENS, _tokenizer()).items()))
    for dense in (True, False):
        whole = local.prefilled_kv(tokens, chunk_tokens=2**20, dense=dense)
        for chunk_tokens in (512, 2048):
            chunked = local.prefilled_kv(tokens, chunk_tokens=chunk_tokens, dense=dense)
            worst = max(
                float((a.float() - b.float()).norm() / b.float().norm())
                for pair, reference in zip(chunked, whole, strict=True)
                for a, b in zip(pair, reference, strict=True)
            )
            report.add(
                f"KV of chunks of {chunk_tokens} against whole, {'dense' if dense else 'SALE'}, {name}",
                f"relative L2 <= {BF16_TOLERANCE:.4f}",
                f"{worst:.5f} in the worst layer",
                worst <= BF16_TOLERANCE,
            )


class FlippingRelay(kv_transfer_service_pb2_grpc.KvTransferServiceServicer):
    """Passes PullKv on to a real server and flips one bit of one chunk on the way back."""

    def __init__(self, target: str) -> None:
        channel = grpc.insecure_channel(target)
        self._upstream = kv_transfer_service_pb2_grpc.KvTransferServiceStub(channel)  # type: ignore[no-untyped-call]

    def PullKv(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        """The upstream's frames, the eighth chunk spoiled."""
        for frame in self._upstream.PullKv(request):
            if frame.WhichOneof("frame") == "chunk" and frame.chunk.index == 7:
                data = bytearray(frame.chunk.data)
                data[len(data) // 2] ^= 1
                frame.chunk.data = bytes(data)
            yield frame


def check_pull(report: Report) -> None:
    """KV at the caller's, continued by plain transformers; a flipped bit on the way."""
    model = plain_transformers()
    with server() as client:
        name, tokens = next(iter(documents(3000, client.tokenizer()).items()))
        session = client.prefill(tokens).session_id
        cache = client.pull_kv(session)
        first = client.generate(session, max_new_tokens=32, ignore_eos=True).token_ids
        # transformers wants one token to go on from: the first of the answer, which both sides agree on.
        history = [*tokens, first[0]]
        rest = greedy_tokens(model, history, 31, past_key_values=cache.to_dynamic_cache())
        report.add(
            f"pulled KV continued in plain transformers, {name}, {len(tokens)} tokens, SALE",
            "32 same greedy tokens",
            "the same" if first[1:] == rest else f"{first[1:]} against {rest}",
            first[1:] == rest,
        )
        relay = grpc.server(ThreadPoolExecutor(2))
        add_KvTransferServiceServicer_to_server(FlippingRelay(client.target), relay)  # type: ignore[no-untyped-call]
        port = relay.add_insecure_port("127.0.0.1:0")
        relay.start()
        try:
            with Client(f"127.0.0.1:{port}") as victim:
                victim.pull_kv(session)
            caught = "nothing was noticed"
        except ChecksumMismatchError as error:
            caught = f"caught: {error.message}"
        finally:
            relay.stop(None)
        report.add("one bit flipped in a pull on the wire", "caught", caught[:90], caught.startswith("caught"))


def check_memory(report: Report) -> None:
    """Attention alone, one head, up to 64K tokens."""
    command = [sys.executable, "benchmarks/attention_memory.py", "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    for ratio in found["ratios"]:
        # Linear is the ratio of the lengths; a tenth more is for what each process has anyway.
        limit = 1.1 * ratio["length_ratio"]
        report.add(
            f"sale_attention alone, one head of {ratio['head_dim']}: peak memory, 64K over 16K tokens",
            f"<= {limit:.1f} (linear is {ratio['length_ratio']:.0f})",
            f"{ratio['growth_ratio']:.2f}",
            ratio["growth_ratio"] <= limit,
            results=[row for row in found["results"] if row["head_dim"] == ratio["head_dim"]],
        )


def check_overhead(report: Report) -> None:
    """What gRPC and Python add to the engine's own time."""
    with server() as client:
        tokens = next(iter(documents(2048, client.tokenizer()).values()))
        client.prefill(tokens)
        shares = []
        for _ in range(7):
            started = time.perf_counter()
            result = client.prefill(tokens)
            wall_seconds = time.perf_counter() - started
            shares.append(wall_seconds / result.stats.compute_seconds - 1)
            client.delete_session(result.session_id)
    report.add(
        "client's wall time over the engine's own, 2K prefill, median of 7",
        "<= 3 %",
        f"{100 * statistics.median(shares):.2f} %",
        statistics.median(shares) <= 0.03,
        runs=[round(share, 5) for share in shares],
    )


def check_tests(report: Report) -> None:
    """Bad input, interruptions, start-up mistakes, the README's example."""
    suites = {
        "each bad input: code, reason, message, and the server still serves": [
            "tests/integration/test_bad_input.py",
            "tests/integration/test_sessions.py",
            "tests/integration/test_start.py",
            "tests/fault",
            "tests/unit/models",
        ],
        "the README's client example runs as written": ["tests/integration/test_readme.py"],
    }
    for line, paths in suites.items():
        run = subprocess.run([sys.executable, "-m", "pytest", "-q", *paths], cwd=ROOT, capture_output=True, text=True)
        summary = run.stdout.strip().splitlines()[-1].strip("= ")
        passed = run.returncode == 0 and "skipped" not in summary
        report.add(line, "all pass, none skipped", summary, passed)


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL).path)


CHECKS: dict[str, Callable[[Report], None]] = {
    "generate": check_generate,
    "agreement": check_agreement,
    "chunks": check_chunks,
    "pull": check_pull,
    "memory": check_memory,
    "overhead": check_overhead,
    "tests": check_tests,
    "newcomer": check_newcomer,
}


def main() -> int:
    """Runs the checks. Returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these checks only; nothing is written then")
    chosen = parser.parse_args().only
    report = Report("main" if not chosen else "main-partial")
    for name in chosen or CHECKS:
        CHECKS[name](report)
    return report.finish("make check-main")


if __name__ == "__main__":
    sys.exit(main())
