"""Sessions read back from disk after a restart, against computing them again.

    python -m benchmarks.kv_restore

The session that never left is a fork, decoded before the server stops.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.kv_prefix import texts
from benchmarks.kv_store import drop_cache
from benchmarks.served import ServedModel, serving
from sale_prefill_client.tokenizer import Tokenizer
from sale_prefill_server.models import DEFAULT_MODEL, resolve_model

#: Most of the default model's context of 8,192; not a whole number of pages.
TOKENS = 8130
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Restored:
    """One session.

    Attributes:
        recompute_seconds: a prefill of the same tokens on the restarted server, nothing reused: caller's time.
        first_token_seconds: from the call of `decode` to its first token, when the KV was on disk only.
        next_token_seconds: of the tokens after that, each: what decoding itself takes.
        restored_tokens: tokens that the server says it read back.
        computed_tokens: tokens that it computed to bring the session back; 0 where nothing was lost.
        same_tokens: leading tokens of the answer that are the same as those of the session that never left.
        tier: where the session was before.
    """

    recompute_seconds: float
    first_token_seconds: float
    next_token_seconds: float
    restored_tokens: int
    computed_tokens: int
    same_tokens: int
    tier: str

    @property
    def speedup(self) -> float:
        """Computing over reading back; the first token's own step counts against reading."""
        return self.recompute_seconds / self.first_token_seconds


def measure(
    prompts: Sequence[list[int]], directory: Path, *arguments: str, answer_tokens: int = ANSWER_TOKENS
) -> list[Restored]:
    """Prefills every prompt with durability LOCAL, stops the server, starts it again, decodes.

    What the system has of the files in memory is dropped before the second start and before each decode, as far as it
    does so on advice.
    """
    disk = ("--kv-disk", str(directory), *arguments)
    with serving(*disk) as served:
        expected = [_keep(served, prompt, f"kept-{index}", answer_tokens) for index, prompt in enumerate(prompts)]
    with serving(*disk) as served:
        client = served.client
        client.delete_session(client.prefill(prompts[0][-64:] * 4, prefix_reuse=False).session_id)  # warms the process
        found = []
        for index, (prompt, answer) in enumerate(zip(prompts, expected, strict=True)):
            drop_cache([file for file in directory.rglob("*") if file.is_file()])
            found.append(_bring_back(served, prompt, f"kept-{index}", answer))
    return found


def _keep(served: ServedModel, prompt: list[int], session_id: str, answer_tokens: int) -> list[int]:
    client = served.client
    client.prefill(prompt, session_id=session_id, durability="local", lease_seconds=3600)
    child = client.fork_session(session_id, durability="none").session_id
    answer = client.generate(child, max_new_tokens=answer_tokens, ignore_eos=True).token_ids
    client.delete_session(child)
    return answer


def _bring_back(served: ServedModel, prompt: list[int], session_id: str, expected: list[int]) -> Restored:
    client = served.client
    tier = client.get_session(session_id).tier or ""
    restored, computed = _counted(served)
    started = time.perf_counter()
    with client.decode(session_id, max_new_tokens=len(expected), ignore_eos=True) as stream:
        answer = [next(stream).token_id]
        first_token_seconds = time.perf_counter() - started
        answer += [token.token_id for token in stream]
    seconds = time.perf_counter() - started
    restored_after, computed_after = _counted(served)
    started = time.perf_counter()
    again = client.prefill(prompt, prefix_reuse=False)
    recompute_seconds = time.perf_counter() - started
    for session in (session_id, again.session_id):
        client.delete_session(session)
    return Restored(
        recompute_seconds,
        first_token_seconds,
        (seconds - first_token_seconds) / max(1, len(answer) - 1),
        restored_after - restored,
        computed_after - computed,
        next(
            (index for index, pair in enumerate(zip(answer, expected, strict=True)) if len(set(pair)) > 1), len(answer)
        ),
        tier,
    )


def _counted(served: ServedModel) -> tuple[int, int]:
    """Tokens that came from a slower tier, and tokens computed, so far."""
    store, computed = (served.metric("sale_prefill_tokens_total", source=source) for source in ("store", "computed"))
    return int(store), int(computed)


def default_prompts(count: int) -> list[list[int]]:
    """So many texts, of nearly the default model's context."""
    tokenizer = Tokenizer(resolve_model(DEFAULT_MODEL).path)
    return texts(TOKENS, tokenizer)[:count]


def main() -> None:
    """Prints what was seen of the default model."""
    with TemporaryDirectory() as folder:
        for restored in measure(default_prompts(3), Path(folder)):
            print(f"{restored.speedup:.1f}x: {restored}", flush=True)


if __name__ == "__main__":
    main()
