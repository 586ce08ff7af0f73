"""Byte streams in memory, which behave as sockets do: bounded, cut in odd places, late, and broken when told to be."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

__all__ = ["MemoryStream", "duplex"]


class _Pipe:
    """One direction: a bounded buffer between a writer and a reader, and what is still on its way into it."""

    def __init__(self, capacity: int, latency: Callable[[], float] | None) -> None:
        self.capacity = capacity
        self.latency = latency
        self.buffer = bytearray()
        self.transit: deque[tuple[float, bytes]] = deque()
        self.under_way = 0
        self.ended = False
        self.broken = False
        self.deaf = False
        self.held = False
        self._changed = anyio.Event()

    def change(self) -> None:
        """Wake both ends; each looks again at what it waits for."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait(self) -> None:
        """Wait for a change, or for what arrives next."""
        if not self.transit or self.held:
            await self._changed.wait()
            return
        with anyio.CancelScope(deadline=self.transit[0][0]):
            await self._changed.wait()

    def put(self, data: memoryview) -> None:
        if self.latency is None:
            self.buffer += data
            return
        at = anyio.current_time() + self.latency()
        # Bytes never overtake: one late packet holds up all behind it, as in TCP.
        self.transit.append((max(at, self.transit[-1][0]) if self.transit else at, bytes(data)))
        self.under_way += len(data)

    def arrive(self) -> None:
        """Move what has arrived by now into the buffer."""
        now = anyio.current_time() if self.transit else -math.inf
        while self.transit and self.transit[0][0] <= now:
            _, data = self.transit.popleft()
            self.under_way -= len(data)
            self.buffer += data

    @property
    def room(self) -> int:
        return self.capacity - len(self.buffer) - self.under_way


class MemoryStream(ByteStream):
    """One end of a `duplex`. Behaves as a socket does: a send may have been taken in part when it is cancelled.

    Attributes:
        chunk: The most bytes that one receive gives, whatever it asks for.
        closed: This end has been closed.
    """

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self.chunk = 1 << 30
        self.closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes, at most ``max_bytes`` and at most `chunk`.

        Raises:
            anyio.EndOfStream: The other side has closed, and all that it sent has been received.
            anyio.BrokenResourceError: The connection was cut.
            anyio.ClosedResourceError: This end has been closed.
        """
        pipe = self._incoming
        await anyio.lowlevel.checkpoint()
        while True:
            if self.closed:
                raise anyio.ClosedResourceError
            if pipe.broken:
                raise anyio.BrokenResourceError
            if not pipe.held:
                pipe.arrive()
                if pipe.buffer:
                    n = min(max_bytes, self.chunk)
                    data = bytes(pipe.buffer[:n])
                    del pipe.buffer[:n]
                    pipe.change()
                    return data
                if pipe.ended and not pipe.transit:
                    raise anyio.EndOfStream
            await pipe.wait()

    async def send(self, item: bytes) -> None:
        """Send all of ``item``, waiting for room where there is none.

        Raises:
            anyio.BrokenResourceError: The connection was cut, or the other side has closed.
            anyio.ClosedResourceError: This end has been closed.
        """
        pipe = self._outgoing
        await anyio.lowlevel.checkpoint()
        left = memoryview(item)
        while True:
            if self.closed or pipe.ended:
                raise anyio.ClosedResourceError
            if pipe.broken or pipe.deaf:
                raise anyio.BrokenResourceError
            room = pipe.room
            if room > 0 and left:
                pipe.put(left[:room])
                left = left[room:]
                pipe.change()
            if not left:
                return
            await pipe.wait()

    async def send_eof(self) -> None:
        """Send no more; the other side reads what was sent, then the end."""
        self._outgoing.ended = True
        self._outgoing.change()
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """The other side reads what was sent, then the end; what it sends from now on breaks."""
        self.closed = True
        self._outgoing.ended = True
        self._incoming.deaf = True
        for pipe in (self._incoming, self._outgoing):
            pipe.change()
        await anyio.lowlevel.checkpoint()

    def cut(self) -> None:
        """Break both directions at once, as a reset does: nothing that was under way arrives."""
        for pipe in (self._incoming, self._outgoing):
            pipe.broken = True
            pipe.buffer.clear()
            pipe.transit.clear()
            pipe.under_way = 0
            pipe.change()

    def hold(self, held: bool = True) -> None:
        """Let nothing arrive in either direction, as a network without a route does; ``False`` lets it all through."""
        for pipe in (self._incoming, self._outgoing):
            pipe.held = held
            pipe.change()

    @property
    def unread(self) -> int:
        """Bytes that this end could receive now."""
        self._incoming.arrive()
        return len(self._incoming.buffer)

    def __repr__(self) -> str:
        return f"<MemoryStream{' closed' if self.closed else ''}: {self.unread} bytes to read>"


def duplex(capacity: int = 65536, latency: Callable[[], float] | None = None) -> tuple[MemoryStream, MemoryStream]:
    """Two ends of one connection.

    Args:
        capacity: The bytes that each direction holds before a sender has to wait.
        latency: Gives the seconds that the bytes of one send take to arrive; asked for each. ``None`` for no time.
    """
    there, back = _Pipe(capacity, latency), _Pipe(capacity, latency)
    return MemoryStream(back, there), MemoryStream(there, back)
