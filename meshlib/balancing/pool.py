"""One session per endpoint, shared by all requests, and made again when it ends.

=============  ==========================================  ======================================================
state          entered when                                a request that comes now
=============  ==========================================  ======================================================
IDLE           nothing has been asked yet, or the session  starts a connect and waits for it
               ended
CONNECTING     a connect is under way                      waits for it with the others
READY          there is a session                          uses it
BACKING_OFF    a connect failed                            fails at once, as never processed, so it goes elsewhere
CLOSED         the endpoint is gone                        fails likewise
=============  ==========================================  ======================================================

The first connect is lazy. With the layer `failfast`, which every client has unless told otherwise, the pool reconnects
by itself from then on: in the background, after the waits that the layer draws, as soon as a connect fails or a session
ends. The balancer is told that the endpoint is busy until it is back, so no request has to find out. Without the layer
nothing is tried but on demand: a session that ended is made again for the next request, and a failed connect fails
those who waited for it and nobody else.

Connecting belongs to the pool, not to the request that happened to ask first: cancelling that request leaves the
others theirs, and runs in an empty context. Finagle: SingletonPool.scala.
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
from ..core.health import Peers
from ..core.service import ServiceFactory, Session, Status
from ..core.supervisor import Job
from ..names.watch import Watch
from .failfast import Failfast, Waits

__all__ = ["Pool", "SingletonPool"]

SHORTEST: Final = 1.0
"""Seconds. A session that ended sooner, as asked as it may have been, is made again after a wait."""


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
        return "pool(sessions=1)"


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
            ``retire()``, to end once it is idle; where the protocol has leases, it calls ``on_lease``; where a server
            may ask for a new connection, it says that it ended so by a true ``graceful``.
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
        self._since = 0.0
        self._peers = env.shared(Peers, Peers)
        self._watch: Watch | None = env.params.get(Watch)
        self._pause: anyio.CancelScope | None = None
        metrics = env.metrics.scope("pool")
        self._connects, self._failures = metrics.counter("connects"), metrics.counter("connects/fail")
        metrics = env.metrics.scope("failfast")
        self._removals, self._returns = metrics.counter("marked_dead"), metrics.counter("marked_available")

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

    @functools.cached_property
    def _waits(self) -> Waits | None:
        """What failfast says; the layer stands above this one and is built after it, hence not asked at first."""
        policy = self._env.params.get(Failfast)
        return None if policy is None else Waits(policy, self._env.rng)

    def _connect(self) -> None:
        self._state = _State.CONNECTING
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._start(0.0)

    def _start(self, wait: float) -> None:
        self._pause_for(wait)
        self._job = self._env.supervisor.start(self._keep, name=f"connect {self._env.address}")

    def _pause_for(self, wait: float) -> None:
        # A scope, so that others can end the wait at once or earlier, even before the job has come to it.
        self._pause = anyio.CancelScope(deadline=anyio.current_time() + wait) if wait else None

    async def _keep(self) -> None:
        """Wait, and connect, until there is a session; without failfast, once."""
        while True:
            if self._pause is not None:
                with self._pause:
                    await anyio.sleep_forever()
                self._pause = None
            if self._state is _State.CLOSED:  # in that very moment, too late for the cancellation
                return
            self._state = _State.CONNECTING
            wait = await self._try()
            if wait is None:
                return
            self._pause_for(wait)

    async def _try(self) -> float | None:
        """Connect once; seconds until the next time, or ``None`` if there is no need of one."""
        try:
            session: Any = await self._factory.acquire()
        except Exception as cause:
            if self._state is _State.CLOSED:
                return None
            error = cause if isinstance(cause, MeshError) else ConnectError(f"connect failed: {cause!r}")
            if error is not cause:
                error.__cause__ = cause
            self._failures.value += 1
            if self._watch is not None:
                self._watch.refresh()  # the address may be out of date
            known, self._error = self._error, error
            return self._failed(error, known is None)
        if self._state is _State.CLOSED:  # in that very moment, too late for the cancellation
            session.retire()
            return None
        self._connects.value += 1
        if self._error is not None and self._waits is not None:
            self._returns.value += 1
            self._env.events.note("revive", "connect", endpoint=self._env.address, call=False)
        self._error = None
        self._install(session)
        self._settle(_State.READY)
        self._peers.up(self._env.health)
        self._env.health.mark("connect", Status.OPEN)
        return None

    def _install(self, session: Any) -> None:
        """It is the one that is lent from now on."""
        self._session = session
        self._since = self._env.clock.now()
        session.on_leave = functools.partial(self._left, session)
        session.on_lease = functools.partial(self._leased, session)

    def _spare(self) -> Any:
        """A session to go on with when the one that is lent has ended; ``None`` where there is but one."""
        return None

    def _failed(self, error: MeshError, first: bool) -> float | None:
        if self._waits is None:
            self._settle(_State.IDLE)
            return None
        env = self._env
        self._peers.down(env.health, self._hurry)
        wait = self._waits.after_failure(self._peers.all_down)
        if first:
            self._removals.value += 1
            env.events.note("eject", "connect", error.message, endpoint=env.address, call=False)
        env.health.mark("connect", Status.BUSY, f"{error.message}; next try within {wait:.1f} s")
        self._settle(_State.BACKING_OFF)
        return wait

    def _hurry(self) -> None:
        if self._pause is not None and self._waits is not None:
            self._pause.deadline = min(self._pause.deadline, anyio.current_time() + self._waits.hurried())

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
        spare = self._spare()
        if spare is not None:
            self._install(spare)
            return
        self._state = _State.IDLE
        if self._waits is None:
            return
        self._peers.down(self._env.health, self._hurry)
        lasted = self._env.clock.now() - self._since
        # A server that asks for a new connection is most likely there to accept it; one that does nothing else is not.
        asked = getattr(session, "graceful", False) and lasted >= SHORTEST
        wait = 0.0 if asked else self._waits.after_loss(lasted, self._peers.all_down)
        self._env.health.mark("connect", Status.BUSY, f"the session ended; reconnecting within {wait:.1f} s")
        self._start(wait)

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
