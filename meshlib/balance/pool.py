"""One session per endpoint, shared by all requests, and made again whenever it ends.

=============  ==========================================  ======================================================
state          entered when                                a request that comes now
=============  ==========================================  ======================================================
IDLE           nothing has been asked yet                  starts a connect and waits for it
CONNECTING     a connect is under way                      waits for it with the others
READY          there is a session                          uses it
BACKING_OFF    a connect failed                            fails at once, as never processed, so it goes elsewhere
CLOSED         the endpoint is gone                        fails likewise
=============  ==========================================  ======================================================

The first connect is lazy. After that the pool reconnects by itself, in the background, as soon as a session ends: the
balancer is told that the endpoint is busy until it is back, so no request has to find out. Waits between tries double
from 0.1 s to 10 s, each jittered by half so that the clients of a restarted server do not return as one.

Connecting belongs to the pool, not to the request that happened to ask first: cancelling that request leaves the
others theirs, and runs in an empty context. Finagle: SingletonPool.scala, FailFastFactory.scala.
"""

from __future__ import annotations

import functools
from enum import Enum, auto
from typing import Any, ClassVar, Final

import anyio

from ..core.context import VAR
from ..core.deadlines import wait_by
from ..core.env import Env
from ..core.errors import ConnectError, MeshError, ServiceClosed
from ..core.service import ServiceFactory, Session, Status
from ..core.supervisor import Job

__all__ = ["Pool", "SingletonPool"]

FIRST_WAIT: Final = 0.1
LAST_WAIT: Final = 10.0


class Pool:
    """The layer: one shared session per endpoint."""

    place: ClassVar[str] = "pool"
    keeps_deadline: ClassVar[bool] = True

    def build(self, env: Env, below: ServiceFactory[Any, Any]) -> Any:
        """A service over a pool over the connector."""
        pool = SingletonPool(below, env)
        env.closers.append(pool.close)
        return pool.to_service()

    def __repr__(self) -> str:
        return f"pool(sessions=1, backoff={FIRST_WAIT:g}…{LAST_WAIT:g} s)"


class _State(Enum):
    IDLE = auto()
    CONNECTING = auto()
    READY = auto()
    BACKING_OFF = auto()
    CLOSED = auto()


class SingletonPool(ServiceFactory[Any, Any]):
    """Lends one session to everybody.

    Args:
        factory: Makes sessions. A session has ``on_leave``, to be called when it takes no more requests, and
            ``retire()``, to end once it is idle; where the protocol has leases, it calls ``on_lease``.
        env: The endpoint's.
    """

    def __init__(self, factory: ServiceFactory[Any, Any], env: Env) -> None:
        self._factory = factory
        self._env = env
        self._state = _State.IDLE
        self._session: Any = None
        self._job: Job | None = None
        self._settled: anyio.Event | None = None
        self._error: MeshError | None = None
        metrics = env.metrics.scope("pool")
        self._connects, self._failures = metrics.counter("connects"), metrics.counter("connects/fail")

    @property
    def status(self) -> Status:
        """Closed, backing off (busy), or fit to be asked."""
        if self._state is _State.CLOSED:
            return Status.CLOSED
        return Status.BUSY if self._state is _State.BACKING_OFF else Status.OPEN

    def to_service(self) -> Any:
        """As `ServiceFactory.to_service`, without the steps that a shared session makes empty."""

        async def call(request: Any) -> Any:
            session = self._session
            if session is None:
                session = await self.acquire()
            return await session(request)

        return call

    async def acquire(self) -> Session[Any, Any]:
        """The session, once there is one.

        Raises:
            ConnectError: The connect that this waited for failed, or an earlier one did and the next try is not due.
            ServiceClosed: The endpoint has been removed, or the client closed.
        """
        if self._state is _State.READY:
            session: Session[Any, Any] = self._session
            return session
        if self._state is _State.IDLE:
            self._connect()
        if self._state is _State.CONNECTING:
            if self._settled is None:
                self._settled = anyio.Event()
            deadline = VAR.get().deadline
            await wait_by(self._settled, deadline, self._env.clock, f"a connection to {self._env.address}")
            if self._session is not None:
                return await self.acquire()
        if self._state is _State.CLOSED:
            raise ServiceClosed("the endpoint was removed", retryable=True, endpoint=str(self._env.address))
        error = self._error
        text = error.message if error is not None else "the session ended"
        raise ConnectError(text, endpoint=str(self._env.address)) from error

    def _connect(self) -> None:
        self._state = _State.CONNECTING
        self._job = self._env.supervisor.start(self._connect_until_there, name=f"connect {self._env.address}")

    async def _connect_until_there(self) -> None:
        wait = FIRST_WAIT
        while True:
            try:
                session: Any = await self._factory.acquire()
            except Exception as cause:
                if self._state is _State.CLOSED:
                    return
                error = cause if isinstance(cause, MeshError) else ConnectError(f"connect failed: {cause!r}")
                if error is not cause:
                    error.__cause__ = cause
                self._failures.value += 1
                self._error = error
                pause = wait * self._env.rng.uniform(0.5, 1.0)
                self._env.health.mark("connect", Status.BUSY, f"{error.message}; next try within {pause:.1f} s")
                self._settle(_State.BACKING_OFF)
                await anyio.sleep(pause)
                wait = min(wait * 2, LAST_WAIT)
                self._state = _State.CONNECTING
            else:
                if self._state is _State.CLOSED:  # in that very moment, too late for the cancellation
                    session.retire()
                    return
                self._connects.value += 1
                self._error = None
                self._session = session
                session.on_leave = functools.partial(self._left, session)
                session.on_lease = functools.partial(self._leased, session)
                self._settle(_State.READY)
                self._env.health.mark("connect", Status.OPEN)
                return

    def _settle(self, state: _State) -> None:
        self._state = state
        if self._settled is not None:
            self._settled.set()
            self._settled = None

    def _left(self, session: Any) -> None:
        if self._session is not session or self._state is _State.CLOSED:
            return
        self._session = None
        if self._env.supervisor.closed:
            return
        self._env.health.mark("lease", Status.OPEN)
        self._env.health.mark("connect", Status.BUSY, "the session ended; reconnecting")
        self._connect()

    def _leased(self, session: Any, valid: bool) -> None:
        if self._session is session:
            # A server whose lease ran out would rather not, but serves (Finagle dispatches to it as well).
            self._env.health.mark("lease", Status.OPEN if valid else Status.BUSY, "it ran out", serves=True)

    def close(self) -> None:
        """End the session once it is idle, and connect no more."""
        session, self._session = self._session, None
        self._settle(_State.CLOSED)
        if self._job is not None:
            self._job.cancel()
        if session is not None:
            session.retire()

    def __repr__(self) -> str:
        return f"<SingletonPool of {self._env.address}: {self._state.name.lower()}>"
