"""Two tenants with equal prompts: neither timing nor counters show one that the other was there before.

    python -m benchmarks.kv_tenants

In each round another tenant goes first, so that nothing but reuse could make the later one faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.kv_prefix import texts
from benchmarks.served import ServedModel, ServerProcess
from sale_prefill_client import Client, PrefillResult

TENANTS = ("red", "blue")


@dataclass(frozen=True)
class Round:
    """One prompt: the first tenant, the same one again, the other one, the other one again.

    Attributes:
        cold_seconds: the first tenant's, when nobody had sent the prompt before.
        own_seconds: the same tenant's second time.
        other_seconds: the other tenant's first time.
        other_reused_tokens: of the other tenant's first time, tokens that were not computed, by its report.
        other_counted_tokens: the same by the metrics page.
        own_reused_tokens: of the first tenant's second time.
    """

    cold_seconds: float
    own_seconds: float
    other_seconds: float
    other_reused_tokens: int
    other_counted_tokens: int
    own_reused_tokens: int


def speedups(rounds: Sequence[Round]) -> tuple[float, float]:
    """Medians of cold over second time: of the same tenant, of the other one."""
    own = statistics.median(each.cold_seconds / each.own_seconds for each in rounds)
    return own, statistics.median(each.cold_seconds / each.other_seconds for each in rounds)


@contextmanager
def tenants(*arguments: str) -> Iterator[dict[str, ServedModel]]:
    """A server that knows two tenants, and a client of each."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        file = folder / "tokens"
        file.write_text("".join(f"{name}:{name}-secret\n" for name in TENANTS))
        process = ServerProcess("--auth-tokens-file", str(file), *arguments)
        stack.callback(process.stop)
        yield {
            name: ServedModel(
                stack.enter_context(Client(process.target, token=f"{name}-secret")),
                process.process_id,
                process.metrics_url,
            )
            for name in TENANTS
        }


def measure(served: dict[str, ServedModel], prompts: Sequence[list[int]]) -> list[Round]:
    """One round a prompt; no session outlives its round."""
    warm_up = served[TENANTS[0]].client
    warm_up.delete_session(warm_up.prefill(prompts[0][-64:] * 4).session_id)
    return [_round(served, prompt, TENANTS[index % 2 :] + TENANTS[: index % 2]) for index, prompt in enumerate(prompts)]


def _round(served: dict[str, ServedModel], prompt: list[int], order: tuple[str, ...]) -> Round:
    first, other = (served[name] for name in order)
    cold_seconds, cold = _timed(first, prompt)
    own_seconds, own = _timed(first, prompt)
    before = _not_computed(other)
    other_seconds, apart = _timed(other, prompt)
    counted = _not_computed(other) - before
    for client, results in ((first.client, (cold, own)), (other.client, (apart,))):
        for result in results:
            client.delete_session(result.session_id)
    return Round(
        cold_seconds,
        own_seconds,
        other_seconds,
        len(prompt) - apart.stats.computed_tokens,
        counted,
        own.stats.prefix_tokens,
    )


def _timed(served: ServedModel, prompt: list[int]) -> tuple[float, PrefillResult]:
    started = time.perf_counter()
    result = served.client.prefill(prompt)
    return time.perf_counter() - started, result


def _not_computed(served: ServedModel) -> int:
    every = served.metric("sale_prefill_tokens_total")
    return int(every - served.metric("sale_prefill_tokens_total", source="computed"))


def reused_across_restart(prompt: list[int], directory: Path, *arguments: str) -> tuple[int, int]:
    """Tokens that new sessions take from the disk tier: of the tenant that had the prompt before, of the other one.

    The first tenant prefills with durability LOCAL; then the server starts again over the same directory, and the other
    tenant asks first.
    """
    disk = ("--kv-disk", str(directory), *arguments)
    with tenants(*disk) as served:
        served[TENANTS[0]].client.prefill(prompt, durability="local", lease_seconds=600)
    with tenants(*disk) as served:
        other, own = (served[name].client.prefill(prompt).stats.computed_tokens for name in reversed(TENANTS))
    return len(prompt) - own, len(prompt) - other


def main() -> None:
    """Prints the rounds."""
    with tenants() as served:
        rounds = measure(served, texts(6144, served[TENANTS[0]].client.tokenizer()))
    for each in rounds:
        print(each)
    print("cold over second time: same tenant {:.1f}x, other tenant {:.2f}x".format(*speedups(rounds)))


if __name__ == "__main__":
    main()
