"""Hedging: a call that takes longer than nearly all others is sent once more, elsewhere, and the first success wins.

The second copy goes out once the call has taken longer than all but four fifths of ``extra_load`` of those of the last
20 to 30 s. A budget of its own, without reserve, keeps the copies to that share when latency shifts, and the client's
retry budget must allow them as well. Idempotent calls only. An error while the other copy is out
waits for the other. The loser is cancelled, on the wire too, and counts neither as a failure nor as a short latency:
here it counts with the time it has had, which keeps the quantile where it is. Sources: Dean and Barroso, "The Tail at
Scale", 2013; Finagle, BackupRequestFilter.scala, without its threshold of 1 ms while it has no samples.

The first try runs in the caller's task, in one cancel scope. The hours at which copies are due come in the order of the
calls, so a queue and one background task keep them, and a call that ends in time costs it nothing more. Only a call
whose hour has come costs a task.
"""

from __future__ import annotations

import contextvars
import math
from collections import deque
from typing import Any, ClassVar, Final

import anyio

from ..core.classify import ResponseClass, classify, is_idempotent
from ..core.context import VAR, CallRecord
from ..core.deadlines import passed
from ..core.env import Env
from ..core.errors import ConfigurationError, DeadlineExceeded
from ..core.latencies import Latencies
from ..core.service import Filter, Service
from ..core.supervisor import Job, Supervisor
from .budget import RetryBudget, budget_of

__all__ = ["Hedge", "hedge"]

LEAST_DELAY: Final = 0.001
"""Seconds. Finagle's least as well; a timer is not worth more."""
LOOK_EVERY: Final = 1.0
"""Seconds from one reading of the quantile to the next (Finagle: 3); it takes 20 to 60 µs."""
ENOUGH: Final = 20
"""Samples without which nothing is said of a latency; and at least 1/``extra_load``, or the quantile is the maximum."""
AIM: Final = 0.8
"""Of ``extra_load``. Were it all of it, chance would have spent the budget in one case of sixteen when a call is slow,
and it takes few calls without a copy to undo what the others gain at the p99.9 (benchmarks: tail_at_scale)."""
NEVER: Final = math.inf


class Hedge(Filter[Any, Any, Any, Any]):
    """Sends a slow call twice. See `hedge` for the parameters."""

    place: ClassVar[str] = "hedge"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, extra_load: float = 0.01, beyond: float = 0.0, env: Env | None = None) -> None:
        for name, value, most in (("extra_load", extra_load, 1), ("beyond", beyond, 1e6)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ConfigurationError(
                    f"hedge({name}={value!r}): give the share of calls that may be sent twice, such as 0.01 for 1 %"
                    if name == "extra_load"
                    else f"hedge({name}={value!r}): give how many medians a call must have taken, 0 for no such rule"
                )
        if not extra_load > 0:
            raise ConfigurationError(f"hedge(extra_load={extra_load!r}): give a share above 0, such as 0.01 for 1 %")
        self.extra_load, self.beyond = extra_load, beyond
        self._in_client = env is not None
        self._env = env = env or Env()
        self._now = env.clock
        self._classify = None if env.classifier is classify else env.classifier
        self._supervisor = env.supervisor
        self._ticker: Job | None = None
        self._line: deque[_Race] = deque()
        self._scope: type[anyio.CancelScope] = anyio.CancelScope
        self._latencies = Latencies()
        self._enough = max(ENOUGH, math.ceil(1 / extra_load))
        self._delay = self._median = NEVER
        self._looked_at = self._look_at = NEVER
        self._load = RetryBudget(extra_load, 0.0)
        self._calls = 0
        self._budget = budget_of(env)
        self._sent = env.metrics.counter("hedges/sent")
        self._won = env.metrics.counter("hedges/won")
        env.metrics.gauge("hedges/after_ms", lambda: self._delay * 1e3 if self._delay < NEVER else 0.0)

    def build(self, env: Env, service: Any) -> Any:
        """With latencies, a budget and a timer of its own."""
        return Filter.bind(type(self)(self.extra_load, self.beyond, env), service)

    def bind(self, service: Service[Any, Any]) -> Service[Any, Any]:
        """Each service that it is bound to has latencies of its own."""
        return Filter.bind(type(self)(self.extra_load, self.beyond), service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call, and once more if it is slow."""
        if not is_idempotent(request) or not getattr(request, "concurrent", True):
            return await service(request)
        clock = self._now
        started = clock.now()
        self._calls += 1
        if not self._looked_at <= started < self._look_at:
            self._look(started)
        deadline = VAR.get().deadline
        # A copy that has less than the median left would be given up before it could answer.
        if self._delay == NEVER or (deadline is not None and deadline - started <= self._delay + self._median):
            return await self._alone(request, service, started)
        race = _Race(request, service, started, started + self._delay, self._scope())
        self._line.append(race)
        try:
            with race.scope:
                reply = await service(request)
                took = clock.now() - started
                if race.copy is None or self._succeeded(request, reply) or not await race.other():
                    self._latencies.record(took)
                    return reply
            # The copy has won, and its success has cancelled the scope, or the first reply is none.
            self._latencies.record(clock.now() - started)
            return self._taken(race)
        except BaseException as error:
            self._censored(error, started)
            if race.copy is None or not isinstance(error, Exception) or not await race.other():
                raise
            return self._taken(race)
        finally:
            race.done = True
            if race.copy is not None:
                race.end()
            else:
                race.request = race.service = None  # the line keeps the race until its hour, but not what it was about

    def _taken(self, race: _Race) -> Any:
        """The copy's reply becomes the call's. Both may have come in one turn of the loop, and then it is the first."""
        race.won = True
        self._won.value += 1
        return race.reply

    def _succeeded(self, request: Any, reply: Any) -> bool:
        """A reply may be a failure as well, if the client's classifier says so."""
        if self._classify is None:
            return True
        return self._classify(request, reply, None) not in (ResponseClass.FAILURE, ResponseClass.RETRYABLE)

    async def _alone(self, request: Any, service: Service[Any, Any], started: float) -> Any:
        """A call that is measured, and not sent twice."""
        try:
            reply = await service(request)
        except BaseException as error:
            self._censored(error, started)
            raise
        self._latencies.record(self._now.now() - started)
        return reply

    def _censored(self, error: BaseException, started: float) -> None:
        """A try that ran out of time took at least as long; a failure says nothing, and must not look quick."""
        expired = not isinstance(error, Exception) and passed(VAR.get().deadline, self._now)
        if expired or isinstance(error, DeadlineExceeded):
            self._latencies.record(self._now.now() - started)

    def _look(self, now: float) -> None:
        """Read the quantile, and see that the timer runs."""
        self._looked_at = now
        # What anyio makes of `CancelScope` depends on the event loop; asking it for each call would cost 1 µs.
        self._scope = type(anyio.CancelScope())
        self._pay_in(now)
        self._latencies.roll(now)
        if self._latencies.count < self._enough:
            self._delay = self._median = NEVER
            self._look_at = now + LOOK_EVERY / 10
        else:
            self._median, slow = self._latencies.quantiles(0.5, 1 - AIM * self.extra_load)
            self._delay = max(LEAST_DELAY, slow, self.beyond * self._median)
            self._look_at = now + LOOK_EVERY
        if not self._in_client and self._supervisor.elsewhere:
            # A decorated function may be called on one event loop after another, each with a time of its own.
            self._supervisor = Supervisor("hedge")
            self._line.clear()
            self._ticker = None
        runs = self._ticker is not None and self._ticker.task is not None
        if self._delay < NEVER and not runs and not self._supervisor.closed:
            self._ticker = self._supervisor.start(self._tick, name="hedges")

    def _pay_in(self, now: float) -> None:
        """The calls since the last time, all at once: a deposit for each would cost each 0.3 µs."""
        self._load.deposit(now, self._calls)
        self._calls = 0

    async def _tick(self) -> None:
        """Tell the hours for as long as there are calls: had there been one after `_look_at`, it would have looked."""
        line, now = self._line, self._now.now()
        while line or now < self._look_at:
            while line and (line[0].done or line[0].due <= now):
                race = line.popleft()
                if not race.done:
                    self._due(race)
            # No call that comes meanwhile is due before the delay is over.
            wait = min(self._delay, LOOK_EVERY, line[0].due - now if line else NEVER)
            await anyio.sleep(max(wait, LEAST_DELAY))
            now = self._now.now()

    # --- the second copy ----------------------------------------------------------------------------------------------

    def _due(self, race: _Race) -> None:
        """The call has taken so long that it may be sent again. Runs in the timer's task."""
        if not self._supervisor.closed and race.context.run(self._allows, race):
            race.begin(race.context[VAR].record if VAR in race.context else None)
            race.copy = self._supervisor.start(self._copy, race, name="hedge", context=race.context)

    def _allows(self, race: _Race) -> bool:
        """May the copy be sent? If so it is paid for, and has its turn. Runs in the context of the call."""
        context = VAR.get()
        now, note = self._now.now(), self._env.events.note
        waited = f"no reply in {(now - race.started) * 1e3:.1f} ms"
        record = context.record
        if record is not None and record.endpoint is None:
            note("no_hedge", "unsent", f"{waited}, and it waits for an endpoint")
        elif context.deadline is not None and context.deadline - now <= self._median:
            note("no_hedge", "deadline", f"{waited}, and less is left than the median of {self._median * 1e3:.1f} ms")
        elif not self._affordable(now):
            note("no_hedge", "extra_load", f"{waited}, and {self.extra_load:.2%} of the calls were sent twice already")
        elif not self._budget.turns.try_take():
            note("no_hedge", "budget", f"{waited}, and {self._budget.turns.taken} retries are under way")
        elif not self._budget.try_withdraw(now):
            self._budget.turns.give_back()
            note("no_hedge", "budget", f"{waited}, and the retry budget is spent")
        else:
            self._load.try_withdraw(now)
            self._sent.value += 1
            first = "" if record is None else record.endpoint
            note("hedge", "slow", f"{waited}; nearly all take less than {self._delay * 1e3:.1f} ms", endpoint=first)
            return True
        return False

    def _affordable(self, now: float) -> bool:
        self._pay_in(now)
        return self._load.balance(now) > 0

    async def _copy(self, race: _Race) -> None:
        """Make the call a second time, in the context of the first."""
        try:
            if race.done:
                return  # it was answered before this task had its first turn
            if race.fork is not None:
                VAR.set(VAR.get().evolve(record=race.fork))
            race.reply = await race.service(race.request)
            if not self._succeeded(race.request, race.reply):
                return
            race.succeeded = True
            race.scope.cancel()
        except Exception:  # noqa: S110 - the account of the try says what it was; the first try's own error is raised
            pass
        finally:
            self._budget.turns.give_back()
            race.over.set()

    def __repr__(self) -> str:
        beyond = f", beyond={self.beyond:g}" if self.beyond else ""
        return f"hedge(extra_load={self.extra_load:g}{beyond})"


class _Race:
    """A call that may be sent twice: its first try, and what the copy came to."""

    __slots__ = (
        "context",
        "copy",
        "done",
        "due",
        "fork",
        "over",
        "record",
        "reply",
        "request",
        "scope",
        "service",
        "started",
        "succeeded",
        "won",
    )

    copy: Job | None
    over: anyio.Event
    fork: CallRecord | None
    record: CallRecord | None
    reply: Any
    succeeded: bool
    won: bool

    def __init__(self, request: Any, service: Any, started: float, due: float, scope: anyio.CancelScope) -> None:
        self.request = request
        self.service = service
        self.started = started
        self.due = due
        self.scope = scope
        self.context = contextvars.copy_context()
        self.copy = None
        self.done = False

    def begin(self, record: CallRecord | None) -> None:
        """There will be a copy. What only it needs is made now, so that other calls do not pay for it."""
        self.over = anyio.Event()
        self.record = record
        self.fork = None
        if record is not None:
            record.retries += 1
            self.fork = record.fork()
        self.reply = None
        self.succeeded = self.won = False

    async def other(self) -> bool:
        """The first try has failed: wait for the copy, and say whether it succeeded."""
        await self.over.wait()
        return self.succeeded

    def end(self) -> None:
        """The call is over: give up the copy if it is still out, and take over what it has to tell."""
        if self.copy is not None:
            self.copy.cancel()
        if self.record is not None and self.fork is not None:
            if self.won:
                self.record.endpoint, self.fork.endpoint = self.fork.endpoint, None
            self.record.join(self.fork)


def hedge(extra_load: float = 0.01, *, beyond: float = 0.0) -> Hedge:
    """Send a slow call once more, elsewhere; the first success wins, and the other is cancelled.

    Args:
        extra_load: The share of calls that may be sent twice, above 0, at most 1. With 0.01, the slowest 1 %.
        beyond: Besides, only what has taken this many medians. With 3, a healthy service whose latencies lie close
            together is sent nothing twice, and one slow endpoint is.

    Only idempotent requests are hedged, and none before there are enough samples to know what slow is. Nor are those
    whose attribute ``concurrent`` is false: what both copies would read can be read by one at a time. As a decorator it
    calls the function it decorates a second time.

    Raises:
        ConfigurationError: A parameter is wrong; says what would be right.
    """
    return Hedge(extra_load, beyond)
