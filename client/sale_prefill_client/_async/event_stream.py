"""A server stream that outlives its connection."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .._retry import Attempts
from ..errors import ProtocolError, RequestCancelledError, SalePrefillError
from ._io import EventReader, sleep


class AsyncEventStream:
    """Reads events of a call that is safe to repeat, and repeats it where the connection breaks.

    Args:
        open_reader: begins the call anew; called once for each attempt.
        attempts: says when to try again.

    `attempt` is the number of the running one, from 1.
    """

    def __init__(self, open_reader: Callable[[], EventReader], attempts: Attempts) -> None:
        self._open_reader = open_reader
        self._attempts = attempts
        self._reader: EventReader | None = None
        self._cancelled = False
        self.attempt = 0

    async def read(self) -> Any:
        """The next event of the running attempt; None after the last event of a successful one.

        Raises:
            SalePrefillError: the call failed for good, or was cancelled.
        """
        while not self._cancelled:
            try:
                if self._reader is None:
                    self._reader = self._open_reader()
                    self.attempt += 1
                return await self._reader.read()
            except SalePrefillError as error:
                if self._reader is not None:
                    self._reader.cancel()
                    self._reader = None
                wait_seconds = self._attempts.wait_seconds(error)
            await sleep(wait_seconds)
        raise RequestCancelledError("the call was cancelled by its caller")

    async def initial_metadata(self) -> dict[str, str | bytes]:
        """Metadata of the running attempt, after its first event."""
        return {} if self._reader is None else await self._reader.initial_metadata()

    async def finish(self) -> None:
        """Take the status that follows the last event, so that the server sees a call that ended and no cancelled one.

        The last event makes a call complete: an error after it changes nothing.

        Raises:
            ProtocolError: another event came.
        """
        surplus = None
        if self._reader is not None:
            with suppress(SalePrefillError):
                surplus = await self._reader.read()
        if surplus is not None:
            raise ProtocolError("the server sent another event after the last one of the stream")

    def progressed(self) -> None:
        """Note that the call got further than any attempt before."""
        self._attempts.progressed()

    def cancel(self) -> None:
        """Stop the call, from any thread or task; a `read` that waits ends with RequestCancelledError."""
        self._cancelled = True
        if self._reader is not None:
            self._reader.cancel()

    close = cancel
