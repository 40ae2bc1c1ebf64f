"""What differs between asyncio and threads; the counterpart is `_sync/_io.py`, written by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import grpc
import grpc.aio

from ..errors import InactivityTimeoutError, RequestCancelledError, from_rpc_error

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

sleep = asyncio.sleep


def open_channel(
    target: str, credentials: grpc.ChannelCredentials | None, options: list[tuple[str, int | str]]
) -> grpc.aio.Channel:
    """A channel of the running event loop; it connects with the first call."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


async def run_blocking(function: Callable[_Params, _Result], *args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
    """Run file work off the event loop."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def run_together(calls: Sequence[Callable[[], Awaitable[_Result]]], stop: Callable[[], None]) -> list[_Result]:
    """Run calls side by side; where one fails, `stop` is to end the others, and that error is raised."""
    tasks = [asyncio.ensure_future(call()) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        stop()
        await asyncio.gather(*tasks, return_exceptions=True)


def begin_upload(method: Any, frames: Any, **options: Any) -> Any:
    """Start a client stream that sends what `frames` yields."""
    return method(frames, **options)


async def upload_response(call: Any, timeout_seconds: float | None) -> Any:
    """The response of a client stream.

    Raises:
        SalePrefillError: the call failed.
    """
    try:
        return await call
    except grpc.RpcError as error:
        raise from_rpc_error(error, timeout_seconds) from error


class EventReader:
    """Reads one server stream.

    Args:
        call: the running call.
        timeout_seconds: its timeout, for messages.
        inactivity_timeout_seconds: longest wait for one event; None for no limit.
    """

    def __init__(self, call: Any, *, timeout_seconds: float | None, inactivity_timeout_seconds: float | None) -> None:
        self._call = call
        self._timeout_seconds = timeout_seconds
        self._inactivity_timeout_seconds = inactivity_timeout_seconds
        self._cancelled = False

    async def read(self) -> Any:
        """The next event; None after the last.

        Raises:
            SalePrefillError: the call failed, was silent for too long, or was cancelled through `cancel`.
        """
        try:
            async with asyncio.timeout(self._inactivity_timeout_seconds):
                event = await self._call.read()
        except TimeoutError:
            self.cancel()
            raise InactivityTimeoutError(
                f"the server sent nothing for {self._inactivity_timeout_seconds:g} seconds"
            ) from None
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._timeout_seconds) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._cancelled and not (task is not None and task.cancelling()):
                raise RequestCancelledError("the call was cancelled by its caller") from None
            raise
        return None if event is grpc.aio.EOF else event

    async def initial_metadata(self) -> dict[str, str | bytes]:
        """What the server sent before the first event; call it after that."""
        return dict(await self._call.initial_metadata())

    def cancel(self) -> None:
        """Stop the call; without effect where it has ended."""
        self._cancelled = True
        self._call.cancel()
