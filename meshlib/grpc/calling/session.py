"""A connection to one server, and the calls on it.

========  ===================================  ======================================================
state     entered when                         a new call is
========  ===================================  ======================================================
OPEN      the server's SETTINGS have come      sent
LEAVING   GOAWAY came, or it is to retire      refused as never processed, so it goes elsewhere
CLOSED    the connection has ended             refused likewise
========  ===================================  ======================================================

On GOAWAY the calls above its last stream were never looked at, and are told so; the others go on, and the connection
ends with the last of them. A call that is given up is reset with CANCEL. What a call's caller waits for is a future
that frames, failures and deadlines complete; see `exchange`. Sources: RFC 9113, grpc/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

import anyio
from h2.errors import ErrorCodes
from h2.exceptions import NoAvailableStreamIDError, ProtocolError

from ...core.clock import Clock
from ...core.context import VAR
from ...core.deadlines import Wheel, kept, wait_by
from ...core.env import Metrics
from ...core.errors import ConnectError, ConnectionLost, MeshError, Rejected
from ...core.service import Status
from .call import Reply, Request
from .exchange import Exchange, cancelled, fresh
from .heads import Options
from .incoming import Incoming
from .keepalive import Keepalive

__all__ = ["GrpcSession"]

LINGER: Final = 1.0
"""Seconds that the last words of a session may take to leave."""


class GrpcSession(Incoming):
    """See the module. Made before its connection is; usable once `ready` is over.

    Args:
        options: The channel's.
        endpoint: What to call the other side in errors.
        authority: What to call it in requests.
        clock: For deadlines.
        metrics: Below ``grpc/``.
        keepalive: When to ping.

    Attributes:
        limit: Calls at once.
        exchanges: Those under way, by stream.
        graceful: It ends because the server asked for that, which is no failure.
        on_leave: Called once, when it takes no more calls.
        on_room: Called when a call has ended, while somebody waits for that.
    """

    def __init__(
        self, options: Options, endpoint: str, authority: str, clock: Clock, metrics: Metrics, keepalive: Keepalive
    ) -> None:
        super().__init__(options, endpoint, authority, clock, metrics, keepalive)
        self.graceful = False
        self.on_leave: Callable[[], None] | None = None
        self._wheel = Wheel(clock, self._expired)
        self._queued = 0

    # --- calls --------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """Open, or closed once it takes no more calls."""
        return Status.CLOSED if self._leaving else Status.OPEN

    @property
    def full(self) -> bool:
        """Would one more call have to wait?"""
        return self.load >= self.limit

    @property
    def load(self) -> int:
        """Calls under way, and those that wait until the transport takes more."""
        return len(self.exchanges) + self._queued

    def release(self) -> None:
        """Sessions are shared, so giving one back changes nothing."""

    async def __call__(self, request: Request) -> Reply | Exchange:
        """Make one call: gives the reply, or for a stream the exchange, once the server has begun to answer.

        Raises:
            Rejected: It was refused, or the session takes no more calls; it was not processed.
            MeshError: It failed.
        """
        if self._leaving:
            raise self._refusal()
        if self._paused:
            await self._wait_writable()
        exchange = self._open(request)
        try:
            if exchange.whole is not None:
                if exchange.rest:
                    await self._send_rest(exchange)
                await exchange.whole
                return exchange.reply()
            request.opened.append(exchange)
            if exchange.rest:
                await self._send_rest(exchange)
            if request.method.cardinality.client_streaming:
                return exchange
            while exchange.headers is None and not exchange.over:
                await exchange.progress()
            error = exchange.failure() if exchange.over and not exchange.came else None
            # A "no" that is final, after headers of its own, is the caller's to read with them.
            if error is not None and (error.retryable or exchange.trailers is None):
                raise fresh(error)
            return exchange
        except BaseException:
            self.give_up(exchange)
            raise

    async def _wait_writable(self) -> None:
        """Wait until the transport takes more, which is a place taken: nobody may find it free in the meantime."""
        self._queued += 1
        try:
            while self._paused:
                # It waits as an event of anyio's does.
                writable = cast(anyio.Event, self._writable)
                await wait_by(writable, VAR.get().deadline, self._clock, "room in the connection")
                if self._leaving:
                    raise self._refusal()
            if self.load > self.limit:  # the server has lowered it
                raise Rejected("the server takes fewer calls at once than before", endpoint=self.endpoint)
        except BaseException:
            self._queued -= 1
            if self.on_room is not None:
                self.on_room()
            raise
        self._queued -= 1

    def _refusal(self) -> MeshError:
        return Rejected(self._leaving, endpoint=self.endpoint)

    def _open(self, request: Request) -> Exchange:
        """Send the headers, and the message as far as it fits."""
        h2, context = self._h2, VAR.get()
        block = self._heads.block(request, context)
        data = request.data
        room = h2.new_room
        whole = len(data) <= room
        try:
            if whole:
                stream_id = h2.open_request(block, data, end=request.end)
            else:
                stream_id = h2.open_request(block, data[:room] if room > 0 else b"")
        except (NoAvailableStreamIDError, ProtocolError) as error:
            self.leave("the connection has no more streams")
            raise self._refusal() from error
        now = self._clock.now()
        exchange = self.exchanges[stream_id] = Exchange(self, stream_id, request, now)
        if not whole:
            exchange.ended = False
            exchange.rest = data[max(0, room) :]
        if not request.method.streams:
            exchange.whole = self.loop.create_future()
        self._flush()
        if context.deadline is not None:
            exchange.tick = self._wheel.add(context.deadline, exchange)
        return exchange

    async def _send_rest(self, exchange: Exchange) -> None:
        rest, exchange.rest = exchange.rest, b""
        await self.send(exchange, rest, end=exchange.request.end)

    async def send(self, exchange: Exchange, data: bytes, *, end: bool = False) -> None:
        """Send more on a stream, as it has room. Stops silently when the exchange is over.

        Whoever calls it sees to it that nobody else does meanwhile. A message that is given up half-way takes the
        stream with it: the next one would be read as its rest.
        """
        view, at = memoryview(data), 0
        h2 = self._h2
        try:
            while not exchange.over:
                if self._paused:
                    await exchange.progress()
                    continue
                left = len(view) - at
                room = h2.room(exchange.stream_id)
                # Nothing at all needs no room, but a window that SETTINGS have made negative refuses even that, in h2
                # too.
                if room < 0 or (left and not room):
                    await exchange.progress()
                    continue
                size = min(left, room)
                last = at + size >= len(view)
                h2.put(exchange.stream_id, bytes(view[at : at + size]), end=end and last)
                self._flush()
                at += size
                if last:
                    exchange.ended = exchange.ended or end
                    return
        except BaseException:
            if at:
                exchange.error = exchange.error or cancelled("one of its messages was cut short")
                self.give_up(exchange)
            raise

    def give_up(self, exchange: Exchange, error: MeshError | None = None) -> None:
        """End an exchange from this side: the server is told, and whoever waits."""
        if exchange.over:
            return
        exchange.abandoned = error is None
        exchange.error = error or exchange.error or MeshError("the call was cancelled")
        self._finish(exchange)

    def _finish(self, exchange: Exchange) -> None:
        """It is over, in whatever way."""
        stream_id = exchange.stream_id
        if self.exchanges.pop(stream_id, None) is None:
            return
        if exchange.tick is not None:
            self._wheel.discard(exchange.tick, exchange)
        if self._error is None:
            self._close_stream(exchange)
        exchange.finish()
        if self.on_room is not None:
            self.on_room()
        if self._leaving and not self.exchanges:
            self._shut()

    def _close_stream(self, exchange: Exchange) -> None:
        """Both sides are done with the stream, or it is reset."""
        h2, stream_id = self._h2, exchange.stream_id
        if h2.half_open(stream_id):
            self._resets.value += 1
            h2.reset_stream(stream_id, ErrorCodes.CANCEL)
        h2.forget(stream_id)
        inbound = exchange.inbound
        if inbound is not None and inbound.held:
            # What has not been read stays readable; the connection does not wait for it.
            held, inbound.held = inbound.held, 0
            self._freed(held)
        self._flush()

    def _expired(self, exchange: Exchange) -> None:
        if exchange.over:
            return
        now = self._clock.now()
        self.give_up(exchange, kept())
        if self._keepalive.silent_since(exchange.sent_at, now):
            self.leave("nothing has come for long", graceful=False)

    # --- its life -----------------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait for the server's first word, so that what answers is known to speak HTTP/2.

        Raises:
            ConnectError: It does not.
        """
        await self._settled.wait()
        if self._error is not None:
            hint = "is it a gRPC server, and does it speak TLS or not as this client does?"
            if self._options.scheme == "https":
                hint = "is it a gRPC server, does it speak TLS, or does it want a client certificate?"
            raise ConnectError(f"{self._error.message}, before it said anything: {hint}", endpoint=self.endpoint)

    async def run(self) -> None:
        """Keep deadlines and ping until the connection has ended."""
        error: MeshError = ConnectionLost("the connection was closed here")
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._wheel.run)
                group.start_soon(self._ping)
                group.start_soon(self._do_later)
                await self._gone.wait()
                group.cancel_scope.cancel()
        except BaseException:
            self.on_leave = None  # the client is being closed: nobody is to connect again
            raise
        finally:
            self._end(error)
            self._catch_up()
            if not self._left_behind:
                with anyio.CancelScope(shield=True, deadline=anyio.current_time() + LINGER):
                    await self._gone.wait()
            self.abort()

    async def _ping(self) -> None:
        keepalive, clock = self._keepalive, self._clock
        while True:
            await anyio.sleep(keepalive.pause(clock.now()))
            what = keepalive.due(clock.now(), len(self.exchanges))
            if what is None:
                continue
            if isinstance(what, MeshError):
                self._end(what)
                self.abort()
                return
            self._h2.ping(what)
            self._flush()

    def leave(self, why: str, *, graceful: bool = False) -> None:
        """Take no more calls; end with the last of those under way."""
        if not self._leaving:
            self._leaving = why
            self.graceful = graceful
            self.in_task(self._tell_left)
            if self.on_room is not None:
                self.on_room()
        if not self.exchanges:
            self._shut()

    def _tell_left(self) -> None:
        callback, self.on_leave = self.on_leave, None
        if callback is not None:
            callback()

    def retire(self) -> None:
        """Nobody needs it any more: end once it is idle."""
        self.on_leave = None
        self.leave("the session is closed")

    def _shut(self) -> None:
        if self._error is None:
            self._end(ConnectionLost("the session is closed"))

    def _end(self, error: MeshError) -> None:
        """The connection ends because of ``error``."""
        if self._error is not None:
            return
        self._error = error
        self._close()
        for exchange in list(self.exchanges.values()):
            if exchange.error is None:
                exchange.error = self._lost(exchange, error)
            self._finish(exchange)
        self.leave(error.message)

    def _lost(self, exchange: Exchange, error: MeshError) -> MeshError:
        if exchange.stream_id > self._flushed:
            own: MeshError = Rejected(f"it was not sent: {error.message}", endpoint=self.endpoint)
        else:
            own = type(error)(error.message, endpoint=self.endpoint)
        own.__cause__ = error.__cause__
        return own

    def __repr__(self) -> str:
        state = self._leaving or "open"
        return f"<session with {self.endpoint}: {len(self.exchanges)} of {self.limit} calls, {state}>"
