"""How soon a server that was slow, or failed, and is well again gets its share back."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import meshlib
from benchmarks.scenarios import alone
from benchmarks.scenarios.balancers import finagle_ewma
from benchmarks.scenarios.latency import PRODUCTION
from benchmarks.scenarios.model import Chart, Outcome, Point, check
from meshlib.testing import Clients, Load, Report, Scenario, Servers, errors, slow
from meshlib.testing.faults import Fault

TITLE = "Recovery: what was slow, or failed, and is well again"
ABOUT = (
    "Eleven servers with a median of 167 ms, 1000 requests a second. For 30 s one of them takes ten times as long, or "
    "fails at once; how long does it take then until it has half of its fair share of the requests again, for good? A "
    "peak EWMA without more forgets only as its average decays, which takes 25 s in *Beyond Round Robin*'s set-up."
)
CHART = Chart(x="seconds since it is well", y="its traffic / fair share")

BACKENDS, RATE = 11, 1000.0
BEFORE, TROUBLE, WATCHED = 5.0, 30.0, 30.0
SLOW = 10.0
ENOUGH, LATEST = 0.5, 10.0
WINDOW, STEP = 1.0, 0.5
"""Seconds over which the share is taken, and how often."""


@dataclass(frozen=True)
class Client:
    """One of those compared.

    Attributes:
        name: What to call it.
        layers: Its layers.
        alone: Nothing but a balancer.
        troubles: Which are worth showing.
        bound: For the seconds until it has half of its share, if there is one.
    """

    name: str
    layers: tuple[Any, ...]
    alone: bool = True
    troubles: tuple[str, ...] = ("slow", "failing")
    bound: str = f"<= {LATEST:g}"


def _clients() -> list[Client]:
    balance = meshlib.balance
    return [
        Client("P2C least loaded", (balance(meshlib.least_loaded()),), troubles=("slow",), bound=""),
        Client("P2C peak EWMA as in Finagle", (balance(finagle_ewma()),), troubles=("slow",), bound=f"> {LATEST:g}"),
        Client("P2C peak EWMA", (balance(meshlib.peak_ewma()),)),
        Client("default", (), alone=False),
        # Timeouts make it a failing server, which is ejected; and then it waits for a probe, which is told in the docs.
        Client("default, timeout(1.0)", (meshlib.timeout(1.0),), alone=False, troubles=("slow",), bound=""),
        Client(
            "default, timeout(1.0), out_for=(1, 3)",
            (meshlib.timeout(1.0), meshlib.failure_accrual(out_for=(1, 3))),
            alone=False,
            troubles=("slow",),
        ),
    ]


TROUBLES: dict[str, Callable[[float, float], Fault]] = {
    "slow": lambda at, until: slow(SLOW, 0, at=at, until=until),
    "failing": lambda at, until: errors(1.0, 0, at=at, until=until),
}


def run(seed: int, quick: bool) -> Outcome:
    """Play it for each client and each kind of trouble."""
    outcome = Outcome()
    before, trouble, watched = (2.0, 6.0, 14.0) if quick else (BEFORE, TROUBLE, WATCHED)
    rate = RATE / 4 if quick else RATE
    well = before + trouble
    for kind, fault in TROUBLES.items():
        for client in _clients():
            if kind not in client.troubles or (quick and not client.bound):
                continue
            report = _play(client, fault(before, well), rate, well + watched, seed)
            shares = _shares(report, well, watched)
            took = _back(shares)
            row = {
                "its traffic / fair share meanwhile": round(BACKENDS * report.share(0, before, well), 3),
                "half of its share after s": took,
                "share after 10 s": round(dict(shares)[LATEST], 2),
                "success %": round(100 * report.success(within=1.0), 3),
            }
            outcome.rows.append({"trouble": kind, "client": client.name, **row})
            outcome.series[f"{kind}: {client.name}"] = shares
            if client.bound:
                outcome.checks.append(check(f"{kind}, {client.name}: half of its share after s", took, client.bound))
    return outcome


def _play(client: Client, fault: Fault, rate: float, duration: float, seed: int) -> Report:
    scenario = Scenario(
        servers=Servers(BACKENDS, PRODUCTION),
        clients=Clients(1, client.layers),
        load=Load(rate, spacing="even"),
        faults=[fault],
        duration=duration,
        seed=seed,
    )
    return alone.play(scenario) if client.alone else scenario.run()


def _shares(report: Report, well: float, watched: float) -> list[Point]:
    """The share, in fair shares, of each window, by the second in which that ends."""
    ends = [WINDOW + n * STEP for n in range(int((watched - WINDOW) / STEP) + 1)]
    return [(end, BACKENDS * report.share(0, well + end - WINDOW, well + end)) for end in ends]


def _back(shares: list[Point]) -> float:
    """The end of the first window from which on the share is enough."""
    back = inf
    for end, share in reversed(shares):
        if share < ENOUGH:
            break
        back = end
    return back
