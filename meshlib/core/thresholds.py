"""What is too much failure, as values and as exact counts.

Two rules, of which either suffices: failures in a row, which find what is dead within a few calls, and the share of
calls that succeed, which finds what fails half of the time. The share is an exact count over slices of a window, not a
moving average over time: in a tight burst each sample of an average weighs next to nothing, so that it can hide a total
outage (linkerd2-proxy's unified breaker; Finagle's FailureAccrualPolicy has the average). Finagle also waits until the
window has been filled once; here `Thresholds.min_requests` suffices, as in Linkerd. The share is looked at when a call
fails: a success never takes anything out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from .backoff import Backoff, EqualJitter
from .errors import ConfigurationError

__all__ = ["Thresholds", "Window", "backoff_of", "shown_backoff"]

FIRST_OUT, LAST_OUT = 5.0, 300.0
"""Seconds (Finagle, FailureAccrualFactory: jittered between 5 and 300)."""

SLICES: Final = 10
"""Of a window (linkerd2-proxy: a ring of 10; Finagle's WindowedAdder has 5)."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What opens a circuit.

    Attributes:
        failures: So many in a row; ``None`` for whatever number (Finagle and Envoy: 5).
        success_rate: A lower share of calls that succeed, between 0 and 1; ``None`` for whatever share (Finagle: 0.8).
        window: Seconds over which the share is counted (Finagle: 30).
        min_requests: The share says nothing below so many calls in the window (Finagle and Linkerd: 5).

    Raises:
        ConfigurationError: One makes no sense.
    """

    failures: int | None = 5
    success_rate: float | None = 0.8
    window: float = 30.0
    min_requests: int = 5

    def __post_init__(self) -> None:
        if self.failures is not None and not (_whole(self.failures) and self.failures >= 1):
            raise ConfigurationError(f"failures={self.failures!r}: give how many in a row, 1 or more, or None")
        if self.success_rate is not None and not (_number(self.success_rate) and 0 < self.success_rate <= 1):
            raise ConfigurationError(f"success_rate={self.success_rate!r}: give a share, such as 0.8 for 80 %, or None")
        if self.failures is None and self.success_rate is None:
            raise ConfigurationError("failures=None, success_rate=None: nothing would ever open it; give one of them")
        if not (_number(self.window) and 0 < self.window < 1e6):
            raise ConfigurationError(f"window={self.window!r}: give seconds, a number above 0")
        if not (_whole(self.min_requests) and self.min_requests >= 1):
            raise ConfigurationError(f"min_requests={self.min_requests!r}: give a number of requests, 1 or more")

    def __str__(self) -> str:
        return (
            f"failures={self.failures}, success_rate={self.success_rate}, "
            f"window={self.window:g}, min_requests={self.min_requests}"
        )


def backoff_of(what: str, given: tuple[float, float] | Backoff) -> Backoff:
    """The waits of a circuit: ``(first, last)`` in seconds are equal-jittered, and a `Backoff` is as it is.

    Raises:
        ConfigurationError: It is neither.
    """
    if not isinstance(given, tuple):
        if not callable(getattr(given, "delay", None)):
            raise ConfigurationError(f"{what}={given!r}: give (first, last) in seconds, or a Backoff")
        return given
    if len(given) != 2 or not (_number(given[0]) and _number(given[1]) and 0 < given[0] <= given[1] < 1e9):
        raise ConfigurationError(f"{what}={given!r}: give (first, last) in seconds, above 0, the longer one last")
    return EqualJitter(*given)


def shown_backoff(backoff: Backoff) -> str:
    """As a user would type it."""
    return f"({backoff.first:g}, {backoff.last:g})" if isinstance(backoff, EqualJitter) else repr(backoff)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Window:
    """How many calls succeeded and how many failed within the last ``seconds``, exactly, to a slice of a tenth."""

    __slots__ = ("_failed", "_past", "_slice", "_succeeded", "_until")

    def __init__(self, seconds: float) -> None:
        self._slice = seconds / SLICES
        self._past: deque[tuple[float, int, int]] = deque()
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._past.clear()
        self._until = float("-inf")
        self._succeeded = self._failed = 0

    def success(self, now: float) -> None:
        """Count one."""
        if now >= self._until:
            self._turn(now)
        self._succeeded += 1

    def failure(self, now: float) -> None:
        """Count one."""
        if now >= self._until:
            self._turn(now)
        self._failed += 1

    def counts(self, now: float) -> tuple[int, int]:
        """How many succeeded, and how many failed."""
        self._forget(now)
        if now >= self._until + (SLICES - 1) * self._slice:
            return 0, 0
        return (
            self._succeeded + sum(succeeded for _, succeeded, _ in self._past),
            self._failed + sum(failed for _, _, failed in self._past),
        )

    def _turn(self, now: float) -> None:
        """Begin a slice at ``now``."""
        if self._succeeded or self._failed:
            self._past.append((self._until, self._succeeded, self._failed))
            self._succeeded = self._failed = 0
        self._until = now + self._slice
        self._forget(now)

    def _forget(self, now: float) -> None:
        """Drop the slices that began longer ago than the window, so that what counts is never older than that."""
        oldest = now - (SLICES - 1) * self._slice
        while self._past and self._past[0][0] <= oldest:
            self._past.popleft()
