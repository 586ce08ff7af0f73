"""``extensions["trace"]``: what httpcore tells a request's trace function, told where we do the work instead of it."""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any

__all__ = ["Steps"]


class _Told:
    value: Any = None


class Steps:
    """Tells one request's trace function.

    Args:
        function: It, or ``None``.
    """

    __slots__ = ("function",)

    def __init__(self, function: Any) -> None:
        self.function = function

    def of(self, name: str, **facts: Any) -> Step:
        """A step, as an async context manager; what is put into its ``value`` is told when it is complete."""
        return Step(self.function, name, facts)


class Step:
    """One step: ``started`` when it is entered, then ``complete`` or ``failed``."""

    __slots__ = ("_facts", "_function", "_name", "_told")

    def __init__(self, function: Any, name: str, facts: dict[str, Any]) -> None:
        self._function, self._name, self._facts, self._told = function, name, facts, _Told()

    async def _tell(self, what: str, facts: dict[str, Any]) -> None:
        if self._function is not None:
            result = self._function(f"{self._name}.{what}", facts)
            if inspect.isawaitable(result):
                await result

    async def __aenter__(self) -> _Told:
        await self._tell("started", self._facts)
        return self._told

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            await self._tell("complete", {"return_value": self._told.value})
        elif isinstance(error, Exception):
            await self._tell("failed", {"exception": error})
