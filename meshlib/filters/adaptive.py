"""How much at once is right: a concurrency limit that follows the latency it measures. Pure; the shell is `limit`.

Envoy's gradient: over windows of a second or more, ``limit = limit · clamp(1.25 · baseline / latency, ½, 1) + √limit``.
What waits inside the service shows as latency over the baseline, the latency without a queue. √limit lets it probe for
more, so about that many wait in equilibrium. Limits are moved by whole windows, since single samples lose 15 to 30 % of
the throughput to noise, and only while at least half of the limit is in use.

A baseline that is taken under load contains the very queue that it is to reveal, and creeps up. So now and then, while
it is busy, the limit goes down to half of what the service seems to work on, for some tens of samples. That drains the
queue, and what they show is the baseline. (Envoy goes down to 3, and refuses what it could have served.)
Source: Envoy, adaptive_concurrency/controller/gradient_controller.cc; windows: Netflix, WindowedLimit.java.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from ..core.errors import ConfigurationError

__all__ = ["Adaptive", "AdaptiveLimit", "adaptive"]

WINDOW: Final = 1.0
"""Seconds, at least (Netflix, WindowedLimit)."""
EAGER_WINDOW: Final = 0.1
"""The same while no queue has been met yet (Envoy: sample aggregation in 100 ms)."""
LATENCIES: Final = 2
"""A window lasts at least so many latencies, for a change of the limit to show in it (Netflix, WindowedLimit)."""
SAMPLES: Final = 10
"""In a window, at least (Netflix, WindowedLimit)."""
SHORTEST: Final = 100e-6
"""Seconds; what takes less says nothing about a queue (Netflix, WindowedLimit)."""
BUFFER: Final = 1.25
"""Latency may exceed the baseline by a quarter before it counts as a queue (Envoy, the minRTT's buffer)."""
STEEPEST: Final = 0.5
"""No window takes more than half of the limit (Envoy, Netflix: the gradient's lower bound)."""
EAGER: Final = 1.5
"""A limit that has met no queue yet grows by a half each window, so that 20 become 1,000 in a second, not in 55."""
DROPS: Final = 0.1
"""The share of requests that ran out of time inside, from which a window counts as overloaded, whatever others took."""
BACKOFF: Final = 0.9
"""What an overloaded window leaves of the limit (Netflix, AIMDLimit)."""
CHECK_SAMPLES: Final = 25
"""Samples that make a baseline: half of Envoy's 50, for half of the time at half of the limit."""
CHECK_EVERY: Final = 10.0
"""Seconds between checks of the baseline, or `CHECK_LATENCIES` if that is more. Jittered by a quarter, so that the
servers of a cluster do not all do it at once. A check takes about three latencies, so it costs 3 % of the capacity at
most, and only of a server that is busy."""
CHECK_LATENCIES: Final = 50
CHECK_SHARE: Final = 0.5
"""Of the concurrency at which the service would have no queue, if the baseline were right. Were it twice too high, half
of that would still be without one."""
SETTLED: Final = 0.9
"""A check that finds less than this of the baseline is followed by another after the next window: a baseline from the
middle of an overload may be many times too high, and one check brings it down by about a half."""
CHECK_AT_MOST: Final = 10
"""A check that takes more latencies than this is given up: what runs so long has another latency than the rest."""
IDLE_SHARE: Final = 0.1
"""How far a window with room to spare pulls the baseline up to itself."""


@dataclass(frozen=True, slots=True)
class Adaptive:
    """A limit that adapts; see `adaptive`."""

    initial: int = 20
    min_limit: int = 1
    max_limit: int = 1000

    def __post_init__(self) -> None:
        numbers = (self.initial, self.min_limit, self.max_limit)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not (whole and 1 <= self.min_limit <= self.initial <= self.max_limit):
            raise ConfigurationError(
                f"{self!r}: give whole numbers of requests, min_limit at least 1, and initial between min_limit and "
                "max_limit"
            )

    def __repr__(self) -> str:
        return f"adaptive(initial={self.initial!r}, min_limit={self.min_limit!r}, max_limit={self.max_limit!r})"


def adaptive(initial: int = 20, *, min_limit: int = 1, max_limit: int = 1000) -> Adaptive:
    """Let `concurrency_limit` find the limit by itself: ``concurrency_limit(adaptive())``.

    Args:
        initial: Requests at once, at first (Netflix's limits: 20).
        min_limit: It never goes below. By itself it hardly goes below 4, where √limit makes up for the steepest slope.
        max_limit: It never goes above (Netflix, VegasLimit: 1,000).

    Raises:
        ConfigurationError: They are no whole numbers in that order.
    """
    return Adaptive(initial, min_limit, max_limit)


class AdaptiveLimit:
    """The limit of one service. Pure: time and chance are given.

    Attributes:
        limit: How many may run at once now.
        baseline: Seconds that a request takes when none waits for another; ``None`` before it is known.
        latency: Seconds, the mean of the last window; 0 before there was one.
        checking: The limit is held down for a moment, to measure the baseline.
    """

    __slots__ = (
        "_active",
        "_count",
        "_dropped",
        "_eager",
        "_end",
        "_held",
        "_next_check",
        "_rng",
        "_since",
        "_steep",
        "_sum",
        "baseline",
        "checking",
        "latency",
        "limit",
        "spec",
    )

    def __init__(self, spec: Adaptive, rng: random.Random) -> None:
        self.spec = spec
        self.limit = spec.initial
        self.baseline: float | None = None
        self.latency = 0.0
        self.checking = False
        self._rng = rng
        self._held = float(spec.initial)
        self._eager = True
        self._steep = 0
        self._next_check = -math.inf
        self._since = math.inf
        self._end = -math.inf
        self._begin(-math.inf, 0.0)

    def _begin(self, now: float, length: float) -> None:
        self._count = self._active = self._dropped = 0
        self._sum = 0.0
        self._end = now + length

    @property
    def steady(self) -> int:
        """The limit, as it is when the baseline is not being checked."""
        return int(self._held)

    def finished(self, now: float, took: float, active: int, overloaded: bool = False) -> bool:
        """A request succeeded.

        Args:
            now: The time.
            took: Seconds that it ran.
            active: How many ran, itself included.
            overloaded: Something else says that there is too much.

        Returns:
            Has the limit changed?
        """
        if took < SHORTEST:
            return False
        if self.checking:
            return self._check(now, took, active)
        self._count += 1
        self._sum += took
        self._active += active
        if now < self._end or self._count < SAMPLES:
            return False
        return self._roll(now, overloaded)

    def dropped(self, active: int) -> None:
        """A request ran out of time, while ``active`` ran."""
        self._dropped += 1
        self._active += active

    def failed(self, now: float) -> bool:
        """A request failed, which says nothing about a queue; but a check must not last for want of successes.

        Returns:
            Has the limit changed?
        """
        return self.checking and now >= self._end and self._end_check(now)

    def _roll(self, now: float, overloaded: bool) -> bool:
        first = self._end == -math.inf
        latency = self._sum / self._count
        length = self._length(latency)
        if first:  # the clock had not begun to run
            self._begin(now, length)
            return False
        self.latency = latency
        ended = self._count + self._dropped
        busy = 2 * self._active >= self.limit * ended
        dropped = self._dropped >= DROPS * ended
        self._begin(now, length)
        if self.baseline is None or latency < self.baseline:
            self.baseline = latency
        if not busy:
            self._steep = 0
            self.baseline += IDLE_SHARE * (latency - self.baseline)
            return False
        before = self._held
        gradient = min(1.0, max(STEEPEST, BUFFER * self.baseline / latency))
        if overloaded or dropped:
            self._eager = False
            self._hold(before * BACKOFF)
        else:
            if gradient < 1.0:
                self._eager = False
            more = max(math.sqrt(before), (EAGER - 1) * before if self._eager else 0.0)
            self._hold(before * gradient + more)
        self._steep = self._steep + 1 if gradient == STEEPEST else 0
        if self._next_check == -math.inf:
            self._next_check = now  # the first baseline may have been taken in the middle of an overload
        elif now >= self._next_check or self._steep >= 2:
            self._start_check(now)
        return True

    def _length(self, latency: float) -> float:
        return max(EAGER_WINDOW if self._eager else WINDOW, LATENCIES * latency)

    def _hold(self, limit: float) -> None:
        self._held = min(float(self.spec.max_limit), max(float(self.spec.min_limit), limit))
        self.limit = int(self._held)

    # --- the baseline -------------------------------------------------------------------------------------------------

    def _start_check(self, now: float) -> None:
        assert self.baseline is not None  # noqa: S101
        self.checking = True
        self._since = math.inf
        self.limit = max(self.spec.min_limit, int(CHECK_SHARE * self.limit * min(1.0, self.baseline / self.latency)))
        self._begin(now, CHECK_AT_MOST * self.latency)

    def _check(self, now: float, took: float, active: int) -> bool:
        if self._since == math.inf and active <= self.limit:
            self._since = now  # the queue is gone: what begins from here on meets none
        if now - took >= self._since:
            self._count += 1
            self._sum += took
            if self._count >= CHECK_SAMPLES:
                return self._end_check(now)
        return now >= self._end and self._end_check(now)

    def _end_check(self, now: float) -> bool:
        self.checking = False
        self._steep = 0
        self._hold(self._held)
        wait = max(CHECK_EVERY, CHECK_LATENCIES * self.latency) * self._rng.uniform(0.75, 1.25)
        if self._count >= SAMPLES:
            found, believed = self._sum / self._count, self.baseline
            self.baseline = found
            if believed is not None and found < SETTLED * believed:
                wait = 0.0
        self._next_check = now + wait
        self._begin(now, self._length(self.latency))
        return True

    def __repr__(self) -> str:
        baseline = "unknown" if self.baseline is None else f"{self.baseline * 1e3:.3g} ms"
        return f"<AdaptiveLimit {self.limit}: baseline {baseline}, latency {self.latency * 1e3:.3g} ms>"
