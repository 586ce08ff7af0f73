"""Saying how much a request matters, for a piece of work or for whatever passes a filter.

The priority is part of the context: it travels with each call, and a handler's own calls inherit it.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Final, Literal

from ..core.context import VAR, Context
from ..core.errors import ConfigurationError
from ..core.priority import Priority
from ..core.service import Filter, Service

__all__ = ["PriorityFilter", "priority"]

_ENTERED: Final[ContextVar[tuple[Token[Context], ...]]] = ContextVar("meshlib.priority", default=())
"""How to leave each ``with`` block that the running task is in, innermost last. A filter's value may be entered by many
tasks at once, so it cannot keep that itself."""


class PriorityFilter(Filter[Any, Any, Any, Any]):
    """Gives what passes it a priority. See `priority`."""

    keeps_deadline = True

    def __init__(self, level: Priority) -> None:
        self.level = level

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle the request with this priority, whatever it had."""
        context = VAR.get()
        if context.priority is self.level:
            return await service(request)
        token = VAR.set(context.evolve(priority=self.level))
        try:
            return await service(request)
        finally:
            VAR.reset(token)

    def __enter__(self) -> Context:
        context = VAR.get().evolve(priority=self.level)
        _ENTERED.set((*_ENTERED.get(), VAR.set(context)))
        return context

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        *outer, token = _ENTERED.get()
        _ENTERED.set(tuple(outer))
        VAR.reset(token)

    def __repr__(self) -> str:
        return f"priority({self.level.name.lower()!r})"


def priority(level: Literal["critical", "default", "sheddable"] | Priority) -> PriorityFilter:
    """Say how much calls matter: in a ``with`` block, or as a filter with the same value.

    Args:
        level: ``critical`` is kept the longest under overload, ``sheddable`` is refused first.

    Raises:
        ConfigurationError: It is none of these.
    """
    if isinstance(level, Priority):
        return PriorityFilter(level)
    try:
        return PriorityFilter(Priority[level.upper() if level.islower() else ""])
    except (KeyError, AttributeError):
        raise ConfigurationError(f"priority({level!r}): give 'critical', 'default' or 'sheddable'") from None
