"""The concurrency limit: a server that is full says so at once, and the client goes elsewhere.

A refusal before any work is done costs next to nothing and is safe to repeat, so it becomes a nack on the wire, which
clients requeue under their budget. Finagle: ConcurrentRequestFilter (off by default there; on here, because a Python
process that takes everything it is offered first gets slow and then gets killed).

The limit is a number, or follows latency and event-loop lag (`adaptive`, `lag`). In front of it may stand a short queue
(`waiting`); a place that becomes free is handed to whoever is next, so it is never lost and never given twice.

A client's reply that lasts beyond the call, a stream or a body that is still being read, has its place until it ends.

The least important go first: sheddable requests have nine tenths of the limit, so that more important ones find a
place, and in the queue whoever is more important takes the next place, or the last seat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Final

import anyio

from ..core.context import VAR, Context
from ..core.deadlines import kept, passed
from ..core.env import Env
from ..core.errors import ConfigurationError, DeadlineExceeded, MeshError, Rejected
from ..core.priority import Priority
from ..core.service import Call, Filter, Lasting, Service
from .adaptive import Adaptive, AdaptiveLimit
from .lag import LoopLag
from .waiting import INTERVAL, Waiter, WaitingLine

__all__ = ["ConcurrencyLimit", "concurrency_limit"]

DEFAULT = 1000
"""Requests at once. One core of Python answers some 10,000 small calls a second: 1,000 at once are 100 ms of work."""
SHEDDABLE_SHARE: Final = 0.9
"""Of the limit; the rest is kept for what matters more."""
FEW: Final = 10
"""May wait for an adaptive limit, however low it is."""
SMOOTHING: Final = 0.1
"""Of each new service time in the typical one."""
GO: Final = "go"
_SHEDDABLE: Final = Priority.SHEDDABLE
_WHY: Final = {
    "full": "no place is free",
    "codel": "no place became free soon enough",
    "displaced": "it had to make room for what matters more",
    "deadline": "its deadline would pass before it could be done",
    "lag": "the event loop is late",
}


class ConcurrencyLimit(Filter[Any, Any, Any, Any]):
    """Refuses requests beyond a number at once. See `concurrency_limit`.

    Attributes:
        limit: How many may run at once now.
        active: How many do.
    """

    place: ClassVar[str] = "limit"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, limit: int | Adaptive = DEFAULT, queue: int | None = None, env: Env | None = None) -> None:
        if not isinstance(limit, Adaptive) and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ConfigurationError(
                f"concurrency_limit({limit!r}): give a whole number of requests, 1 or more, or adaptive()"
            )
        if queue is not None and (isinstance(queue, bool) or not isinstance(queue, int) or queue < 0):
            raise ConfigurationError(
                f"concurrency_limit(queue={queue!r}): give a whole number of requests that may wait, 0 or more"
            )
        env = env or Env()
        self._spec = limit
        self._queue = queue
        self._policy = AdaptiveLimit(limit, env.rng) if isinstance(limit, Adaptive) else None
        self._line = WaitingLine()
        self._waits = bool(queue) if queue is not None else self._policy is not None
        self._plain = not self._waits and self._policy is None
        self._lasting: Callable[[Any], Lasting | None] | None = env.params.get(Lasting)
        self._lag: LoopLag | None = None
        if self._policy is not None and env.kind == "server" and env.label:
            self._lag = env.shared(LoopLag, lambda: LoopLag(env))
        self._typical = 0.0
        self._room = queue or 0
        self.active = 0
        self.limit = self._easy = self._steady = 0
        self._env, self._clock = env, env.clock
        self._resize()
        metrics = env.metrics.scope("limit")
        if env.address is not None:  # an endpoint of a client: its numbers are its own, and leave with it
            metrics = env.metrics.scope("endpoints", str(env.address), "limit")
            env.closers.append(metrics.drop)
        self._rejected = metrics.counter("rejected")
        metrics.gauge("concurrency", lambda: self.active)
        if not self._plain:
            metrics.gauge("limit", lambda: self.limit)
            metrics.gauge("queue", lambda: len(self._line))

    def build(self, env: Env, service: Any) -> Any:
        """Counts this server's requests, or those to this endpoint."""
        return type(self)(self._spec, self._queue, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle it if there is room, or soon will be.

        Raises:
            Rejected: There is none.
            DeadlineExceeded: Its deadline passed while it waited.
        """
        if self._plain:
            if self.active >= self._easy and (self.active >= self.limit or VAR.get().priority is _SHEDDABLE):
                raise self._refusal(request, "full")
            self.active += 1
            if hasattr(request, "on_complete"):
                return await self._until_complete(request, service, None)
            if self._lasting is not None:
                return await self._until_ended(request, service, None)
            try:
                return await service(request)
            finally:
                self.active -= 1
        lag = self._lag
        if lag is not None:
            lag.busy = True
            lag.gate.arrived(VAR.get().waited)
            if not lag.running:
                lag.start()
        if self.active < self._easy and (lag is None or not lag.gate.overloaded):
            self.active += 1
        else:
            await self._enter(request)
        began = self._clock.now()
        if hasattr(request, "on_complete"):
            return await self._until_complete(request, service, began)
        if self._lasting is not None:
            return await self._until_ended(request, service, began)
        try:
            reply = await service(request)
        except BaseException as error:
            self._failed(error)
            raise
        else:
            self._succeeded(began)
            return reply
        finally:
            self._leave()

    async def _until_complete(self, request: Any, service: Service[Any, Any], began: float | None) -> Any:
        """Handle a request that may be over before the service returns, and has its place until it is."""
        inside = True

        def complete() -> None:
            nonlocal inside
            if inside:
                inside = False
                if began is not None:
                    self._succeeded(began)
                self._leave()

        request.on_complete(complete)
        try:
            reply = await service(request)
        except BaseException as error:
            if inside:
                inside = False
                if began is not None:
                    self._failed(error)
                self._leave()
            raise
        complete()
        return reply

    async def _until_ended(self, request: Any, service: Service[Any, Any], began: float | None) -> Any:
        """Send a request whose reply may last beyond the call, and then has its place until it ends."""
        held: Lasting | None = None
        try:
            reply = await service(request)
            if began is not None:
                self._succeeded(began)
            if self._lasting is not None:
                held = self._lasting(reply)
            return reply
        except BaseException as error:
            if began is not None:
                self._failed(error)
            raise
        finally:
            if held is None:
                self._leave()
            else:
                held.on_end(lambda _: self._leave())

    # --- coming -------------------------------------------------------------------------------------------------------

    async def _enter(self, request: Any) -> None:
        context = VAR.get()
        priority = context.priority
        if self._lag is not None and not self._lag.gate.admits(priority, self._clock.now(), context.waited):
            raise self._refusal(request, "lag")
        if self.active < self._places(priority):
            self.active += 1
            return
        if not self._waits:
            raise self._refusal(request, "full")
        verdict = await self._wait(context)
        if verdict != GO:
            if verdict == "deadline" and passed(context.deadline, self._clock):
                raise self._expired(request)
            raise self._refusal(request, verdict)

    async def _wait(self, context: Context) -> str:
        """Wait for a place, and give the verdict: ``go``, or why not. Whoever waits holds none, until ``go``."""
        now = self._clock.now()
        patience, late = self._line.interval, "codel"
        if context.deadline is not None:
            left = context.deadline - now - self._typical
            if left <= 0:
                return "deadline"
            if left < patience:
                patience, late = left, "deadline"
        self._dismiss_late(now)
        line = self._line
        waiter = Waiter(context.priority, now, anyio.Event())
        pushed_out = line.push(waiter, self._room)
        if pushed_out is waiter:
            return "full"
        if pushed_out is not None:
            # The oldest of a standing queue would soon have been dismissed anyway; that it is a newer one of its own
            # kind that takes its seat is no displacement.
            _tell(pushed_out, "displaced" if pushed_out.priority < waiter.priority else "codel")
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + patience):
                await waiter.event.wait()
        except BaseException:
            if waiter.verdict == GO:  # the place was handed over in the moment of the cancellation
                self._leave()
            else:
                line.remove(waiter, self._clock.now())
            raise
        if waiter.verdict is None:
            line.remove(waiter, self._clock.now())
            waiter.verdict = late
        return waiter.verdict

    def _places(self, priority: Priority) -> int:
        if priority is _SHEDDABLE:
            return self._easy
        # While the baseline is checked, only critical requests have all of the limit.
        return self._steady if priority is Priority.CRITICAL else self.limit

    # --- going --------------------------------------------------------------------------------------------------------

    def _succeeded(self, began: float) -> None:
        now = self._clock.now()
        took = now - began
        policy = self._policy
        if policy is None:
            self._typical += SMOOTHING * (took - self._typical)
            self._line.interval = max(INTERVAL, self._typical)
        elif policy.finished(now, took, self.active, self._lag is not None and self._lag.gate.overloaded):
            self._resize()

    def _failed(self, error: BaseException) -> None:
        policy = self._policy
        if policy is None:
            return
        if isinstance(error, DeadlineExceeded) or (
            not isinstance(error, Exception) and passed(VAR.get().deadline, self._clock)
        ):
            policy.dropped(self.active)
        if policy.failed(self._clock.now()):
            self._resize()

    def _resize(self) -> None:
        policy = self._policy
        if policy is not None:
            self.limit, self._steady = policy.limit, policy.steady
            self._room = max(FEW, policy.steady) if self._queue is None else self._queue
            self._typical = policy.baseline or 0.0
            self._line.interval = max(INTERVAL, self._typical)
        elif isinstance(self._spec, int):
            self.limit = self._steady = self._spec
        self._easy = math.ceil(SHEDDABLE_SHARE * self.limit)

    def _leave(self) -> None:
        self.active -= 1
        line = self._line
        if line:
            now = self._clock.now()
            self._dismiss_late(now)
            while (best := line.best(now)) is not None and self.active < self._places(best.priority):
                line.remove(best, now)
                self.active += 1
                _tell(best, GO)

    def _dismiss_late(self, now: float) -> None:
        while (late := self._line.late(now)) is not None:
            _tell(late, "codel")

    # --- refusing -----------------------------------------------------------------------------------------------------

    def _refusal(self, request: Any, code: str) -> MeshError:
        self._rejected.value += 1
        label = self._env.label
        if self._env.kind == "server" and label:
            refusal = Rejected(f"server {label!r} is at its limit of {self.limit} requests at once")
        else:
            refusal = Rejected(f"over the limit of {self.limit} at once")
        if code == "lag" and self._lag is not None:
            # What has piled up in the event loop takes about as long as the loop is late.
            refusal.retry_after = self._lag.gate.lag
            refusal.args = (f"server {label!r} is overloaded: its event loop is {self._lag.gate.lag:.3f} s late",)
        elif code != "full":
            refusal.args = (f"{refusal.args[0]}: {_WHY[code]}",)
        return self._noted(refusal, request, code)

    def _expired(self, request: Any) -> MeshError:
        self._rejected.value += 1
        error = kept("a place under the concurrency limit")
        error.processed = False
        return self._noted(error, request, "deadline")

    def _noted(self, error: MeshError, request: Any, code: str) -> MeshError:
        self._env.events.note("shed", code, _WHY[code], endpoint=self._env.address or "")
        if isinstance(request, Call):
            # The call of a function was refused, which need not be the whole of the request that is being served: a
            # server must not promise its client that nothing was done.
            error.processed = None
        return error

    def __repr__(self) -> str:
        queue = "" if self._queue is None else f", queue={self._queue}"
        return f"concurrency_limit({self._spec!r}{queue})"


def _tell(waiter: Waiter, verdict: str) -> None:
    waiter.verdict = verdict
    waiter.event.set()


def concurrency_limit(limit: int | Adaptive = DEFAULT, *, queue: int | None = None) -> ConcurrencyLimit:
    """Refuse requests beyond ``limit`` at once, before any work is done.

    Args:
        limit: A number of requests; or ``adaptive()``, to find it from the latency.
        queue: How many may wait for a place, for at most 100 ms, or the time that a request takes if that is more. By
            default none may wait for a fixed limit, and as many as the limit itself, 10 at least, for an adaptive one.

    Raises:
        ConfigurationError: ``limit`` is no whole number above 0, or ``queue`` none from 0.
    """
    return ConcurrencyLimit(limit, queue)
