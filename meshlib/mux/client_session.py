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
from ..core.errors import ConnectionLost, DeadlineExceeded, MeshError, Rejected, RemoteError
from ..core.service import Status
from .codec import MuxError, decode, encode, encode_tdispatch
from .connection import SLICE, Connection
from .contexts import LOW, encode_context
from .failure import from_wire
from .messages import (
    CONTROL_TAG,
    MARKER_TAG,
    Message,
    Rdiscarded,
    Rdispatch,
    Rdrain,
    ReplyStatus,
    Rerr,
    Rping,
    Rreq,
    Tdiscarded,
    Tdrain,
    Tlease,
    Tping,
    Treq,
)
from .request import Request, Response
from .tags import TagPool

__all__ = ["ClientSession"]

logger = logging.getLogger("meshlib.mux")


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
        ping_interval: float | None = 5.0,
        ping_timeout: float = 4.0,
    ) -> None:
        self.connection = connection
        self.endpoint = endpoint
        self._clock = clock
        self._metrics = metrics
        self._ping_interval = ping_interval
        self._ping_timeout = ping_timeout
        self._tags = TagPool()
        self._deadlines = Wheel(clock, self._expire)
        self._pending: dict[int, _Pending | None] = {}
        self._draining = False
        self._closed: MeshError | None = None
        self._leased_until: float | None = None
        self._dispatches: bool | None = None
        self._pong: anyio.Event | None = None
        self._scope = anyio.CancelScope()
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
        try:
            frame = self._encode(tag, request)
        except BaseException:
            self._tags.release(tag)
            raise
        pending = self._pending[tag] = _Pending(tag)
        connection.write(frame, tag)
        deadline = VAR.get().deadline
        tick = None if deadline is None else self._deadlines.add(deadline, pending)
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
            self._dispatches = True
            if reply.status is ReplyStatus.OK:
                return Response(reply.body, reply.contexts)
            raise self._located(from_wire(reply.status, reply.contexts, reply.body))
        return await self._unusual(request, reply)

    def _encode(self, tag: int, request: Request) -> bytes:
        context = VAR.get()
        if self._dispatches is not False:
            contexts = encode_context(context, self._clock, request.contexts)
            return encode_tdispatch(tag, contexts, request.dest, context.dtab, request.body)
        trace = context.trace
        ids = None if trace is None else (trace.span, trace.parent or trace.span, trace.trace & LOW)
        return encode(Treq(tag, ids, None if trace is None else int(trace.debug), request.body))

    async def _unusual(self, request: Request, reply: Message | MeshError | None) -> Response:
        if isinstance(reply, Rreq):
            if reply.status is ReplyStatus.OK:
                return Response(reply.body)
            raise self._located(from_wire(reply.status, (), reply.body))
        if isinstance(reply, DeadlineExceeded):
            raise self._located(reply)
        if isinstance(reply, MeshError):
            raise type(reply)(reply.message, endpoint=self.endpoint) from reply.__cause__
        if isinstance(reply, Rerr):
            if self._dispatches is None:
                # Finagle: a server older than Tdispatch answers the first one with Rerr; this session falls back.
                self._dispatches = False
                logger.info("%s knows no Tdispatch (%s); falling back to Treq", self.endpoint, reply.why)
                return await self(request)
            raise self._located(RemoteError(f"the server could not handle the request: {reply.why}"))
        raise self._located(RemoteError(f"the server answered with {type(reply).__name__}"))

    def _located(self, error: MeshError) -> MeshError:
        error.endpoint = self.endpoint
        return error

    def _refusal(self) -> MeshError:
        if self._closed is not None:
            return Rejected(f"the session is closed: {self._closed.message}", endpoint=self.endpoint)
        return Rejected("the server is draining", endpoint=self.endpoint)

    def _expire(self, pending: _Pending | ClientSession) -> None:
        if isinstance(pending, ClientSession):
            self._tell_lease()
            return
        if self._pending.get(pending.tag) is pending:
            self._abandon(pending.tag, pending, "the deadline passed")
            pending.reply = kept("the deadline passed before the reply came")
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
            self.connection.send(Tdiscarded(MARKER_TAG, tag, why))

    # --- the session --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read, write and ping until the session ends. Never raises: whoever waits for a reply is told why."""
        error: MeshError = ConnectionLost("the session was closed here")
        try:
            with self._scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._write)
                    group.start_soon(self._deadlines.run)
                    if self._ping_interval is not None:
                        group.start_soon(self._ping, self._ping_interval)
                    try:
                        await self._read()
                    except Exception as e:
                        self._fail(_lost(e))
                    group.cancel_scope.cancel()
        finally:
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
        for waiting in pending.values():
            if waiting is not None:
                waiting.reply = self._closed
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
            self._fail(_lost(e))

    async def _read(self) -> None:
        connection, pending, tags = self.connection, self._pending, self._tags
        limit = connection.limits.max_contexts
        frames = connection.take_unread()
        while True:
            for n, frame in enumerate(frames):
                if n and not n % SLICE:
                    await connection.give_way()
                message = decode(frame, limit)
                if type(message) is Rdispatch or (isinstance(message, _ANSWERS) and message.tag != CONTROL_TAG):
                    waiting = pending.pop(message.tag, _NOBODY)
                    if waiting is _NOBODY:
                        self._metrics.counter("unexpected_replies").value += 1
                        continue
                    tags.release(message.tag)
                    if waiting is not None:
                        waiting.reply = message
                        waiting.answered.set()
                    if self._draining:
                        self._check_drained()
                else:
                    self._control(message)
            frames = await connection.read()

    def _control(self, message: Message) -> None:
        if isinstance(message, Tping):
            self.connection.send(Rping(message.tag))
        elif isinstance(message, Rping):
            if self._pong is not None:
                self._pong.set()
        elif isinstance(message, Tdrain):
            self.connection.send(Rdrain(message.tag))
            self._metrics.counter("draining").value += 1
            self.retire()
        elif isinstance(message, Tlease):
            if message.unit != 0:
                raise MuxError(f"a lease in unit {message.unit}; only 0, milliseconds, is known")
            self._metrics.counter("leased").value += 1
            self._leased_until = self._clock.now() + message.howmuch / 1e3
            self._deadlines.add(self._leased_until, self)
            self._tell_lease()
        elif isinstance(message, Rerr):
            raise MuxError(f"the server reports an error of the session: {message.why}")
        else:
            code = getattr(message, "code", None)
            what = type(message).__name__ if code is None else f"message type {code}"
            self._metrics.counter("unexpected_messages").value += 1
            if code is None or code > 0:
                self.connection.send(Rerr(message.tag, f"Unexpected mux {what}"))

    def _tell_lease(self) -> None:
        if self.on_lease is not None:
            self.on_lease(self.status is not Status.BUSY)

    def _check_drained(self) -> None:
        if self._draining and not self._pending and self._closed is None:
            self._drained.value += 1
            self._closed = Rejected("the session has drained")
            self._scope.cancel()

    async def _ping(self, interval: float) -> None:
        rtt = self._metrics.histogram("ping_latency_us")
        while True:
            started = self._clock.now()
            self._pong = anyio.Event()
            self.connection.send(Tping(CONTROL_TAG))
            with anyio.move_on_after(self._ping_timeout):
                await self._pong.wait()
            took = self._clock.now() - started
            if not self._pong.is_set():
                self._metrics.counter("ping_failures").value += 1
                self._fail(ConnectionLost(f"no answer to a ping within {self._ping_timeout:g} s"))
                return
            rtt.record(took * 1e6)
            await anyio.sleep(max(0.0, interval - took))

    def __repr__(self) -> str:
        state = "closed" if self._closed else "draining" if self._draining else "open"
        return f"<mux session with {self.endpoint}: {state}, {self.pending} pending>"


def _lost(cause: Exception) -> MeshError:
    if isinstance(cause, MuxError):
        error: MeshError = ConnectionLost(f"the server broke the protocol: {cause.message}")
    elif isinstance(cause, anyio.EndOfStream):
        error = ConnectionLost("the server closed the connection")
    else:
        error = ConnectionLost(f"the connection broke: {cause.__cause__ or cause!r}")
    error.__cause__ = cause
    return error
