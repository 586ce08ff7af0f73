"""Time: a total for the call, a limit for each attempt, and the deadline that all of it shares.

`TotalTimeout` sets the deadline to the nearer of its own and the inherited one and cancels everything below when it
passes; the deadline travels with the request, so servers stop as well. `AttemptTimeout` bounds one try. On a server,
`ServerDeadline` refuses work that nobody waits for any more and cancels a handler whose time has run out.

Whether time ran out is read from the cancel scope, never guessed from an exception: code inside may raise
``TimeoutError`` for reasons of its own. (Finagle's TimeoutFilter waits its configured time even when the inherited
deadline is nearer; we wait the nearer of the two.)
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import anyio

from ..core.context import SCOPE, VAR, Context
from ..core.deadlines import passed
from ..core.env import Env
from ..core.errors import AttemptTimeout, ConfigurationError, DeadlineExceeded
from ..core.service import Filter, Service
from ..core.stack import Layers

__all__ = ["AttemptLimit", "ServerDeadline", "Timeout", "TotalTimeout", "timeout"]

DEFAULT_TOTAL = 30.0
"""Seconds. Finagle has none; gRPC users are told to always set one. Longer than anybody waits for a page."""


def _seconds(value: float | None, what: str) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9):
        raise ConfigurationError(f"timeout({what}={value!r}): give seconds, a number above 0, or None for no limit")
    return value


class TotalTimeout(Filter[Any, Any, Any, Any]):
    """Bounds the whole call, with all its attempts.

    Args:
        seconds: How long, or ``None`` for as long as the inherited deadline allows.
    """

    place: ClassVar[str] = "timeout"

    def __init__(self, seconds: float | None, env: Env | None = None) -> None:
        self.seconds = _seconds(seconds, "total")
        env = env or Env()
        self._clock = env.clock
        self._kept_below = env.deadline_kept

    def build(self, env: Env, service: Any) -> Any:
        """On the client's clock."""
        return type(self)(self.seconds, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Run the call until its time is over.

        Raises:
            DeadlineExceeded: It is.
        """
        context = VAR.get()
        now = self._clock.now()
        at = context.deadline
        inherited = True
        if self.seconds is not None and (at is None or now + self.seconds < at):
            at = now + self.seconds
            inherited = False
        if at is None:
            return await service(request)
        if at <= now:
            raise DeadlineExceeded("the deadline had passed before the call was made", processed=False)
        token = None if inherited else VAR.set(context.evolve(deadline=at))
        try:
            if self._kept_below:
                return await service(request)
            with anyio.CancelScope(deadline=anyio.current_time() + (at - now)) as scope:
                if hasattr(request, "on_complete"):  # what is done after the reply has its own time
                    request.on_complete(functools.partial(setattr, scope, "deadline", math.inf))
                return await service(request)
        except DeadlineExceeded as error:
            # One with a label is another client's, called from here. Else a server may have been quicker to say it.
            if not error.label and (error.kept_here is not None or passed(at, self._clock)):
                waiting = f": {error.kept_here}" if error.kept_here else ""
                error.args = (self._whose(inherited, at - now) + waiting,)
                if not inherited:
                    error.kept_here = None  # it is told whose it was; a longer timeout above must not claim it
            raise
        finally:
            if token is not None:
                VAR.reset(token)
        # Only a scope that has swallowed its own cancellation lets control come here.
        raise DeadlineExceeded(self._whose(inherited, at - now))

    def _whose(self, inherited: bool, left: float) -> str:
        if inherited:
            return f"the inherited deadline passed, {left:.3f} s after the call was made"
        return f"no reply within the timeout of {self.seconds:g} s"

    def __repr__(self) -> str:
        return f"timeout(total={_show(self.seconds)})"


class AttemptLimit(Filter[Any, Any, Any, Any]):
    """Bounds one try. The last try a call may make is bounded by the call's own deadline alone.

    Args:
        seconds: How long, or ``None`` for no limit.
    """

    place: ClassVar[str] = "attempt_timeout"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, seconds: float | None) -> None:
        self.seconds = _seconds(seconds, "attempt")

    def build(self, env: Env, service: Any) -> Any:
        """Nothing at all when there is no limit."""
        return service if self.seconds is None else self.bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Run one try until its time is over.

        Raises:
            AttemptTimeout: It is.
        """
        record = VAR.get().record
        if self.seconds is None or (record is not None and record.last_try):
            return await service(request)
        with anyio.CancelScope(deadline=anyio.current_time() + self.seconds):
            return await service(request)
        raise AttemptTimeout(f"no reply within the attempt timeout of {self.seconds:g} s")

    def __repr__(self) -> str:
        return f"timeout(attempt={_show(self.seconds)})"


class Timeout(Layers, Filter[Any, Any, Any, Any]):
    """Both at once, as `timeout` makes them: two layers in a stack, and one filter when composed or decorating."""

    def __init__(self, total: float | None, attempt: float | None) -> None:
        Layers.__init__(self, TotalTimeout(total), AttemptLimit(attempt))
        self._both = TotalTimeout(total) >> AttemptLimit(attempt)

    def bind(self, service: Service[Any, Any]) -> Service[Any, Any]:
        """One try is the whole call here, so the nearer limit decides."""
        return self._both.bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Run the call until its time is over."""
        return await self._both.apply(request, service)


class _Unset:
    def __repr__(self) -> str:
        return "…"


_UNSET = _Unset()


def timeout(
    total: float | _Unset | None = _UNSET, *, attempt: float | _Unset | None = _UNSET
) -> Filter[Any, Any, Any, Any]:
    """A limit on time, in seconds.

    Args:
        total: For the whole call, with every retry; ``None`` lifts the default of 30 s.
        attempt: For each try but the last, so that a slow endpoint costs one try and not the call.

    Raises:
        ConfigurationError: Neither is given, or one is no number above 0.
    """
    if isinstance(total, _Unset):
        if isinstance(attempt, _Unset):
            raise ConfigurationError("timeout(): give total=, attempt=, or both, in seconds")
        return AttemptLimit(attempt)
    if isinstance(attempt, _Unset):
        return TotalTimeout(total)
    return Timeout(total, attempt)


class ServerDeadline(Filter[Any, Any, Any, Any]):
    """Refuses requests whose caller has given up, and cancels a handler when its caller does.

    The server's own cancel scope around the request is given the deadline, and whoever owns that scope tells the
    caller; layers above see a cancellation while the context's deadline has passed. Without such a scope, as when the
    filter is composed by hand, it opens one and raises `DeadlineExceeded` itself.
    """

    place: ClassVar[str] = "deadline"

    def __init__(self, env: Env | None = None) -> None:
        env = env or Env()
        self._clock = env.clock
        self._expired = env.metrics.counter("deadline/expired")

    def build(self, env: Env, service: Any) -> Any:
        """On the server's clock."""
        return type(self)(env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle the request for as long as somebody waits for the answer.

        Raises:
            DeadlineExceeded: Nobody does any more.
        """
        context: Context = VAR.get()
        if context.deadline is None:
            return await service(request)
        left = context.deadline - self._clock.now()
        if left <= 0:
            self._expired.value += 1
            raise DeadlineExceeded("the deadline had passed before the request was handled", processed=False)
        scope = SCOPE.get()
        if scope is not None:
            scope.deadline = anyio.current_time() + left
            return await service(request)
        with anyio.CancelScope(deadline=anyio.current_time() + left):
            return await service(request)
        raise DeadlineExceeded("the deadline passed while the request was handled", processed=True)

    def __repr__(self) -> str:
        return "deadline()"


def _show(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds:g} s"
