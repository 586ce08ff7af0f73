"""Outlier detection: an endpoint that does much worse than the others is left alone for a while.

Failure accrual judges an endpoint by itself; this compares it with its peers, so it finds the one that fails 15 % of
its requests where the others fail 1 %, and takes nobody out when all fail alike. Every `interval` a sweep looks at what
each endpoint has done since the last one, in this order:

1. *Success rate*: of the endpoints with enough requests, if there are enough of them, those are ejected whose share of
   successes is below the mean by more than `deviation` standard deviations (of the population).
2. *Failure percentage*: likewise those of which more than `failure_rate` failed; exactly as many is not more.
3. Who is not ejected gets its multiplier reduced by one. Who is, and has been for the base time, multiplied, returns.

Both stop as soon as `max_ejected` of the endpoints are out, which is looked at before each ejection: so one endpoint
may always be ejected. Whoever is ejected keeps its connection, serves if there is no other, and is not ejected again.

Source: gRPC proposal A50, which is a subset of Envoy's outlier detection.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, ClassVar

import anyio

from ..core.breaking import Outcome, outcome_of
from ..core.classify import classify
from ..core.context import VAR
from ..core.deadlines import passed
from ..core.env import Env
from ..core.errors import ConfigurationError
from ..core.service import Filter, Service, Status

__all__ = ["Detector", "Host", "OutlierDetection", "Rules", "outlier_detection"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What makes an outlier; see `outlier_detection`."""

    interval: float
    out_for: tuple[float, float]
    max_ejected: float
    deviation: float | None
    deviation_requests: int
    failure_rate: float | None
    failure_requests: int
    min_hosts: int
    enforce: float


class Host:
    """What one endpoint has done since the last sweep, and whether it is out."""

    __slots__ = ("ejected_at", "failed", "multiplier", "succeeded")

    def __init__(self) -> None:
        self.succeeded = self.failed = 0
        self.multiplier = 0
        self.ejected_at: float | None = None


class Detector:
    """The sweep. Pure: ``now`` and ``rng`` are given.

    Args:
        rules: What makes an outlier.
        eject: Called with a host, the rule that it broke (``success_rate`` or ``failure_percentage``), and the numbers.
        reinstate: Called with a host whose time is over.
    """

    def __init__(
        self, rules: Rules, eject: Callable[[Any, str, str], object], reinstate: Callable[[Any], object]
    ) -> None:
        self.rules = rules
        self.hosts: dict[Host, None] = {}
        self.ejected = 0
        self._eject_now = eject
        self._reinstate = reinstate

    def add(self, host: Host) -> None:
        """An endpoint is there."""
        self.hosts[host] = None

    def remove(self, host: Host) -> None:
        """It is gone."""
        if host in self.hosts:
            del self.hosts[host]
            self.ejected -= host.ejected_at is not None

    def sweep(self, now: float, rng: random.Random) -> None:
        """Compare, eject, and take back."""
        rules = self.rules
        counts = {host: (host.succeeded, host.succeeded + host.failed) for host in self.hosts}
        for host in counts:
            host.succeeded = host.failed = 0
        if rules.deviation is not None:
            rates = self._rates(counts, rules.deviation_requests)
            if rates:
                mean, spread = fmean(rates.values()), pstdev(rates.values())
                least = mean - rules.deviation * spread
                why = f"below {100 * least:.1f} %, which is {rules.deviation:g} deviations under the mean of all"
                low = [(host, f"{100 * rate:.1f} % succeeded, {why}") for host, rate in rates.items() if rate < least]
                self._eject(low, "success_rate", now, rng)
        if rules.failure_rate is not None:
            rates = self._rates(counts, rules.failure_requests)
            # Failures are counted, not 1 minus the rate: that would round 85 % to a little more or less.
            failed = {host: (counts[host][1] - counts[host][0]) / counts[host][1] for host in rates}
            high = [
                (host, f"{100 * share:.1f} % failed, over {100 * rules.failure_rate:g} %")
                for host, share in failed.items()
                if share > rules.failure_rate
            ]
            self._eject(high, "failure_percentage", now, rng)
        first, longest = rules.out_for
        for host in counts:
            if host.ejected_at is None:
                host.multiplier = max(0, host.multiplier - 1)
            elif now > host.ejected_at + min(first * host.multiplier, longest):
                host.ejected_at = None
                self.ejected -= 1
                self._reinstate(host)

    def _rates(self, counts: dict[Host, tuple[int, int]], least: int) -> dict[Host, float]:
        """The share of successes of each host with enough requests; empty if there are too few of them."""
        rates = {host: good / total for host, (good, total) in counts.items() if total >= least}
        return rates if len(rates) >= self.rules.min_hosts else {}

    def _eject(self, outliers: list[tuple[Host, str]], code: str, now: float, rng: random.Random) -> None:
        for host, why in outliers:
            if self.ejected >= 1 and self.ejected >= self.rules.max_ejected * len(self.hosts):
                return
            if host.ejected_at is None and (self.rules.enforce >= 1 or rng.random() < self.rules.enforce):
                host.ejected_at = now
                host.multiplier += 1
                self.ejected += 1
                self._eject_now(host, code, why)


class _Endpoint(Host):
    """A host, and where to say what becomes of it."""

    __slots__ = ("env",)

    def __init__(self, env: Env) -> None:
        super().__init__()
        self.env = env


class _Sweeper:
    """The one sweep of a client."""

    def __init__(self, rules: Rules, env: Env) -> None:
        self._env = env
        self.detector = Detector(rules, self._eject, self._reinstate)
        self.running = False
        metrics = env.metrics.scope("outlier_detection")
        self._ejections = {
            code: metrics.counter(f"ejections_{code}") for code in ("success_rate", "failure_percentage")
        }
        metrics.gauge("ejections_active", lambda: self.detector.ejected)

    def start(self) -> None:
        """Sweep from now on."""
        if not self._env.supervisor.closed:
            self.running = True
            self._env.supervisor.start(self._run, name="outlier detection")

    async def _run(self) -> None:
        try:
            while True:
                await anyio.sleep(self.detector.rules.interval)
                self.detector.sweep(self._env.clock.now(), self._env.rng)
        finally:
            self.running = False

    def _eject(self, host: _Endpoint, code: str, why: str) -> None:
        first, longest = self.detector.rules.out_for
        back = min(first * host.multiplier, longest)
        self._ejections[code].value += 1
        # It would serve if there were no other, and keeps its connection for when it is taken back.
        host.env.health.mark("outlier", Status.BUSY, f"{why}; back after {back:g} s", serves=True)
        self._env.events.note("eject", f"outlier_{code}", why, endpoint=host.env.address, call=False)

    def _reinstate(self, host: _Endpoint) -> None:
        host.env.health.mark("outlier", Status.OPEN)
        self._env.events.note("revive", "outlier", endpoint=host.env.address, call=False)


class OutlierDetection(Filter[Any, Any, Any, Any]):
    """Counts what an endpoint does, for the sweep. See `outlier_detection`."""

    place: ClassVar[str] = "outlier"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, rules: Rules, env: Env | None = None) -> None:
        self.rules = rules
        self._sweeper: _Sweeper | None = None
        self._env = env = env or Env()
        self._host = _Endpoint(env)
        self._judge_replies = env.classifier is not classify

    def build(self, env: Env, service: Any) -> Any:
        """One for each endpoint, and one sweep for all endpoints of the client."""
        mine = type(self)(self.rules, env)
        sweeper = mine._sweeper = env.shared(_Sweeper, lambda: _Sweeper(self.rules, env))
        sweeper.detector.add(mine._host)
        env.closers.append(lambda: sweeper.detector.remove(mine._host))
        return mine.bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Send it, and count how it ends."""
        if self._sweeper is not None and not self._sweeper.running:
            self._sweeper.start()
        try:
            reply = await service(request)
        except Exception as error:
            self._count(request, None, error)
            raise
        except BaseException:
            if passed(VAR.get().deadline, self._env.clock):
                self._host.failed += 1
            raise
        if self._judge_replies:
            self._count(request, reply, None)
        else:
            self._host.succeeded += 1
        return reply

    def _count(self, request: Any, reply: Any, error: Exception | None) -> None:
        outcome = outcome_of(self._env.classifier, request, reply, error)
        if outcome is Outcome.SUCCESS:
            self._host.succeeded += 1
        elif outcome is not Outcome.NOTHING:
            self._host.failed += 1

    def __repr__(self) -> str:
        r = self.rules
        return (
            f"outlier_detection(interval={r.interval:g}, out_for=({r.out_for[0]:g}, {r.out_for[1]:g}), "
            f"max_ejected={r.max_ejected:g}, deviation={_show(r.deviation)}, failure_rate={_show(r.failure_rate)})"
        )


def outlier_detection(
    *,
    interval: float = 10.0,
    out_for: tuple[float, float] = (30.0, 300.0),
    max_ejected: float = 0.1,
    deviation: float | None = 1.9,
    deviation_requests: int = 100,
    failure_rate: float | None = 0.85,
    failure_requests: int = 50,
    min_hosts: int = 5,
    enforce: float = 1.0,
) -> OutlierDetection:
    """Leave an endpoint alone that does much worse than the others. Off by default; all values are those of gRPC's A50.

    Args:
        interval: Seconds from one sweep to the next.
        out_for: Seconds that an ejection lasts, times how often there was one of late, and at most.
        max_ejected: The share of the endpoints that may be out at once, between 0 and 1; one always may.
        deviation: So many standard deviations below the mean is an outlier; ``None`` switches this rule off.
        deviation_requests: An endpoint with fewer requests in a sweep is not compared by that rule.
        failure_rate: More failures than this share are an outlier's, between 0 and 1; ``None`` switches it off.
        failure_requests: An endpoint with fewer requests in a sweep is not looked at by that rule.
        min_hosts: With fewer endpoints that have enough requests, a rule ejects nobody.
        enforce: The share of outliers that are really ejected, between 0 and 1, to try it out with care.

    Raises:
        ConfigurationError: One makes no sense.
    """

    def check(right: bool, what: str, value: object, give: str) -> None:
        if not right:
            raise ConfigurationError(f"outlier_detection({what}={value!r}): give {give}")

    check(0 < interval < 1e9, "interval", interval, "seconds, above 0")
    fit = isinstance(out_for, tuple) and len(out_for) == 2 and 0 < out_for[0] <= out_for[1] < 1e9
    check(fit, "out_for", out_for, "(base, longest) in seconds, above 0, the longer one last")
    check(0 <= max_ejected <= 1, "max_ejected", max_ejected, "a share, such as 0.1 for 10 %")
    check(deviation is None or deviation > 0, "deviation", deviation, "a number of deviations above 0, or None")
    check(failure_rate is None or 0 <= failure_rate < 1, "failure_rate", failure_rate, "a share below 1, or None")
    check(deviation is not None or failure_rate is not None, "failure_rate", None, "this or deviation=")
    for what, number in (
        ("deviation_requests", deviation_requests),
        ("failure_requests", failure_requests),
        ("min_hosts", min_hosts),
    ):
        check(isinstance(number, int) and number >= 1, what, number, "a whole number, 1 or more")
    check(0 <= enforce <= 1, "enforce", enforce, "a share, 1 for all")
    return OutlierDetection(
        Rules(
            interval=interval,
            out_for=out_for,
            max_ejected=max_ejected,
            deviation=deviation,
            deviation_requests=deviation_requests,
            failure_rate=failure_rate,
            failure_requests=failure_requests,
            min_hosts=min_hosts,
            enforce=enforce,
        )
    )


def _show(value: float | None) -> str:
    return "None" if value is None else f"{value:g}"
