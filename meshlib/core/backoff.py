"""Backoffs: how long to wait before the next try, as pure functions of the number of the try and of chance.

A `Backoff` is a value: ``delay(n, rng, previous)`` gives the seconds before the ``n``-th next try, and keeps no state
of its own, so one value serves any number of callers. ``previous`` is the delay that was given before, of which only
decorrelated jitter takes note.

Finagle's Backoff.scala, with its two quirks mended: its decorrelated jitter never shrinks (its lower bound is the
previous wait, not the start), and its exponential jitter multiplies the previous *random* wait, so that growth is
irregular; both follow AWS's formulae here ("Exponential Backoff and Jitter", 2015). Exponents are bounded, so that the
thousandth try overflows nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from .errors import ConfigurationError

__all__ = ["Backoff", "Constant", "DecorrelatedJitter", "EqualJitter", "Exponential", "FullJitter"]

DOUBLINGS = 62
"""2**62 of anything is longer than anybody waits, and no overflow."""


class Backoff(Protocol):
    """How long to wait before each try."""

    def delay(self, n: int, rng: random.Random, previous: float = 0.0) -> float:
        """Seconds before the ``n``-th next try, ``n`` from 1; ``previous`` is the delay before this one, 0 at first."""
        ...


def _check(name: str, first: float, last: float) -> None:
    if not 0 < first <= last < 1e9:
        raise ConfigurationError(
            f"{name}({first!r}, {last!r}): give the first and the longest wait in seconds, above 0"
        )


@dataclass(frozen=True, slots=True)
class Constant:
    """The same each time."""

    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < 1e9:
            raise ConfigurationError(f"Constant({self.seconds!r}): give seconds, 0 or more")

    def delay(self, n: int, rng: random.Random, previous: float = 0.0) -> float:
        """See `Backoff`."""
        return self.seconds


@dataclass(frozen=True, slots=True)
class Exponential:
    """``first``, doubled each time, at most ``last``; without jitter, so for tests and for one client alone."""

    first: float
    last: float

    def __post_init__(self) -> None:
        _check("Exponential", self.first, self.last)

    def delay(self, n: int, rng: random.Random, previous: float = 0.0) -> float:
        """See `Backoff`."""
        return _doubled(self.first, n - 1, self.last)


@dataclass(frozen=True, slots=True)
class FullJitter:
    """Uniform in [0, ``first``·2ⁿ⁻¹), at most ``last`` (Finagle's exponentialJittered, mended)."""

    first: float
    last: float

    def __post_init__(self) -> None:
        _check("FullJitter", self.first, self.last)

    def delay(self, n: int, rng: random.Random, previous: float = 0.0) -> float:
        """See `Backoff`."""
        return rng.uniform(0.0, _doubled(self.first, n - 1, self.last))


@dataclass(frozen=True, slots=True)
class EqualJitter:
    """``first``; then half of ``first``·2ⁿ⁻¹ and as much again at random, at most ``last``.

    Finagle's equalJittered: there the later waits are h + uniform(0, h) with h = first·2ⁿ⁻², and constant once they
    reach ``last``. Here the longest wait is jittered as well, since clients that were thrown off together would
    otherwise return together.
    """

    first: float
    last: float

    def __post_init__(self) -> None:
        _check("EqualJitter", self.first, self.last)

    def delay(self, n: int, rng: random.Random, previous: float = 0.0) -> float:
        """See `Backoff`."""
        if n <= 1:
            return self.first
        half = _doubled(self.first, n - 1, self.last) / 2
        return half + rng.uniform(0.0, half)


@dataclass(frozen=True, slots=True)
class DecorrelatedJitter:
    """Uniform between ``first`` and three times the previous wait, at most ``last``."""

    first: float
    last: float

    def __post_init__(self) -> None:
        _check("DecorrelatedJitter", self.first, self.last)

    def delay(self, n: int, rng: random.Random, previous: float = 0.0) -> float:
        """See `Backoff`."""
        return min(self.last, rng.uniform(self.first, max(self.first, previous) * 3))


def _doubled(first: float, times: int, last: float) -> float:
    return min(last, first * 2.0 ** min(max(times, 0), DOUBLINGS))
