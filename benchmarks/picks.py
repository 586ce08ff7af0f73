"""``python -m benchmarks.picks``: what it takes to pick an endpoint and to account for the request, in µs.

Every balancer over 10, 1,000 and 10,000 endpoints that are ready and were measured; each request is answered at once.
The endpoints are real nodes without layers below them, and what is timed is what a balancer does for each request: it
picks, notes that it began, and notes how it ended. The ratio says how much more the same takes with more endpoints.
What there is of it for the power of two choices is memory: 10,000 nodes are not in the processor's cache.

All variants take turns in many short rounds, and each counts with its fastest: the rest is what the machine added.
"""

import argparse
import random
from collections.abc import Callable
from time import perf_counter
from typing import Any

from benchmarks import machine
from benchmarks.report import as_columns
from meshlib import aperture, heap, least_loaded, p2c, peak_ewma, round_robin
from meshlib.balancing.choose import metric_of, picker_of
from meshlib.balancing.node import Node
from meshlib.core.env import Env
from meshlib.names.addr import Address

SIZES = (10, 1_000, 10_000)
LIMIT = 1.5
"""A pick among 1,000 endpoints should take less than this many times one among 10."""


def choosers() -> dict[str, tuple[Any, bool]]:
    """Every balancer, and whether its endpoints have different weights."""
    return {
        "p2c(peak_ewma())": (p2c(peak_ewma()), False),
        "p2c(least_loaded())": (p2c(least_loaded()), False),
        "p2c(peak_ewma()), weights": (p2c(peak_ewma()), True),
        "round_robin()": (round_robin(), False),
        "round_robin(), weights": (round_robin(), True),
        "heap()": (heap(), False),
        "aperture()": (aperture(), False),
        "aperture(coordinate=(3, 10))": (aperture(coordinate=(3, 10)), False),
    }


def make(chooser: Any, weighted: bool, size: int, seed: int) -> Callable[[int], float]:
    """A function that sends so many requests, and says how many seconds one took."""
    env = Env(rng=random.Random(seed))
    metric = metric_of(chooser)
    nodes = []
    for i in range(size):
        nodes.append(Node(Address("10.0.0.1", i + 1, weight=1.0 + i % 3 if weighted else 1.0), _nowhere, env))
        nodes[-1].meter = metric.meter()
        nodes[-1].meter.succeeded(env.rng.uniform(0.01, 0.02), 0.0)
    picker = picker_of(chooser, env)
    picker.update(nodes, nodes)
    pick, changed, watches = picker.pick, picker.changed, picker.watches_load
    clock = 0.0

    def send(requests: int) -> float:
        nonlocal clock
        started = perf_counter()
        for _ in range(requests):
            now = clock
            node = pick(now)
            meter = node.meter
            meter.pending += 1
            meter.begun += now
            meter.used = now
            if watches:
                changed(node, 1, now)
            now = clock = now + 1e-5
            meter.succeeded(0.015, now)
            meter.pending -= 1
            meter.begun = 0.0
            if watches:
                changed(node, -1, now)
        return (perf_counter() - started) / requests

    return send


async def _nowhere(request: Any) -> Any:
    return request


def measure(requests: int, rounds: int, seed: int) -> list[list[str]]:
    """The table."""
    made = {
        (name, size): make(chooser, weighted, size, seed)
        for name, (chooser, weighted) in choosers().items()
        for size in SIZES
    }
    best = dict.fromkeys(made, float("inf"))
    for _ in range(rounds):
        for key, send in made.items():
            best[key] = min(best[key], send(requests) * 1e6)
    rows = [["balancer", *(f"{size:,} µs" for size in SIZES), *(f"{size:,} to {SIZES[0]}" for size in SIZES[1:])]]
    for name in choosers():
        took = [best[name, size] for size in SIZES]
        rows.append([name, *(f"{t:.2f}" for t in took), *(f"{t / took[0]:.2f}" for t in took[1:])])
    return rows


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picks")
    parser.add_argument("--requests", type=int, default=2000, help="requests in a round (default 2000)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of each variant (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    machine.pin(machine.cores()[1])
    rows = measure(options.requests, options.rounds, options.seed)
    print(as_columns(rows))
    slow = [row[0] for row in rows[1:] if float(row[4]) > LIMIT]
    print(f"\nabove {LIMIT} at 1,000: {', '.join(slow) or 'none'}")


if __name__ == "__main__":
    main()
