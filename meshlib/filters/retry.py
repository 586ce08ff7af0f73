"""Retries: a call that failed is made again, if that may help, if it is safe, and if the budget allows it.

All of these must hold: the error says that trying again may help (``on=`` replaces that judgement); the request is
idempotent; tries are left; the call does not itself serve a retry (retries at every layer of a call tree would
multiply: Kitex stops the chain in the same way); the deadline leaves time for the wait; and the client's retry budget
pays for it. The original error is raised when one does not, and says which.

tenacity's parts plug in as they are: ``wait=tenacity.wait_exponential_jitter()``,
``stop=tenacity.stop_after_delay(2)``, ``on=tenacity.retry_if_exception_type(OSError)``. Its loop does not: it costs
14 µs even when nothing fails, and it feeds cancellations to predicates. Default waits are decorrelated jitter, 5 to
200 ms (Finagle's MethodBuilder; the formula is AWS's, whose lower bound is the start and not the previous wait).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import anyio

from ..core.classify import ResponseClass, is_idempotent
from ..core.context import VAR
from ..core.env import Env
from ..core.errors import ConfigurationError, MeshError
from ..core.service import Filter, Service
from .requeue import budget_of

__all__ = ["Retry", "retry"]

FIRST_WAIT, LAST_WAIT = 0.005, 0.2

On = type[BaseException] | tuple[type[BaseException], ...] | Callable[[Any], bool]


class Retry(Filter[Any, Any, Any, Any]):
    """Makes a failed call again. See `retry` for the parameters."""

    place: ClassVar[str] = "retry"
    keeps_deadline: ClassVar[bool] = True

    def __init__(
        self,
        attempts: int = 3,
        on: On | None = None,
        wait: float | Callable[[Any], float] | None = None,
        stop: Callable[[Any], bool] | None = None,
        env: Env | None = None,
    ) -> None:
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ConfigurationError(f"retry(attempts={attempts!r}): give the number of tries in all, 1 or more")
        if wait is not None and not callable(wait) and not (isinstance(wait, int | float) and wait >= 0):
            raise ConfigurationError(f"retry(wait={wait!r}): give seconds, or a function such as tenacity's waits")
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
        self._retries = env.metrics.counter("retries/retries")
        self._exhausted = env.metrics.counter("retries/budget_exhausted")

    def build(self, env: Env, service: Any) -> Any:
        """With the client's budget and clock."""
        return type(self)(self.attempts, self.on, self.wait, self.stop, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call, again if need be."""
        if self.attempts == 1 or not is_idempotent(request):
            return await service(request)
        record = VAR.get().record
        if record is not None:
            record.last_try = record.chained
        try:
            return await service(request)
        except Exception as error:
            return await self._again(request, service, error)

    async def _again(self, request: Any, service: Service[Any, Any], error: Exception) -> Any:
        context = VAR.get()
        record = context.record
        clock = self._env.clock
        started = clock.now() if record is None else record.started
        wait = FIRST_WAIT
        for n in range(1, self.attempts + 1):
            state = _State(self, n, error, clock.now() - started)
            verdict = self._refuses(request, error, n, state)
            if not verdict:
                now = clock.now()
                wait, state.pause = self._next_wait(wait, state)
                if self.stop is not None and self.stop(state.tenacity()):
                    verdict = f"stop={self.stop!r}"
                elif context.deadline is not None and now + state.pause >= context.deadline:
                    verdict = "the deadline would pass first"
                elif not self._budget.try_withdraw(now):
                    self._exhausted.value += 1
                    verdict = "the retry budget is spent"
                    if isinstance(error, MeshError):
                        error.finalize(verdict)
            if verdict:
                if verdict != NOT_RETRYABLE:
                    _note(error, verdict)
                raise error
            if state.pause:
                await anyio.sleep(state.pause)
            self._retries.value += 1
            if record is not None:
                record.retries += 1
                record.last_try = n + 1 >= self.attempts
            token = VAR.set(context.evolve(attempt=context.attempt + n))
            try:
                return await service(request)
            except Exception as again:
                error = again
            finally:
                VAR.reset(token)
        raise error

    def _refuses(self, request: Any, error: Exception, n: int, state: _State) -> str:
        """Why the call must not be made again, apart from ``stop``, time and budget; empty when it may."""
        record = VAR.get().record
        if isinstance(error, MeshError) and "retryable" in vars(error) and not error.retryable:
            return error.verdict or "the failure is final"
        if isinstance(error, MeshError) and error.verdict and not error.label:
            return error.verdict  # whoever sends again what was never processed has given up on it
        if not self._wants(request, error, state):
            return NOT_RETRYABLE
        if record is not None and record.chained:
            return "this call serves a retry already"
        if n >= self.attempts:
            return f"{self.attempts} attempts were made"
        return ""

    def _wants(self, request: Any, error: Exception, state: _State) -> bool:
        on = self.on
        if on is None:
            return self._env.classifier(request, None, error) is ResponseClass.RETRYABLE
        if isinstance(on, type | tuple):
            return isinstance(error, on)
        return bool(on(state.tenacity() if _is_tenacity(on) else error))

    def _next_wait(self, previous: float, state: _State) -> tuple[float, float]:
        if self.wait is None:
            pause = min(LAST_WAIT, self._env.rng.uniform(FIRST_WAIT, previous * 3))
            return pause, pause
        if callable(self.wait):
            return previous, max(0.0, float(self.wait(state.tenacity())))
        return previous, self.wait

    def __repr__(self) -> str:
        given = [f"attempts={self.attempts}"]
        given += [f"{k}={v!r}" for k, v in (("on", self.on), ("wait", self.wait), ("stop", self.stop)) if v is not None]
        if self.wait is None:
            given.append(f"wait={FIRST_WAIT * 1e3:g}…{LAST_WAIT * 1e3:g} ms")
        return f"retry({', '.join(given)})"


NOT_RETRYABLE = "not retryable"


class _State:
    """One failure, as tenacity's parts want to see it; built only if one of them is asked."""

    __slots__ = ("_built", "elapsed", "error", "n", "pause", "retry")

    def __init__(self, retry: Retry, n: int, error: Exception, elapsed: float) -> None:
        self.retry, self.n, self.error, self.elapsed = retry, n, error, elapsed
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


def _note(error: Exception, verdict: str) -> None:
    if isinstance(error, MeshError):
        error.verdict = verdict
    else:
        error.add_note(f"meshlib: not retried: {verdict}")


def retry(
    attempts: int = 3,
    *,
    on: On | None = None,
    wait: float | Callable[[Any], float] | None = None,
    stop: Callable[[Any], bool] | None = None,
) -> Retry:
    """Make a failed call again, under the budget.

    Args:
        attempts: Tries in all, the first one included; 1 turns retries off.
        on: Which errors: exception types, a function of the error, or one of tenacity's ``retry_…`` objects. By
            default those whose ``retryable`` is true.
        wait: Seconds between tries, or one of tenacity's ``wait_…`` objects. By default jittered, 5 to 200 ms.
        stop: When to give up earlier: one of tenacity's ``stop_…`` objects.

    In a client only idempotent requests are retried. As a decorator it retries the function it decorates, and by
    default only errors of this library that allow it; name others with ``on``.

    Raises:
        ConfigurationError: A parameter is wrong; says what would be right.
    """
    return Retry(attempts, on, wait, stop)
