"""Lets a step into a layer as soon as that layer's KV has been brought back, while later layers are still coming."""

from __future__ import annotations

import threading


class LoadFailedError(Exception):
    """KV that a step counted on could not be brought back."""


class LayerGate:
    """Opened layer by layer by whoever loads, waited at by whoever computes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open_layers = 0
        self._failure: Exception | None = None

    def open(self, num_layers: int) -> None:
        """Layers [0, num_layers) are there."""
        with self._changed:
            self._open_layers = num_layers
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """The rest will not come."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def wait(self, layer: int) -> None:
        """Waits for a layer; the loader's own time limits bound this.

        Raises:
            LoadFailedError: it will not come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._open_layers > layer or self._failure is not None)
            if self._failure is not None:
                raise LoadFailedError(str(self._failure)) from self._failure
