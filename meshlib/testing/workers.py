"""A server with so many workers and one queue: work waits its turn, first come first served.

What happens to work whose caller has given up decides how a server behaves under overload:

* ``"dropped"``: it leaves the queue, or stops where it is. What an async handler does when it is cancelled.
* ``"skipped"``: it leaves the queue, but work that has begun is finished. What threads do, at best.
* ``"served"``: it keeps its place and is done all the same, for nobody. How an overload outlives its cause ("Metastable
  Failures in Distributed Systems", HotOS 2021).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Literal

import anyio

from ..core.errors import ConfigurationError
from ..core.supervisor import Supervisor

__all__ = ["ABANDONED", "Abandoned", "Workers"]

Abandoned = Literal["dropped", "skipped", "served"]
ABANDONED: Final = ("dropped", "skipped", "served")


class _Turn:
    """Work that waits for a worker."""

    __slots__ = ("abandoned", "come", "gone")

    def __init__(self) -> None:
        self.come = anyio.Event()
        self.gone = False
        self.abandoned = False


class Workers:
    """Does work, so much at a time.

    Args:
        count: How many workers there are, 1 or more.
        abandoned: What becomes of work whose caller has given up.
        supervisor: Where work goes on that nobody waits for.

    Attributes:
        busy: How many workers are at work.
        waiting: How much work waits that somebody wants, or that will be done all the same.
        wasted: The seconds of work done for nobody.
    """

    def __init__(self, count: int, abandoned: Abandoned, supervisor: Supervisor) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigurationError(f"workers={count!r}: give a whole number, 1 or more")
        if abandoned not in ABANDONED:
            raise ConfigurationError(f"abandoned={abandoned!r}: there are {', '.join(map(repr, ABANDONED))}")
        self.count = count
        self.abandoned = abandoned
        self.busy = 0
        self.waiting = 0
        self.wasted = 0.0
        self._supervisor = supervisor
        self._queue: deque[tuple[_Turn, Callable[[], float]]] = deque()

    async def work(self, seconds: Callable[[], float]) -> None:
        """Wait for a worker, and then for it to be done.

        Args:
            seconds: How long it takes; asked when it begins.
        """
        if self.busy < self.count:
            self.busy += 1
        else:
            await self._turn(seconds)
        need = seconds()
        began = anyio.current_time()
        try:
            await anyio.sleep(need)
        except BaseException:
            if self.abandoned == "dropped":
                self._next()
            else:
                self._finish_alone(began + need - anyio.current_time())
            raise
        self._next()

    async def _turn(self, seconds: Callable[[], float]) -> None:
        turn = _Turn()
        self._queue.append((turn, seconds))
        self.waiting += 1
        try:
            await turn.come.wait()
        except BaseException:
            if turn.come.is_set():  # in this very moment
                if self.abandoned == "served":
                    self._finish_alone(seconds())
                else:
                    self._next()
            elif self.abandoned == "served":
                turn.abandoned = True
            else:
                turn.gone = True
                self.waiting -= 1
            raise

    def _next(self) -> None:
        """A worker is free: give it the next work."""
        while self._queue:
            turn, seconds = self._queue.popleft()
            if turn.gone:
                continue
            self.waiting -= 1
            if turn.abandoned:
                self._finish_alone(seconds())
            else:
                turn.come.set()
            return
        self.busy -= 1

    def _finish_alone(self, seconds: float) -> None:
        if not self._supervisor.closed:
            self._supervisor.start(self._alone, seconds, name="abandoned work")

    async def _alone(self, seconds: float) -> None:
        self.wasted += seconds
        await anyio.sleep(seconds)
        self._next()

    def __repr__(self) -> str:
        return f"<Workers: {self.busy} of {self.count} busy, {self.waiting} waiting>"
