"""One server fails at once whatever it is sent, which to a balancer may look like being quick."""

from dataclasses import dataclass
from typing import Any

import meshlib
from benchmarks.scenarios import alone
from benchmarks.scenarios.balancers import finagle_ewma
from benchmarks.scenarios.latency import PRODUCTION
from benchmarks.scenarios.model import Chart, Outcome, check
from meshlib.core.stack import Stack
from meshlib.testing import Clients, Load, Report, Scenario, Servers, errors

TITLE = "Fast failing host: a server that answers errors in 1 ms"
ABOUT = (
    "Three, and eleven, servers with a median of 167 ms; from 5 s on, for 60 s, one of them fails every request within "
    "1 ms. Nothing is retried. The power of two choices sends it everything that draws it, 2/n of the traffic, because "
    "it never has anything under way and never takes long. What follows from Finagle's metrics, and what *Beyond Round "
    "Robin* does not test; linkerd2 added a penalty for failures in 2026 (load-biaser)."
)
CHART = Chart(x="seconds", y="requests lost in %")

WARM_UP, FAULTY = 5.0, 60.0
AFTER = 0.001


@dataclass(frozen=True)
class Client:
    """One of those compared.

    Attributes:
        name: What to call it.
        layers: Its layers.
        alone: Nothing but a balancer.
        ours: It is to lose little, and not 2/n.
    """

    name: str
    layers: tuple[Any, ...]
    alone: bool = True
    ours: bool = False


def _clients() -> list[Client]:
    balance = meshlib.balance
    return [
        Client("P2C least loaded", (balance(meshlib.least_loaded()),)),
        Client("P2C peak EWMA as in Finagle", (balance(finagle_ewma()),)),
        Client("P2C peak EWMA", (balance(meshlib.peak_ewma()),), ours=True),
        Client("default, retries off", (), alone=False, ours=True),
    ]


def run(seed: int, quick: bool) -> Outcome:
    """Play it for each client, number of servers and rate."""
    outcome = Outcome()
    faulty = FAULTY / 10 if quick else FAULTY
    places = [(3, 500.0), (11, 500.0)] if quick else [(3, 500.0), (11, 500.0), (3, 100.0), (11, 100.0)]
    for servers, rate in places:
        for client in _clients():
            report = _play(client, servers, rate, faulty, seed)
            lost = 100 * (1 - report.success(WARM_UP, WARM_UP + faulty))
            share = servers * report.share(0, WARM_UP, WARM_UP + faulty)
            where = f"1 of {servers}, {rate:g}/s"
            row = {"lost %": round(lost, 3), "its traffic / fair share": round(share, 3)}
            outcome.rows.append({"servers": where, "client": client.name, **row})
            # To find it out costs the same however long it fails: of a shorter run it is a greater part.
            ours, theirs = "<= 2" if quick else "<= 0.5", "60 to 70" if servers == 3 else "16 to 20"
            outcome.checks.append(check(f"{where}, {client.name}: lost %", lost, ours if client.ours else theirs))
            if servers == 11 and rate == 500:
                pieces = [piece for piece in report.slices(1.0) if piece.requests]
                outcome.series[client.name] = [(piece.since, 100 * (1 - piece.success)) for piece in pieces]
    return outcome


def _once(stack: Stack) -> Stack:
    return stack.remove("retry").remove("hedge")


def _play(client: Client, servers: int, rate: float, faulty: float, seed: int) -> Report:
    scenario = Scenario(
        servers=Servers(servers, PRODUCTION),
        clients=Clients(1, client.layers, stack=None if client.alone else _once),
        load=Load(rate, spacing="even"),
        faults=[errors(1.0, 0, after=AFTER, at=WARM_UP)],
        duration=WARM_UP + faulty,
        seed=seed,
    )
    return alone.play(scenario) if client.alone else scenario.run()
