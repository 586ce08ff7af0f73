"""Latencies given by their quantiles, with straight lines between them, since those are what gets published."""

import random
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass

from meshlib.testing.latency import Latency


@dataclass(frozen=True)
class Quantiles(Latency):
    """A distribution function in straight pieces.

    Attributes:
        points: ``(share, seconds)``, rising from share 0 to share 1: so much of the times is at most so long.
    """

    points: tuple[tuple[float, float], ...]

    @property
    def mean(self) -> float:
        """Of a straight piece it is its middle."""
        pieces = zip(self.points, self.points[1:], strict=False)
        return sum((q - p) * (low + high) / 2 for (p, low), (q, high) in pieces)

    def sampler(self, rng: random.Random) -> Callable[[], float]:
        """The inverse of the distribution function, of a uniform draw."""
        draw, points = rng.random, self.points
        shares = [share for share, _ in points]

        def sample() -> float:
            share = draw()
            at = bisect(shares, share, 1, len(shares) - 1)
            (p, low), (q, high) = points[at - 1], points[at]
            return low + (high - low) * (share - p) / (q - p)

        return sample


PRODUCTION = Quantiles(
    (
        (0.0, 0.16409),
        (0.1, 0.166),
        (0.5, 0.16748),
        (0.75, 0.169),
        (0.9, 0.1767),
        (0.95, 0.1817),
        (0.97, 0.1848),
        (0.99, 0.1923),
        (0.999, 0.1988),
        (1.0, 0.2),
    )
)
"""What "Beyond Round Robin" and Finagle's balancer simulation replay from a file: the least, median, p90, p95, p99,
p99.9 and longest times are that file's; those between are chosen so that the mean, 169.6 ms, comes out as well."""
