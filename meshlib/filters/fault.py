"""Fault injection: delays, errors and lost connections, by chance and on request, to see what the protections do.

On a client it stands innermost, directly above the connection, so that every protection takes an injected fault for a
real one (Polly's Simmy: chaos goes last); on a server next to the handler. Each kind of fault has a die of its own, as
in gRPC's A33: a request may be delayed and then fail. Of those that are due, the delay comes first, then the lost
connection, then the error. The dice are thrown with the client's own generator, so a seed repeats them.

Sources: gRPC proposal A33 (independent percentages, a cap on active faults), Polly's Simmy (predicate, switch).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from random import Random
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import anyio

from ..core.context import VAR
from ..core.deadlines import kept
from ..core.env import Env
from ..core.errors import ConfigurationError, ConnectionLost
from ..core.service import Filter, Service

__all__ = ["Fault", "fault"]

KINDS: Final = ("delay", "abort", "error")
"""In the order in which they strike."""

INJECTED: Final = "injected fault"
"""The message of an error that was given as a class."""


class _Switch:
    """What all clients and servers that were given one fault share."""

    __slots__ = ("active", "blocks", "on")

    def __init__(self, on: bool) -> None:
        self.on = on
        self.blocks = 0
        self.active = 0


class Fault(Filter[Any, Any, Any, Any]):
    """Injects faults. Made by `fault`.

    It can be switched while it is in use, for every client and server that was given it: `enabled` is the switch, and
    ``with`` switches it on for the body of the block (blocks may overlap).
    """

    place: ClassVar[str] = "fault"
    keeps_deadline: ClassVar[bool] = True

    def __init__(
        self,
        odds: Mapping[str, float],
        delay: Callable[[Random], float] | float | None,
        error: Any,
        when: Callable[[Any], bool] | None,
        max_concurrent: int | None,
        enabled: bool,
    ) -> None:
        self.odds = dict(odds)
        self.delay = delay
        self.error = error
        self.when = when
        self.max_concurrent = max_concurrent
        self._switch = _Switch(enabled)
        self._env = Env()

    def build(self, env: Env, service: Any) -> Any:
        """With the client's chance and the endpoint's name; the switch and the cap stay those of this value."""
        built = copy.copy(self)
        built._env = env
        return built.bind(service)

    @property
    def enabled(self) -> bool:
        """Are faults injected now? Set it at any time."""
        return self._switch.on or self._switch.blocks > 0

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._switch.on = bool(value)

    @property
    def active(self) -> int:
        """How many requests suffer a fault at this moment."""
        return self._switch.active

    def __enter__(self) -> Self:
        self._switch.blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._switch.blocks -= 1

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Hand the request on, or not, or not at once.

        Raises:
            ConnectionLost: The abort's die said so.
            Exception: The error's die said so; what was given as ``error``.
            DeadlineExceeded: The call's deadline passed during the delay.
        """
        switch = self._switch
        if (switch.on or switch.blocks) and (self.when is None or self.when(request)):
            due = self._throw()
            if due:
                await self._strike(request, due)
        return await service(request)

    def _throw(self) -> list[str]:
        # Every die is thrown for every request: the one kind's luck is not to shift the other's.
        chance = self._env.rng.random
        return [kind for kind, odds in self.odds.items() if chance() < odds]

    async def _strike(self, request: Any, due: list[str]) -> None:
        switch, env = self._switch, self._env
        if self.max_concurrent is not None and switch.active >= self.max_concurrent:
            env.events.note("no_fault", "max_concurrent", f"{switch.active} suffer one already")
            return
        where = "" if env.address is None else str(env.address)
        switch.active += 1
        try:
            if "delay" in due:
                seconds = max(0.0, self.delay(env.rng) if callable(self.delay) else self.delay or 0.0)
                env.events.note("fault", "delay", f"{seconds:g} s", endpoint=where)
                await self._wait(seconds)
            if "abort" in due:
                env.events.note("fault", "abort", "the connection is taken for lost", endpoint=where)
                raise ConnectionLost(f"connection reset by an {INJECTED}", endpoint=where)
            if "error" in due:
                error = self._make(request)
                env.events.note("fault", "error", type(error).__name__, endpoint=where)
                raise error
        finally:
            switch.active -= 1

    async def _wait(self, seconds: float) -> None:
        deadline = VAR.get().deadline
        left = math.inf if deadline is None else max(0.0, deadline - self._env.clock.now())
        if seconds < left:
            await anyio.sleep(seconds)
        elif left < math.inf:
            await anyio.sleep(left)
            raise kept(f"an injected delay of {seconds:g} s")
        else:
            await anyio.sleep_forever()

    def _make(self, request: Any) -> Exception:
        """A new error each time: errors keep the account of the call that they end."""
        given = self.error
        if isinstance(given, type):
            made = given(INJECTED)
        elif isinstance(given, Exception):
            made = copy.copy(given)
        else:
            made = given(request)
            if not isinstance(made, Exception):
                raise TypeError(f"fault(error={_spelled(given)}) gave {made!r}, which is no exception")
        assert isinstance(made, Exception)  # noqa: S101 - for type checkers; `fault` has looked
        return made

    def __repr__(self) -> str:
        says = []
        if self.delay is not None:
            says.append(f"delay={_spelled(self.delay) if callable(self.delay) else format(self.delay, 'g')}")
        if self.error is not None:
            says.append(f"error={_spelled(self.error)}")
        if "abort" in self.odds:
            says.append("abort=True")
        odds = set(self.odds.values())
        if len(odds) > 1:
            says.append(f"probability={self.odds}")
        elif odds != {1}:
            says.append(f"probability={odds.pop():g}")
        if self.when is not None:
            says.append(f"when={_spelled(self.when)}")
        if self.max_concurrent is not None:
            says.append(f"max_concurrent={self.max_concurrent}")
        if not self.enabled:
            says.append("enabled=False")
        return f"fault({', '.join(says)})"


def fault(
    *,
    delay: float | Callable[[Random], float] | None = None,
    error: Exception | type[Exception] | Callable[[Any], Exception] | None = None,
    abort: bool = False,
    probability: float | Mapping[str, float] = 1.0,
    when: Callable[[Any], bool] | None = None,
    max_concurrent: int | None = None,
    enabled: bool = True,
) -> Fault:
    """Inject faults into the requests that pass.

    Args:
        delay: Seconds to wait before the request goes on (``math.inf``: until somebody gives up), or a function that
            draws them from a ``random.Random``.
        error: What to raise instead of going on: an exception, which is copied for each request; a class; or a function
            of the request that makes one.
        abort: Fail as if the peer had reset the connection, with `ConnectionLost`.
        probability: Of each kind, from 0 to 1, each kind by itself; or one for each, ``{"delay": 0.1, "error": 0.01}``.
        when: Which requests may suffer at all; by default, all.
        max_concurrent: At most so many suffer a fault at once, over all clients and servers that were given this value;
            the others pass. By default any number.
        enabled: Whether it begins switched on.

    Raises:
        ConfigurationError: No fault is given, or one cannot be.
    """
    given = {"delay": delay is not None, "abort": abort is not False, "error": error is not None}
    kinds = [kind for kind in KINDS if given[kind]]
    if not kinds:
        raise ConfigurationError("fault(): give what to inject: delay=, error= or abort=True")
    if delay is not None and not callable(delay) and not _number(delay, math.inf):
        raise ConfigurationError(f"fault(delay={delay!r}): give seconds, 0 or more, or a function of a random.Random")
    if error is not None:
        _check_error(error)
    if not isinstance(abort, bool):
        raise ConfigurationError(f"fault(abort={abort!r}): give True or False")
    if when is not None and not callable(when):
        raise ConfigurationError(f"fault(when={when!r}): give a function of the request that says True or False")
    if max_concurrent is not None and (
        isinstance(max_concurrent, bool) or not isinstance(max_concurrent, int) or max_concurrent < 1
    ):
        raise ConfigurationError(f"fault(max_concurrent={max_concurrent!r}): give a whole number of requests above 0")
    if not isinstance(enabled, bool):
        raise ConfigurationError(f"fault(enabled={enabled!r}): give True or False")
    return Fault(_odds(probability, kinds), delay, error, when, max_concurrent, enabled)


def _odds(probability: Any, kinds: list[str]) -> dict[str, float]:
    odds: dict[str, Any]
    if isinstance(probability, Mapping):
        if set(probability) != set(kinds):
            raise ConfigurationError(
                f"fault(probability={dict(probability)!r}): give one for each of {', '.join(kinds)}, and no other"
            )
        odds = {kind: probability[kind] for kind in kinds}
    else:
        odds = dict.fromkeys(kinds, probability)
    for value in odds.values():
        if not _number(value, 1):
            raise ConfigurationError(f"fault(probability={probability!r}): give numbers from 0 to 1")
    return odds


def _check_error(error: Any) -> None:
    if isinstance(error, type):
        if not issubclass(error, Exception):
            raise ConfigurationError(f"fault(error={error.__name__}): give a class of exceptions")
        make: Callable[[], Any] = lambda: error(INJECTED)  # noqa: E731
    elif isinstance(error, Exception):
        make = lambda: copy.copy(error)  # noqa: E731
    elif callable(error) and not isinstance(error, BaseException):
        return
    else:
        raise ConfigurationError(
            f"fault(error={error!r}): give an exception, a class of exceptions, or a function of the request"
        )
    try:
        make()
    except Exception as problem:
        raise ConfigurationError(
            f"fault(error={_spelled(error)}): it cannot be made anew for each request ({problem}); "
            "give a function that makes it: error=lambda request: …"
        ) from problem


def _number(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def _spelled(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
