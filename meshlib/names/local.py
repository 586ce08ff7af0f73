"""The local Dtab: entries for one call tree, above those of the base. They travel with every call that is made below.

``with meshlib.dtab("/s/users => /s/users-canary"):`` sends what is called in the body, here and in services further
down, to the canary. Tasks that the body starts inherit it; what runs beside it does not see it. Source: Finagle,
Dtab.local.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar, cast

from ..core.context import VAR, Context
from ..core.errors import ConfigurationError
from .dtab import Dtab

__all__ = ["LocalDtab", "dtab"]

F = TypeVar("F", bound=Callable[..., Any])

_ENTERED: ContextVar[tuple[tuple[Context, Context], ...]] = ContextVar("meshlib.dtabs", default=())
"""What was before and what began with each block that the running code is in. Not kept in the value: many tasks may be
in the same one."""


class LocalDtab:
    """See `dtab`."""

    __slots__ = ("added", "pairs")

    def __init__(self, added: Dtab) -> None:
        self.added, self.pairs = added, added.pairs()

    def __enter__(self) -> Dtab:
        before = VAR.get()
        inside = before.evolve(dtab=before.dtab + self.pairs)
        _ENTERED.set((*_ENTERED.get(), (before, inside)))
        VAR.set(inside)
        return self.added

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        *outer, (before, inside) = _ENTERED.get()
        _ENTERED.set(tuple(outer))
        now = VAR.get()
        VAR.set(before if now is inside else now.evolve(dtab=before.dtab))

    def __call__(self, function: F) -> F:
        """As a decorator: for the whole of each call of the function.

        Raises:
            ConfigurationError: It is a generator, whose body runs in pieces, in between which others run.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(f"{self!r} on {function.__qualname__}: it is a generator; use 'with' in its body")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def waiting(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return cast("F", waiting)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return cast("F", wrapper)

    def __repr__(self) -> str:
        return f"d{repr(self.added)[1:]}"


def dtab(entries: Dtab | str) -> LocalDtab:
    """Add entries to the local Dtab: for the body of a ``with``, or of the function that it decorates.

    Those added last are wanted most. They hold for calls of logical paths, and travel on with the requests, so they
    hold in the services that are called, too, where these trust their callers. A Finagle service understands those
    whose leaves are paths.

    Args:
        entries: A Dtab, or its text.

    Raises:
        DtabError: It cannot be read; says where.
    """
    return LocalDtab(entries if isinstance(entries, Dtab) else Dtab(entries))
