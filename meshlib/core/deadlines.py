"""Many deadlines, one timer.

A call waits in one place nearly all of its time: for its reply. Bounding that wait with a cancel scope costs 5 µs, most
of it for a timer that is cancelled a moment later. In a `Wheel` it costs 0.5 µs: the deadline goes into the bucket of
its tick, and one background task sleeps until the first bucket falls due. Ticks are 10 ms, as in Finagle's timer, and
coarser for deadlines further off, so that there are never more than a few thousand. A deadline is kept never early, and
late by at most 10 ms and 1/128 of its distance.

A layer or session that bounds its own waits by the context's deadline says ``keeps_deadline = True``; when all below
the timeout do, it needs no scope. `wait_by` is for their rarer waits.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

import anyio

from .clock import Clock
from .errors import DeadlineExceeded

__all__ = ["Wheel", "kept", "passed", "patience_of", "wait_by"]

PER_SECOND: Final = 100
LEAST_WAIT: Final = 0.001
FURTHEST: Final = 1e9
"""Seconds; what lies further off is infinity."""
EARLIEST: Final = 0.002


class Wheel:
    """Deadlines by key. `run` must be running for any of them to fire.

    Args:
        clock: What the deadlines are measured on.
        expired: Called with the key of each deadline that has passed; in the order in which they were added, within one
            tick, so that what follows from it repeats.
    """

    __slots__ = ("_buckets", "_clock", "_earlier", "_expired", "_next", "_ticks")

    def __init__(self, clock: Clock, expired: Callable[[Any], None]) -> None:
        self._clock = clock
        self._expired = expired
        self._buckets: dict[int, dict[Any, None]] = {}
        self._ticks: list[int] = []
        self._next: int | None = None
        self._earlier: anyio.Event | None = None

    def add(self, deadline: float, key: Any) -> int:
        """Watch a deadline; give the tick by which `discard` finds it again."""
        now = self._clock.now()
        due = int(min(deadline, now + FURTHEST) * PER_SECOND) + 1
        # The further off, the coarser: 128 ticks for each doubling of the distance, not 100 for each second.
        away = due - int(now * PER_SECOND)
        coarse = max(0, away.bit_length() - 8) if away > 0 else 0
        tick = ((due - 1 >> coarse) + 1) << coarse
        bucket = self._buckets.get(tick)
        if bucket is None:
            self._buckets[tick] = {key: None}
            heappush(self._ticks, tick)
            if self._earlier is not None and (self._next is None or tick < self._next):
                self._earlier.set()
        else:
            bucket[key] = None
        return tick

    def discard(self, tick: int, key: Any) -> None:
        """Watch it no more. Harmless when it has fired."""
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.pop(key, None)

    async def run(self) -> None:
        """Fire what is due, until cancelled."""
        while True:
            now = self._clock.now()
            # Buckets whose last key was discarded wake nobody.
            while self._ticks and (self._ticks[0] <= now * PER_SECOND or not self._buckets[self._ticks[0]]):
                for key in self._buckets.pop(heappop(self._ticks)):
                    self._expired(key)
            self._next = self._ticks[0] if self._ticks else None
            self._earlier = anyio.Event()
            # Rounding can wake us a hair before the tick; without a least wait, virtual time would stand still there.
            wait = float("inf") if self._next is None else max(self._next / PER_SECOND - now, LEAST_WAIT)
            with anyio.CancelScope(deadline=anyio.current_time() + wait):
                await self._earlier.wait()

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def __repr__(self) -> str:
        return f"<Wheel: {len(self)} deadlines in {len(self._buckets)} buckets>"


def passed(deadline: float | None, clock: Clock) -> bool:
    """Is it over? Asked after a cancellation, to tell a deadline from a change of mind.

    An event loop's timers may fire early by its own resolution: uvloop counts whole milliseconds.
    """
    return deadline is not None and clock.now() >= deadline - EARLIEST


def patience_of(request: Any, most: float) -> float:
    """Seconds that ``request`` waits for somebody to send it to. Requests say so by an attribute ``patience``.

    Args:
        request: Any protocol's.
        most: What holds for those that say nothing, and at most for those that do.
    """
    own = getattr(request, "patience", None)
    return most if own is None else min(own, most)


def kept(waiting: str = "") -> DeadlineExceeded:
    """The error of whoever keeps a deadline itself. The timeout above completes it with whose deadline it was.

    Args:
        waiting: What was waited for, if it was not the reply.
    """
    error = DeadlineExceeded(f"the deadline passed{': ' if waiting else ''}{waiting}")
    error.kept_here = waiting
    return error


async def wait_by(event: anyio.Event, deadline: float | None, clock: Clock, what: str) -> None:
    """Wait for ``event``, at most until ``deadline`` (on ``clock``; ``None`` for as long as it takes).

    Raises:
        DeadlineExceeded: It passed first; says that ``what`` was waited for.
    """
    if deadline is None:
        await event.wait()
        return
    with anyio.CancelScope(deadline=anyio.current_time() + max(0.0, deadline - clock.now())):
        await event.wait()
        return
    raise kept(f"waiting for {what}")
