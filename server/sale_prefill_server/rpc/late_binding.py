"""A servicer that exists before what it serves: gRPC wants its handlers before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class LateServicer:
    """Stands for a servicer that `bind` supplies later; until then the interceptor's gate lets no call through."""

    def __init__(self) -> None:
        self._target: object | None = None

    def bind(self, target: object) -> None:
        """Supplies the servicer."""
        self._target = target

    def __getattr__(self, name: str) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: Any) -> Any:
            return getattr(self._target, name)(request, context)

        return call
