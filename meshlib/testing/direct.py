"""The direct wire: a request goes from the client's stack to the server's without a byte on the way.

What crosses is what Mux would carry: the context without the caller's own account, deadlines, cancellation, and
failures in the words of ``mux/failure.py``, so that a refusal comes out as the peer's and a handler's error as
`RemoteError`. Sessions drain, break and are given up as Mux sessions are. The handler runs in the caller's task, which
makes a call several times as cheap as one over streams: simulations need hundreds of thousands. (So a handler sees its
caller's other context variables as well, which over a wire it would not.)
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable
from typing import Any, ClassVar, Final

import anyio

from ..client import Liveness
from ..core.clock import Clock
from ..core.context import SCOPE, VAR
from ..core.deadlines import kept, passed
from ..core.env import Env
from ..core.errors import ConnectionLost, MeshError, Rejected, RemoteError
from ..core.service import Status
from ..mux.failure import from_wire, to_wire
from ..mux.request import Request, Response

__all__ = ["DirectAcceptor", "DirectSession", "Line"]

logger = logging.getLogger("meshlib.testing")

GIVEN_UP: Final = "no answer to a ping"


class Line:
    """What stands for the connection: both ends know it, and whoever plays the network cuts it.

    Attributes:
        latency: Gives the seconds that a message takes; ``None`` for no time.
        held: Nothing arrives, in either direction.
        accepted: Set once the server has taken the connection, or has refused it.
        service: The server's stack; ``None`` until it has taken the connection.
        lost: Why the connection has ended; empty while it has not.
        released: Set when what was held back arrives again.
        draining: The server wants no more requests on it.
        calls: The cancel scopes of requests under way.
        ended: Set when the connection has ended.
        session: The client's end.
    """

    __slots__ = (
        "_idle",
        "accepted",
        "calls",
        "draining",
        "ended",
        "held",
        "latency",
        "lost",
        "released",
        "service",
        "session",
    )

    def __init__(self, latency: Callable[[], float] | None = None) -> None:
        self.latency = latency
        self.held = False
        self.accepted = anyio.Event()
        self.service: Any = None
        self.lost = ""
        self.draining = False
        self.calls: dict[anyio.CancelScope, None] = {}
        self.ended = anyio.Event()
        self.session: DirectSession | None = None
        self._idle: anyio.Event | None = None
        self.released = anyio.Event()

    def cut(self, why: str = "the connection broke: reset by the peer") -> None:
        """End it: handlers are cancelled, and their callers told that the connection was lost."""
        if self.lost:
            return
        self.lost = why
        self.accepted.set()
        for scope in self.calls:
            scope.cancel()
        self.ended.set()
        self.check_idle()
        if self.session is not None:
            self.session.left()

    def hold(self, held: bool = True) -> None:
        """Let nothing arrive in either direction; ``False`` lets it all through."""
        if held is self.held:
            return
        self.held = held
        if held:
            self.released = anyio.Event()
            if self.session is not None:
                self.session.doubt()
        else:
            self.released.set()

    async def carry(self) -> None:
        """Wait as long as one message takes to arrive."""
        if self.latency is not None:
            await anyio.sleep(self.latency())
        while self.held:
            await self.released.wait()

    def check_idle(self) -> None:
        """Tell `drain` if nothing is under way any more."""
        if self._idle is not None and not self.calls:
            self._idle.set()

    async def drain(self) -> None:
        """Have the client send no more, and wait until what is under way has been answered."""
        self.draining = True
        if self.session is not None:
            self.session.left()
        if self.calls and not self.lost:
            self._idle = anyio.Event()
            await self._idle.wait()
        self.cut("the server closed the connection")

    async def aclose(self) -> None:
        """The server takes no connections any more."""
        self.cut("the server closed the connection")


class DirectAcceptor:
    """Serves a `Line`."""

    protocol: ClassVar[str] = "direct"

    def accept(self, stream: Any, service: Any, peer: str, env: Env, base: contextvars.Context) -> _Connection:
        """The server's end of the line."""
        return _Connection(stream, service)


class _Connection:
    def __init__(self, line: Line, service: Any) -> None:
        self._line = line
        self._service = service

    async def run(self) -> None:
        self._line.service = self._service
        self._line.accepted.set()
        await self._line.ended.wait()

    async def drain(self) -> None:
        await self._line.drain()

    def abort(self) -> None:
        self._line.cut("the server closed the connection")


class DirectSession:
    """The client's end of a `Line` that the server has taken.

    Args:
        line: The line.
        address: What to call the server in errors.
        env: The client's.
        liveness: When to give up a line on which nothing arrives; ``None`` for never.
    """

    def __init__(self, line: Line, address: str, env: Env, liveness: Liveness | None) -> None:
        self.on_leave: Callable[[], None] | None = None
        self.on_lease: Callable[[bool], None] | None = None
        self._line = line
        self._address = address
        self._env = env
        self._clock: Clock = env.clock
        self._liveness = liveness
        self._service = line.service
        self._retired = False
        line.session = self
        env.supervisor.start(self._run, name=f"direct session with {address}")

    async def _run(self) -> None:
        try:
            await self._line.ended.wait()
        except BaseException:
            # The client is being closed: nobody is to connect again, and whoever waits is told.
            self.on_leave = None
            self._line.cut("the session was closed here")
            raise

    @property
    def status(self) -> Status:
        """Open, or closed once it takes no more requests."""
        return Status.CLOSED if self._retired or self._line.lost or self._line.draining else Status.OPEN

    async def __call__(self, request: Request) -> Response:
        """Have the server handle one request.

        Raises:
            MeshError: As a Mux session raises it.
        """
        line = self._line
        if line.lost or line.draining or self._retired:
            why = f"the session is closed: {line.lost}" if line.lost else "the server is draining"
            raise Rejected(why, endpoint=self._address)
        context = VAR.get()
        deadline = context.deadline
        scope = anyio.CancelScope()
        if deadline is not None:
            scope.deadline = anyio.current_time() + max(0.0, deadline - self._clock.now())
        line.calls[scope] = None
        token = VAR.set(context.evolve(record=None))
        inner = SCOPE.set(scope)
        try:
            with scope:
                if line.latency is None and not line.held:
                    outcome = await self._handled(request)
                else:
                    await line.carry()
                    outcome = await self._handled(request)
                    await line.carry()
                if isinstance(outcome, Response):
                    return outcome
                error = from_wire(*to_wire(outcome))
                error.endpoint = self._address
                raise error
        finally:
            SCOPE.reset(inner)
            VAR.reset(token)
            line.calls.pop(scope, None)
            line.check_idle()
            if self._retired and not line.calls:
                line.cut("the session has drained")
        # The scope has swallowed its own cancellation: by the end of the line, or by the deadline.
        if line.lost:
            raise ConnectionLost(line.lost, endpoint=self._address)
        if passed(deadline, self._clock):
            late = kept()
            late.endpoint = self._address
            raise late
        raise RemoteError("the handler was cancelled on the server", endpoint=self._address)

    async def _handled(self, request: Request) -> Response | MeshError:
        try:
            reply = await self._service(request)
        except MeshError as error:
            return error
        except Exception as error:
            logger.exception("a layer of the server at %s failed", self._address)
            return MeshError(f"internal error: {type(error).__name__}")
        if not isinstance(reply, Response):
            logger.error("the handler at %s returned %r, which is no mux.Response", self._address, reply)
            return MeshError("internal error: the reply cannot be sent")
        return reply

    def release(self) -> None:
        """Sessions are shared, so giving one back changes nothing."""

    def retire(self) -> None:
        """Take no more requests, and end once those under way are answered."""
        self._retired = True
        self.left()
        if not self._line.calls:
            self._line.cut("the session has drained")

    def close(self) -> None:
        """End at once."""
        self._line.cut("the session was closed here")

    def left(self) -> None:
        """Tell the pool, once, that this takes no more requests."""
        callback, self.on_leave = self.on_leave, None
        if callback is not None:
            callback()

    def doubt(self) -> None:
        """Nothing arrives any more: give the line up when a ping would have gone unanswered."""
        if self._liveness is not None and not self._env.supervisor.closed:
            self._env.supervisor.start(self._ping, self._liveness, name=f"liveness of {self._address}")

    async def _ping(self, liveness: Liveness) -> None:
        # The next ping is due at any moment of the interval.
        wait = liveness.interval * self._env.rng.random() + liveness.timeout
        released = self._line.released
        with anyio.move_on_after(wait):
            await released.wait()
            return
        self._line.cut(f"{GIVEN_UP} within {liveness.timeout:g} s")

    def __repr__(self) -> str:
        state = self._line.lost or self.status.name.lower()
        return f"<direct session with {self._address}: {state}, {len(self._line.calls)} under way>"
