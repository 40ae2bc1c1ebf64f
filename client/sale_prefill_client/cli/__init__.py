"""The command line `sale-prefill`."""

from ._main import main

__all__ = ["main"]
