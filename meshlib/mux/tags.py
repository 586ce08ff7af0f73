"""Request tags: the lowest free number is used next, so that a session's tags stay small and its tables dense."""

from __future__ import annotations

from heapq import heappop, heappush

from .messages import MAX_TAG, MIN_TAG

__all__ = ["TagPool"]


class TagPool:
    """Numbers from ``MIN_TAG`` to ``last``, each lent to one request at a time."""

    __slots__ = ("_free", "_last", "_next")

    def __init__(self, last: int = MAX_TAG) -> None:
        self._free: list[int] = []
        self._next = MIN_TAG
        self._last = last

    def acquire(self) -> int | None:
        """The lowest free tag; ``None`` when all are in use."""
        if self._free:
            return heappop(self._free)
        tag = self._next
        if tag > self._last:
            return None
        self._next = tag + 1
        return tag

    def release(self, tag: int) -> None:
        """Give a tag back. The caller makes sure that it was lent."""
        heappush(self._free, tag)

    @property
    def in_use(self) -> int:
        """How many are lent."""
        return self._next - MIN_TAG - len(self._free)
