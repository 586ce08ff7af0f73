"""The distribution of what took how long lately: log-linear histograms in slices, of which the oldest is dropped.

Each power of two is cut into 32 buckets, so a quantile is right within 3 %, and is told as the upper edge of its
bucket: no more than the share asked for lies above it. Only buckets that were hit take memory. Three slices of 10 s,
as in Finagle's WindowedPercentileHistogram; unlike there, the slice being filled counts as well, and an answer comes
with the number of samples that it rests on, so that nobody takes an empty histogram for a quick one. Pure: time is
given.
"""

from __future__ import annotations

from collections import defaultdict
from math import ceil, frexp, ldexp
from typing import Final

__all__ = ["Latencies"]

SLICES: Final = 3
SLICE: Final = 10.0
LEAST: Final = 1e-6
"""Seconds: what is shorter counts as this, and so does what is none, for a clock may step back."""


class Latencies:
    """Latencies of the last 20 to 30 seconds.

    Args:
        slices: How many histograms.
        seconds: For how long each is filled.
    """

    __slots__ = ("_filled", "_rolls_at", "_seconds", "_slices")

    def __init__(self, slices: int = SLICES, seconds: float = SLICE) -> None:
        self._slices: list[defaultdict[int, int]] = [defaultdict(int) for _ in range(slices)]
        self._filled = self._slices[-1]
        self._seconds = seconds
        self._rolls_at: float | None = None

    def record(self, seconds: float) -> None:
        """Take note of one latency. It counts from the next `roll` on as one of that time."""
        mantissa, exponent = frexp(seconds if seconds > LEAST else LEAST)  # noqa: FURB136 - three times as fast as max
        self._filled[exponent * 32 + int(mantissa * 64.0)] += 1

    def roll(self, now: float) -> None:
        """Drop what is too old by ``now``."""
        if self._rolls_at is None:
            self._rolls_at = now + self._seconds
        elif now >= self._rolls_at:
            passed = int((now - self._rolls_at) / self._seconds) + 1
            for _ in range(min(passed, len(self._slices))):
                del self._slices[0]
                self._slices.append(defaultdict(int))
            self._filled = self._slices[-1]
            self._rolls_at += passed * self._seconds

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(sum(piece.values()) for piece in self._slices)

    def quantiles(self, *shares: float) -> tuple[float, ...]:
        """For each of ``shares``, rising, the seconds that at most 1 - share of the samples exceed; 0 without any."""
        total: defaultdict[int, int] = defaultdict(int)
        for piece in self._slices:
            for index, n in piece.items():
                total[index] += n
        count = sum(total.values())
        found: list[float] = []
        seen = 0
        for index in sorted(total):
            seen += total[index]
            while len(found) < len(shares) and seen >= max(1, ceil(shares[len(found)] * count)):
                # a mantissa lies in [0.5, 1), so 64 times it lies in [32, 64): undo the sum, take the upper edge
                exponent, step = divmod(index - 32, 32)
                found.append(ldexp((step + 33) / 64.0, exponent))
        return tuple(found) + (0.0,) * (len(shares) - len(found))

    def __repr__(self) -> str:
        median, slow = self.quantiles(0.5, 0.99)
        return f"<Latencies: {self.count} samples, p50 {median * 1e3:.3g} ms, p99 {slow * 1e3:.3g} ms>"
