"""The body of a response while it is being read: it holds its connection, and counts as load, until it is closed.

httpx closes every response once, read or not; what hangs on the body is told then, with the error it ended in if there
was one. Nothing here waits for the network in closing: a connection that has more to say is closed, not drained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Self

import anyio

from ..core.clock import Clock
from ..core.deadlines import kept
from ..core.errors import AttemptTimeout, ConnectionLost, InvalidArgument, MeshError
from .core import Core

__all__ = ["Body", "body_class", "from_core"]


def from_core(core: Core, error: Exception, doing: str) -> MeshError | None:
    """Our error for one of httpcore's; ``None`` for what is not one of those."""
    library = core.httpcore
    made: MeshError
    if isinstance(error, library.TimeoutException):
        made = AttemptTimeout(f"no progress in time while {doing}: {type(error).__name__}")
    elif isinstance(error, library.NetworkError | library.RemoteProtocolError | library.ConnectionNotAvailable):
        made = ConnectionLost(f"the connection broke while {doing}: {error or type(error).__name__}")
    elif isinstance(error, library.ProtocolError):
        made = InvalidArgument(f"the request makes no sense: {error}")
    else:
        return None
    made.__cause__ = error
    return made


class Body:
    """What a body is, whatever httpx it belongs to; see `body_class`.

    Args:
        core: Whose errors are raised.
        inner: httpcore's stream.
        request: What it answers, for errors.
        clock: What ``deadline`` is measured on.
        deadline: Until when it may be read; ``None`` for ever.
        endpoint: Where it comes from, for errors.
    """

    def __init__(
        self, core: Core, inner: Any, request: Any, clock: Clock, deadline: float | None, endpoint: str
    ) -> None:
        self._core, self._inner, self._request = core, inner, request
        self._clock, self._deadline, self._endpoint = clock, deadline, endpoint
        self._watchers: list[Callable[[Exception | None], None]] = []
        self._error: Exception | None = None
        self._closed = False
        self._chunks: Any = None

    def on_end(self, callback: Callable[[Exception | None], None]) -> None:
        """Call ``callback`` when it is closed, with the error that reading it ended in, or ``None``."""
        if self._closed:
            callback(self._error)
        else:
            self._watchers.append(callback)

    @property
    def closed(self) -> bool:
        """Has it been closed?"""
        return self._closed

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._chunks is None:
            self._chunks = aiter(self._inner)
        try:
            if self._deadline is None:
                return await anext(self._chunks)
            with anyio.CancelScope(deadline=anyio.current_time() + max(0.0, self._deadline - self._clock.now())):
                return await anext(self._chunks)
            raise kept("a body was read")
        except StopAsyncIteration:
            raise
        except Exception as error:
            ours = error if isinstance(error, MeshError) else from_core(self._core, error, "a body was read")
            if ours is None:
                raise
            ours.endpoint = self._endpoint
            self._error = ours
            raise self._core.error(ours, self._request) from (ours.__cause__ or error)

    async def aclose(self) -> None:
        """Give the connection back, or close it if the body was not read to its end. Twice is the same as once."""
        if self._closed:
            return
        self._closed = True
        try:
            with anyio.CancelScope(shield=True):  # nothing but local work, without which the connection would leak
                await self._inner.aclose()
                await self._close_chunks()
        finally:
            for watcher in self._watchers:
                watcher(self._error)
            self._watchers.clear()

    async def _close_chunks(self) -> None:
        """Close httpcore's generator here and now.

        Left to the garbage collector, trio may run what it does at its end in whatever task is current, up to its first
        await: a shielded scope that it opens then stays open around that task, which nothing can cancel any more.
        """
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            with contextlib.suppress(RuntimeError):  # somebody is reading in it, and will see it end
                await close()


_CLASSES: dict[str, type[Any]] = {}


def body_class(core: Core) -> type[Any]:
    """`Body` as a stream of ``core``: httpx checks that it is one of its own."""
    if core.name not in _CLASSES:
        _CLASSES[core.name] = type("Body", (Body, core.httpx.AsyncByteStream), {"__module__": __name__})
    return _CLASSES[core.name]
