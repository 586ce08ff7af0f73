"""Retries: a call that failed is made again, if that may help, if it is safe, and if the budget allows it.

All of these must hold: the error says that trying again may help (``on=`` replaces that judgement); the request is
idempotent; the server has not asked to be left alone for good; tries are left; the call does not itself serve a retry
(retries at every layer of a call tree would multiply: Kitex stops the chain in the same way); the deadline leaves time
for the wait; and the client's retry budget pays for it. The original error is raised when one does not, and says which.

tenacity's parts plug in as they are: ``wait=tenacity.wait_exponential_jitter()``,
``stop=tenacity.stop_after_delay(2)``, ``on=tenacity.retry_if_exception_type(OSError)``. Its loop does not: it costs
14 µs even when nothing fails, and it feeds cancellations to predicates. Default waits are decorrelated jitter, 5 to
200 ms (Finagle's MethodBuilder); a server that says how long to wait (`MeshError.retry_after`) is obeyed to the number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, TypeGuard

import anyio

from ..core.backoff import Backoff, DecorrelatedJitter
from ..core.classify import ResponseClass, is_idempotent
from ..core.context import VAR
from ..core.env import Env
from ..core.errors import ConfigurationError, ConnectError, ConnectionLost, DeadlineExceeded, MeshError, Rejected
from ..core.service import Filter, Service
from .budget import budget_of
from .turns import patience

__all__ = ["Retry", "retry"]

FIRST_WAIT, LAST_WAIT = 0.005, 0.2
DEFAULT_WAIT: Final = DecorrelatedJitter(FIRST_WAIT, LAST_WAIT)

On = type[BaseException] | tuple[type[BaseException], ...] | Callable[[Any], bool]
Wait = float | Backoff | Callable[[Any], float]


class Retry(Filter[Any, Any, Any, Any]):
    """Makes a failed call again. See `retry` for the parameters."""

    place: ClassVar[str] = "retry"
    keeps_deadline: ClassVar[bool] = True

    def __init__(
        self,
        attempts: int = 3,
        on: On | None = None,
        wait: Wait | None = None,
        stop: Callable[[Any], bool] | None = None,
        env: Env | None = None,
    ) -> None:
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ConfigurationError(f"retry(attempts={attempts!r}): give the number of tries in all, 1 or more")
        number = isinstance(wait, int | float) and not isinstance(wait, bool) and 0 <= wait < 1e9
        if wait is not None and not (number or callable(wait) or _is_backoff(wait)):
            raise ConfigurationError(
                f"retry(wait={wait!r}): give seconds, a backoff, or a function such as tenacity's waits"
            )
        if stop is not None and not callable(stop):
            raise ConfigurationError(f"retry(stop={stop!r}): give a function such as tenacity's stops")
        kinds = on if isinstance(on, tuple) else (on,) if isinstance(on, type) else ()
        fit = all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)
        if not fit or not (on is None or kinds or callable(on)):
            raise ConfigurationError(f"retry(on={on!r}): give exception types, or a function of the error")
        self.attempts, self.on, self.wait, self.stop = attempts, on, wait, stop
        env = env or Env()
        self._env = env
        self._budget = budget_of(env)
        self._feeds = not self._budget.fed
        self._retries = env.metrics.counter("retries/retries")
        self._exhausted = env.metrics.counter("retries/budget_exhausted")

    def build(self, env: Env, service: Any) -> Any:
        """With the client's budget and clock."""
        return type(self)(self.attempts, self.on, self.wait, self.stop, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call, again if need be."""
        if self.attempts == 1:
            return await service(request)
        if not is_idempotent(request):
            try:
                return await service(request)
            except Exception as error:
                self._unsafe(request, error)
                raise
        record = VAR.get().record
        if record is not None:
            record.last_try = record.chained
        if self._feeds:
            return await self._feeding(request, service)
        try:
            return await service(request)
        except Exception as error:
            return await self._again(request, service, error)

    async def _feeding(self, request: Any, service: Service[Any, Any]) -> Any:
        """Without requeues below, it is this layer that counts the calls and pays in for those that succeed."""
        turns = self._budget.turns
        turns.calls += 1
        try:
            try:
                reply = await service(request)
            except Exception as error:
                reply = await self._again(request, service, error)
        finally:
            turns.calls -= 1
        self._budget.deposit(self._env.clock.now())
        return reply

    async def _again(self, request: Any, service: Service[Any, Any], error: Exception) -> Any:
        context = VAR.get()
        record, clock, turns = context.record, self._env.clock, self._budget.turns
        chained = context.attempt > 0 if record is None else record.chained
        started = clock.now() if record is None else record.started
        previous = 0.0
        for n in range(1, self.attempts + 1):
            state = _State(n, error, clock.now() - started)
            code, why = self._refuses(request, error, state, chained)
            if not code:
                state.pause, previous = self._pause(error, state, previous)
                code, why = self._cannot(state, context.deadline)
            if not code and not await self._turn(state.pause, context.deadline):
                code, why = "deadline", f"no turn within the deadline, with {turns.taken} other retries under way"
            if code:
                self._give_up(error, code, why)
                raise error
            self._retries.value += 1
            if record is not None:
                record.retries += 1
                record.last_try = n + 1 >= self.attempts
            told = f"try {n + 1} of {self.attempts}, {state.pause * 1e3:.0f} ms after {_short(error)}"
            self._env.events.note("retry", _kind(error), told, endpoint=_endpoint(error))
            token = VAR.set(context.evolve(attempt=context.attempt + n))
            try:
                return await service(request)
            except Exception as again:
                error = again
            finally:
                VAR.reset(token)
                turns.give_back()
        raise error

    async def _turn(self, pause: float, deadline: float | None) -> bool:
        """Wait ``pause`` seconds, and then for a turn; ``False`` if the deadline is too near by then."""
        turns = self._budget.turns
        waiting = 0 if self._feeds else 1  # the requeues below count a call only while it is with them
        turns.calls += waiting
        try:
            if pause:
                await anyio.sleep(pause)
            if turns.try_take():
                return True
            with anyio.CancelScope(deadline=anyio.current_time() + patience(deadline, self._env.clock.now())):
                await turns.take()
                return True
        finally:
            turns.calls -= waiting
        return False

    # --- what speaks against it ---------------------------------------------------------------------------------------

    def _refuses(self, request: Any, error: Exception, state: _State, chained: bool) -> tuple[str, str]:
        """Why the call must not be made again, apart from ``stop``, time and budget: a code and words, or neither."""
        if isinstance(error, MeshError) and "retryable" in vars(error) and not error.retryable:
            return "not_retryable", error.verdict or "the failure is final"
        if isinstance(error, MeshError) and error.verdict and not error.label:
            return "not_retryable", error.verdict  # whoever sends again what was never processed has given up on it
        if not self._wants(request, error, state):
            return "not_retryable", ""
        if isinstance(error, MeshError) and error.retry_after is not None and error.retry_after < 0:
            return "pushback", "the server asked not to be tried again"
        if chained:
            return "chain", "this call serves a retry already"
        if state.n >= self.attempts:
            return "attempts", f"{self.attempts} attempts were made"
        return "", ""

    def _wants(self, request: Any, error: Exception, state: _State) -> bool:
        on = self.on
        if on is None:
            return self._env.classifier(request, None, error) is ResponseClass.RETRYABLE
        if isinstance(on, type | tuple):
            return isinstance(error, on)
        return bool(on(state.tenacity() if _is_tenacity(on) else error))

    def _pause(self, error: Exception, state: _State, previous: float) -> tuple[float, float]:
        """Seconds to wait, and what the next wait is told of this one: a server's wish is no part of the series."""
        asked = error.retry_after if isinstance(error, MeshError) else None
        if asked is not None:
            return asked, 0.0
        wait = DEFAULT_WAIT if self.wait is None else self.wait
        if isinstance(wait, int | float):
            pause = float(wait)
        elif _is_backoff(wait):
            pause = wait.delay(state.n, self._env.rng, previous)
        else:
            ask: Any = wait
            pause = max(0.0, float(ask(state.tenacity())))
        return pause, pause

    def _cannot(self, state: _State, deadline: float | None) -> tuple[str, str]:
        """Why it cannot be made again now; if it can, it is paid for."""
        now = self._env.clock.now()
        if self.stop is not None and self.stop(state.tenacity()):
            return "stop", f"stop={self.stop!r}"
        if deadline is not None and now + state.pause >= deadline:
            asked = getattr(state.error, "retry_after", None) is not None
            wait = f" (the server asked for {state.pause:.3f} s)" if asked else ""
            return "deadline", f"the deadline would pass first{wait}"
        if not self._budget.try_withdraw(now):
            return "budget", "the retry budget is spent"
        return "", ""

    def _unsafe(self, request: Any, error: Exception) -> None:
        """A call that is not idempotent has failed: say that this is why it is not made again, if nothing else is."""
        code, why = self._refuses(request, error, _State(1, error, 0.0), chained=False)
        if code:
            self._give_up(error, code, why)
        else:
            self._give_up(error, "not_idempotent", "the request is not idempotent")

    def _give_up(self, error: Exception, code: str, why: str) -> None:
        if code == "budget":
            self._exhausted.value += 1
            if isinstance(error, MeshError):
                error.finalize(why)
        left = self._budget.balance(self._env.clock.now())
        told = f"{why or _short(error)}; the retry budget has {left} left"
        self._env.events.note("no_retry", code, told, endpoint=_endpoint(error))
        if not why:
            return
        if isinstance(error, MeshError):
            error.verdict = why
        else:
            error.add_note(f"meshlib: not retried: {why}")

    def __repr__(self) -> str:
        given = [f"attempts={self.attempts}"]
        given += [f"{k}={v!r}" for k, v in (("on", self.on), ("wait", self.wait), ("stop", self.stop)) if v is not None]
        if self.wait is None:
            given.append(f"wait={FIRST_WAIT * 1e3:g}…{LAST_WAIT * 1e3:g} ms")
        return f"retry({', '.join(given)})"


class _State:
    """One failure, as tenacity's parts want to see it; built only if one of them is asked."""

    __slots__ = ("_built", "elapsed", "error", "n", "pause")

    def __init__(self, n: int, error: Exception, elapsed: float) -> None:
        self.n, self.error, self.elapsed = n, error, elapsed
        self.pause = 0.0
        self._built: Any = None

    def tenacity(self) -> Any:
        """A ``tenacity.RetryCallState``."""
        if self._built is None:
            import tenacity

            state = tenacity.RetryCallState(_NO_LOOP, fn=None, args=(), kwargs={})
            state.attempt_number = self.n
            state.outcome = tenacity.Future.construct(self.n, self.error, True)
            state.outcome_timestamp = state.start_time + self.elapsed
            self._built = state
        self._built.upcoming_sleep = self.pause
        return self._built


_NO_LOOP: Any = None
"""tenacity's parts are given everything but its loop, which does not run here."""


def _is_tenacity(part: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "tenacity" for kind in type(part).__mro__)


def _is_backoff(wait: Any) -> TypeGuard[Backoff]:
    return callable(getattr(wait, "delay", None)) and not isinstance(wait, type)


def _kind(error: Exception) -> str:
    """What the retry is for, in a word."""
    if getattr(error, "retry_after", None) is not None:
        return "pushback"
    if isinstance(error, Rejected | ConnectError):
        return "refused"
    if isinstance(error, ConnectionLost):
        return "lost"
    return "timeout" if isinstance(error, DeadlineExceeded | TimeoutError) else "failure"


def _short(error: Exception) -> str:
    message = error.message if isinstance(error, MeshError) else str(error)
    return f"{type(error).__name__}: {message[:100]}" if message else type(error).__name__


def _endpoint(error: Exception) -> str:
    """Where the try went that ended with ``error``; empty when nobody knows."""
    record = VAR.get().record
    return str(record.tried[-1]) if record is not None and record.tried else getattr(error, "endpoint", "")


def retry(
    attempts: int = 3,
    *,
    on: On | None = None,
    wait: Wait | None = None,
    stop: Callable[[Any], bool] | None = None,
) -> Retry:
    """Make a failed call again, under the budget.

    Args:
        attempts: Tries in all, the first one included; 1 turns retries off.
        on: Which errors: exception types, a function of the error, or one of tenacity's ``retry_…`` objects. By
            default those whose ``retryable`` is true.
        wait: Seconds between tries, a `Backoff`, or one of tenacity's ``wait_…`` objects. By default jittered, 5 to
            200 ms. A server that says how long to wait overrides it.
        stop: When to give up earlier: one of tenacity's ``stop_…`` objects.

    In a client only idempotent requests are retried. As a decorator it retries the function it decorates, and by
    default only errors of this library that allow it; name others with ``on``.

    Raises:
        ConfigurationError: A parameter is wrong; says what would be right.
    """
    return Retry(attempts, on, wait, stop)
