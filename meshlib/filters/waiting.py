"""Who waits for a free place, who goes next, and who is told to go elsewhere. Pure; the shell is `limit`.

The queue is short and for bursts. The more important goes first, always. Among equals it is first come, first served,
until a standing queue has formed: one that has not been empty for an interval of 100 ms. Then whoever waits longest has
likely been given up already, so the newest goes first (adaptive LIFO), and those who have waited 5 ms are told to go
elsewhere (CoDel's target, a twentieth of the interval). A moment without anybody, shorter than those 5 ms, does not end
it. Where requests take longer than 100 ms, so does the interval, since places become free only so often.

An importance sees only what goes before it: critical requests do not find a standing queue because sheddable ones make
it. When there is no more room, whoever would be served last must go.

Source: Facebook, "Fail at Scale" (ACM Queue, 2015); Nichols and Jacobson, "Controlling Queue Delay" (2012).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Final

from ..core.priority import Priority

__all__ = ["INTERVAL", "Waiter", "WaitingLine"]

INTERVAL: Final = 0.1
"""Seconds, at least, that a request may wait, and after which a queue is a standing one."""
TARGET: Final = 0.05
"""The share of the interval that a request may wait once there is a standing queue: 5 ms of 100."""


class Waiter:
    """One who waits.

    Attributes:
        priority: How important it is.
        since: When it came.
        event: For whoever wakes it.
        verdict: ``None`` while it waits, then ``go``, or the reason why it must leave.
    """

    __slots__ = ("event", "priority", "since", "verdict")

    def __init__(self, priority: Priority, since: float, event: Any = None) -> None:
        self.priority = priority
        self.since = since
        self.event = event
        self.verdict: str | None = None


class WaitingLine:
    """Those who wait, by importance and age. Every operation costs the same however many there are.

    Attributes:
        interval: Seconds that a request may wait, and after which a queue is a standing one.
    """

    __slots__ = ("_empty_from", "_levels", "_size", "_standing_from", "interval")

    def __init__(self) -> None:
        self._levels: tuple[OrderedDict[Waiter, None], ...] = tuple(OrderedDict() for _ in Priority)
        # For each importance: since when has somebody of that importance or a higher one waited, and since when not?
        self._standing_from = [-math.inf] * len(Priority)
        self._empty_from: list[float | None] = [-math.inf] * len(Priority)
        self._size = 0
        self.interval = INTERVAL

    def __len__(self) -> int:
        return self._size

    def standing(self, priority: Priority, now: float) -> bool:
        """Does a request of ``priority`` see a queue that has stood for an interval?"""
        return self._empty_from[priority] is None and now - self._standing_from[priority] >= self.interval

    def push(self, waiter: Waiter, room: int) -> Waiter | None:
        """Let ``waiter`` in.

        Args:
            waiter: Who comes, and since when.
            room: How many may wait.

        Returns:
            Whoever must go for want of room, perhaps ``waiter`` itself.
        """
        self._levels[waiter.priority][waiter] = None
        self._size += 1
        for level in range(waiter.priority + 1):
            empty_from = self._empty_from[level]
            if empty_from is not None:
                stood = empty_from - self._standing_from[level] >= self.interval
                if not (stood and waiter.since - empty_from < TARGET * self.interval):
                    self._standing_from[level] = waiter.since
                self._empty_from[level] = None
        if self._size <= room:
            return None
        last = self._last(waiter.since)
        self.remove(last, waiter.since)
        return last

    def _last(self, now: float) -> Waiter:
        for priority in Priority:
            level = self._levels[priority]
            if level:
                return next(iter(level)) if self.standing(priority, now) else next(reversed(level))
        raise AssertionError("nobody waits")

    def best(self, now: float) -> Waiter | None:
        """Who goes next. `remove` it when it does."""
        for priority in reversed(Priority):
            level = self._levels[priority]
            if level:
                return next(reversed(level)) if self.standing(priority, now) else next(iter(level))
        return None

    def late(self, now: float) -> Waiter | None:
        """Somebody who has waited too long; it is taken out."""
        for priority in Priority:
            level = self._levels[priority]
            if level:
                oldest = next(iter(level))
                if now - oldest.since >= self.interval * (TARGET if self.standing(priority, now) else 1.0):
                    self.remove(oldest, now)
                    return oldest
        return None

    def remove(self, waiter: Waiter, now: float) -> None:
        """Forget ``waiter``. Harmless when it has gone already."""
        level = self._levels[waiter.priority]
        if waiter not in level:
            return
        del level[waiter]
        self._size -= 1
        for priority in reversed(Priority):
            if self._levels[priority]:
                return  # the lower ones see this one too
            if self._empty_from[priority] is None:
                self._empty_from[priority] = now

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self._levels[p])} {p.name.lower()}" for p in reversed(Priority))
        return f"<WaitingLine: {counts}>"
