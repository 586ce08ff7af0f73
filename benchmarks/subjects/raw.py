"""The floor: length-prefixed, tagged frames over one TCP connection, and nothing else.

This is what plain anyio allows to code that knows no more than "many calls share a connection": a four-byte size, a
four-byte tag and the body; a reader task, a writer task that sends all that was queued in a turn of the loop with one
``send``, an event for each waiting caller and a task for each request being served. No errors, no deadlines, no
cancellation, no flow control: what any of those costs shows as the distance to this line.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from struct import Struct

import anyio
import anyio.lowlevel
from anyio.abc import ByteReceiveStream, ByteSendStream, SocketAttribute, SocketStream

from benchmarks.subjects import Call, Ready

# The size counts all that follows it: the tag and the body.
_HEADER = Struct(">II")
_TAG_SIZE = 4

# What an asyncio transport reads at once: asking for less would only make anyio cut the chunk up.
_READ_SIZE = 256 * 1024

# After so many frames of one read the loop is handed over, as meshlib does. Without it both ends work in turns, and the
# floor would be a third lower.
_SLICE = 16


class _Writer:
    """Queues frames and sends everything queued in the same turn of the loop at once."""

    def __init__(self, stream: ByteSendStream) -> None:
        self._stream = stream
        self._frames: list[bytes] = []
        self._queued = anyio.Event()

    def write(self, tag: int, body: bytes) -> None:
        self._frames.append(_HEADER.pack(_TAG_SIZE + len(body), tag) + body)
        if len(self._frames) == 1:
            self._queued.set()

    async def run(self) -> None:
        while True:
            await self._queued.wait()
            frames, self._frames, self._queued = self._frames, [], anyio.Event()
            await self._stream.send(b"".join(frames))


async def _read(stream: ByteReceiveStream) -> AsyncIterator[list[tuple[int, bytes]]]:
    """The frames of the stream, in the lists that each read of the socket completed."""
    rest = b""
    while True:
        try:
            chunk = await stream.receive(_READ_SIZE)
        except anyio.EndOfStream:
            return
        data = rest + chunk if rest else chunk
        frames: list[tuple[int, bytes]] = []
        start, available = 0, len(data)
        while available - start >= _HEADER.size:
            size, tag = _HEADER.unpack_from(data, start)
            end = start + _HEADER.size - _TAG_SIZE + size
            if end > available:
                break
            frames.append((tag, data[start + _HEADER.size : end]))
            start = end
        rest = data[start:]
        yield frames


async def _give_way() -> None:
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()


async def _echo(body: bytes) -> bytes:
    return body


async def _serve_connection(stream: SocketStream) -> None:
    async def answer(tag: int, body: bytes) -> None:
        writer.write(tag, await _echo(body))

    writer = _Writer(stream)
    async with stream, anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        async for frames in _read(stream):
            for n, (tag, body) in enumerate(frames):
                if n and not n % _SLICE:
                    await _give_way()
                tasks.start_soon(answer, tag, body)
        tasks.cancel_scope.cancel()


async def serve(ready: Ready) -> None:
    """Echo frames until cancelled."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener:
        ready(f"127.0.0.1:{listener.extra(SocketAttribute.local_port)}")
        await listener.serve(_serve_connection)


class _Waiter:
    """A caller's place to wait and where its reply is put."""

    __slots__ = ("arrived", "reply")

    def __init__(self) -> None:
        self.arrived = anyio.Event()
        self.reply = b""


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Call]:
    """One connection, shared by all callers."""
    host, _, port = address.rpartition(":")
    pending: dict[int, _Waiter] = {}
    tags = count()

    async def call(body: bytes) -> bytes:
        tag = next(tags)
        waiter = pending[tag] = _Waiter()
        writer.write(tag, body)
        await waiter.arrived.wait()
        return waiter.reply

    async def receive() -> None:
        async for frames in _read(stream):
            for n, (tag, body) in enumerate(frames):
                if n and not n % _SLICE:
                    await _give_way()
                waiter = pending.pop(tag)
                waiter.reply = body
                waiter.arrived.set()

    async with await anyio.connect_tcp(host, int(port)) as stream, anyio.create_task_group() as tasks:
        writer = _Writer(stream)
        tasks.start_soon(writer.run)
        tasks.start_soon(receive)
        yield call
        tasks.cancel_scope.cancel()
