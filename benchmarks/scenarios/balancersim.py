"""Finagle's own balancer simulation: one server of eleven starts cold, is slow, or fails, with every balancer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import meshlib
from benchmarks.scenarios import alone
from benchmarks.scenarios.balancers import finagle_ewma
from benchmarks.scenarios.latency import PRODUCTION
from benchmarks.scenarios.model import Chart, Outcome, Point, check
from meshlib.testing import Clients, Load, Report, Scenario, Servers, errors, slow
from meshlib.testing.faults import Fault

TITLE = "Finagle's balancer simulation: every balancer, four profiles"
ABOUT = (
    "Ten servers with a median of 167 ms and one that is odd, 1250 requests a second for 45 s, nothing but balancers. "
    "Cold start: five times as slow, improving over 10 s, and ten times from 19 s to 23 s. Slow middle: ten times from "
    "15 s on. Temporary failure: every request fails within 1 ms from 10 s to 25 s. Permanent failure: from 10 s on. "
    "Source: Finagle, finagle-benchmark, balancersim/Simulation.scala."
)
CHART = Chart(x="seconds", y="odd server's traffic / fair share")

STABLE, RATE, DURATION = 10, 1250.0, 45.0
SERVERS = STABLE + 1
PATIENCE = 1.0
QUICK = 0.2
"""The share of the times and of the duration that a quick run takes."""


@dataclass(frozen=True)
class Profile:
    """What befalls the odd server, as of so many seconds from when until when the rows speak of trouble."""

    name: str
    faults: Callable[[float], Sequence[Fault]]
    trouble: tuple[float, float]


PROFILES = (
    Profile(
        "cold start",
        lambda scale: [
            slow(5, 0, to=1, at=0, until=10 * scale),
            slow(10, 0, at=19 * scale, until=23 * scale),
        ],
        (19, 23),
    ),
    Profile("slow middle", lambda scale: [slow(10, 0, at=15 * scale)], (15, 45)),
    Profile("temporary failure", lambda scale: [errors(1.0, 0, at=10 * scale, until=25 * scale)], (10, 25)),
    Profile("permanent failure", lambda scale: [errors(1.0, 0, at=10 * scale)], (10, 45)),
)

DEFAULT = "P2C peak EWMA"
FINAGLES = ("heap", "P2C least loaded", "P2C peak EWMA as in Finagle")


def _clients() -> dict[str, Clients]:
    balance, aperture = meshlib.balance, meshlib.aperture

    def one(how: Any) -> Clients:
        return Clients(1, (balance(how),))

    return {
        "round robin": one(meshlib.round_robin()),
        "heap": one(meshlib.heap()),
        "P2C least loaded": one(meshlib.least_loaded()),
        "P2C peak EWMA as in Finagle": one(finagle_ewma()),
        DEFAULT: one(meshlib.peak_ewma()),
        "random aperture": one(aperture(minimum=4)),
        # Alone on the ring a client would have all of it; four have windows of six to nine servers each.
        "deterministic aperture, 4 clients": Clients(4, lambda n: (balance(aperture(coordinate=(n, 4), minimum=6)),)),
    }


def run(seed: int, quick: bool) -> Outcome:
    """Play every profile with every balancer."""
    outcome = Outcome()
    scale = QUICK if quick else 1.0
    for profile in PROFILES:
        since, until = (time * scale for time in profile.trouble)
        failed: dict[str, float] = {}
        share: dict[str, float] = {}
        for name, clients in _clients().items():
            report = alone.play(
                Scenario(
                    servers=Servers(SERVERS, PRODUCTION),
                    clients=clients,
                    load=Load(RATE, spacing="even"),
                    faults=profile.faults(scale),
                    duration=DURATION * scale,
                    seed=seed,
                )
            )
            failed[name] = 100 * (1 - report.success(within=PATIENCE))
            share[name] = SERVERS * report.share(0, since, until)
            outcome.rows.append(
                {
                    "profile": profile.name,
                    "balancer": name,
                    "success %": round(100 - failed[name], 3),
                    "p99 ms": round(1e3 * report.latency(0.99, answered=True)),
                    "p99.9 ms": round(1e3 * report.latency(0.999, answered=True)),
                    "odd one's share": round(share[name], 3),
                    "busiest other's share": round(_busiest(report), 3),
                }
            )
            outcome.series[f"{profile.name}: {name}"] = _over_time(report, scale)
        what = f"{profile.name}, {DEFAULT}: failures"
        outcome.checks.append(
            check(f"{what} / round robin's", failed[DEFAULT] / failed["round robin"], "<= 0.25" if quick else "<= 0.1")
        )
        if not quick:  # of a second of trouble there are too few failures to compare
            fewest = min(failed[name] for name in FINAGLES)
            outcome.checks.append(check(f"{what} / those of Finagle's best", failed[DEFAULT] / fewest, "<= 1.1"))
    return outcome


def _busiest(report: Report) -> float:
    return SERVERS * max(report.share(number) for number in range(1, SERVERS))


def _over_time(report: Report, scale: float) -> list[Point]:
    step = 0.5 * scale
    times = [n * step for n in range(int(DURATION * scale / step))]
    return [(at, SERVERS * report.share(0, at, at + step)) for at in times]
