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


class Clock:
    """A source of time. A client or server has one of its own, and stays with the event loop that first reads it.

    Args:
        now: Monotonic seconds; by default the time of the event loop in use.
        epoch_ns: Wall time, in nanoseconds since the epoch. Only deadlines and spans on the wire use it.
        settle: Find out once which loop that is. Without it every read does, for a clock that several loops share.
    """

    __slots__ = ("_settle", "epoch_ns", "now")

    def __init__(
        self,
        now: Callable[[], float] | None = None,
        epoch_ns: Callable[[], int] = time.time_ns,
        *,
        settle: bool = True,
    ) -> None:
        self.now: Callable[[], float] = now or self._detect
        self.epoch_ns = epoch_ns
        self._settle = settle

    def _detect(self) -> float:
        trio = sys.modules.get("trio")
        read: Callable[[], float] = time.monotonic
        if trio is not None and trio.lowlevel.in_trio_run():
            read = trio.current_time
        if self._settle:
            self.now = read
        return read()

    def __repr__(self) -> str:
        return f"Clock(now={getattr(self.now, '__qualname__', self.now)})"
