"""The main job, end to end, on a real model and a real document: what `make demo` runs.

A server is started on free ports and driven through the client library, as another service would: a long prompt is
prefilled with SALE sparse attention, an answer streamed, a second question asked on the retained session, the KV cache
pulled and continued by plain transformers. Any step that does not hold ends the demo with exit status 1.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.texts import PASSWORD, RESTAURANT, Fact, reference_with_facts
from sale_prefill_client import Client, KvCache, PrefillProgress, PrefillStats, Session
from sale_prefill_client.tokens import token_digest
from sale_prefill_server.models import DEFAULT_MODEL, ModelError, ModelSource, resolve_model

READY = re.compile(r"sale-prefill ready: grpc (?P<grpc>\S+) metrics (?P<metrics>\S+)")
DOCUMENT_OFFSET = 200_000  # characters into the language reference
ANSWER_TOKENS = 48
CONTINUED_TOKENS = 32
BAR_WIDTH = 40
LOG_LINE_SECONDS = 5.0
STOP_SECONDS = 30
METRICS_SHOWN = (
    "sale_prefill_requests_total",
    "sale_prefill_tokens_total",
    "sale_prefill_attention_blocks_total",
    "sale_prefill_compute_seconds_total",
    "sale_prefill_sessions",
    "sale_prefill_kv_used_bytes",
)


class DemoError(Exception):
    """A step that did not hold."""


@dataclass
class RunningServer:
    """A `sale-prefill serve` process that is ready.

    Attributes:
        target: gRPC address.
        metrics_url: of its metrics page.
    """

    process: subprocess.Popen[str]
    target: str
    metrics_url: str

    def stop(self) -> int:
        """Ask it to stop and wait for its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@dataclass
class Conversation:
    """The retained session as this caller knows it.

    Attributes:
        session: as the server last described it.
        token_ids: every token that it holds, in order.
    """

    session: Session
    token_ids: list[int]


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)
    print("-" * len(text), flush=True)


def fetch_model(name: str) -> ModelSource:
    heading(f"Model: {name}")
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        print(f"  {line}", flush=True)

    source = resolve_model(name, on_progress=show)
    print(f"  {'ready' if lines else 'nothing to fetch, nothing to convert'}: {source.path}")
    return source


@contextmanager
def running_server(source: ModelSource) -> Iterator[RunningServer]:
    """A server of the model on free ports; killed at the end where it was not stopped."""
    command = [sys.executable, "-m", "sale_prefill_client.cli", "serve", "--port", "0", "--metrics-port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--model", str(source.path)], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            found = next((match for line in process.stdout or () if (match := READY.search(line))), None)
            if found is None:
                log.seek(0)
                raise DemoError(f"the server ended with status {process.wait()}:\n{log.read()[-3000:]}")
            yield RunningServer(process, found["grpc"], found["metrics"])
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def progress() -> bool | Callable[[PrefillProgress], None]:
    """The client's own bar on a terminal, and a line now and then in a log."""
    if sys.stderr.isatty():
        return True
    next_seconds = 0.0

    def show(event: PrefillProgress) -> None:
        nonlocal next_seconds
        if event.elapsed_seconds >= next_seconds:
            next_seconds = event.elapsed_seconds + LOG_LINE_SECONDS
            print(f"  {event.elapsed_seconds:5.1f} s  {event.completed_ratio:6.1%}", flush=True)

    return show


def report(stats: PrefillStats) -> None:
    total_seconds = stats.queue_seconds + stats.compute_seconds
    print(f"  {stats.computed_tokens} tokens prefilled, {stats.cached_tokens} already there: ", end="")
    print(f"{stats.tokens_per_second:.0f} tokens/s ({stats.attention_backend} attention)")
    phases = {
        "queue": stats.queue_seconds,
        "estimation": stats.estimation_seconds,
        "attention": stats.attention_seconds,
        "the rest": stats.other_seconds,
    }
    for name, seconds in phases.items():
        share = seconds / total_seconds if total_seconds else 0.0
        print(f"    {name:<11} {seconds:7.2f} s  {share:6.1%}  {'#' * round(share * BAR_WIDTH)}")


def report_sparsity(stats: PrefillStats) -> None:
    print(f"  blocks left out (sparsity), by layer; {stats.sparsity:.1%} overall:")
    for index, layer in enumerate(stats.layers):
        sparsity = 1 - layer.density
        print(f"    layer {index:2d} {sparsity:6.1%}  {'#' * round(sparsity * BAR_WIDTH)}")


def ask_first(client: Client, tokenizer: Any, document_tokens: int) -> Conversation:
    document = reference_with_facts(document_tokens, tokenizer, [PASSWORD, RESTAURANT], DOCUMENT_OFFSET)
    messages = [{"role": "user", "content": f"{document}\n\n{PASSWORD.question}"}]
    prompt: list[int] = tokenizer.apply_chat_template(messages, tokenize=True)
    heading(f"Prefill: {len(prompt)} tokens of the Python language reference and a question")
    result = client.prefill(prompt, progress=progress(), timeout_seconds=600)
    report(result.stats)
    report_sparsity(result.stats)
    conversation = Conversation(result.session, prompt)
    stream_answer(client, conversation, PASSWORD)
    return conversation


def ask_second(client: Client, tokenizer: Any, conversation: Conversation) -> None:
    heading("Second question, on the retained session: only the new tokens are prefilled")
    text = tokenizer.chat_continuation([{"role": "user", "content": RESTAURANT.question}])
    new_ids = tokenizer.encode(text, add_special_tokens=False)
    result = client.prefill(
        new_ids, session_id=conversation.session.session_id, expected_prefix_tokens=len(conversation.token_ids)
    )
    report(result.stats)
    if result.stats.computed_tokens > len(new_ids) + 1:
        raise DemoError(f"{result.stats.computed_tokens} tokens were prefilled where {len(new_ids)} are new")
    conversation.token_ids += new_ids
    stream_answer(client, conversation, RESTAURANT)


def stream_answer(client: Client, conversation: Conversation, fact: Fact) -> None:
    print(f"  question: {fact.question}\n  answer:   ", end="")
    with client.decode_text(conversation.session.session_id, max_new_tokens=ANSWER_TOKENS) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
        result = stream.result
    speed = result.stats.decoded_tokens / result.stats.decode_seconds
    print(f"\n  ({result.stats.decoded_tokens} tokens, {speed:.1f} tokens/s; the document says: {fact.answer})")
    conversation.token_ids += stream.token_ids
    conversation.session = result.session
    if result.session.num_tokens != len(conversation.token_ids):
        raise DemoError(f"the session holds {result.session.num_tokens} tokens, not {len(conversation.token_ids)}")


def continue_elsewhere(client: Client, conversation: Conversation, source: ModelSource) -> None:
    heading("The KV cache, pulled and continued by plain transformers")
    started = time.perf_counter()
    kv = client.pull_kv(conversation.session.session_id, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    print(f"  {kv.num_bytes / 1e6:.0f} MB, {kv.num_tokens} tokens, checksums verified, {seconds:.2f} s")
    if kv.token_digest != token_digest(conversation.token_ids):
        raise DemoError("the KV belongs to other tokens than those sent and received")
    theirs = client.generate(
        conversation.session.session_id, max_new_tokens=CONTINUED_TOKENS, ignore_eos=True
    ).token_ids
    ours = continue_with_transformers(kv, conversation.token_ids[-1], source)
    print(f"  server:       {theirs}\n  transformers: {ours}")
    if ours != theirs:
        raise DemoError("plain transformers continues with other tokens than the server")
    print(f"  the same {len(ours)} tokens")


def continue_with_transformers(kv: KvCache, last_token_id: int, source: ModelSource) -> list[int]:
    """Greedy tokens after `kv`, by the model as transformers loads it, with nothing of this project in it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16)
    cache = kv.to_dynamic_cache(model.config)
    cache.crop(-1)  # the last token is fed again, for its logits
    tokens = [last_token_id]
    with torch.inference_mode():
        for _ in range(CONTINUED_TOKENS):
            output = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
            tokens.append(int(output.logits[0, -1].argmax()))
    return tokens[1:]


def show_metrics(server: RunningServer) -> None:
    heading(f"Metrics: {server.metrics_url}")
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    shown = [line for line in lines if line.startswith(METRICS_SHOWN) and not line.endswith(" 0.0")]
    for line in shown:
        print(f"  {line}")
    missing = [name for name in METRICS_SHOWN if not any(line.startswith(name) for line in shown)]
    if missing:
        raise DemoError(f"metrics page lacks {', '.join(missing)}")


def run(model: str, document_tokens: int) -> None:
    source = fetch_model(model)
    heading("Server")
    started = time.perf_counter()
    with running_server(source) as server:
        print(f"  ready in {time.perf_counter() - started:.1f} s: gRPC {server.target}, metrics {server.metrics_url}")
        with Client(server.target) as client:
            tokenizer = client.tokenizer()
            conversation = ask_first(client, tokenizer, document_tokens)
            ask_second(client, tokenizer, conversation)
            continue_elsewhere(client, conversation, source)
            show_metrics(server)
            heading("Stop")
            freed = client.delete_session(conversation.session.session_id)
            print(f"  session deleted, {freed / 1e6:.0f} MB freed")
        status = server.stop()
        if status != 0:
            raise DemoError(f"the server ended with status {status}")
        print("  server stopped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="the default's name, a directory, a .gguf file or a hub id"
    )
    parser.add_argument("--document-tokens", type=int, default=6600, help="length of the document (default 6600)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    try:
        run(arguments.model, arguments.document_tokens)
    except (DemoError, ModelError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    print(f"\nAll steps held, {time.perf_counter() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
