"""A short outage that retries make last for ever, and the same outage with budgets, deadlines and cancellation."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import anyio

import meshlib
from benchmarks.scenarios.model import Chart, Outcome, Point, check
from meshlib.core.env import Env
from meshlib.core.service import Filter, Service
from meshlib.core.stack import Stack
from meshlib.core.supervisor import Supervisor
from meshlib.testing import Calls, Clients, Load, Report, Scenario, Servers
from meshlib.testing.faults import Fault

TITLE = "Metastable failure: a 10 s outage, and what follows"
ABOUT = (
    "A server with 30 workers, 100 ms of work a request and one queue (300 requests/s) stops working for 10 s. Naive "
    "clients retry three times at once, each try waiting 1 s, and the naive server works off what nobody waits for any "
    "more; ours are the default client and the default server, with the same patience. Source: Bronson et al., "
    "*Metastable Failures in Distributed Systems*, HotOS 2021."
)
CHART = Chart(x="seconds", y="answers per second")

WORKERS, WORK = 30, 0.1
TRY, TRIES = 1.0, 4
PATIENCE = TRY * TRIES
LAYERS = ("back", "middle", "front")

RECOVERED, WITHIN = 0.95, 0.25
"""Back for good: from then on, 95 % of the calls made in each quarter of a second are answered."""
WINDOW = 5.0
"""Seconds over which amplification is taken, in steps of half a second: attempts sent for each call that came."""


@dataclass(frozen=True, kw_only=True)
class Stop(Fault):
    """No work gets on until it ends; what is being worked on when it begins still gets done."""

    def begin(self, host: Any, until: float) -> Any:
        """What begins now takes as long as the outage still lasts, and then its own time."""

        def factor(now: float) -> float:
            return 1 + (until - now) / WORK

        host.slowed.append(factor)
        return lambda: host.slowed.remove(factor)


class NaiveRetries(Filter[Any, Any, Any, Any]):
    """Tries at once again, whatever went wrong, without a budget."""

    place: ClassVar[str] = "retry"

    def __init__(self, tries: int) -> None:
        self.tries = tries

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """The reply of the first try that gets one in time."""
        error: meshlib.MeshError | None = None
        for _ in range(self.tries):
            try:
                with anyio.move_on_after(TRY):
                    return await service(request)
                error = meshlib.AttemptTimeout("no reply in time")
            except meshlib.MeshError as failure:
                error = failure
        assert error is not None
        raise error


class Oblivious(Filter[Any, Any, Any, Any]):
    """Does what was asked for although the caller has gone: what threads do."""

    place: ClassVar[str] = "filters"

    def __init__(self, supervisor: Supervisor | None = None) -> None:
        self._supervisor = supervisor or Supervisor()

    def build(self, env: Env, service: Any) -> Any:
        """With the server's supervisor, which outlives the request."""
        return Oblivious(env.supervisor).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """The reply, if somebody still waits for it."""
        done = anyio.Event()
        outcome: list[Any] = []

        async def job() -> None:
            try:
                outcome.append(await service(request))
            except meshlib.MeshError as error:
                outcome.append(error)
            finally:
                done.set()

        self._supervisor.start(job, name="request")
        await done.wait()
        if isinstance(outcome[0], meshlib.MeshError):
            raise outcome[0]
        return outcome[0]


@dataclass(frozen=True)
class Times:
    """When the outage begins, when it ends, and when the load does."""

    begins: float
    ends: float
    end: float


@dataclass(frozen=True)
class Way:
    """How clients and servers are set up."""

    name: str
    client: Sequence[Any]
    server: Sequence[Any]
    abandoned: Any
    client_stack: Any = None
    server_stack: Any = None


def _bare_client(stack: Stack) -> Stack:
    return stack.remove("requeue")


def _bare_server(stack: Stack) -> Stack:
    return stack.remove("deadline").remove("limit")


def naive(tries: int) -> Way:
    """No budget, no deadline on the wire, no cancellation of abandoned work."""
    times = f"{tries - 1} {'retry' if tries == 2 else 'retries'}"
    client = (NaiveRetries(tries), meshlib.timeout(None))
    return Way(f"naive, {times}", client, (Oblivious(),), "served", _bare_client, _bare_server)


OURS = Way("default", (meshlib.timeout(PATIENCE, attempt=TRY),), (), "dropped")


def scenario(way: Way, rate: float, layers: int, times: Times, seed: int) -> Scenario:
    """One client that calls the outermost of so many tiers; the innermost is the one that has the outage."""
    tiers = LAYERS[:layers]
    shared: dict[str, Any] = {"layers": way.server, "stack": way.server_stack}
    servers = [Servers(1, WORK, name=tiers[0], workers=WORKERS, abandoned=way.abandoned, **shared)]
    for to, name in pairwise(tiers):
        calls = Calls(to=to, layers=way.client, stack=way.client_stack)
        servers.append(Servers(1, 0.001, name=name, calls=calls, **shared))
    return Scenario(
        servers=servers,
        clients=Clients(1, way.client, to=tiers[-1], stack=way.client_stack),
        load=Load(rate),
        faults=[Stop(servers=f"{tiers[0]}/0", at=times.begins, until=times.ends)],
        duration=times.end,
        settle=PATIENCE,
        seed=seed,
    )


def amplification(report: Report, window: float) -> float:
    """The highest of any window, attempts to the innermost server for each call of the outermost client."""
    starts = int((report.scenario.duration - window) * 2) + 1
    return max(report.amplification("back", n / 2, n / 2 + window) for n in range(starts))


def run(seed: int, quick: bool) -> Outcome:
    """Naive and ours, at three rates, and through three layers."""
    outcome = Outcome()
    times = Times(5.0, 9.0, 17.0) if quick else Times(10.0, 20.0, 50.0)
    rates = (280,) if quick else (280, 240, 200)
    for layers in (1, 3):
        for way in (naive(TRIES if layers == 1 else 2), OURS):
            for rate in rates if layers == 1 else (280,):
                _measure(outcome, way, rate, layers, times, seed)
    return outcome


def _measure(outcome: Outcome, way: Way, rate: float, layers: int, times: Times, seed: int) -> None:
    report = scenario(way, rate, layers, times, seed).run()
    answered = 100 * report.success(times.ends)
    recovery = report.recovery(times.ends, success=RECOVERED, window=WITHIN)
    peak, burst = amplification(report, WINDOW), amplification(report, 1.0)
    several = f"{layers} layers" if layers > 1 else "1 layer"
    outcome.rows.append(
        {
            "set-up": way.name,
            "layers": layers,
            "calls/s": rate,
            "recovered after s": recovery,
            "answered after the outage, %": round(answered, 2),
            "attempts per call, worst 5 s": round(peak, 2),
            "worst 1 s": round(burst, 2),
        }
    )
    what = f"{way.name}, {several}, {rate}/s"
    if way is OURS:
        outcome.checks += [
            check(f"{what}: seconds until it has recovered", recovery, "<= 1"),
            check(f"{what}: attempts per call in the worst {WINDOW:g} s", round(peak, 3), "<= 1.25"),
        ]
    else:
        watched = times.end - times.ends
        outcome.checks.append(
            check(f"{what}: answered in the {watched:g} s after the outage, %", round(answered, 2), "<= 5")
        )
    if rate == 280:
        outcome.series[f"{several}, {rate} calls/s: {'default' if way is OURS else 'naive'}"] = _answers(report)


def _answers(report: Report) -> list[Point]:
    return [(each.since, each.success * each.requests) for each in report.slices(1.0)]
