"""The connections of one endpoint: one that all calls share, and more before the server's limit would make them wait.

The first connection, its failures and its return are `SingletonPool`'s business. Calls go to the first connection that
has room. When the last one is nearly full another is made in the background, one at a time and for all who wait, up to
``most``; beyond that, calls wait in line for one to end, at most until their deadline. (grpclib holds them back without
a word, and C core as well: one connection, and a queue.) Connections that were made so end when they are idle.

A connection that has reached its maximum age, give or take a tenth, is replaced first and then retired, so that nobody
waits for it. When one ends that was asked to drain, the next is made at once.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import Any, ClassVar, Final

import anyio

from ...balancing.pool import SingletonPool
from ...core.context import VAR
from ...core.deadlines import wait_by
from ...core.env import Env
from ...core.errors import ConfigurationError, MeshError
from ...core.service import ServiceFactory, Status
from ...core.supervisor import Job

__all__ = ["Connections", "SessionPool", "connections"]

MOST: Final = 10
IDLE: Final = 30.0
"""Seconds after which a further connection ends that nobody has used."""
EARLY: Final = 0.8
"""The share of the limit at which the next connection is begun, so that it is there when it is needed."""
RETRY: Final = 1.0
"""Seconds until a further connection is tried again that could not be made."""
JITTER: Final = 0.1
OPEN: Final = Status.OPEN


class Connections:
    """The layer. See `connections`."""

    place: ClassVar[str] = "pool"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, most: int = MOST, age: float | None = None, idle: float = IDLE) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ConfigurationError(f"connections(most={most!r}): give a number of connections, 1 or more")
        for name, value in (("age", age), ("idle", idle)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise ConfigurationError(f"connections({name}={value!r}): give seconds, above 0")
        self.most, self.age, self.idle = most, age, idle

    def build(self, env: Env, below: ServiceFactory[Any, Any]) -> Any:
        """A service over a pool over the connector."""
        pool = SessionPool(below, env, self)
        env.closers.append(pool.close)
        return pool.to_service()

    def __repr__(self) -> str:
        age = "" if self.age is None else f", age={self.age:g} s"
        return f"connections(most={self.most}{age}, idle={self.idle:g} s)"


class SessionPool(SingletonPool):
    """See the module. Its sessions also have ``full``, ``load``, ``exchanges`` and ``limit``, and call ``on_room``.

    Args:
        factory: Makes sessions.
        env: The endpoint's.
        policy: How many, and for how long.
    """

    def __init__(self, factory: ServiceFactory[Any, Any], env: Env, policy: Connections) -> None:
        super().__init__(factory, env)
        self._policy = policy
        self._more: list[Any] = []
        self._growing: Job | None = None
        self._ageing: dict[Any, Job] = {}
        self._keeping: Job | None = None
        self._not_before = float("-inf")
        self._waiting: deque[anyio.Event] = deque()
        metrics = env.metrics.scope("pool")
        self._waited = metrics.counter("waited")
        self._replaced = metrics.counter("replaced")

    def to_service(self) -> Any:
        """A service that sends each call on a connection with room."""

        async def call(request: Any) -> Any:
            session = self._session
            if session is None or session.status is not OPEN or session.load >= EARLY * session.limit:
                session = await self._with_room()
            return await session(request)

        return call

    @property
    def sessions(self) -> tuple[Any, ...]:
        """Those that take calls."""
        return (*(() if self._session is None else (self._session,)), *self._more)

    async def _with_room(self) -> Any:
        """A connection that can take one more call.

        Raises:
            ConnectError: There is none, and none can be made now.
            DeadlineExceeded: None had room in time.
        """
        event: anyio.Event | None = None
        while True:
            first = await self._first()
            for session in (first, *self._more):
                if not session.full and session.status is OPEN:
                    if session is self.sessions[-1] and session.load >= EARLY * session.limit:
                        self._grow()
                    if event is not None and session.load + 1 < session.limit:
                        self._wake()  # there may be more than one, since one word of the server's can make much room
                    return session
            if first.status is OPEN:  # else it has just left, and whoever made it is about to be told
                self._grow()
            self._waited.value += event is None
            turn = anyio.Event()
            # Who was woken in vain, because another came first, keeps the place in the line.
            (self._waiting.append if event is None else self._waiting.appendleft)(turn)
            event = turn
            self._listen(True)
            try:
                await wait_by(turn, VAR.get().deadline, self._env.clock, f"room in a connection to {self._env.address}")
            except BaseException:
                if turn.is_set():
                    self._wake()
                raise
            finally:
                if not turn.is_set():
                    self._waiting.remove(turn)
                if not self._waiting:
                    self._listen(False)

    async def _first(self) -> Any:
        return await self.acquire() if self._session is None else self._session

    def _listen(self, wanted: bool) -> None:
        for session in self.sessions:
            session.on_room = self._wake if wanted else None

    def _wake(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()

    def _wake_all(self) -> None:
        while self._waiting:
            self._waiting.popleft().set()

    # --- more than one ------------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """See that there will be one more, if there may be."""
        if self._growing is not None or len(self.sessions) >= self._policy.most or self._env.supervisor.closed:
            return
        if self._env.clock.now() < self._not_before or self.status is not Status.OPEN:
            return
        self._growing = self._env.supervisor.start(self._add, name=f"one more connection to {self._env.address}")

    async def _add(self) -> None:
        try:
            session = await self._made()
            if session is not None:
                self._join(session)
                if self._keeping is None:
                    self._keeping = self._env.supervisor.start(
                        self._keep_few, name=f"idle connections to {self._env.address}"
                    )
        finally:
            self._growing = None
            self._wake_all()

    async def _made(self) -> Any:
        """One more connection; ``None`` if it cannot be, which is no news of the endpoint while there is another."""
        try:
            session: Any = await self._factory.acquire()
        except MeshError:
            self._failures.value += 1
            self._not_before = self._env.clock.now() + RETRY
            return None
        if self.status is Status.CLOSED or session.status is not Status.OPEN:
            session.retire()
            return None
        self._connects.value += 1
        return session

    def _join(self, session: Any) -> None:
        self._more.append(session)
        session.on_leave = functools.partial(self._one_left, session)
        self._grow_old(session)

    def _one_left(self, session: Any) -> None:
        if session in self._more:
            self._more.remove(session)
            self._forget_age(session)
        self._wake_all()

    def _spare(self) -> Any:
        return self._more.pop(0) if self._more else None

    def _left(self, session: Any) -> None:
        self._forget_age(session)
        super()._left(session)
        self._wake_all()

    async def _keep_few(self) -> None:
        """End connections beyond the first that nobody has used for a while."""
        idle: dict[Any, int] = {}
        try:
            while self._more:
                await anyio.sleep(self._policy.idle / 2)
                for session in list(self._more):
                    idle[session] = 0 if session.load else idle.get(session, 0) + 1
                    if idle[session] >= 2:
                        self._more.remove(session)
                        self._forget_age(session)
                        session.retire()
                idle = {session: times for session, times in idle.items() if session in self._more}
        finally:
            self._keeping = None

    # --- age ----------------------------------------------------------------------------------------------------------

    def _install(self, session: Any) -> None:
        super()._install(session)
        if self._waiting:
            self._listen(True)
        self._grow_old(session)

    def _grow_old(self, session: Any) -> None:
        age = self._policy.age
        if age is not None and session not in self._ageing and not self._env.supervisor.closed:
            seconds = age * self._env.rng.uniform(1 - JITTER, 1 + JITTER)
            self._ageing[session] = self._env.supervisor.start(
                self._age, session, seconds, name=f"age of a connection to {self._env.address}"
            )

    def _forget_age(self, session: Any) -> None:
        job = self._ageing.pop(session, None)
        if job is not None:
            job.cancel()

    async def _age(self, session: Any, seconds: float) -> None:
        """Replace the connection when it is old; one that cannot be replaced stays until it can."""
        while True:
            await anyio.sleep(seconds)
            newer = await self._made()
            if newer is not None:
                break
            seconds = RETRY
        if self._ageing.pop(session, None) is None:  # it has left in that very moment
            newer.retire()
            return
        self._replaced.value += 1
        if session is self._session:
            self._install(newer)
        else:
            self._more.remove(session)
            self._join(newer)
            if self._waiting:
                self._listen(True)
            self._wake_all()
        session.retire()

    def close(self) -> None:
        """End the connections once they are idle, and connect no more."""
        super().close()
        for job in (self._growing, self._keeping, *self._ageing.values()):
            if job is not None:
                job.cancel()
        self._ageing.clear()
        more, self._more = self._more, []
        for session in more:
            session.retire()
        self._wake_all()

    def __repr__(self) -> str:
        calls = "+".join(str(len(session.exchanges)) for session in self.sessions) or "none"
        return f"<pool of {self._env.address}: {self._state.name.lower()}, calls {calls}>"


def connections(most: int = MOST, *, age: float | None = None, idle: float = IDLE) -> Connections:
    """How many connections a gRPC client has with each endpoint, and for how long.

    Args:
        most: At once; there is more than one only when calls would have to wait for it.
        age: Seconds after which one is replaced, give or take a tenth; ``None`` for never.
        idle: Seconds after which one beyond the first ends that nobody uses.

    Raises:
        ConfigurationError: One makes no sense.
    """
    return Connections(most, age, idle)
