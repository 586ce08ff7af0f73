"""How long requests have waited before they were read: in the other end, in the network, and in our own socket.

A server whose one core is saturated reads late. Its requests queue where no layer sees them, and a deadline that is
read as "so much is left" begins anew when it is read. The deadline's context says when it was sent, on the sender's
clock; what is not known is how that clock differs from ours. Whenever we had read all there was and had to wait for
more, the next request came straight through, so the difference then is the two clocks' and the shortest way: the base.
As long as we do not get to the end of what there is, whatever a request is later than the base, it has waited. (RFC
6817, LEDBAT, measures one-way delays against a base in the same way.) A clock that is set meanwhile costs little: it
can only mislead while there is a backlog, and no request is said to have waited longer than there has been one. Pure.
"""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["Transit"]

SAMPLES: Final = 8
"""Requests that came straight through, of which the quickest is the base: enough for one not to have been held up."""


class Transit:
    """What the requests of one connection have waited. Times are seconds of one monotonic clock, except as noted."""

    __slots__ = ("_base", "_caught_up", "_first", "_fresh", "_read_at", "_straight", "_through")

    def __init__(self) -> None:
        self._straight: deque[int] = deque(maxlen=SAMPLES)
        self._base: int | None = None
        self._fresh = self._through = self._first = False
        self._caught_up: float | None = None
        self._read_at: float | None = None

    def caught_up(self, now: float) -> None:
        """Everything that had come was read; what is read next comes straight through."""
        self._fresh = True
        self._caught_up = now

    def read(self, now: float) -> None:
        """Something was read, and its requests follow."""
        self._read_at = now
        self._through = self._first = self._fresh
        self._fresh = False

    def waited(self, sent: int, arrived: int, now: float) -> float:
        """Seconds that a request has waited by ``now``.

        Args:
            sent: When it was sent, in nanoseconds of the sender's wall clock.
            arrived: What our wall clock says now, in nanoseconds.
            now: Seconds.
        """
        here = 0.0 if self._read_at is None else now - self._read_at
        late = arrived - sent
        if self._through:
            if self._first:  # those behind it may have waited for their turn
                self._first = False
                self._straight.append(late)
                self._base = min(self._straight)
            return here
        if self._base is None or self._caught_up is None:
            return here
        return max(here, min((late - self._base) / 1e9, now - self._caught_up))

    def __repr__(self) -> str:
        return f"<Transit: base {self._base}, {'caught up' if self._fresh or self._through else 'behind'}>"
