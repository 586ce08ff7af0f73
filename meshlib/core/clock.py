"""Time and chance, injected.

Everything that measures time reads one `Clock`, and everything that draws lots uses one seeded ``random.Random``, so
that whole stacks run in virtual time and repeat from a seed. Under trio the clock is trio's own, and with trio's
``MockClock`` that makes it virtual with nothing to configure; on asyncio and uvloop it is ``time.monotonic`` (uvloop's
own loop time has a resolution of a millisecond, too coarse to measure latencies).

Waiting is always ``anyio.sleep`` or a cancel scope, which follow the same clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import anyio

__all__ = ["Clock", "loop_time"]


def loop_time() -> float:
    """Monotonic seconds on the clock of the event loop that runs now: trio's own, else ``time.monotonic``."""
    return _reader()()


def _reader() -> Callable[[], float]:
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        read: Callable[[], float] = trio.current_time
        return read
    return time.monotonic


class Clock:
    """A source of time. A client or server has one of its own, and stays with the event loop that first reads it.

    Args:
        now: Monotonic seconds; by default the time of the event loop in use when it is first read.
        epoch_ns: Wall time, in nanoseconds since the epoch. Only deadlines and spans on the wire use it.
    """

    __slots__ = ("epoch_ns", "now")

    def __init__(self, now: Callable[[], float] | None = None, epoch_ns: Callable[[], int] = time.time_ns) -> None:
        self.now: Callable[[], float] = now or self._settle
        self.epoch_ns = epoch_ns

    def _settle(self) -> float:
        read = _reader()
        try:
            anyio.current_time()
        except RuntimeError:  # no event loop runs yet, so this decides nothing
            return read()
        self.now = read
        return read()

    def __repr__(self) -> str:
        return f"Clock(now={getattr(self.now, '__qualname__', self.now)})"
