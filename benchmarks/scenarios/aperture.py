"""How even servers are loaded, and how few connections it takes, when each client talks to a part of the servers."""

import random
from collections.abc import Callable, Sequence
from math import sqrt
from statistics import mean, pstdev

import meshlib
from benchmarks.scenarios.model import Outcome, check
from meshlib.balancing.ring import point, rank, windows
from meshlib.testing import Clients, Load, Scenario, Servers

TITLE = "Aperture: even load with few connections"
ABOUT = (
    "Clients that talk to so many of the servers at least, 12 by default: on a ring by their coordinate "
    "(deterministic), or the first of them by rendezvous hashing where no coordinate is known. 12 of 20 servers and 12 "
    "of 31 save little, so these shapes are there with a smaller aperture as well. The load expected is computed from "
    "the shares that the policy gives; the load measured is that of real clients in a simulation, where chance adds "
    "its own deviation. Source: Twitter's deterministic aperture (2019), and gRPC's proposal A68."
)

USUAL = 12
SHAPES = ((100, 100, USUAL), (20, 100, USUAL), (100, 20, USUAL), (57, 31, USUAL), (100, 20, 3), (57, 31, 4))
"""Clients, servers, and how many of these each client talks to at least."""
FEW_ENOUGH = 80.0
"""Per cent of the connections that must be saved, where the aperture is no more than a fifth of the servers."""
SECONDS = 20.0

Shares = dict[str, float]
"""What share of a client's requests goes to which server."""
Policy = Callable[[Sequence[str], int, int], list[Shares]]


def _address(n: int) -> str:
    return f"10.0.{n // 250}.{n % 250 + 1}:80"


def on_ring(servers: Sequence[str], clients: int, least: int) -> list[Shares]:
    """By the coordinates."""
    ring = sorted(servers, key=lambda address: (point(address), address))
    found = []
    for client in range(clients):
        first, parts = windows([1.0] * len(ring), client, clients, least)
        width = sum(parts)
        found.append({ring[(first + n) % len(ring)]: part / width for n, part in enumerate(parts)})
    return found


def by_rank(seeds: Sequence[int]) -> Policy:
    """By rendezvous hashing, each client with a seed of its own."""

    def policy(servers: Sequence[str], clients: int, least: int) -> list[Shares]:
        found = []
        for seed in seeds[:clients]:
            chosen = sorted(servers, key=lambda address: rank(address, 1.0, seed))[:least]
            found.append(dict.fromkeys(chosen, 1 / len(chosen)))
        return found

    return policy


def deviation(loads: Sequence[float]) -> float:
    """The standard deviation, in per cent of the mean."""
    return 100 * pstdev(loads) / mean(loads)


def moved(before: Sequence[Shares], after: Sequence[Shares]) -> float:
    """The connections that staying clients close here and open there instead, in per cent of those that they had.

    An aperture that becomes wider or narrower by a server opens or closes one without moving any.
    """
    staying = list(zip(before, after, strict=False))
    count = sum(min(len(new.keys() - old.keys()), len(old.keys() - new.keys())) for old, new in staying)
    return 100 * count / sum(len(old) for old, _ in staying)


def measured(clients: int, servers: int, least: int, per_server: float, seed: int) -> tuple[float, int]:
    """The deviation of the load of real servers from real clients with coordinates, and the connections they made."""

    def layers(client: int) -> list[object]:
        return [meshlib.balance(meshlib.aperture(coordinate=(client, clients), minimum=least))]

    report = Scenario(
        servers=Servers(servers, 0.01),
        clients=Clients(clients, layers),
        load=Load(per_server * servers / SECONDS),
        duration=SECONDS,
        seed=seed,
    ).run()
    return deviation([report.sent(server) for server in range(servers)]), report.connects()


def run(seed: int, quick: bool) -> Outcome:
    """Each shape with a coordinate and without, and with one client or server more or less."""
    outcome = Outcome()
    rng = random.Random(seed)
    per_server = 50.0 if quick else 300.0
    for clients, servers, least in SHAPES:
        # The addresses decide the order on the ring, and the seeds the ranks; both are other ones in each run.
        offset = rng.randrange(10_000)
        addresses = [_address(offset + n) for n in range(servers + 1)]
        policies = {"deterministic": on_ring, "rendezvous": by_rank([rng.getrandbits(64) for _ in range(clients + 1)])}
        for name, policy in policies.items():
            _measure(outcome, (clients, servers, least), name, policy, addresses, rng.getrandbits(32), per_server)
    return outcome


def _measure(
    outcome: Outcome,
    shape: tuple[int, int, int],
    name: str,
    policy: Policy,
    addresses: Sequence[str],
    seed: int,
    per_server: float,
) -> None:
    clients, servers, least = shape
    here, spare = addresses[:servers], addresses[servers]
    shares = policy(here, clients, least)
    loads = [sum(client.get(address, 0.0) for client in shares) for address in here]
    connections = sum(map(len, shares))
    k = connections / clients
    saved = 100 * (1 - connections / (clients * servers))
    by_clients = max(moved(shares, policy(here, total, least)) for total in (clients + 1, clients - 1))
    fewer = [moved(shares, policy([each for each in here if each != gone], clients, least)) for gone in here]
    by_servers = max(mean(fewer), moved(shares, policy([*here, spare], clients, least)))
    off = round(deviation(loads), 2)
    what = f"{clients} x {servers}" + (f", at least {least}" if least != USUAL else "")
    row: dict[str, object] = {
        "clients x servers": what,
        "aperture": name,
        "servers per client": round(k, 1),
        "connections saved, %": round(saved, 1),
        "deviation of load expected, %": off,
        "measured, %": None,
        "by chance, %": None,
        "moved by one client more or less, %": round(by_clients, 1),
        "by one server, %": round(by_servers, 1),
    }
    outcome.rows.append(row)
    if name != "deterministic":
        return
    found, connects = measured(clients, servers, least, per_server, seed)
    row["measured, %"], row["by chance, %"] = round(found, 1), round(100 / sqrt(per_server), 1)
    if least <= servers / 5:
        outcome.checks.append(check(f"{what}: connections saved, %", round(saved, 1), f">= {FEW_ENOUGH:g}"))
    by_client, by_server = f"{what}: moved by one client more or less, times {least}", f"by one server, times {least}"
    outcome.checks += [
        check(f"{what}: relative deviation of the load expected, %", off, "<= 1"),
        check(f"{what}: connections of real clients, of those expected", round(connects / connections, 2), "<= 1"),
        check(by_client, round(by_clients * least / 100, 2), "<= 1"),
        check(f"{what}: moved {by_server}", round(by_servers * least / 100, 2), "<= 1"),
    ]
