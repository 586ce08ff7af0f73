"""The sending half of a gRPC server's connection: writes that go out together, and windows.

All that is sent within one turn of the event loop leaves in one write, so a unary answer is one, with those of other
calls. While the client does not read, handlers wait; what we owe without a handler (acknowledgements, refusals) is
bounded by not reading either.

Flow control: what has come is the client's again on the connection at once, so that a handler that does not read holds
up its own call alone; on the stream it is when the handler has read it, half a window at a time. Only when a connection
makes us hold `MOST_HELD` bytes that nobody reads, its window stays closed until they are read, or their calls end.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from grpclib.exceptions import StreamTerminatedError
from h2.errors import ErrorCodes

from ..h2 import FLUSH_AT
from .h2 import Fields, Fixed, ServerH2
from .limits import MOST_HELD

if TYPE_CHECKING:
    from .stream import ServerStream

__all__ = ["Sending"]

MOST_UNSENT: Final = 1 << 20
"""Bytes that wait to be sent, beyond which nothing more is read from a client that does not read."""

LEAST_GRANT: Final = 16_384
"""Bytes of the connection's window that are given back at once, at least: those of a frame."""


class Sending(asyncio.Protocol):
    """What a connection sends.

    Attributes:
        h2: The state of the connection.
        deaf_since: Since when nothing is read, as the client reads nothing; ``None`` while it does.
        held: Bytes of requests that no handler has read, or waits for.
    """

    h2: ServerH2
    _transport: asyncio.Transport
    _window: int
    _stream_window: int

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._flushing = self._paused = self._closing = False
        self._blocked: dict[asyncio.Future[None], ServerStream] = {}
        self._ending: set[int] = set()
        self.held = 0
        self.deaf_since: float | None = None

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        self._paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._paused = False
        if self.deaf_since is not None:
            self.deaf_since = None
            self._transport.resume_reading()
        self._wake()
        self.flush_soon()

    def flush_soon(self) -> None:
        """Write at the end of this turn."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._turn_ends)

    def _turn_ends(self) -> None:
        self._flushing = False
        self.flush()

    def flush(self) -> None:
        """Write now."""
        if self.h2.unsent:
            data = self.h2.data_to_send()
            if not self._transport.is_closing():
                self._transport.write(data)
                if self._paused and self.deaf_since is None and not self._closing:
                    self._listen_no_more()

    def _listen_no_more(self) -> None:
        if self._transport.get_write_buffer_size() > MOST_UNSENT:
            self.deaf_since = self._loop.time()
            self._transport.pause_reading()

    def _check(self, stream: ServerStream) -> None:
        if stream.terminated or not self.h2.half_open(stream.id):
            raise StreamTerminatedError(stream.terminated or "the stream has ended")

    def send_headers(self, stream: ServerStream, fixed: Fixed, more: Fields = (), *, end: bool = False) -> None:
        """Send the fields of an answer, or its trailers; see `ServerH2.answer`.

        Raises:
            StreamTerminatedError: The client is gone.
        """
        self._check(stream)
        self.h2.answer(stream.id, fixed, more, end=end)
        if end:
            if stream.senders:
                self._wake(stream)
            # The answer is complete, and nobody will read the rest of the request, if there is any (RFC 9113 8.1).
            self.h2.refuse(stream.id, ErrorCodes.NO_ERROR)
            self._ending.add(stream.id)
        self.flush_soon()

    def send_at_once(self, stream: ServerStream, data: bytes) -> bool:
        """Send ``data`` if nothing and nobody stands in its way; ``False`` otherwise.

        Raises:
            StreamTerminatedError: The client is gone.
        """
        self._check(stream)
        h2 = self.h2
        if stream.senders or self._paused or len(data) > h2.room(stream.id) or h2.unsent >= FLUSH_AT:
            return False
        h2.put(stream.id, data)
        h2.spoken = True
        self.flush_soon()
        return True

    async def send_data(self, stream: ServerStream, data: bytes) -> None:
        """Send ``data`` as the client takes it, after what others are sending on the stream.

        A message that is given up half-way takes the stream with it: the next one would be read as its rest.

        Raises:
            StreamTerminatedError: The client is gone.
        """
        h2, at = self.h2, 0
        stream.senders += 1
        try:
            async with stream.turn:
                while at < len(data):
                    self._check(stream)
                    if self._paused:
                        await self._unblocked(stream)
                        continue
                    if h2.unsent >= FLUSH_AT:
                        self.flush()
                        await asyncio.sleep(0)  # others have their turn
                        continue
                    room = h2.room(stream.id)
                    if room <= 0:
                        self.flush_soon()
                        await self._unblocked(stream)
                        continue
                    h2.put(stream.id, data[at : at + room])
                    h2.spoken = True
                    at += room
        except BaseException:
            if at:
                stream.lost("the sending of a message was cut short")
                self.reset(stream, ErrorCodes.INTERNAL_ERROR)
            raise
        finally:
            stream.senders -= 1
        self.flush_soon()

    async def _unblocked(self, stream: ServerStream) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._blocked[future] = stream
        try:
            await future
        finally:
            del self._blocked[future]

    def _wake(self, stream: ServerStream | None = None) -> None:
        for future, waiting in self._blocked.items():
            if (stream is None or waiting is stream) and not future.done():
                future.set_result(None)

    def reset(self, stream: ServerStream, code: ErrorCodes) -> None:
        """Tell the client that nothing more will come of a call."""
        stream.lost("the stream was reset by its handler")
        self.h2.refuse(stream.id, code)
        if stream.senders:
            self._wake(stream)
        self.flush_soon()

    def consumed(self, stream: ServerStream, size: int) -> None:
        """Bytes of a request have been read."""
        inbound = stream.inbound
        inbound.held -= size
        self.held -= size
        self.grant()
        if not inbound.ended:
            inbound.owed += size
            if inbound.owed >= self._stream_window // 2 and self.h2.half_open(stream.id):
                self.h2.increment_flow_control_window(inbound.owed, stream.id)
                inbound.owed = 0
                self.flush_soon()

    def grant(self) -> None:
        """Let the client send on the connection what its window and `MOST_HELD` allow, if it is worth a frame."""
        window = self.h2.inbound_flow_control_window
        if window > self._window // 2 or self._closing:
            return
        size = min(self._window, max(MOST_HELD, self._window) - self.held) - window
        if size >= LEAST_GRANT:
            self.h2.increment_flow_control_window(size)
            self.flush_soon()
