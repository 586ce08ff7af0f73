"""Those who wait for a connection, in the order in which they came.

What becomes free is put into the hands of whoever has waited longest, before anybody else can see it: were he only told
to look, a request that comes meanwhile would take it, he would go to the end, and some would never have a turn
(encode/httpcore hands over likewise, Finagle's WatermarkPool too). A turn that is given and not wanted any more, since
its request was cancelled in that moment, goes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import anyio

from ..core.errors import Rejected

__all__ = ["Line", "PoolFull"]


class PoolFull(Rejected):
    """All connections were in use for too long."""


class _Turn:
    """A place in the line.

    Attributes:
        event: Set when the turn has come, with one of:
        session: A connection, which counts as lent; without it,
        error: why there is none; with neither, one may be made, and counts as being made.
    """

    __slots__ = ("error", "event", "session")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.session: Any = None
        self.error: Exception | None = None


class Line:
    """All of them. Empty, it is false.

    Args:
        serve: Gives turns, if there is something to give; called when somebody joins.
        back: Takes back a connection, or ``None`` for the leave to make one.
        full: What they are told whose time is over.
    """

    __slots__ = ("_back", "_full", "_serve", "_turns")

    def __init__(self, serve: Callable[[], None], back: Callable[[Any], None], full: Callable[[], PoolFull]) -> None:
        self._serve, self._back, self._full = serve, back, full
        self._turns: deque[_Turn] = deque()

    async def turn(self, until: float, first: bool) -> Any:
        """Wait, at the end or before all others; gives a connection, which counts as lent, or ``None`` to make one.

        Args:
            until: When to give up, on the event loop's clock.
            first: Before all others.

        Raises:
            PoolFull: It is too late.
            MeshError: There will be none.
        """
        turn = _Turn()
        if first:
            self._turns.appendleft(turn)
        else:
            self._turns.append(turn)
        self._serve()
        try:
            with anyio.CancelScope(deadline=until):
                await turn.event.wait()
            if not turn.event.is_set():
                raise self._full()
        except BaseException:
            if not turn.event.is_set():
                self._turns.remove(turn)
            elif turn.error is None:
                self._back(turn.session)
            raise
        if turn.error is not None:
            raise turn.error
        return turn.session

    def give(self, session: Any = None, error: Exception | None = None) -> None:
        """It is the turn of whoever has waited longest."""
        turn = self._turns.popleft()
        turn.session, turn.error = session, error
        turn.event.set()

    def __len__(self) -> int:
        return len(self._turns)
