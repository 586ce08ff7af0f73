"""Streams in memory and time that jumps: what lets session tests run for minutes in milliseconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import trio
import trio.testing
from anyio.abc import ByteStream

__all__ = ["MemoryStream", "duplex", "run_virtual"]

T = TypeVar("T")


class _Pipe:
    """One direction: a bounded buffer between a writer and a reader."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.buffer = bytearray()
        self.ended = False
        self.broken = False
        self.deaf = False
        self._changed = anyio.Event()

    def change(self) -> None:
        """Wake both ends; each looks again at what it waits for."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait(self) -> None:
        await self._changed.wait()


class MemoryStream(ByteStream):
    """One end of a `duplex`. Behaves as a socket does: a send may have been taken in part when it is cancelled.

    Attributes:
        chunk: The most bytes that one receive gives, whatever it asks for.
    """

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self.chunk = 1 << 30
        self.closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        pipe = self._incoming
        await anyio.lowlevel.checkpoint()
        while True:
            if self.closed:
                raise anyio.ClosedResourceError
            if pipe.broken:
                raise anyio.BrokenResourceError
            if pipe.buffer:
                n = min(max_bytes, self.chunk)
                data = bytes(pipe.buffer[:n])
                del pipe.buffer[:n]
                pipe.change()
                return data
            if pipe.ended:
                raise anyio.EndOfStream
            await pipe.wait()

    async def send(self, item: bytes) -> None:
        pipe = self._outgoing
        await anyio.lowlevel.checkpoint()
        left = memoryview(item)
        while True:
            if self.closed or pipe.ended:
                raise anyio.ClosedResourceError
            if pipe.broken or pipe.deaf:
                raise anyio.BrokenResourceError
            room = pipe.capacity - len(pipe.buffer)
            if room > 0:
                pipe.buffer += left[:room]
                left = left[room:]
                pipe.change()
            if not left:
                return
            await pipe.wait()

    async def send_eof(self) -> None:
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
            pipe.change()

    @property
    def unread(self) -> int:
        """Bytes that this end could receive now."""
        return len(self._incoming.buffer)

    def __repr__(self) -> str:
        return f"<MemoryStream{' closed' if self.closed else ''}: {self.unread} bytes to read>"


def duplex(capacity: int = 65536) -> tuple[MemoryStream, MemoryStream]:
    """Two ends of one connection, each direction holding at most ``capacity`` bytes that nobody has read."""
    there, back = _Pipe(capacity), _Pipe(capacity)
    return MemoryStream(back, there), MemoryStream(there, back)


def run_virtual(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run an async function on trio, in virtual time: whenever all tasks wait, the clock jumps to the next timer."""
    return trio.run(function, *args, clock=trio.testing.MockClock(autojump_threshold=0))
