"""Failure accrual: an endpoint that keeps failing is left alone for a while, and then asked with one real request.

The rules are in `meshlib.core.thresholds`, the states in `meshlib.core.breaking`; this is the shell that counts what an
endpoint does, tells its health, and waits. It refuses nothing: an endpoint that is out is avoided by the balancer while
there is another, and used all the same when there is none, so a client of one endpoint loses nothing by it.

While a probe is due the endpoint counts as ready, so the balancer sends it a request when its turn comes; from then on
it is out again until the probe has ended. Whatever else reaches it while it is out changes nothing.

Finagle: liveness/FailureAccrualFactory.scala, FailureAccrualPolicy.scala. Three differences: the share of successes is
an exact count; refusals (a nack, HTTP's 429) count for the share alone, as in Linkerd; and a lost connection counts
once in the run, however many calls were on it, since it is one failure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import anyio

from ..core.backoff import Backoff
from ..core.breaking import CLOSED, Circuit, Outcome, in_words, outcome_of
from ..core.classify import classify
from ..core.context import VAR
from ..core.deadlines import passed
from ..core.env import Env
from ..core.errors import MeshError
from ..core.service import Filter, Lasting, Service, Status
from ..core.supervisor import Job
from ..core.thresholds import FIRST_OUT, LAST_OUT, Thresholds, backoff_of, shown_backoff

__all__ = ["FailureAccrual", "failure_accrual"]


class FailureAccrual(Filter[Any, Any, Any, Any]):
    """Takes an endpoint out that fails too often. See `failure_accrual`."""

    place: ClassVar[str] = "accrual"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, thresholds: Thresholds, backoff: Backoff, env: Env | None = None) -> None:
        self.thresholds = thresholds
        self.backoff = backoff
        self.circuit = Circuit(thresholds, backoff)
        self._timed = env is not None
        self._env = env = env or Env()
        self._clock = env.clock
        self._judge_replies = env.classifier is not classify
        self._lasting: Callable[[Any], Lasting | None] | None = env.params.get(Lasting)
        self._timer: Job | None = None
        metrics = env.metrics.scope("failure_accrual")
        self._removals, self._revivals = metrics.counter("removals"), metrics.counter("revivals")
        self._probes, self._removed_for = metrics.counter("probes"), metrics.counter("removed_for_ms")

    def build(self, env: Env, service: Any) -> Any:
        """One for each endpoint."""
        mine = type(self)(self.thresholds, self.backoff, env)
        env.closers.append(mine.close)
        return mine.bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Send it, and take note of how it ends."""
        circuit = self.circuit
        mine = circuit.now_valid if circuit.state is CLOSED else self._pass()
        try:
            reply = await service(request)
        except Exception as error:
            self._ended(mine, request, None, error)
            raise
        except BaseException:
            # A deadline that passed while an answer was awaited is a failure; a caller that changed its mind is none.
            if passed(VAR.get().deadline, self._clock):
                self._failed(mine, Outcome.FAILURE, "no reply before the deadline")
            else:
                self._said_nothing(mine)
            raise
        if self._lasting is not None and (lasting := self._lasting(reply)) is not None:
            self._lasts(mine, request, reply, lasting)
        elif self._judge_replies:
            self._ended(mine, request, reply, None)
        elif circuit.succeeded(mine, self._clock.now()):
            self._revived()
        return reply

    def _lasts(self, mine: int, request: Any, reply: Any, lasting: Lasting) -> None:
        """A reply that lasts beyond the call counts once, at its end; but a probe is answered by its beginning."""
        circuit = self.circuit
        if self._judge_replies and outcome_of(self._env.classifier, request, reply, None) is not Outcome.SUCCESS:
            self._ended(mine, request, reply, None)
            return
        begun, probe = False, circuit.state is not CLOSED

        def ended(error: Exception | None) -> None:
            if not begun:  # it is over already
                self._ended(mine, request, None if error else reply, error)
            elif circuit.state is CLOSED and (error is not None or not probe):
                # What has broken off now is news of now, however long ago it began.
                current = mine if circuit.heeds(mine) else circuit.now_valid
                self._ended(current, request, None if error else reply, error)

        lasting.on_end(ended)
        begun = True
        if probe and circuit.succeeded(mine, self._clock.now()):
            self._revived()

    def _pass(self) -> int:
        mine = self.circuit.probe(self._clock.now())
        if mine is None:
            return Circuit.STRAGGLER
        self._stop_timer()
        self._probes.value += 1
        self._mark(f"{self.circuit.reason}; a probe is under way")
        self._env.events.note("probe", "accrual", self.circuit.reason, endpoint=self._env.address or "")
        return mine

    def _ended(self, mine: int, request: Any, reply: Any, error: Exception | None) -> None:
        outcome = outcome_of(self._env.classifier, request, reply, error)
        if outcome is Outcome.SUCCESS:
            if self.circuit.succeeded(mine, self._clock.now()):
                self._revived()
        elif outcome is Outcome.NOTHING:
            self._said_nothing(mine)
        else:
            asked = error.retry_after if isinstance(error, MeshError) else None
            self._failed(mine, outcome, in_words(error), asked)

    def _failed(self, mine: int, outcome: Outcome, what: str, asked: float | None = None) -> None:
        circuit, env = self.circuit, self._env
        now = self._clock.now()
        code = circuit.failed(mine, outcome, now, env.rng, what, asked or 0.0)
        if not code:
            return
        if code != "probe":
            self._removals.value += 1
        wait = circuit.until - now
        self._mark(f"{circuit.reason}; next probe in {wait:.1f} s")
        env.events.note("eject", code, circuit.reason, endpoint=env.address or "", call=False)
        if self._timed and not env.supervisor.closed:
            self._stop_timer()
            self._timer = env.supervisor.start(self._wait, circuit.until, wait, name=f"next probe of {env.address}")

    async def _wait(self, until: float, seconds: float) -> None:
        await anyio.sleep(seconds)
        if self.circuit.wait_is_over(until):
            self._timer = None
            self._env.health.mark("accrual", Status.OPEN)

    def _revived(self) -> None:
        env, circuit = self._env, self.circuit
        out_for = self._clock.now() - circuit.since
        self._revivals.value += 1
        self._removed_for.value += round(1000 * out_for)
        env.health.mark("accrual", Status.OPEN)
        env.events.note("revive", "accrual", f"out for {out_for:.1f} s", endpoint=env.address or "", call=False)

    def _said_nothing(self, mine: int) -> None:
        if self.circuit.nothing(mine):
            self._env.health.mark("accrual", Status.OPEN)

    def _mark(self, reason: str) -> None:
        # It would serve if there were no other: nothing is refused here.
        self._env.health.mark("accrual", Status.BUSY, reason, serves=True)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """The endpoint is gone: wait for nothing more."""
        self._timed = False
        self._stop_timer()

    def __repr__(self) -> str:
        return f"failure_accrual({self.thresholds}, out_for={shown_backoff(self.backoff)})"


def failure_accrual(
    *,
    failures: int | None = 5,
    success_rate: float | None = 0.8,
    window: float = 30.0,
    min_requests: int = 5,
    out_for: tuple[float, float] | Backoff = (FIRST_OUT, LAST_OUT),
) -> FailureAccrual:
    """Leave an endpoint alone that fails, as far as there are others. On by default, with these values.

    Args:
        failures: So many in a row; ``None`` for whatever number.
        success_rate: A lower share of successes within ``window``, between 0 and 1; ``None`` for whatever share.
        window: Seconds over which that share is counted.
        min_requests: The share says nothing below so many requests within ``window``.
        out_for: Seconds until the first probe, and at most: equal-jittered, doubled with each probe that fails, and
            small again after one that succeeds. Or any `Backoff`.

    Raises:
        ConfigurationError: One makes no sense, or nothing would ever take an endpoint out.
    """
    return FailureAccrual(Thresholds(failures, success_rate, window, min_requests), backoff_of("out_for", out_for))
