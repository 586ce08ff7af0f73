"""Finagle's peak EWMA as it is there, for comparison (loadbalancer/PeakEwma.scala)."""

from math import exp, inf
from typing import Any

from meshlib.balancing.load import UNMEASURED, LoadMetric, Meter


class FinagleEwma:
    """However a request ends, the time it took is what counts."""

    explores = False

    def meter(self) -> Meter:
        """The meter of a new node."""
        return _FinagleMeter()

    def __repr__(self) -> str:
        return "peak EWMA as in Finagle"


class _FinagleMeter(Meter):
    DECAY = 10.0

    __slots__ = ("_average", "_stamp")

    def __init__(self) -> None:
        super().__init__()
        self._average, self._stamp = 0.0, -inf

    def cost(self, now: float) -> float:
        self._observe(0.0, now)
        if not self._average and self.pending:
            return UNMEASURED + self.pending
        return self._average * (self.pending + 1)

    def _observe(self, took: float, now: float) -> None:
        kept = exp((self._stamp - now) / self.DECAY) if now > self._stamp else 1.0
        self._stamp = max(self._stamp, now)
        self._average = took if took > self._average else took * (1 - kept) + self._average * kept

    def succeeded(self, took: float, now: float) -> None:
        self._observe(took, now)

    def failed(self, took: float, now: float, **how: Any) -> None:
        self._observe(took, now)

    def timed_out(self, took: float, now: float) -> None:
        self._observe(took, now)

    def censored(self, took: float, now: float) -> None:
        self._observe(took, now)


def finagle_ewma() -> LoadMetric:
    """Peak EWMA without penalties and without anything else that was added to it."""
    return FinagleEwma()
