"""Prefixes that are there already: what a second prompt costs, what a fork and a delete cost.

    python -m benchmarks.kv_prefix

Times are the caller's, through the public client.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.served import ServedModel, serving
from benchmarks.texts import english_reference, python_source
from sale_prefill_client import PrefillResult
from sale_prefill_client.tokenizer import Tokenizer

#: What the metrics page counts tokens by.
_SOURCES = ("computed", "prefix", "session")
_ENGLISH_OFFSETS = (0, 150_000, 300_000)
_MODULES = ("argparse", "doctest")


@dataclass(frozen=True)
class Reuse:
    """One prefix, and two prompts that begin with it.

    Attributes:
        first_seconds: the first prompt, nothing to reuse.
        second_seconds: the second one.
        prefix_tokens: what the second one's report says it took.
        same_logits: the second prompt answers, in every bit, as without reuse.
        counted: tokens that the metrics page counted for the second prompt, by source.
    """

    first_seconds: float
    second_seconds: float
    prefix_tokens: int
    same_logits: bool
    counted: dict[str, int]

    @property
    def speedup(self) -> float:
        """First over second."""
        return self.first_seconds / self.second_seconds


@dataclass(frozen=True)
class ForkTimes:
    """Seconds of every fork and of every delete of the fork, by tokens of the parent."""

    fork: dict[int, list[float]]
    delete: dict[int, list[float]]

    @staticmethod
    def growth(seconds: dict[int, list[float]]) -> float:
        """Median of the longest parent over that of the shortest."""
        return statistics.median(seconds[max(seconds)]) / statistics.median(seconds[min(seconds)])


def texts(num_tokens: int, tokenizer: Tokenizer) -> list[list[int]]:
    """Five different texts of `num_tokens` token ids."""
    english = [english_reference(num_tokens, tokenizer, offset) for offset in _ENGLISH_OFFSETS]
    return english + [python_source(num_tokens, tokenizer, module) for module in _MODULES]


def timed_prefill(served: ServedModel, tokens: list[int], *, prefix_reuse: bool = True) -> tuple[float, PrefillResult]:
    """Seconds by the caller's clock, and the result; the session stays."""
    started = time.perf_counter()
    result = served.client.prefill(tokens, prefix_reuse=prefix_reuse)
    return time.perf_counter() - started, result


def tokens_by_source(served: ServedModel) -> dict[str, int]:
    """Prompt tokens that the server has counted so far."""
    return {source: int(served.metric("sale_prefill_tokens_total", source=source)) for source in _SOURCES}


def measure_reuse(served: ServedModel, prefixes: Sequence[list[int]], tail_tokens: int = 64) -> list[Reuse]:
    """Two prompts with each prefix, their tails different, and the second one once more without reuse.

    The tails of a prefix come from the next one in the list. No session outlives its prefix's turn.
    """
    served.client.delete_session(served.client.prefill(prefixes[0][-tail_tokens:] * 4).session_id)  # warms the process
    found = []
    for index, prefix in enumerate(prefixes):
        other = prefixes[(index + 1) % len(prefixes)]
        first_prompt = prefix + other[:tail_tokens]
        second_prompt = prefix + other[tail_tokens : 2 * tail_tokens]
        first_seconds, first = timed_prefill(served, first_prompt)
        before = tokens_by_source(served)
        second_seconds, second = timed_prefill(served, second_prompt)
        after = tokens_by_source(served)
        _, alone = timed_prefill(served, second_prompt, prefix_reuse=False)
        for result in (first, second, alone):
            served.client.delete_session(result.session_id)
        found.append(
            Reuse(
                first_seconds,
                second_seconds,
                second.stats.prefix_tokens,
                second.top_logits == alone.top_logits,
                {source: after[source] - before[source] for source in after},
            )
        )
    return found


def measure_forks(served: ServedModel, tokens: list[int], lengths: Sequence[int], rounds: int) -> ForkTimes:
    """Forks of a session of each length, and deletes of the forks, the lengths taken in turn."""
    client = served.client
    parents = {length: client.prefill(tokens[:length]).session_id for length in lengths}
    times = ForkTimes({length: [] for length in lengths}, {length: [] for length in lengths})
    for _ in range(rounds):
        for length, parent in parents.items():
            started = time.perf_counter()
            child = client.fork_session(parent)
            forked = time.perf_counter()
            client.delete_session(child.session_id)
            times.fork[length].append(forked - started)
            times.delete[length].append(time.perf_counter() - forked)
    for parent in parents.values():
        client.delete_session(parent)
    return times


def main() -> None:
    """Prints both."""
    with serving() as served:
        tokenizer = served.client.tokenizer()
        for reuse in measure_reuse(served, texts(6144, tokenizer)):
            print(f"{reuse.speedup:.1f}x: {reuse}", flush=True)
        times = measure_forks(served, english_reference(7168, tokenizer), (1024, 2048, 4096, 7168), 300)
        for name, seconds in (("fork", times.fork), ("delete", times.delete)):
            medians = {length: round(1e3 * statistics.median(values), 3) for length, values in seconds.items()}
            print(f"{name}: ms by tokens {medians}, growth {ForkTimes.growth(seconds):.2f}", flush=True)


if __name__ == "__main__":
    main()
