"""Two hundred clients lose all their connections in the same moment; how they come back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import anyio

import meshlib
from benchmarks.scenarios.model import Chart, Outcome, Point, check
from meshlib.core.backoff import Constant
from meshlib.core.service import Filter, Service
from meshlib.testing import Clients, Cluster, Load, Report, Scenario, Servers, crash, restart
from meshlib.testing.faults import Fault

TITLE = "Thundering herd: all servers restart at once"
ABOUT = (
    "200 clients with a connection to each of 10 servers and 1,000 requests/s in all; the servers crash together and "
    "are back together 10 s later. Naive clients connect every second and repeat each failed call every second. The "
    "same in a rolling restart with drains. A server's steady request rate is that before; its steady connection rate "
    "is that of 200 clients that spread evenly over their longest wait for a server when they have no other, which is "
    "1 s."
)
CHART = Chart(x="seconds", y="connections made per second")

SERVERS, CLIENTS, RATE = 10, 200, 1000.0
WORK = 0.01
STEADY_FROM = 5.0
WINDOW = 1.0
"""Seconds: the longest wait of ``failfast``'s ``alone``; see `meshlib.failfast`."""
SPREAD = CLIENTS / WINDOW
"""Connections a second at each server, were all clients to spread evenly over it."""
STEP = 0.25
EXCESS = 1.5


class Stubborn(Filter[Any, Any, Any, Any]):
    """Calls again every second, so many times, whatever went wrong."""

    place: ClassVar[str] = "retry"

    def __init__(self, tries: int, wait: float) -> None:
        self.tries, self.wait = tries, wait

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """The first reply."""
        for _ in range(self.tries - 1):
            try:
                return await service(request)
            except meshlib.MeshError:
                await anyio.sleep(self.wait)
        return await service(request)


@dataclass(frozen=True)
class Event:
    """What happens to the servers."""

    name: str
    faults: Sequence[Fault]
    begins: float
    ends: float


def _all_at_once(begins: float, down: float) -> Event:
    return Event("all at once", [crash(at=begins, until=begins + down)], begins, begins + down)


def _rolling(begins: float, every: float) -> Event:
    faults = [restart(n, at=begins + n * every, down=every / 2) for n in range(SERVERS)]
    return Event("rolling, drained", faults, begins, begins + SERVERS * every)


def scenario(layers: Sequence[Any], event: Event, end: float, seed: int, during: Any = None) -> Scenario:
    """The clients, the servers, and what befalls these."""
    return Scenario(
        servers=Servers(SERVERS, WORK),
        clients=Clients(CLIENTS, layers),
        load=Load(RATE),
        faults=event.faults,
        duration=end,
        seed=seed,
        during=during,
    )


class Most:
    """The most connections that any server had at once, looked at every quarter of a second."""

    def __init__(self) -> None:
        self.connections = 0

    async def watch(self, cluster: Cluster) -> None:
        """Look, until cancelled."""
        while True:
            for host in cluster.hosts.values():
                self.connections = max(self.connections, cluster.network.connections(host.address))
            await anyio.sleep(STEP)


def run(seed: int, quick: bool) -> Outcome:
    """Naive clients and default ones, through both kinds of restart."""
    begins, down, every, after = (7.0, 4.0, 0.5, 3.0) if quick else (15.0, 10.0, 2.0, 12.0)
    wait = Constant(1.0)
    naive = (meshlib.failfast(wait, alone=wait), Stubborn(30, 1.0))
    outcome = Outcome()
    together, rolling = _all_at_once(begins, down), _rolling(begins, every)
    for name, layers, event in (("naive", naive, together), ("default", (), together), ("default", (), rolling)):
        most = Most()
        report = scenario(layers, event, event.ends + after, seed, most.watch).run()
        _measure(outcome, name, event, report, most.connections)
    return outcome


def _measure(outcome: Outcome, name: str, event: Event, report: Report, most: int) -> None:
    steady = report.sent("servers", STEADY_FROM, event.begins) / (event.begins - STEADY_FROM) / SERVERS
    connects = [report.rates(server, STEP, "connects") for server in range(SERVERS)]
    # Before the restart clients connect for the first time, which is another story.
    since = int(event.begins / STEP)
    connects = [rates[since:] for rates in connects]
    requests = [report.rates(server, STEP) for server in range(SERVERS)]
    connecting = max(map(max, connects)) / SPREAD
    asking = max(max(rates[since:]) for rates in requests) / steady
    crowd = max(_longest(rates, EXCESS * SPREAD) for rates in connects)
    burst = max(_longest(rates[since:], EXCESS * steady) for rates in requests)
    outcome.rows.append(
        {
            "restart": event.name,
            "clients": name,
            "most connects/s, of steady": round(connecting, 2),
            "s of connects above 1.5": crowd,
            "most requests/s, of steady": round(asking, 2),
            "s of requests above 1.5": burst,
            "most connections open": most,
            "refused connects/s meanwhile": round(
                report.connects(None, event.begins, event.ends, refused=True) / SERVERS / (event.ends - event.begins), 1
            ),
            "answered after, %": round(100 * report.success(event.ends), 2),
        }
    )
    if name == "default":
        outcome.checks += [
            check(f"{event.name}: seconds with connects above 1.5 times the steady rate", crowd, "<= 1"),
            check(f"{event.name}: seconds with requests above 1.5 times the steady rate", burst, "<= 1"),
            check(f"{event.name}: most connections open at a server, of the steady number", most / CLIENTS, "<= 1.5"),
        ]
    if event.name == "all at once":
        outcome.series[f"connections made: {name}"] = _mean(connects, event.begins)
        outcome.series[f"requests: {name}"] = _mean([rates[since:] for rates in requests], event.begins)


def _longest(rates: Sequence[float], bound: float) -> float:
    """For how many seconds in a row they are above it."""
    runs = [len(list(run)) for above, run in groupby(rates, lambda rate: rate > bound) if above]
    return max(runs, default=0) * STEP


def _mean(rates: Sequence[Sequence[float]], start: float) -> list[Point]:
    """Over all servers, over time."""
    return [(start + n * STEP, sum(each) / len(each)) for n, each in enumerate(zip(*rates, strict=True))]
