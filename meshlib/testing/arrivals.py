"""When the requests of an open loop come: pure arithmetic, from a rate that may change in a straight line.

The ``n``-th arrival is where the integral of the rate reaches ``n`` (even spacing), or a sum of exponential steps of
mean 1 (a Poisson process); time is found by solving that integral, which is a quadratic, for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import sqrt

__all__ = ["arrivals"]


def arrivals(rate: float, to: float | None, start: float, until: float, rng: random.Random | None) -> Iterator[float]:
    """The times of arrivals, in order, from ``start`` up to but not including ``until``.

    Args:
        rate: Arrivals a second at the start.
        to: Arrivals a second at the end; ``None`` for the same.
        start: Seconds.
        until: Seconds.
        rng: The chance of a Poisson process; ``None`` for even spacing, the first arrival at the very start.
    """
    growth = 0.0 if to is None else (to - rate) / (until - start)
    up_to = 0.0 if rng is None else rng.expovariate(1.0)
    while True:
        if growth == 0.0:
            after = up_to / rate
        else:
            square = rate * rate + 2 * growth * up_to
            if square < 0:  # the rate falls to nothing before so many have come
                return
            after = (sqrt(square) - rate) / growth
        if start + after >= until:
            return
        yield start + after
        up_to += 1.0 if rng is None else rng.expovariate(1.0)
