"""The bytes of a connection: an asyncio protocol between a transport and h2, which tells a session what has come.

Frames that are made in one turn of the event loop leave together (`BatchingTransport`). Whatever h2 says of bytes that
are none of HTTP/2's ends this connection, and it alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from grpclib.protocol import Peer
from h2.config import H2Configuration
from h2.events import DataReceived, ResponseReceived, TrailersReceived

from ...core.clock import Clock
from ...core.errors import ConnectionLost, MeshError, shown
from ..h2 import BatchingTransport, DrainableConnection, goaway
from .heads import Heads, Options
from .keepalive import Keepalive

__all__ = ["Wire"]

logger = logging.getLogger("meshlib.grpc")

MOST_OWED: Final = 1 << 20
"""Bytes that answer a server which does not read them, beyond which nothing more is read from it. Calls are not
counted: they wait by themselves, and two sides that each waited for the other to read its calls would wait for ever."""

H2_CONFIG: Final = H2Configuration(
    client_side=True,
    header_encoding="latin-1",  # which decodes whatever comes
    validate_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_inbound_headers=False,
    normalize_outbound_headers=False,
)

_DATA: Final = frozenset((DataReceived, ResponseReceived, TrailersReceived))
"""What a server does not say by itself, but because of calls: see `keepalive`."""


class Wire(asyncio.Protocol):
    """See the module. `GrpcSession` is what is made of it.

    Args:
        options: The channel's.
        authority: What to call the server in requests.
        clock: What time it is.
        keepalive: Told of whatever comes.

    Attributes:
        loop: The event loop.
        peer: grpclib's.
    """

    def __init__(self, options: Options, authority: str, clock: Clock, keepalive: Keepalive) -> None:
        self.loop = asyncio.get_running_loop()
        self.peer: Peer | None = None
        self._options, self._authority, self._clock = options, authority, clock
        self._keepalive = keepalive
        self._settled = asyncio.Event()
        self._gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._later: deque[Callable[[], None]] = deque()
        self._wanted = asyncio.Event()
        self._paused = False
        self._owed = 0
        self._error: MeshError | None = None
        self._h2: DrainableConnection
        self._heads: Heads
        self._transport: BatchingTransport | None = None
        self._flushed = 0
        self._events: dict[type, Callable[[Any], None]] = {}

    # --- the transport ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:  # uvloop's are no asyncio.Transport
        """Say hello."""
        options = self._options
        batching = self._transport = BatchingTransport(transport)
        batching.on_flush = self._on_flush
        self.peer = Peer(batching)  # type: ignore[arg-type]  # it asks for `get_extra_info` alone
        h2 = self._h2 = DrainableConnection(H2_CONFIG, header_list=options.max_headers, window=options.stream_window)
        self._heads = Heads(options, self._authority, self._clock, h2.encoder, h2.remote_settings)
        h2.initiate_connection()
        if options.connection_window > 65535:
            h2.increment_flow_control_window(options.connection_window - 65535)
        batching.write(h2.data_to_send())
        batching.flush()

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self._error is not None:
            return
        try:
            events = self._h2.receive_data(data)
        except Exception as error:  # h2 raises its own, and for some bytes what it did not think of
            self._violated(error)
            return
        self._keepalive.heard(self._clock.now(), any(type(event) in _DATA for event in events))
        known = self._events
        for event in events:
            react = known.get(type(event))
            if react is not None:
                react(event)
                if self._error is not None:
                    return
        owed = self._flush()
        if self._paused and owed:
            self._owed += owed
            if self._owed > MOST_OWED and self._transport is not None:
                self._transport.pause_reading()  # pings then find out whether it is dead

    def _flush(self) -> int:
        data = self._h2.data_to_send()
        if data and self._transport is not None:
            self._transport.write(data)
        return len(data)

    def _on_flush(self) -> None:
        self._flushed = self._h2.highest_outbound_stream_id

    def _violated(self, cause: Exception) -> None:
        self._flush()  # h2's own GOAWAY
        what = shown(str(cause) or type(cause).__name__)
        error = ConnectionLost(f"the server broke the protocol: {what}")
        error.__cause__ = cause
        self._end(error)

    def pause_writing(self) -> None:
        """The transport holds much."""
        self._paused = True
        self._writable.clear()

    def resume_writing(self) -> None:
        """It holds less."""
        self._paused = False
        self._writable.set()
        if self._owed > MOST_OWED and self._transport is not None:
            self._transport.resume_reading()
        self._owed = 0

    def eof_received(self) -> bool:
        """The server says no more: close."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if self._error is None:
            text = "the server closed the connection"
            if exc is not None:
                text = f"the connection broke: {shown(str(exc)) or type(exc).__name__}"
            error = ConnectionLost(text)
            error.__cause__ = exc
            self._end(error)
        self._settled.set()
        self._gone.set()
        self._writable.set()  # asyncio says nothing more of it, and nobody may wait for what will not come

    def _close(self) -> None:
        """Say goodbye, and close."""
        transport = self._transport
        if transport is not None:
            if not transport.is_closing():
                transport.write(goaway(0))
            transport.close()

    @property
    def tls(self) -> Any:
        """The ``ssl.SSLObject`` of the connection; ``None`` without TLS."""
        return None if self._transport is None else self._transport.get_extra_info("ssl_object")

    @property
    def _left_behind(self) -> bool:
        """Has all been written that there was to say, and does only TLS wait for the server's goodbye?"""
        transport = self._transport
        return transport is None or (self.tls is not None and not transport.get_write_buffer_size())

    def abort(self) -> None:
        """Close without a word."""
        if self._transport is not None:
            self._transport.abort()

    # --- what needs a task --------------------------------------------------------------------------------------------

    def in_task(self, function: Callable[[], None]) -> None:
        """Call it now if a task runs, else soon in the session's: asyncio reads in none, and anyio needs one."""
        if asyncio.current_task() is not None:
            function()
        else:
            self._later.append(function)
            self._wanted.set()

    async def _do_later(self) -> None:
        while True:
            self._catch_up()
            self._wanted.clear()
            await self._wanted.wait()

    def _catch_up(self) -> None:
        while self._later:
            try:
                self._later.popleft()()
            except Exception:  # one's failure is not to end the connection, which is others' as well
                logger.exception("a gRPC connection with %s: what was to be told was not", self._authority)

    def _end(self, error: MeshError) -> None:
        """The connection ends because of ``error``."""
        raise NotImplementedError
