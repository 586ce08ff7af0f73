"""Twice as many requests as a server can take, with an adaptive concurrency limit and without one."""

from typing import Any

import meshlib
from benchmarks.scenarios.model import Chart, Outcome, Point, check
from meshlib.core.priority import Priority
from meshlib.core.stack import Stack
from meshlib.testing import Clients, Load, Report, Scenario, Servers

TITLE = "Overload: twice the capacity for two minutes"
ABOUT = (
    "One server with 10 workers and 10 ms of work a request (1,000 requests/s) gets 500 requests/s, then 2,000 for two "
    "minutes, then 500 again, from 10 default clients with a timeout of 1 s; 20 % of the requests are critical, 60 % "
    "default, 20 % sheddable. Source: the set-up after the adaptive limiters of Netflix and Envoy, "
    "which publish no number of their own."
)
CHART = Chart(x="seconds", y="answers per second")

WORKERS, WORK = 10, 0.01
CAPACITY = WORKERS / WORK
SHARES = ((Priority.CRITICAL, 0.2), (Priority.DEFAULT, 0.6), (Priority.SHEDDABLE, 0.2))
BEGINS = 10.0
AFTER = 20.0
UNLOADED = 5.0
"""The second half of the time before is the measure of what an unloaded server does."""


def _unlimited(stack: Stack) -> Stack:
    return stack.remove("limit")


def scenario(server: dict[str, Any], overload: float, seed: int) -> Scenario:
    """Calm, an overload of so many seconds, and calm again."""
    ends = BEGINS + overload
    end = ends + AFTER
    phases = ((0.0, BEGINS, 0.5), (BEGINS, ends, 2.0), (ends, end, 0.5))
    return Scenario(
        servers=Servers(1, WORK, workers=WORKERS, **server),
        clients=Clients(10, (meshlib.timeout(1.0),)),
        load=[
            Load(CAPACITY * times * share, start=start, until=until, priority=priority)
            for start, until, times in phases
            for priority, share in SHARES
        ],
        duration=end,
        seed=seed,
    )


def run(seed: int, quick: bool) -> Outcome:
    """With the limit for two minutes; without it for as long as it takes to see what happens."""
    overload, collapse = (6.0, 4.0) if quick else (120.0, 15.0)
    outcome = Outcome()
    limited = {"layers": (meshlib.concurrency_limit(meshlib.adaptive()),)}
    ways = (
        ("no limit, abandoned work is done", {"stack": _unlimited, "abandoned": "served"}, collapse),
        ("no limit", {"stack": _unlimited}, collapse),
        ("concurrency_limit(adaptive())", limited, overload),
    )
    for name, server, seconds in ways:
        report = scenario(server, seconds, seed).run()
        _measure(outcome, name, report, seconds)
    return outcome


def _measure(outcome: Outcome, name: str, report: Report, overload: float) -> None:
    ends = BEGINS + overload
    calm = report.latency(0.99, BEGINS - UNLOADED, BEGINS)
    goodput = 100 * report.goodput(BEGINS, ends) / CAPACITY
    p50, p99 = (report.latency(q, BEGINS, ends, answered=True) for q in (0.5, 0.99))
    recovery = report.recovery(ends, success=0.99, within=5 * calm, window=0.5)
    answered = {priority: 100 * report.success(BEGINS, ends, priority=priority) for priority, _ in SHARES}
    row: dict[str, object] = {
        "server": name,
        "overload s": overload,
        "goodput, % of capacity": round(goodput, 1),
        "p50 of answered, ms": round(1000 * p50, 1),
        "p99, ms": round(1000 * p99, 1),
        "p99 before, ms": round(1000 * calm, 1),
        "back to normal after s": recovery,
    }
    row |= {f"{priority.name.lower()} answered, %": round(share, 2) for priority, share in answered.items()}
    row["attempts per call"] = round(report.amplification(since=BEGINS, until=ends), 2)
    outcome.rows.append(row)
    outcome.series[name] = _answers(report)
    if "adaptive" in name:
        outcome.checks += [
            check("goodput in the overload, % of capacity", round(goodput, 2), ">= 95"),
            check("p99 of what is answered, over the p99 before", round(p99 / calm, 2), "<= 5"),
            check("seconds until all is as before", recovery, "<= 5"),
            check("critical requests lost, %", round(100 - answered[Priority.CRITICAL], 3), "<= 1"),
            check("sheddable requests lost, %", round(100 - answered[Priority.SHEDDABLE], 1), ">= 50"),
        ]
    elif "abandoned" in name:
        outcome.checks.append(check("goodput without a limit, % of capacity", round(goodput, 2), "<= 50"))


def _answers(report: Report) -> list[Point]:
    return [(each.since, each.success * each.requests) for each in report.slices(1.0)]
