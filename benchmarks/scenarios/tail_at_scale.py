"""A request that needs a hundred answers is as slow as the slowest of them, unless slow ones are asked for twice."""

from dataclasses import dataclass
from math import exp, log
from typing import Any

import meshlib
from benchmarks.scenarios.model import Chart, Outcome, check
from meshlib.testing import Clients, Load, Report, Scenario, Servers, pareto

TITLE = "The tail at scale: a fan-out of a hundred"
ABOUT = (
    "Each request makes 100 calls at once and is answered when all are; 100 servers whose latencies have a Pareto tail "
    "such that 2 % of the calls take more than 10 ms, and that one fan-out in a thousand takes more than 1.8 s. Those "
    "are the numbers of the source, which needs all of 1000 keys, has a hedge sent after 10 ms, and gets from 1800 to "
    "74 ms with 2 % more requests. Source: Dean and Barroso, *The Tail at Scale*, CACM 2013."
)
CHART = Chart(x="share of the fan-outs in %", y="ms until all have answered", log=True)

FAN_OUT, SERVERS, RATE = 100, 100, 10.0
SLOW, SLOW_SHARE = 0.010, 0.02
TAIL, TAIL_SHARE = 1.8, 0.001
EXTRA = 0.02
WARM_UP = 3.0
"""Seconds in which hedging learns what is slow; they do not count."""
GAIN, COST = 20, 0.025
STEEPER = 1.907
"""The slope for which the numbers of the source hold with its own fan-out of 1000. Of 100 calls with that tail the
slowest is quicker by far, so that there is less to gain."""


@dataclass(frozen=True)
class Tail:
    """A Pareto distribution of which `SLOW_SHARE` lies above `SLOW`."""

    shape: float

    @property
    def least(self) -> float:
        """The shortest latency."""
        return SLOW * exp(log(SLOW_SHARE) / self.shape)

    def of_slowest(self, share: float) -> float:
        """What the slowest of a fan-out exceeds with the probability ``share``, exactly."""
        each = 1 - (1 - share) ** (1 / FAN_OUT)
        return self.least * exp(-log(each) / self.shape)


def calibrated() -> Tail:
    """The tail for which one fan-out in `TAIL_SHARE` takes longer than `TAIL`."""
    each = 1 - (1 - TAIL_SHARE) ** (1 / FAN_OUT)
    return Tail(log(SLOW_SHARE / each) / log(TAIL / SLOW))


def run(seed: int, quick: bool) -> Outcome:
    """Play it with and without hedging; with hedging, for the steeper tail as well."""
    outcome = Outcome()
    fan_outs = 60 if quick else 1000
    tail = calibrated()
    hedged = (meshlib.hedge(extra_load=EXTRA),)
    plain = _play(tail, (), fan_outs, seed)
    ours = _play(tail, hedged, fan_outs, seed)
    runs = [("calibrated", tail, "default", plain), ("calibrated", tail, f"hedge({EXTRA:g})", ours)]
    if not quick:
        steeper = Tail(STEEPER)
        runs.append((f"shape {STEEPER}", steeper, f"hedge({EXTRA:g})", _play(steeper, hedged, fan_outs, seed)))
    for which, its, client, report in runs:
        exact = its.of_slowest(TAIL_SHARE)
        last = report.latency(1 - TAIL_SHARE, WARM_UP)
        outcome.rows.append(
            {
                "tail": which,
                "client": client,
                "p50 ms": round(1e3 * report.latency(0.5, WARM_UP), 1),
                "p99 ms": round(1e3 * report.latency(0.99, WARM_UP), 1),
                "p99.9 ms": round(1e3 * last, 1),
                "unhedged p99.9 ms, exactly": round(1e3 * exact, 1),
                "times better": round(exact / last, 1),
                "attempts/call": round(report.amplification(since=WARM_UP), 4),
            }
        )
    outcome.series = {"default": _sorted(plain), f"hedge({EXTRA:g})": _sorted(ours)}
    q = 0.9 if quick else 0.99  # what so many fan-outs can tell
    outcome.checks = [
        # The p99.9 of a thousand is chance; so the gain is told against the distribution's own, which they fit.
        check(
            f"default: p{100 * q:g} / what the distribution says",
            plain.latency(q, WARM_UP) / tail.of_slowest(1 - q),
            "0.6 to 1.7",
        ),
        check("hedge: times better at p99.9", tail.of_slowest(TAIL_SHARE) / ours.latency(0.999, WARM_UP), f">= {GAIN}"),
        check("hedge: extra load %", 100 * (ours.amplification(since=WARM_UP) - 1), f"<= {100 * COST:g}"),
        check("hedge: success %", 100 * ours.success(), ">= 100"),
    ]
    return outcome


def _play(tail: Tail, layers: tuple[Any, ...], fan_outs: int, seed: int) -> Report:
    return Scenario(
        servers=Servers(SERVERS, pareto(tail.least, tail.shape)),
        clients=Clients(1, layers),
        load=Load(RATE, spacing="even", fan_out=FAN_OUT),
        duration=WARM_UP + fan_outs / RATE,
        seed=seed,
    ).run()


def _sorted(report: Report) -> list[tuple[float, float]]:
    shares = [n / 1000 for n in range(10, 1000, 10)] + [0.995, 0.999]
    return [(100 * share, 1e3 * report.latency(share, WARM_UP)) for share in shares]
