"""The server's end of a Mux session: each request is handled in a task of its own, with the caller's context around it.

=============  ===================================  ==========================================================
state          entered when                         a new request is
=============  ===================================  ==========================================================
OPEN           the connection is accepted           handled
DRAINING       Tdrain was sent                      handled still: the client may not have seen it yet
DRAINED        the client's Rdrain came             nacked; the session closes once all others are answered
CLOSED         drained, grace over, or lost         no more
=============  ===================================  ==========================================================

A Tdiscarded cancels the handler and is answered at once; what the handler was about to say is dropped. A tag that is
used twice at the same time is a fault of the client: every request under way is answered with Rerr, cancelled, and the
session ends. Source: finagle-mux, pushsession/MuxServerSession.scala, ServerTracker.scala.
"""

from __future__ import annotations

import contextvars
import logging

import anyio

from ..core.clock import Clock
from ..core.context import SCOPE, VAR, Context, TraceId
from ..core.deadlines import passed
from ..core.env import Metrics
from ..core.errors import DeadlineExceeded, InvalidArgument, MeshError, Rejected, ServiceClosed, shown
from ..core.service import Service
from ..core.supervisor import Job, Supervisor
from .codec import MuxError, decode, encode, encode_contexts, encode_rdispatch
from .connection import SLICE, Connection
from .contexts import ContextReader
from .failure import to_wire
from .handshake import ServerHandshake
from .messages import (
    CONTROL_TAG,
    MARKER_TAG,
    Message,
    Rdiscarded,
    Rdrain,
    ReplyStatus,
    Rerr,
    Rping,
    Rreq,
    Tdiscarded,
    Tdispatch,
    Tdrain,
    Tlease,
    Tping,
    Treq,
)
from .request import Request, Response

__all__ = ["ServerSession"]

logger = logging.getLogger("meshlib.mux")

FIRST_WORD = 10.0
"""Seconds that a client may take to say its first word. Clients speak at once; only a connection that holds a place
without using it would not."""
LINGER = 1.0
"""Seconds to wait for the client to close its side after ours: closing with unread bytes would reset the connection,
and the reset could overtake the last replies."""


class ServerSession:
    """One accepted connection.

    Args:
        connection: The connection, before any handshake.
        service: The server's stack, around the user's service.
        peer: What to call the other side in logs.
        supervisor: Where handlers run.
        clock: What remaining times are added to.
        metrics: Below ``mux/``.
        trust: May the caller's Dtab say where our own calls go?
        base: The context variables that handlers start from; each gets a copy.
    """

    def __init__(
        self,
        connection: Connection,
        service: Service[Request, Response],
        *,
        peer: str,
        supervisor: Supervisor,
        clock: Clock,
        metrics: Metrics,
        trust: bool = True,
        base: contextvars.Context | None = None,
    ) -> None:
        self.connection = connection
        self.peer = peer
        self._service = service
        self._supervisor = supervisor
        self._metrics = metrics
        self._clock = clock
        # One counter for all of a server's sessions: a gauge of each would show the latest session alone.
        self._contexts = ContextReader(clock, trust=trust, undecodable=metrics.counter("undecodable_contexts"))
        self._base = base or contextvars.Context()
        self._in_flight: dict[int, Job] = {}
        self._running = 0
        self._established = False
        self._draining = False
        self._refusing = False
        self._scope = anyio.CancelScope()
        self._idle: anyio.Event | None = None
        self._ended = anyio.Event()

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return len(self._in_flight)

    async def run(self) -> None:
        """Serve until the session ends. Never raises."""
        try:
            with self._scope:
                async with anyio.create_task_group() as group:
                    try:
                        first = await self._negotiate()
                        group.start_soon(self._write)
                        await self._read(first)
                    except MuxError as e:
                        self._violated(e)
                        with anyio.move_on_after(LINGER):
                            await self.connection.flush()
                    except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                        pass
                    group.cancel_scope.cancel()
        finally:
            for job in self._in_flight.values():
                job.cancel()
            self._in_flight.clear()
            self._check_idle()
            self._ended.set()
            await self.connection.aclose()

    def _violated(self, error: MuxError) -> None:
        self.connection.violation(error)
        logger.warning("closing the session with %s: %s", self.peer, error.message)
        if not self._established:
            self.connection.end()  # what there was to say has been said, and no write loop runs to say more
        # First for the session: a request that could not even be read has no other way to learn why it failed.
        self.connection.send(Rerr(CONTROL_TAG, error.message))
        for tag, job in self._in_flight.items():
            job.cancel()
            self.connection.send(Rerr(tag, error.message))
        self._in_flight.clear()  # so that no handler answers after its Rerr

    async def _negotiate(self) -> Message | None:
        handshake = ServerHandshake(self.connection.limits)
        with anyio.CancelScope(deadline=anyio.current_time() + FIRST_WORD):
            while handshake.result is None:
                try:
                    answer = handshake.receive(await self.connection.next_message())
                except MuxError as e:
                    await self.connection.send_now(Rerr(CONTROL_TAG, e.message))
                    raise
                if answer is not None:
                    await self.connection.send_now(answer)
        if handshake.result is None:
            raise MuxError(f"no first message within {FIRST_WORD:g} s", "negotiation")
        self._established = True
        self.connection.fragment_at(handshake.result.fragment)
        return handshake.result.request

    async def _write(self) -> None:
        try:
            await self.connection.write_loop()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._scope.cancel()

    async def _read(self, first: Message | None) -> None:
        connection = self.connection
        limit = connection.limits.max_contexts
        transit = self._contexts.transit
        transit.read(self._clock.now())
        if first is not None:
            self._receive(first)
        frames = connection.take_unread()
        while True:
            for n, frame in enumerate(frames):
                if n and not n % SLICE:
                    await connection.give_way()
                message = decode(frame, limit)
                if type(message) is Tdispatch:
                    self._dispatch(message, self._contexts.read(message.contexts, message.dtab))
                else:
                    self._receive(message)
            if connection.congested:
                await connection.writable()
            if connection.drained:
                transit.caught_up(self._clock.now())
            frames = await connection.read()
            transit.read(self._clock.now())

    # --- requests -----------------------------------------------------------------------------------------------------

    def _dispatch(self, message: Tdispatch | Treq, context: Context) -> None:
        tag = message.tag
        if tag == MARKER_TAG:
            raise MuxError("a request under tag 0, which marks messages that nobody answers")
        if tag in self._in_flight:
            self._metrics.counter("duplicate_tag").value += 1
            raise MuxError(f"tag {tag} is already in use", "duplicate_tag")
        if self._refusing:
            self._answer(message, Rejected("the server is draining"))
            return
        # Handlers are counted, not tags: one that was discarded counts until it has really ended.
        if max(self._running, len(self._in_flight)) >= self.connection.limits.max_in_flight:
            raise MuxError(
                f"more than {self.connection.limits.max_in_flight} requests at once (Limits.max_in_flight)",
                "too_many_in_flight",
            )
        dest = message.dest if isinstance(message, Tdispatch) else ""
        variables = self._base.copy()
        variables.run(VAR.set, context)
        job = self._in_flight[tag] = Job(dest or "request")
        variables.run(SCOPE.set, job.scope)
        try:
            self._supervisor.launch(job, self._handle, (job, message, Request(message.body, dest)), variables)
        except ServiceClosed:  # in this very turn
            del self._in_flight[tag]
            self._answer(message, Rejected("the server is closing"))

    async def _handle(self, job: Job, message: Tdispatch | Treq, request: Request) -> None:
        self._running += 1
        outcome: Response | MeshError = MeshError("the handler was cancelled on the server")
        try:
            if job.scope.cancel_called:
                return  # discarded before it began, perhaps in the same read
            outcome = await self._service(request)
        except MeshError as error:
            outcome = error
        except Exception as error:  # a filter of the user's, above the error mapping
            logger.exception("a layer of the server failed on %s", shown(request.dest) or "a request")
            outcome = MeshError(f"internal error: {type(error).__name__}")
        except BaseException:
            if passed(VAR.get().deadline, self._clock):
                outcome = DeadlineExceeded("the deadline passed while the request was handled", processed=True)
            elif not job.scope.cancel_called:
                logger.exception("the handler of %s was cancelled, and not by us", shown(request.dest) or "a request")
            raise
        finally:
            self._running -= 1
            # Discarded requests and those of a lost connection are no longer in the table: nobody waits for them. Their
            # tag may be there again, for a request that came after the discard.
            if self._in_flight.get(message.tag) is job:
                del self._in_flight[message.tag]
                self._answer(message, outcome)
                self._check_idle()

    def _answer(self, message: Tdispatch | Treq, outcome: Response | MeshError) -> None:
        try:
            self._reply(message, outcome)
        except Exception:  # not a Response, or one that Mux has no room for; its caller waits all the same
            logger.exception("the reply to %s cannot be sent", shown(getattr(message, "dest", "")) or "a request")
            self._reply(message, MeshError("internal error: the reply cannot be sent"))

    def _reply(self, message: Tdispatch | Treq, outcome: Response | MeshError) -> None:
        if isinstance(outcome, MeshError):
            status, contexts, body = to_wire(outcome)
        else:
            status, contexts, body = ReplyStatus.OK, outcome.contexts, outcome.body
        tag = message.tag
        section = encode_contexts(contexts) if contexts else b"\0\0"
        if type(message) is Treq:
            frame = encode(Rreq(tag, status, body))
        else:
            frame = encode_rdispatch(tag, status, section, body)
        limits = self.connection.limits
        if len(frame) - 4 > limits.max_frame or len(section) - 2 > limits.max_contexts:
            # The client's limits are likely ours. Breaking them would end the session, and every call on it.
            raise InvalidArgument(f"a reply of {len(frame)} bytes, contexts of {len(section)} (Limits)")
        self.connection.write(frame, tag)

    def _receive(self, message: Message) -> None:
        if isinstance(message, Tdispatch):
            self._dispatch(message, self._contexts.read(message.contexts, message.dtab))
        elif isinstance(message, Treq):
            self._dispatch(message, _context_of(message))
        elif isinstance(message, Tping):
            self.connection.send(Rping(message.tag))
        elif isinstance(message, Tdiscarded):
            self._discard(message)
        elif isinstance(message, Rdrain):
            if self._draining:
                self._refusing = True
                self._check_idle()
        elif isinstance(message, Tdrain):
            # The client is going to send nothing more; there is nothing for us to do but to say so.
            self.connection.send(Rdrain(message.tag))
        elif isinstance(message, Rping | Rdiscarded | Rerr | Tlease):
            self._metrics.counter("unexpected_messages").value += 1
        else:
            code = getattr(message, "code", None)
            self._metrics.counter("unexpected_messages").value += 1
            number = code if code is not None else _CODES.get(type(message).__name__, 0)
            if number > 0:
                self.connection.send(Rerr(message.tag, f"Unexpected mux message type {number}"))

    def _discard(self, message: Tdiscarded) -> None:
        tag = message.which
        unread = self.connection.forgot(tag)
        job = self._in_flight.pop(tag, None)
        if job is not None:
            job.cancel()
        elif self.connection.holds(tag):
            self.connection.withdraw(tag)
        elif not unread:
            self._metrics.counter("orphaned_tdiscard").value += 1
            return
        # Of whatever came or left in part, no more will: the client may use the tag again once it knows.
        self.connection.send(Rdiscarded(tag), tag)
        self._check_idle()

    def _check_idle(self) -> None:
        if self._idle is not None and self._refusing and not self._in_flight:
            self._idle.set()

    # --- closing ------------------------------------------------------------------------------------------------------

    def lease(self, seconds: float) -> None:
        """Tell the client that requests are welcome for so long."""
        self.connection.send(Tlease(MARKER_TAG, 0, int(seconds * 1e3)))

    async def drain(self) -> None:
        """Ask the client to stop, serve until it has, answer what is under way, and close."""
        if not self._established:
            self._scope.cancel()
        if self._ended.is_set() or not self._established:
            return
        self._draining = True
        self._idle = anyio.Event()
        self._metrics.counter("draining").value += 1
        self.connection.send(Tdrain(CONTROL_TAG))
        async with anyio.create_task_group() as group:
            group.start_soon(self._cancel_when_ended, group.cancel_scope)
            await self._idle.wait()
            await self.connection.flush()
            self._metrics.counter("drained").value += 1
            with anyio.move_on_after(LINGER):
                await self.connection.send_eof()
                await self._ended.wait()
            group.cancel_scope.cancel()
        self._scope.cancel()
        await self._ended.wait()

    async def _cancel_when_ended(self, scope: anyio.CancelScope) -> None:
        await self._ended.wait()
        scope.cancel()

    def abort(self) -> None:
        """Close at once; handlers are cancelled."""
        self._scope.cancel()

    def __repr__(self) -> str:
        return f"<mux session with {self.peer}: {len(self._in_flight)} in flight{', draining' * self._draining}>"


_CODES = {"Tinit": 68, "Tlease": 67}


def _context_of(message: Treq) -> Context:
    if message.trace is None:
        return Context()
    span, parent, trace = message.trace
    if not (span and trace):
        return Context()
    debug = bool((message.flags or 0) & 1)
    return Context(trace=TraceId(trace, span, None if parent == span else parent, None, debug))
