"""Server processes to measure through gRPC: time to the first token, the answer, the report, peak memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.texts import Fact, reference_with_facts
from sale_prefill_client import Client, PrefillStats

_STOP_SECONDS = 30
_LOG_CHARACTERS = 3000
#: Tries to bring a prompt to its length: cutting text elsewhere changes the tokens around the cut.
_LENGTH_TRIES = 6


class ServerProcess:
    """A `sale-prefill serve` process on free ports, which is ready.

    Attributes:
        target: its gRPC target.
        metrics_url: its metrics page.
        ready_seconds: from the start of the process to its line that it is ready.

    Raises:
        SystemExit: it did not start; with what it said.
    """

    def __init__(self, *arguments: str) -> None:
        executable = str(Path(sys.executable).parent / "sale-prefill")
        command = [executable, "serve", "--port", "0", "--metrics-port", "0", "--log-level", "warning", *arguments]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        self.ready_seconds = time.perf_counter() - started
        if not ready:
            status = self._process.wait(_STOP_SECONDS)
            said = self.said()
            self._close()
            raise SystemExit(f"{' '.join(command)} ended with status {status}:\n{said}")
        self.target, self.metrics_url = ready.split()[3], ready.split()[5]

    @property
    def process_id(self) -> int:
        """Of the server."""
        return self._process.pid

    def said(self) -> str:
        """The end of what it wrote to standard error."""
        self._log.seek(0)
        return self._log.read()[-_LOG_CHARACTERS:]

    def stop(self) -> None:
        """Ends it as an operator does, and waits."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it as a crash does: nothing is written any more."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if not self._log.closed:
            self._process.send_signal(number)
            try:
                self._process.wait(_STOP_SECONDS)
            finally:
                self._close()

    def _close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


@dataclass(frozen=True)
class ServedModel:
    """A server process that is ready, and a client of it."""

    client: Client
    process_id: int
    metrics_url: str = ""

    def memory_bytes(self, field: str) -> int:
        """`VmRSS` (resident now) or `VmHWM` (its peak) of the process. Linux only."""
        for line in Path(f"/proc/{self.process_id}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/{self.process_id}/status has no {field}")

    def forget_peak(self) -> None:
        """Let `VmHWM` start again from what is resident now."""
        Path(f"/proc/{self.process_id}/clear_refs").write_text("5")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of the metrics page that have these labels, now; 0 where there are none."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        return sum(
            float(sample.value)
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@dataclass(frozen=True)
class FirstToken:
    """One prompt answered.

    Attributes:
        seconds: from the call of `prefill` to the first token that came out of `decode`, by the caller's clock.
        prefill_seconds: of that, until `prefill` returned.
        stats: the server's own report.
        answer_ids: greedy tokens of the answer.
    """

    seconds: float
    prefill_seconds: float
    stats: PrefillStats
    answer_ids: tuple[int, ...]

    @property
    def reported_seconds(self) -> float:
        """The report's phases, added up."""
        stats = self.stats
        return stats.queue_seconds + stats.estimation_seconds + stats.attention_seconds + stats.other_seconds

    @property
    def unreported_share(self) -> float:
        """How far the report's phases miss the caller's wall time, as a share of it."""
        return abs(self.prefill_seconds - self.reported_seconds) / self.prefill_seconds


@contextmanager
def serving(*arguments: str) -> Iterator[ServedModel]:
    """A `sale-prefill serve` process on free ports; ended with the block.

    Raises:
        SystemExit: it did not start; with what it said.
    """
    process = ServerProcess(*arguments)
    try:
        with Client(process.target) as client:
            yield ServedModel(client, process.process_id, process.metrics_url)
    finally:
        process.stop()


@contextmanager
def serving_each(arguments: dict[str, list[str]]) -> Iterator[dict[str, ServedModel]]:
    """Several servers by name, all loaded; nothing computes until it is asked."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(serving(*given)) for name, given in arguments.items()}


def first_token(served: ServedModel, prompt: list[int], *, answer_tokens: int = 1) -> FirstToken:
    """Prefills `prompt` in a new session, decodes greedily, frees the session."""
    client = served.client
    started = time.perf_counter()
    result = client.prefill(prompt, progress=sys.stderr.isatty())
    prefill_seconds = time.perf_counter() - started
    with client.decode(result.session_id, max_new_tokens=answer_tokens) as stream:
        answer = [next(stream).token_id]
        seconds = time.perf_counter() - started
        answer += [token.token_id for token in stream]
    client.delete_session(result.session_id)
    return FirstToken(seconds, prefill_seconds, result.stats, tuple(answer))


def question_prompt(num_tokens: int, tokenizer: Any, fact: Fact, offset: int = 0) -> list[int]:
    """A chat prompt of at most `num_tokens` and nearly so many: the language reference with `fact`, and its question.

    Args:
        num_tokens: how long.
        tokenizer: the client's, with a chat template.
        fact: planted in the middle.
        offset: where the text starts, in characters into the language reference.
    """
    document_tokens = num_tokens
    prompt: list[int] = []
    for _ in range(_LENGTH_TRIES):
        document = reference_with_facts(document_tokens, tokenizer, [fact], offset)
        messages = [{"role": "user", "content": f"{document}\n\n{fact.question}"}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=True)
        if 0 <= num_tokens - len(prompt) <= 1:
            break
        document_tokens += num_tokens - len(prompt)
    return prompt
