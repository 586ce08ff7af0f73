"""The client's end of a Mux session: many requests at once over one connection, each under a tag of its own.

=============  ===========================  =================================================
state          entered when                 a new request is
=============  ===========================  =================================================
OPEN           the handshake is done        sent
DRAINING       Tdrain came (Rdrain went)    refused as never processed, so it goes elsewhere
CLOSED         drained, lost, or closed     refused likewise
=============  ===========================  =================================================

A lease that ran out makes the session busy, but requests still go (Finagle does the same). A cancelled request that
has not left yet is withdrawn; one that has is discarded on the wire, and its tag stays reserved until the server has
answered it in any way. The first request of a session may find that the server knows no Tdispatch; the session then
speaks Treq. Source: finagle-mux, pushsession/MuxClientSession.scala, ClientTracker.scala.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import anyio

from ..core.clock import Clock
from ..core.context import VAR
from ..core.deadlines import Wheel, kept
from ..core.env import Metrics
from ..core.errors import ConnectionLost, MeshError, Rejected, shown
from ..core.service import Status
from .codec import MuxError, decode
from .connection import SLICE, Connection
from .messages import (
    CONTROL_TAG,
    MARKER_TAG,
    Message,
    Rdiscarded,
    Rdispatch,
    Rdrain,
    Rerr,
    Rinit,
    Rping,
    Rreq,
    Tdiscarded,
    Tdrain,
    Tlease,
    Tping,
)
from .outcome import lost, outcome
from .ping import Pinger
from .request import Request, Response, encode_request
from .tags import TagPool

__all__ = ["ClientSession"]

logger = logging.getLogger("meshlib.mux")

UNANSWERED: Final = 5.0
"""Seconds that a draining session waits for the answers to discards, when nothing else is left to wait for."""
LINGER: Final = 1.0
"""Seconds that the last words of a session which has drained may take to leave."""


class _Pending:
    """A request that waits for its reply."""

    __slots__ = ("answered", "reply", "tag")

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.answered = anyio.Event()
        self.reply: Message | MeshError | None = None


_NOBODY: Final = _Pending.__new__(_Pending)
"""Stands for "no request has this tag"; ``None`` stands for "one had, and was discarded"."""
_ANSWERS: Final = (Rreq, Rdiscarded, Rerr)


class ClientSession:
    """A session over an established, negotiated connection. `run` must be running for anything to happen.

    Args:
        connection: The connection, past its handshake.
        endpoint: What to call the other side in errors.
        clock: For deadlines on the wire, and leases.
        metrics: Below ``mux/``.
        negotiated: The server answered the handshake, so it knows Tdispatch; else its first answer will tell.
        ping_interval: Seconds from one ping to the next; ``None`` for none. Finagle's failure detector: 5.
        ping_timeout: Seconds to wait for its answer before the session is given up. Finagle: 4.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        endpoint: str,
        clock: Clock,
        metrics: Metrics,
        negotiated: bool = False,
        ping_interval: float | None = 5.0,
        ping_timeout: float = 4.0,
    ) -> None:
        self.connection = connection
        self.endpoint = endpoint
        self._clock = clock
        self._metrics = metrics
        self._pings = None if ping_interval is None else Pinger(connection, clock, metrics, ping_interval, ping_timeout)
        self._tags = TagPool()
        self._deadlines = Wheel(clock, self._expire)
        self._pending: dict[int, _Pending | None] = {}
        self._draining = False
        self._closed: MeshError | None = None
        self._leased_until: float | None = None
        self._lease_tick = 0
        self._discarded = 0
        self._dispatches: bool | None = True if negotiated else None
        self._scope = anyio.CancelScope()
        self._done = anyio.Event()
        self._drained = metrics.counter("drained")
        self.on_leave: Callable[[], None] | None = None
        """Called once, when the session stops taking requests."""
        self.on_lease: Callable[[bool], None] | None = None
        """Called with ``False`` when the lease runs out, and with ``True`` when there is a new one."""

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """Open; busy while its lease has run out; closed once it takes no more requests."""
        if self._closed is not None or self._draining:
            return Status.CLOSED
        if self._leased_until is not None and self._clock.now() > self._leased_until:
            return Status.BUSY
        return Status.OPEN

    @property
    def pending(self) -> int:
        """Tags in use: requests under way, and discarded ones that the server has not answered."""
        return len(self._pending)

    def release(self) -> None:
        """Sessions are shared, so giving one back changes nothing."""

    async def __call__(self, request: Request) -> Response:
        """Send one request and wait for its reply.

        Raises:
            Rejected: The server refused it, or the session takes no more; it was not processed.
            ConnectionLost: The connection ended before the reply came.
            RemoteError: The handler failed.
        """
        if self._draining or self._closed is not None:
            raise self._refusal()
        connection = self.connection
        if connection.congested:
            await connection.writable(VAR.get().deadline, self._clock)
            if self._draining or self._closed is not None:
                raise self._refusal()
        tag = self._tags.acquire()
        if tag is None:
            raise Rejected("every tag of the session is in use", endpoint=self.endpoint)
        untried = self._dispatches is None
        try:
            frame = encode_request(tag, request, connection.limits, self._clock, treq=self._dispatches is False)
        except BaseException:
            self._tags.release(tag)
            raise
        pending = self._pending[tag] = _Pending(tag)
        deadline = VAR.get().deadline
        tick = None if deadline is None else self._deadlines.add(deadline, pending)
        connection.write(frame, tag)
        try:
            await pending.answered.wait()
        except BaseException:
            self._abandon(tag, pending, "the caller cancelled the request")
            raise
        finally:
            if tick is not None:
                self._deadlines.discard(tick, pending)
        reply = pending.reply
        if type(reply) is Rdispatch:
            return outcome(reply, self.endpoint)
        return await self._unusual(request, reply, untried)

    async def _unusual(self, request: Request, reply: Message | MeshError | None, untried: bool) -> Response:
        if isinstance(reply, Rerr) and untried and not self._dispatches:
            # Finagle: a server older than Tdispatch answers the first one with Rerr; this session falls back, and with
            # it every request that left before that answer came.
            if self._dispatches is None:
                logger.info("%s knows no Tdispatch (%s); falling back to Treq", self.endpoint, shown(reply.why))
            self._dispatches = False
            return await self(request)
        return outcome(reply, self.endpoint)

    def _refusal(self) -> MeshError:
        if self._closed is not None:
            return Rejected(f"the session is closed: {self._closed.message}", endpoint=self.endpoint)
        return Rejected("the server is draining", endpoint=self.endpoint)

    def _expire(self, pending: _Pending | Callable[[], None]) -> None:
        if not isinstance(pending, _Pending):
            pending()
            return
        if self._pending.get(pending.tag) is pending:
            self._abandon(pending.tag, pending, "the deadline passed")
            pending.reply = kept()
            pending.answered.set()

    def _abandon(self, tag: int, pending: _Pending, why: str) -> None:
        if self._pending.get(tag) is not pending:
            return  # the reply came in the same moment
        if self.connection.withdraw(tag):
            del self._pending[tag]
            self._tags.release(tag)
            self._check_drained()
        else:
            self._pending[tag] = None
            self._discarded += 1
            self.connection.send(Tdiscarded(MARKER_TAG, tag, why))
            self._check_drained()  # it may have been the last that anybody waited for

    # --- the session --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read, write and ping until the session ends. Never raises: whoever waits for a reply is told why."""
        error: MeshError = ConnectionLost("the session was closed here")
        try:
            with self._scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._write)
                    group.start_soon(self._deadlines.run)
                    group.start_soon(self._part)
                    if self._pings is not None:
                        group.start_soon(self._ping, self._pings)
                    try:
                        await self._read()
                    except Exception as e:
                        self._fail(lost(e))
                    group.cancel_scope.cancel()
        except BaseException:
            # The client, or the event loop, is being closed: nobody is to connect again.
            self.on_leave = None
            raise
        finally:
            self.connection.end()
            self._finish(self._closed or error)
            await self.connection.aclose()

    def _fail(self, error: MeshError) -> None:
        """End the session because of ``error``."""
        if self._closed is None:
            self._closed = error
            if isinstance(error.__cause__, MuxError):
                self.connection.violation(error.__cause__)
                logger.warning("closing the session with %s: %s", self.endpoint, error.message)
        self._scope.cancel()

    def _finish(self, error: MeshError) -> None:
        if self._closed is None:
            self._closed = error
        pending, self._pending = self._pending, {}
        unsent = Rejected("the connection ended before the request was sent")
        unsent.__cause__ = self._closed
        for tag, waiting in pending.items():
            if waiting is not None:
                waiting.reply = unsent if tag in self.connection.unsent else self._closed
                waiting.answered.set()
        self._leave()

    def _leave(self) -> None:
        callback, self.on_leave = self.on_leave, None
        if callback is not None:
            callback()

    def close(self) -> None:
        """End the session at once; requests under way fail with `ConnectionLost`."""
        if self._closed is None:
            self._closed = ConnectionLost("the session was closed here")
        self._scope.cancel()

    def retire(self) -> None:
        """Take no more requests, and close once those under way are answered."""
        self._draining = True
        self._leave()
        self._check_drained()

    async def _write(self) -> None:
        try:
            await self.connection.write_loop()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as e:
            # Nothing can be sent any more, but replies that came before that may still be read: let the reader find the
            # end of them by itself.
            if self._closed is None:
                self._closed = lost(e)
            self._leave()
            await anyio.sleep(LINGER)
            self._scope.cancel()

    async def _ping(self, pings: Pinger) -> None:
        try:
            await pings.run()
        except ConnectionLost as error:
            self._fail(error)

    async def _read(self) -> None:
        connection, pending, tags = self.connection, self._pending, self._tags
        limit = connection.limits.max_contexts
        frames = connection.take_unread()
        while True:
            for n, frame in enumerate(frames):
                if n and not n % SLICE:
                    await connection.give_way()
                message = decode(frame, limit)
                if type(message) is Rdispatch:
                    self._dispatches = True
                elif not isinstance(message, _ANSWERS) or message.tag == CONTROL_TAG:
                    self._control(message)
                    continue
                waiting = pending.pop(message.tag, _NOBODY)
                if waiting is _NOBODY:
                    self._metrics.counter("unexpected_replies").value += 1
                    continue
                tags.release(message.tag)
                if waiting is None:
                    self._discarded -= 1
                else:
                    waiting.reply = message
                    waiting.answered.set()
                if self._draining:
                    self._check_drained()
            frames = await connection.read()

    def _control(self, message: Message) -> None:
        if isinstance(message, Tping):
            self.connection.send(Rping(message.tag))
        elif isinstance(message, Rping):
            if self._pings is not None:
                self._pings.answered()
        elif isinstance(message, Tdrain):
            self.connection.send(Rdrain(message.tag))
            self._metrics.counter("draining").value += 1
            self.retire()
        elif isinstance(message, Tlease):
            if message.unit != 0:
                raise MuxError(f"a lease in unit {message.unit}; only 0, milliseconds, is known")
            self._metrics.counter("leased").value += 1
            if self._leased_until is not None:
                self._deadlines.discard(self._lease_tick, self._tell_lease)
            self._leased_until = self._clock.now() + message.howmuch / 1e3
            self._lease_tick = self._deadlines.add(self._leased_until, self._tell_lease)
            self._tell_lease()
        elif isinstance(message, Rerr):
            # What our own servers say before they hang up on a client at fault.
            error = ConnectionLost(f"the server ended the session: {shown(message.why)}")
            logger.warning("%s: %s", self.endpoint, error.message)
            raise error
        else:
            code = getattr(message, "code", None)
            what = type(message).__name__ if code is None else f"message type {code}"
            self._metrics.counter("unexpected_messages").value += 1
            if (code is None and not isinstance(message, Rdrain | Rinit)) or (code is not None and code > 0):
                self.connection.send(Rerr(message.tag, f"Unexpected mux {what}"))

    def _tell_lease(self) -> None:
        if self.on_lease is not None:
            self.on_lease(self.status is not Status.BUSY)

    def _check_drained(self) -> None:
        if not self._draining or self._closed is not None:
            return
        if not self._pending:
            self._end_drained()
        elif len(self._pending) == self._discarded:
            # Nobody waits for any of these, and a server that threw away a half-sent request may never answer it.
            self._deadlines.add(self._clock.now() + UNANSWERED, self._end_drained)

    def _end_drained(self) -> None:
        if self._closed is None:
            self._drained.value += 1
            self._closed = Rejected("the session has drained")
            self._done.set()

    async def _part(self) -> None:
        await self._done.wait()
        with anyio.move_on_after(LINGER):
            await self.connection.flush()  # an Rdrain or a Tdiscarded may have been written in this very turn
        self._scope.cancel()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "draining" if self._draining else "open"
        return f"<mux session with {self.endpoint}: {state}, {self.pending} pending>"
