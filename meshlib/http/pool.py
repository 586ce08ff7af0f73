"""Connections of one endpoint, each lent to one request at a time (to many, over HTTP/2), kept while they are warm.

Finagle's watermark and caching pools in one. The connection used last is lent first, so that those which are not needed
grow old; they are closed before servers do it (uvicorn and Node.js: after 5 s), or sooner where the server says so in a
``Keep-Alive`` header. A connection that the server has closed meanwhile is found out before it is lent. After a maximum
age a connection is not lent again, so that load finds its way to new machines behind an address; one that is shared
ends with the last request on it, while others have a new one. Beyond ``most`` connections, requests wait in line, and
have their turn in order, or give up after httpx's pool timeout.

Connecting is done by the request that needs it; where HTTP/2 is offered by one at a time, since the others may share
what it makes; how many may share one, the server can say anew at any time. If connecting fails, the layer `failfast`
takes the endpoint out, and a connection is made in the background, which brings it back. Nothing waits for the network
in giving a connection back.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import anyio

from ..balancing.failfast import Failfast, Waits
from ..core.context import VAR
from ..core.env import Env
from ..core.errors import ConnectError, ServiceClosed
from ..core.health import Peers
from ..core.service import Status
from ..core.supervisor import Job
from ..names.watch import Watch
from .connection import HttpSession
from .connector import CONNECTING, HttpConnector, is_impatient, is_untrusted
from .line import Line, PoolFull

if TYPE_CHECKING:
    from .policy import Connections

__all__ = ["PoolFull", "WatermarkPool"]

MARGIN: Final = 1.0
"""Seconds before the time that the server gives: its clock started first."""


class WatermarkPool:
    """See the module.

    Args:
        factory: Makes connections.
        env: The endpoint's.
        policy: How many, and for how long.
    """

    def __init__(self, factory: Any, env: Env, policy: Connections) -> None:
        self._factory, self._env, self._policy = factory, env, policy
        self._clock = env.clock
        self._ready: list[HttpSession] = []
        self._all: set[HttpSession] = set()
        self._connecting = 0
        self._waiting = Line(self._serve, self._back, self._full)
        self._shut: HttpSession | None = None
        self._closed = False
        self._keeper: Job | None = None
        self._trying: Job | None = None
        self._doomed: list[HttpSession] = []
        self._awake = anyio.Event()
        self._peers = env.shared(Peers, Peers)
        self._watch: Watch | None = env.params.get(Watch)
        connector: HttpConnector | None = env.params.get(HttpConnector)
        self._shares = connector is not None and connector.shares
        self._error: ConnectError | None = None
        self._pause: anyio.CancelScope | None = None
        metrics = env.metrics.scope("pool")
        self._connects, self._failures = metrics.counter("connects"), metrics.counter("connects/fail")
        self._stale, self._body_failures = metrics.counter("stale"), metrics.counter("body_failures")
        metrics = env.metrics.scope("failfast")
        self._removals, self._returns = metrics.counter("marked_dead"), metrics.counter("marked_available")

    @functools.cached_property
    def _waits(self) -> Waits | None:
        policy = self._env.params.get(Failfast)  # a layer above this one, which is built after it
        return None if policy is None else Waits(policy, self._env.rng)

    async def call(self, request: Any) -> Any:
        """Send the request on a connection of its own.

        Raises:
            ConnectError: There is none, and none can be made.
            PoolFull: All were in use for too long.
            MeshError: The request failed.
        """
        session = (None if self._waiting else self._take()) or await self._acquire(request)
        try:
            reply = await session(request)
        except BaseException as error:
            body: Any = getattr(getattr(error, "response", None), "stream", None)
            if hasattr(body, "on_end"):
                body.on_end(functools.partial(self._end_of_body, session))
            else:
                self._give(session)
            raise
        body = reply.stream
        if hasattr(body, "on_end"):
            body.on_end(functools.partial(self._end_of_body, session))
        else:
            self._give(session)
        return reply

    def _end_of_body(self, session: HttpSession, error: Exception | None) -> None:
        if error is not None:
            self._body_failures.value += 1
        self._give(session)

    # --- lending ------------------------------------------------------------------------------------------------------

    def _take(self) -> HttpSession | None:
        """A connection that can be used now."""
        ready, now = self._ready, self._clock.now()
        while ready:
            session = ready[-1]
            free = session.lent == 0
            if free and (self._is_old(session, now) or session.stale):
                self._stale.value += 1
                self._unlist(session)
                self._doom(session)
            elif not session.usable or self._retires(session, now):
                self._unlist(session)
                if free:
                    self._doom(session)
            elif session.lent < session.capacity:
                session.lent += 1
                if session.lent >= session.capacity:
                    self._unlist(session)
                return session
            else:  # the server allows fewer than it did
                self._unlist(session)
        return None

    def _list(self, session: HttpSession) -> None:
        """Lend it, if it has room and is not lent already."""
        if session.listed or session.lent >= session.capacity:
            return
        if self._policy.age is None or not self._retires(session, self._clock.now()):
            session.listed = True
            self._ready.append(session)

    def _unlist(self, session: HttpSession) -> None:
        if session.listed:
            session.listed = False
            if self._ready[-1] is session:
                self._ready.pop()
            else:
                self._ready.remove(session)

    def _is_old(self, session: HttpSession, now: float) -> bool:
        idle, policy = now - session.idle_since, self._policy
        limit = policy.idle if session.idle_limit is None else min(policy.idle, session.idle_limit - MARGIN)
        return idle > limit or self._is_aged(session, now)

    def _is_aged(self, session: HttpSession, now: float) -> bool:
        age = self._policy.age
        return age is not None and now - session.born > age

    def _retires(self, session: HttpSession, now: float) -> bool:
        """Is it to have no more requests beside those on it? Not if there is no room for another in its place."""
        return self._is_aged(session, now) and len(self._all) + self._connecting < self._policy.most

    async def _acquire(self, request: Any) -> HttpSession:
        left = request.extensions.get("timeout", {}).get("pool")
        until = float("inf") if left is None else anyio.current_time() + left
        again = False
        while True:
            if self._closed:
                raise self._removed()
            session: HttpSession | None = await self._waiting.turn(until, again)
            again = True
            if session is None:
                token = CONNECTING.set(request)
                try:
                    session = await self._connect()
                finally:
                    CONNECTING.reset(token)
                session.lent = 1
                self._list(session)
            if session.lent <= session.capacity and session.usable:
                self._serve()
                return session
            # The server has closed it in that moment, or allows nothing yet.
            self._give(session)

    def _back(self, session: HttpSession | None) -> None:
        """The turn was given, and is not used."""
        if session is not None:
            self._give(session)
        else:
            self._connecting -= 1
            self._serve()

    def _full(self) -> PoolFull:
        most, address = self._policy.most, self._env.address
        error = PoolFull(f"none of at most {most} connections to {address} was free for too long")
        error.finalize("the request's pool timeout has passed")
        return error

    @property
    def _must_wait(self) -> bool:
        if len(self._all) + self._connecting >= self._policy.most:
            return True
        if self._shares and self._connecting:
            return True
        # One that has allowed nothing yet is about to; another would be told the same.
        shut = self._shut
        return shut is not None and shut.fresh and not shut.capacity and shut in self._all

    def _serve(self, error: ConnectError | None = None) -> None:
        """Give turns for as long as there is something to give; ``error`` to those who have waited for that connect."""
        line = self._waiting
        while line:
            session = self._take()
            if session is None and error is not None:
                same = ConnectError(error.message, endpoint=str(self._env.address))
                if not error.retryable:
                    same.finalize(error.verdict)
                line.give(error=same)
                continue
            if session is None:
                if self._must_wait or self._closed:
                    return
                self._connecting += 1
            line.give(session)

    def _give(self, session: HttpSession) -> None:
        session.lent -= 1
        now = session.idle_since = self._clock.now()
        if session.lent == 0 and (self._closed or not session.usable or self._is_old(session, now)):
            self._unlist(session)
            self._doom(session)
        elif session in self._all and session.usable and not self._closed:
            self._list(session)
        if self._waiting:
            self._serve()

    def _changed(self, session: HttpSession) -> None:
        """Its server allows more or fewer requests on it, or will take no more."""
        if session in self._all:
            if session.usable:
                self._list(session)
            elif session.lent == 0:
                self._unlist(session)
                self._doom(session)
        self._serve()

    # --- connecting ---------------------------------------------------------------------------------------------------

    async def _connect(self) -> HttpSession:
        """Make one, which `_connecting` counts already. Whoever asked lists it, and gives the others their turns."""
        try:
            session: HttpSession = await self._factory.acquire()
        except BaseException as error:
            self._connecting -= 1
            if isinstance(error, Exception):
                self._failures.value += 1
            concerns = isinstance(error, ConnectError) and self._judge(error) and self._shares
            self._serve(error if concerns and isinstance(error, ConnectError) else None)
            raise
        self._connecting -= 1
        if self._closed or self._env.supervisor.closed:  # in that very moment
            await session.aclose()
            raise self._removed()
        self._connects.value += 1
        self._all.add(session)
        session.watch(functools.partial(self._changed, session))
        if not session.shared:  # the server chose HTTP/1.1
            self._shares = False
        elif not session.capacity:
            self._shut = session
        if self._keeper is None:
            self._keeper = self._env.supervisor.start(self._keep, name=f"connections to {self._env.address}")
        self._succeeded()
        return session

    def _judge(self, error: ConnectError) -> bool:
        """What a failed connect says of the endpoint, and of another try. Would others have failed as well?"""
        peers = self._peers
        if is_untrusted(error) and peers.downs >= peers.count - 1:
            # There is no other, and what is waited for is not time, but another certificate.
            error.finalize("its certificate is not accepted, and there is no other endpoint")
        elif is_impatient(error, self._env):
            record = VAR.get().record
            tried = {self._env.address} if record is None else {self._env.address, *record.tried}
            if len(tried) >= peers.count:
                error.finalize("the request's connect timeout has passed, and there is no other endpoint")
            return False
        else:
            self._failed(error)
        return True

    def _succeeded(self) -> None:
        self._peers.up(self._env.health)
        if self._error is not None:
            self._error = None
            if self._waits is not None:
                self._waits.after_loss(float("inf"), False)
                self._returns.value += 1
                self._env.events.note("revive", "connect", endpoint=self._env.address, call=False)
            self._env.health.mark("connect", Status.OPEN)

    def _failed(self, error: ConnectError) -> None:
        if self._watch is not None:
            self._watch.refresh()  # the address may be out of date
        first, self._error = self._error is None, error
        if self._waits is None or self._closed or self._trying is not None or self._env.supervisor.closed:
            return
        if first:
            self._removals.value += 1
            self._env.events.note("eject", "connect", error.message, endpoint=self._env.address, call=False)
        self._trying = self._env.supervisor.start(self._try, name=f"connect {self._env.address}")
        self._peers.down(self._env.health, self._hurry)
        self._env.health.mark("connect", Status.BUSY, error.message)

    async def _try(self) -> None:
        """Connect in the background until it works."""
        try:
            while not self._closed and self._waits is not None and self._error is not None:
                wait = self._waits.after_failure(self._peers.all_down)
                self._env.health.mark("connect", Status.BUSY, f"{self._error.message}; next try within {wait:.1f} s")
                self._pause = anyio.CancelScope(deadline=anyio.current_time() + wait)
                with self._pause:
                    await anyio.sleep_forever()
                self._pause = None
                self._connecting += 1
                try:
                    session = await self._connect()
                except (ConnectError, ServiceClosed):
                    continue
                self._list(session)
                self._serve()
        finally:
            self._trying = None

    def _hurry(self) -> None:
        if self._pause is not None and self._waits is not None:
            self._pause.deadline = min(self._pause.deadline, anyio.current_time() + self._waits.hurried())

    # --- ending -------------------------------------------------------------------------------------------------------

    def _doom(self, session: HttpSession) -> None:
        """It is not lent again; the keeper closes it."""
        if session in self._all:
            self._all.discard(session)
            self._doomed.append(session)
            self._awake.set()

    async def _keep(self) -> None:
        """Close what is not needed any more; in the end, all."""
        try:
            while not (self._closed and not self._all and not self._doomed):
                self._awake = anyio.Event()
                if not self._doomed:
                    with anyio.CancelScope(deadline=anyio.current_time() + max(0.5, self._policy.idle / 2)):
                        await self._awake.wait()
                now = self._clock.now()
                for session in [s for s in self._all if s.lent == 0 and (self._closed or self._is_old(s, now))]:
                    self._unlist(session)
                    self._doom(session)
                self._serve()
                while self._doomed:
                    await self._doomed.pop().aclose()
        finally:
            self._keeper = None
            for session in (*self._doomed, *self._all):
                self._unlist(session)
                await session.aclose()
            self._doomed.clear()
            self._all.clear()

    def close(self) -> None:
        """Lend no more; connections end once they are given back."""
        self._closed = True
        if self._trying is not None:
            self._trying.cancel()
        self._awake.set()
        while self._waiting:
            self._waiting.give(error=self._removed())

    def _removed(self) -> ServiceClosed:
        return ServiceClosed("the endpoint was removed", retryable=True, endpoint=str(self._env.address))

    def __repr__(self) -> str:
        return f"<pool of {self._env.address}: {len(self._all)} connections, {len(self._ready)} free>"
