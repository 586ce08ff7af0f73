"""One of eleven servers takes ten times as long for half a minute."""

from dataclasses import dataclass
from typing import Any

import meshlib
from benchmarks.scenarios import alone
from benchmarks.scenarios.balancers import finagle_ewma
from benchmarks.scenarios.latency import PRODUCTION
from benchmarks.scenarios.model import Chart, Outcome, Point, check
from meshlib.testing import Clients, Load, Report, Scenario, Servers, slow
from meshlib.testing.network import Wire

TITLE = "Beyond round robin: one of eleven servers is slow"
ABOUT = (
    "Eleven servers with a median of 167 ms, 1000 requests a second for 60 s, evenly spaced; one takes ten times as "
    "long from 15 s to 45 s. Success is an answer within 1 s. Balancers alone cancel nothing, and their success is "
    "computed from the latencies, as in the source; the default client is told `timeout(1.0)`, and cancels. Source: "
    "Jenson and Oanta, *Beyond Round Robin: Load Balancing for Latency*, Buoyant 2016."
)
CHART = Chart(x="seconds", y="success in %")

BACKENDS, RATE, DURATION = 11, 1000.0, 60.0
SLOW, PATIENCE = 10.0, 1.0
QUICK = 0.1
"""The share of the time that a quick run takes. The rate stays, since it makes the queues."""


@dataclass(frozen=True)
class Client:
    """One of those compared.

    Attributes:
        name: What to call it.
        layers: Its layers.
        wire: How it reaches the servers; empty for a balancer alone.
        healthy: No server is slow.
        least: The success in % that it has to have, and the most, if that is bounded.
    """

    name: str
    layers: tuple[Any, ...]
    wire: Wire | None = None
    healthy: bool = False
    least: float = 0.0
    most: float = 100.0


def _clients(quick: bool) -> list[Client]:
    balance, patient = meshlib.balance, meshlib.timeout(PATIENCE)
    clients = [
        Client("round robin", (balance(meshlib.round_robin()),), least=95.4, most=95.5),
        Client("P2C least loaded", (balance(meshlib.least_loaded()),), least=99.35),
        Client("P2C peak EWMA as in Finagle", (balance(finagle_ewma()),), least=99.88),
        Client("P2C peak EWMA", (balance(meshlib.peak_ewma()),), least=99.88),
        Client("default, timeout(1.0)", (patient,), "direct", least=99.95),
    ]
    if not quick:
        clients += [
            Client("default, timeout(1.0), over Mux", (patient,), "mux", least=99.95),
            Client("default, timeout(1.0), all healthy", (patient,), "direct", healthy=True, least=100.0),
        ]
    return clients


def run(seed: int, quick: bool) -> Outcome:
    """Play it for each client."""
    outcome = Outcome()
    duration = DURATION * (QUICK if quick else 1)
    for client in _clients(quick):
        report = _play(client, seed, duration)
        success, attempts = 100 * report.success(within=PATIENCE), report.amplification()
        outcome.rows.append(
            {
                "client": client.name,
                "success %": round(success, 3),
                "p99 ms": round(1e3 * report.latency(0.99)),
                "p99.9 ms": round(1e3 * report.latency(0.999)),
                "p99.99 ms": round(1e3 * report.latency(0.9999)),
                "sent to the slow server": report.sent(0, duration / 4, duration * 3 / 4),
                "attempts/call": round(attempts, 4),
            }
        )
        if not client.healthy and client.wire != "mux":
            outcome.series[client.name] = _over_time(report, duration)
        # To find a slow server out costs the same however long it stays slow: of a shorter run it is a greater part.
        least = 100 - (100 - client.least) / QUICK if quick and client.most == 100 else client.least
        bound = f">= {least:.4g}" if client.most == 100 else f"{client.least} to {client.most}"
        outcome.checks.append(check(f"{client.name}: success %", success, bound))
        if client.healthy:
            outcome.checks.append(check(f"{client.name}: attempts/call", attempts, "<= 1"))
    return outcome


def _play(client: Client, seed: int, duration: float) -> Report:
    scenario = Scenario(
        servers=Servers(BACKENDS, PRODUCTION),
        clients=Clients(1, client.layers),
        load=Load(RATE, spacing="even"),
        faults=() if client.healthy else (slow(SLOW, 0, at=duration / 4, until=duration * 3 / 4),),
        duration=duration,
        seed=seed,
        wire=client.wire or "direct",
    )
    return alone.play(scenario) if client.wire is None else scenario.run()


def _over_time(report: Report, duration: float) -> list[Point]:
    return [(piece.since, 100 * piece.success) for piece in report.slices(duration / 120, within=PATIENCE)]
