"""What differs between threads and asyncio; the counterpart is `_async/_io.py`. Written by hand."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, ParamSpec, TypeVar

import grpc

from ..errors import InactivityTimeoutError, RequestCancelledError, from_rpc_error

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

sleep = time.sleep


def open_channel(
    target: str, credentials: grpc.ChannelCredentials | None, options: list[tuple[str, int | str]]
) -> grpc.Channel:
    """A channel that any thread may use; it connects with the first call."""
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)


def run_blocking(function: Callable[_Params, _Result], *args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
    """Run file work where the caller is."""
    return function(*args, **kwargs)


def run_together(calls: Sequence[Callable[[], _Result]], stop: Callable[[], None]) -> list[_Result]:
    """Run calls side by side; where one fails, `stop` is to end the others, and that error is raised."""
    with ThreadPoolExecutor(len(calls), "sale-prefill-stripe") as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop()
    return [future.result() for future in futures]


def begin_upload(method: Any, frames: Any, **options: Any) -> Any:
    """Start a client stream that sends what `frames` yields."""
    return method.future(frames, **options)


def upload_response(call: Any, timeout_seconds: float | None) -> Any:
    """The response of a client stream.

    Raises:
        SalePrefillError: the call failed.
    """
    try:
        return call.result()
    except grpc.FutureCancelledError as error:
        raise RequestCancelledError("the call was cancelled by its caller") from error
    except grpc.RpcError as error:
        raise from_rpc_error(error, timeout_seconds) from error


class _Watchdog:
    """Calls a function when an armed wait takes too long. One thread serves all waits of a stream; it starts with the
    first and is woken only when it would sleep past a deadline, so that arming costs a lock and no switch of threads.

    Args:
        timeout_seconds: longest wait.
        on_silence: called once, from the watchdog's thread.
    """

    def __init__(self, timeout_seconds: float, on_silence: Callable[[], None]) -> None:
        self._timeout_seconds = timeout_seconds
        self._on_silence = on_silence
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._idle = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def arm(self) -> None:
        """Begin a wait."""
        with self._changed:
            self._deadline = time.monotonic() + self._timeout_seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="sale-prefill-watchdog", daemon=True)
                self._thread.start()
            elif self._idle:
                self._changed.notify()

    def disarm(self) -> None:
        """End the wait."""
        with self._changed:
            self._deadline = None

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                self._idle = self._deadline is None
                left_seconds = None if self._deadline is None else self._deadline - time.monotonic()
                if left_seconds is not None and left_seconds <= 0:
                    break
                self._changed.wait(left_seconds)
            else:
                return
        self._on_silence()


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
        self._silent = False
        self._watchdog: _Watchdog | None = None
        if inactivity_timeout_seconds is not None:
            # A weak method: a stream that its user drops must end, so nothing else may hold its call.
            silence = weakref.WeakMethod(self._on_silence)

            def report() -> None:
                if (method := silence()) is not None:
                    method()

            self._watchdog = _Watchdog(inactivity_timeout_seconds, report)
            weakref.finalize(self, self._watchdog.close)

    def _on_silence(self) -> None:
        self._silent = True
        self._call.cancel()

    def read(self) -> Any:
        """The next event; None after the last.

        Raises:
            SalePrefillError: the call failed, was silent for too long, or was cancelled through `cancel`.
        """
        if self._watchdog is not None:
            self._watchdog.arm()
        try:
            event = next(self._call, None)
        except grpc.RpcError as error:
            self._close_watchdog()
            if self._silent:
                raise InactivityTimeoutError(
                    f"the server sent nothing for {self._inactivity_timeout_seconds:g} seconds"
                ) from None
            if self._cancelled:
                raise RequestCancelledError("the call was cancelled by its caller") from None
            raise from_rpc_error(error, self._timeout_seconds) from error
        if self._watchdog is not None:
            self._watchdog.disarm()
        return event

    def initial_metadata(self) -> dict[str, str | bytes]:
        """What the server sent before the first event; call it after that."""
        return dict(self._call.initial_metadata())

    def _close_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()

    def cancel(self) -> None:
        """Stop the call; without effect where it has ended."""
        self._cancelled = True
        self._call.cancel()
        self._close_watchdog()
