"""How loaded a node is: what balancers compare. A metric is a value; it makes one `Meter` for each node of each client.

`LeastLoaded` counts requests under way. `PeakEwma` multiplies them (and one more) by what a request to the node takes:
an average that rises to a slow answer at once and falls by its decay (Finagle, loadbalancer/PeakEwma.scala; Tower).
Beyond Finagle's:

* A failure or timeout is recorded as a penalty, so that a fast failure is no fast answer (linkerd2, load-biaser), and
  failures in a row as more and more.
* What waits counts before it is answered: the mean age of the requests under way is a lower bound of the estimate.
* A cancelled request is a censored sample. It took at least that long, so it can raise the estimate, never lower it.
* A node is forgiven on evidence: answers far below the estimate count for ten times the time that they span.
"""

from __future__ import annotations

from math import exp
from typing import Final, Protocol

from ..core.errors import ConfigurationError

__all__ = ["LeastLoaded", "LoadMetric", "Meter", "PeakEwma", "least_loaded", "peak_ewma"]

UNMEASURED: Final = float(2**47 - 1)
"""The cost of a node that was never measured while its first request is under way (Finagle's PENALTY)."""
LONGEST_REST: Final = 300.0
"""Seconds; a server may not ask to be left alone for longer (linkerd2's cap)."""
NACKED: Final = 0.2
"""The share of the penalty for a refusal that asks for no particular rest. It tells of a queue that is full now, which
empties sooner than whatever is broken mends; and in an overload all nodes refuse, and all estimates should return."""
FAR_BELOW: Final = 0.5
"""An answer that takes less than this share of the estimate is evidence that the node has changed."""
FORGIVING: Final = 0.1
"""The share of the decay with which such evidence counts: 1 s for 10 s. One blip costs a busy node about two seconds of
its share and not 25; a node which is slow every tenth time stays suspect, since its slow answers come more often."""
FIRST_LOOK, LAST_LOOK = 1.0, 8.0
"""Seconds that a node is left alone before one request finds out how it is now (go-zero's p2c: 1): at first, and at
most. They double each time that it was in vain, and begin with the penalty where something failed."""


class Meter:
    """The load of one node; this one counts requests under way, and learns nothing from how they end.

    Attributes:
        pending: Requests under way.
        lasting: Those of them that have been answered, and whose answers are still being read: streams, bodies. They
            are load, and their age says nothing of how slow the node is.
        begun: The sum of the times at which the others began.
        used: When the last of its requests began.
    """

    __slots__ = ("begun", "lasting", "pending", "used")

    def __init__(self) -> None:
        self.pending = self.lasting = 0
        self.begun = 0.0
        self.used = float("-inf")

    def cost(self, now: float) -> float:
        """What is compared; the node with less gets the request."""
        return self.pending

    def succeeded(self, took: float, now: float) -> None:
        """A request was answered after ``took`` seconds."""

    def failed(
        self, took: float, now: float, *, rest: float | None = None, nacked: bool = False, lasted: bool = False
    ) -> None:
        """It failed after ``took`` seconds. The server asked for ``rest`` seconds, or just refused it.

        If it ``lasted`` it had been answered, and the time was the stream's own.
        """

    def timed_out(self, took: float, now: float) -> None:
        """Its time ran out after ``took`` seconds."""

    def censored(self, took: float, now: float) -> None:
        """It ended after ``took`` seconds in a way that says no more than that it took that long."""

    def due(self, now: float) -> bool:
        """Has it not been looked at for so long that one request should find out how it is?"""
        return False

    def looked(self) -> None:
        """One request has been sent to find out."""

    def forget(self) -> None:
        """There is a new process behind the address: what was measured says nothing of it."""

    def describe(self, now: float) -> str:
        """In a few words."""
        return f"{self.pending} under way"


class LoadMetric(Protocol):
    """A way to measure load."""

    @property
    def explores(self) -> bool:
        """Do its meters remember, so that a node must be looked at from time to time?"""
        ...

    def meter(self) -> Meter:
        """The meter of a new node."""
        ...


class LeastLoaded:
    """The number of requests under way."""

    explores = False

    def meter(self) -> Meter:
        """A plain count."""
        return Meter()

    def __repr__(self) -> str:
        return "least_loaded()"


class PeakEwma:
    """What a request takes, times how many would be under way.

    Args:
        decay: Seconds; the time constant of the average, and of forgetting while a node is idle.
        penalty: Seconds that a failure counts for, at least.
    """

    explores = True

    def __init__(self, decay: float, penalty: float) -> None:
        for name, value in (("decay", decay), ("penalty", penalty)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                raise ConfigurationError(f"peak_ewma({name}={value!r}): give seconds, a number above 0")
        self.decay, self.penalty = float(decay), float(penalty)

    def meter(self) -> Meter:
        """An estimate that nothing has been measured for yet."""
        return EwmaMeter(self.decay, self.penalty)

    def __repr__(self) -> str:
        return f"peak_ewma(decay={self.decay:g}, penalty={self.penalty:g})"


class EwmaMeter(Meter):
    """The peak EWMA of one node.

    Attributes:
        estimate: Seconds that a request takes, as of `stamp`; 0 while nothing is known.
        stamp: When it was last changed.
    """

    __slots__ = ("_decay", "_failed_at", "_failures", "_patience", "_penalty", "_quiet_until", "estimate", "stamp")

    estimate: float
    stamp: float
    _failed_at: float
    _quiet_until: float

    def __init__(self, decay: float, penalty: float) -> None:
        self.pending = self.lasting = 0
        self.begun = 0.0
        self.used = float("-inf")
        self._decay, self._penalty = decay, penalty
        self._clear()

    def cost(self, now: float) -> float:
        """Seconds until one more request would be answered, if they were answered in turn; 0 asks for a probe."""
        estimate = self.estimate
        pending = self.pending
        if not pending:
            # Nothing was heard since, so what is remembered fades. Reading does not move the stamp: else estimates that
            # are read often would fade without an average ever being taken (Finagle, linkerd2).
            return estimate * exp((self.stamp - now) / self._decay) if estimate else 0.0
        if not estimate:
            return UNMEASURED + pending
        waiting = pending - self.lasting
        age = now - self.begun / waiting if waiting else 0.0
        if age > estimate:
            return age * (pending + 1)
        return estimate * exp((self.stamp - now) / self._decay) * (pending + 1)

    def succeeded(self, took: float, now: float) -> None:
        """Up at once, down by the decay, and quicker when it is far below."""
        estimate = self.estimate
        if took >= estimate:
            self.estimate = took
        else:
            decay = self._decay
            if took < estimate * FAR_BELOW:
                decay *= FORGIVING
                self._patience = FIRST_LOOK
            kept = exp((self.stamp - now) / decay) if now > self.stamp else 1.0
            self.estimate = estimate * kept + took * (1.0 - kept)
        self._failures = 0
        if now > self.stamp:
            self.stamp = now

    def failed(
        self, took: float, now: float, *, rest: float | None = None, nacked: bool = False, lasted: bool = False
    ) -> None:
        """Count it as the penalty, or as the rest that the server asked for if that is longer.

        The penalty doubles with each failure in a row, since no fixed one is enough: where the others have a hundred
        requests under way, each looks a hundred times as costly as it is. In a row are those that were sent after the
        one before had failed; a hundred that fail at once, as when a connection is cut, are one.
        """
        if now - took >= self._failed_at:
            self._failures += 1
            self._failed_at = now
        floor = self._penalty * NACKED if nacked else self._penalty
        self._patience = max(self._patience, floor)
        floor = min(floor * 2.0 ** min(self._failures - 1, 30), LONGEST_REST)
        if rest is not None and rest > 0:
            rest = min(rest, LONGEST_REST)
            floor = max(floor, rest)
            self._quiet_until = max(self._quiet_until, now + rest)
        self._raise(floor if lasted else max(took, floor), now)

    def timed_out(self, took: float, now: float) -> None:
        """A failure if it had the time that an answer takes; else the caller was in a hurry, and nothing is known."""
        if self._failures or took >= self._faded(now):
            self.failed(took, now)

    def censored(self, took: float, now: float) -> None:
        """Raise the estimate to what it has taken at least. A node of which nothing is known stays so."""
        if self.estimate:
            self._raise(took, now)

    def _raise(self, floor: float, now: float) -> None:
        faded = self._faded(now)
        if floor > faded:
            self.estimate = floor
            self.stamp = max(now, self.stamp)

    def _faded(self, now: float) -> float:
        return self.estimate * exp(min(0.0, self.stamp - now) / self._decay)

    def due(self, now: float) -> bool:
        """It is idle, was not used for its patience, and did not ask to be left alone."""
        return not self.pending and now - self.used >= self._patience and now >= self._quiet_until

    def looked(self) -> None:
        """Wait twice as long before the next time, until an answer is evidence."""
        self._patience = max(self._patience, min(self._patience * 2, LAST_LOOK))

    def forget(self) -> None:
        """Nothing is known: exactly one request is let through to measure it."""
        self._clear()

    def _clear(self) -> None:
        self.estimate = 0.0
        self.stamp = self._failed_at = self._quiet_until = float("-inf")
        self._failures = 0
        self._patience = FIRST_LOOK

    def describe(self, now: float) -> str:
        """The cost and what it is made of."""
        if not self.estimate:
            return f"not measured, {self.pending} under way"
        return f"cost {self.cost(now):.4g} s: {self._faded(now) * 1e3:.4g} ms, {self.pending} under way"


def peak_ewma(decay: float = 10.0, penalty: float = 5.0) -> LoadMetric:
    """Compare nodes by what a request to them takes, times how many are under way.

    Args:
        decay: Seconds; the time constant of the average, and of forgetting while a node is idle (Finagle: 10).
        penalty: Seconds that a failure or timeout counts for, at least (linkerd2's load-biaser: 5).

    Raises:
        ConfigurationError: One of them is no number above 0.
    """
    return PeakEwma(decay, penalty)


def least_loaded() -> LoadMetric:
    """Compare nodes by how many requests are under way. It measures nothing, so it does not mind long polls."""
    return LeastLoaded()
