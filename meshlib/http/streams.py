"""What one HTTP/2 connection of a client is made of: its settings, its streams, and what is told of them.

No I/O is done here. h2 knows the protocol; what it is told to do differently, and why, is here too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

import anyio
import h2.connection
import h2.errors
import h2.events
import h2.settings

from .steps import Steps

__all__ = ["EMPTY", "STREAMS", "WINDOW", "Body", "Machine", "Stream", "head_of", "our_settings"]

STREAMS: Final = 100
"""Requests at once on one connection (RFC 9113 5.1.2: servers should allow no fewer)."""
WINDOW: Final = 1 << 20
"""Bytes that a server may send ahead on a stream: 20 MB/s at a round trip of 50 ms."""
HEADERS: Final = 65_536
"""Bytes of a response's headers, as httpcore has it."""
SMALL: Final = 4_096
"""Bytes: smaller parts of a body that nobody reads yet are put together, as each alone takes some 150 more."""
EMPTY: Final = 100
"""DATA frames without data that may come in a row on a stream. They cost work, and no window bounds them
(CVE-2019-9518); a server that flushes too often sends one now and then."""
_NOT_SENT: Final = frozenset(
    (b"host", b"transfer-encoding", b"connection", b"keep-alive", b"proxy-connection", b"upgrade")
)
"""What HTTP/2 has no use for (RFC 9113 8.2.2)."""


def our_settings() -> h2.settings.Settings:
    """What a client says first."""
    codes = h2.settings.SettingCodes
    settings = h2.settings.Settings(
        client=True,
        initial_values={
            codes.ENABLE_PUSH: 0,
            codes.INITIAL_WINDOW_SIZE: WINDOW,
            codes.MAX_CONCURRENT_STREAMS: STREAMS,
            codes.MAX_HEADER_LIST_SIZE: HEADERS,
        },
    )
    del settings[codes.ENABLE_CONNECT_PROTOCOL]  # a server's to say; some trip over it
    return settings


class Machine(h2.connection.H2ConnectionStateMachine):
    """For which GOAWAY is not the end: h2's own takes every further frame for an error."""

    def __init__(self) -> None:
        super().__init__()
        states, inputs = h2.connection.ConnectionState, h2.connection.ConnectionInputs
        goes_on = {(states.CLIENT_OPEN, inputs.RECV_GOAWAY): (None, states.CLIENT_OPEN)}
        self._transitions = {**self._transitions, **goes_on}


class Stream:
    """One request, and what has come of it.

    Attributes:
        id: Its number.
        status: Of the response; 0 before there is one.
        headers: Of the response.
        chunks: Of its body, each with what it counts in flow control.
        empty: DATA frames without data since the last one with some.
        unread: What they count together.
        sent: Our side is done.
        ended: The server's side is done.
        problem: Why nothing more will come: a kind of error, and words.
        news: Set when any of it changes.
    """

    __slots__ = ("chunks", "empty", "ended", "headers", "id", "news", "problem", "sent", "status", "unread")

    def __init__(self, number: int) -> None:
        self.id = number
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.chunks: deque[tuple[bytes | bytearray, int]] = deque()
        self.unread = self.empty = 0
        self.sent = self.ended = False
        self.problem: tuple[type[Exception], str] | None = None
        self.news: anyio.Event | None = None

    def take(self, event: Any, library: Any) -> None:
        """Something has come for it; without `status` after the head, that made no sense. Errors are ``library``'s."""
        if isinstance(event, h2.events.ResponseReceived):
            self.headers = [(name, value) for name, value in event.headers or () if not name.startswith(b":")]
            status = next((value for name, value in event.headers or () if name == b":status"), b"")
            if len(status) == 3 and status.isdigit():
                self.status = int(status)
            else:
                self.problem = library.RemoteProtocolError, f"a response of status {status[:20]!r}"
        elif isinstance(event, h2.events.DataReceived):
            self._add(bytes(event.data or b""), event.flow_controlled_length or 0)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended = True
        elif isinstance(event, h2.events.StreamReset) and not self.ended:
            refused = event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
            kind = library.ConnectionNotAvailable if refused else library.RemoteProtocolError
            self.problem = kind, f"the server reset the stream: {_name_of(event.error_code)}"

    def _add(self, data: bytes, length: int) -> None:
        """Some of its body, which counts ``length`` bytes in flow control."""
        self.empty = 0
        self.unread += length
        if self.chunks and len(data) + len(self.chunks[-1][0]) <= SMALL:
            last, counted = self.chunks.pop()
            last = last if isinstance(last, bytearray) else bytearray(last)
            last += data
            self.chunks.append((last, counted + length))
        else:
            self.chunks.append((data, length))

    def tell(self) -> None:
        """Wake who waits for it."""
        if self.news is not None:
            self.news.set()


class Body:
    """The stream of a response.

    Args:
        connection: Which reads for it, and drops it in the end.
        stream: Whose.
        timeout: Seconds to wait for each part.
        steps: Who is told.
    """

    def __init__(self, connection: Any, stream: Stream, timeout: float | None, steps: Steps) -> None:
        self._connection, self._of, self._timeout, self._steps = connection, stream, timeout, steps
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with self._steps.of("http2.receive_response_body", stream_id=self._of.id):
            while (data := await self._connection.read(self._of, self._timeout)) is not None:
                yield data

    async def aclose(self) -> None:
        """Done with it, read or not."""
        if not self._closed:
            self._closed = True
            self._connection.drop(self._of)
            async with self._steps.of("http2.response_closed", stream_id=self._of.id):
                pass


def head_of(request: Any, host: bytes) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The headers that a request begins with, and whether a body follows."""
    lowered = [(name.lower(), value) for name, value in request.headers]
    head = [
        (b":method", request.method),
        (b":authority", host),
        (b":scheme", request.url.scheme),
        (b":path", request.url.target),
        *(pair for pair in lowered if pair[0] not in _NOT_SENT),
    ]
    return head, any(name in (b"content-length", b"transfer-encoding") for name, _ in lowered)


def _name_of(code: Any) -> str:
    """What an error code is called."""
    try:
        return h2.errors.ErrorCodes(code).name
    except ValueError:
        return str(code)
