"""Server processes to measure through gRPC: time to the first token, the answer, the report, peak memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.texts import Fact, reference_with_facts
from sale_prefill_client import Client, PrefillStats

_STOP_SECONDS = 30
_LOG_CHARACTERS = 3000
#: Tries to bring a prompt to its length: cutting text elsewhere changes the tokens around the cut.
_LENGTH_TRIES = 6


@dataclass(frozen=True)
class ServedModel:
    """A server process that is ready, and a client of it."""

    client: Client
    process_id: int

    def memory_bytes(self, field: str) -> int:
        """`VmRSS` (resident now) or `VmHWM` (its peak) of the process. Linux only."""
        for line in Path(f"/proc/{self.process_id}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/{self.process_id}/status has no {field}")

    def forget_peak(self) -> None:
        """Let `VmHWM` start again from what is resident now."""
        Path(f"/proc/{self.process_id}/clear_refs").write_text("5")


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
    executable = str(Path(sys.executable).parent / "sale-prefill")
    command = [executable, "serve", "--port", "0", "--metrics-port", "0", "--log-level", "warning", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            if not ready:
                log.seek(0)
                said = log.read()[-_LOG_CHARACTERS:]
                raise SystemExit(f"{' '.join(command)} ended with status {process.wait(_STOP_SECONDS)}:\n{said}")
            with Client(ready.split()[3]) as client:
                yield ServedModel(client, process.pid)
        finally:
            process.terminate()
            process.wait(_STOP_SECONDS)


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
