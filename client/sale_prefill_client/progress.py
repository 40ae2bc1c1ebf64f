"""Progress of prefills and transfers: bars on standard error, or the caller's own functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Never

from tqdm import tqdm

from .results import PrefillProgress

PrefillCallback = Callable[[PrefillProgress], None]
BytesCallback = Callable[[int, int], None]


class PrefillBar:
    """A bar of tokens with the rate and the phase (queued, prefilling). It shows up with the first event."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None
        self._first_tokens = 0

    def __call__(self, progress: PrefillProgress) -> None:
        """Show the state. Within a chunk, the ratio of work done moves the bar."""
        if self._bar is None:
            total, done = progress.total_tokens, progress.computed_tokens
            self._bar = tqdm(total=total, initial=done, unit="tok", dynamic_ncols=True)
            self._first_tokens = done
        self._bar.set_description("queued" if progress.queued else "prefilling", refresh=False)
        new_tokens = progress.total_tokens - self._first_tokens
        estimate = self._first_tokens + int(min(progress.completed_ratio, 1.0) * new_tokens)
        self._bar.n = max(self._bar.n, progress.computed_tokens, estimate)
        self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class BytesBar:
    """A bar of bytes with the rate. It shows up with the first event."""

    def __init__(self, activity: str) -> None:
        self._activity = activity
        self._bar: tqdm[Never] | None = None

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Show the state."""
        if self._bar is None:
            self._bar = tqdm(
                desc=self._activity, total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True
            )
        self._bar.update(done_bytes - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def prefill_reporter(progress: bool | PrefillCallback) -> Iterator[PrefillCallback]:
    """What to call with each progress event: a bar's method for True, the caller's function, or nothing."""
    if callable(progress):
        yield progress
    elif progress:
        bar = PrefillBar()
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield lambda _: None


@contextmanager
def bytes_reporter(progress: bool | BytesCallback, activity: str) -> Iterator[BytesCallback]:
    """What to call with (bytes done, bytes in all): a bar's method for True, the caller's function, or nothing."""
    if callable(progress):
        yield progress
    elif progress:
        bar = BytesBar(activity)
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield lambda _done, _total: None
