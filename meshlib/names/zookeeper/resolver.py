"""``zk://host[,host]/path[!endpoint]``: the members of a path, followed.

A watch only says that something has changed, so all that a watch does is to set a flag; what there is now is then read
anew. Nothing depends on the order in which news comes, nor on news at all: the path is listed again every half minute
to minute. A path that is not there is watched for its creation, a deleted one too (kazoo's own `ChildrenWatch` ends for
good with its path).

While ZooKeeper cannot be reached, the last addresses stay in use (Finagle's client does so too), and `Failed` says what
the matter is. Once it is back all is read again, and the difference is one step.

`Members` understands the nodes, `Smoothing` decides when what has vanished is gone. Finagle's Zk2Resolver is the model;
where no member has the endpoint, the state is `Neg`, as there, so that a Dtab's alternative takes over.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, Final

import anyio
from anyio.lowlevel import checkpoint
from kazoo.exceptions import (
    ConnectionClosedError,
    ConnectionLoss,
    KazooException,
    NoAuthError,
    NoNodeError,
    OperationTimeoutError,
    SessionExpiredError,
)

from ...core.errors import shown
from ..addr import Addr, Bound, Failed, Neg
from ..target import Target
from .members import Entry, Members, Vector, parse
from .place import Place
from .session import Session, State, shared
from .smoothing import BRIEF, HOLD, Smoothing

__all__ = ["ZooKeeperResolver"]

logger = logging.getLogger("meshlib.names.zookeeper")

GRACE: Final = 2.0
"""Seconds without a connection before that is a failure: an election takes less, and a first call waits for 3."""
CALM: Final = 0.05
"""Seconds between two readings: a deployment changes many members, and each is a watch that fires."""
SLOW: Final = 30.0
"""Seconds that a reading may take until it is begun again."""
RELIST: Final = (30.0, 60.0)
"""Seconds until the path is listed again though nothing was heard; drawn each time."""
AGAIN, AGAIN_MOST = 0.5, 60.0
"""Seconds until what could not be read is tried again: doubling from the first to the last, jittered by half."""
SLICE: Final = 500
"""Members that are taken over until others in the event loop have their turn: some milliseconds."""
LOGGED: Final = 20
"""Malformed members that are logged, of each path."""
MOST: Final = 100_000
"""Members of a path. ZooKeeper's own limit of a megabyte for a listing is nearer."""

_INTERRUPTED = (ConnectionLoss, ConnectionClosedError, SessionExpiredError, OperationTimeoutError, TimeoutError)


class ZooKeeperResolver:
    """Follows the members of a path.

    Args:
        brief: Seconds that a few missing members stay; see `Smoothing`.
        hold: Seconds that they stay when they are the greater part.
        relist: Seconds, from and to, until the path is listed again though nothing was heard.
        rng: Its chance.
    """

    refreshable: ClassVar[bool] = False
    relist: ClassVar[float | None] = None

    def __init__(
        self,
        *,
        brief: float = BRIEF,
        hold: float = HOLD,
        relist: tuple[float, float] = RELIST,
        rng: random.Random | None = None,
    ) -> None:
        self._brief, self._hold, self._every = brief, hold, relist
        self._rng = rng or random.Random()

    def check(self, target: Target) -> None:
        """Is the target well formed?

        Raises:
            ConfigurationError: It is not; says what would be right.
        """
        Place.parse(target)

    async def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yields the members' addresses, `Neg` when there are none, and `Failed` while ZooKeeper cannot be read."""
        place = Place.parse(target)
        with shared(place.ensemble) as session:
            follower = Follower(session, place, Smoothing(self._brief, self._hold), self._every, self._rng)
            with follower.following():
                while True:
                    yield await follower.next()


class Follower:
    """What is known of one path, and what is still to be found out.

    Args:
        session: With the ensemble.
        place: The path, and the endpoint of its members.
        smoothing: Decides when what has vanished is gone.
        relist: Seconds, from and to, until the path is listed again though nothing was heard.
        rng: Its chance.
    """

    def __init__(
        self, session: Session, place: Place, smoothing: Smoothing, relist: tuple[float, float], rng: random.Random
    ) -> None:
        self._session = session
        self._place = place
        self._smoothing = smoothing
        self._every = relist
        self._rng = rng
        self._members = Members()
        self._listed = self._exists = False
        self._stale = True
        self._wake = anyio.Event()
        self._read_at = self._relist_at = float("-inf")
        self._again_at = float("inf")
        self._wait = AGAIN
        self._told: Addr | None = None
        self._logged = 0

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hear of changes."""
        unwatch = self._session.state.watch(self._entered)
        try:
            with self._session.follow(self._place.path, self._changed, self._rewritten):
                yield
        finally:
            unwatch()

    async def next(self) -> Addr:
        """Wait for the next state that differs from the one before."""
        while True:
            problem = None
            if not self._session.state.value.usable:
                problem = await self._unreachable()
            elif self._stale or anyio.current_time() >= min(self._relist_at, self._again_at):
                problem = await self._look()
            self._smoothing.settle(anyio.current_time())
            state = problem or self._state()
            if state is not None and not _same(state, self._told):
                self._told = state
                return state
            await self._pause()

    # --- what is heard ---

    def _entered(self, state: State) -> None:
        """Watches are lost with the connection, and what was missing before may have been missing for other reasons."""
        if not state.usable:
            self._smoothing.doubt()
            self._members.doubt()
        self._changed()

    def _changed(self) -> None:
        self._stale = True
        self._wake.set()

    def _rewritten(self, name: str) -> None:
        self._members.changed(name)
        self._changed()

    # --- what is done ---

    async def _unreachable(self) -> Failed | None:
        if isinstance(self._told, Failed):
            await self._session.ready()
            return None
        with anyio.move_on_after(GRACE):
            await self._session.ready()
            return None
        reason = self._session.problem or "no server answers"
        return Failed(f"no connection to {self._place.ensemble}: {reason}")

    async def _look(self) -> Failed | None:
        """List the path, and read what is new in it."""
        await anyio.sleep(max(0.0, self._read_at + CALM - anyio.current_time()))
        self._stale = False
        self._again_at = float("inf")
        low, high = self._every
        self._relist_at = anyio.current_time() + self._rng.uniform(low, high)
        path = self._place.path
        try:
            with anyio.fail_after(SLOW):
                return await self._list(path)
        except _INTERRUPTED as error:
            if isinstance(error, TimeoutError):
                self._later()
                return Failed(f"reading {path} from {self._place.ensemble} took more than {SLOW:.0f} s")
            self._changed()
            return None
        except KazooException as error:
            self._later()
            return Failed(f"cannot read {path} from {self._place.ensemble}: {_reason(error)}")
        finally:
            self._read_at = anyio.current_time()

    def _usable(self) -> Session:
        """The session; raises when it is down. Whoever waits for it here cannot tell that it is."""
        if not self._session.state.value.usable:
            raise ConnectionLoss
        return self._session

    async def _list(self, path: str) -> Failed | None:
        fired = self._session.fired
        try:
            names, stat = await self._usable().call("get_children", path, watch=fired, include_data=True)
        except NoNodeError:
            if await self._usable().call("exists", path, watch=fired) is not None:
                self._changed()  # it was made between the two
                return None
            names, stat = [], None
        if len(names) > MOST:
            self._later()
            return Failed(f"{path} has {len(names)} members; the limit is {MOST}")
        news = self._members.listed(names, stat and stat.czxid)
        taken = self._members.take()
        problem = await self._read(path, taken) if taken else None
        self._listed, self._exists = True, stat is not None
        if news or taken or self._smoothing.doubted:
            self._smoothing.see(self._members.addresses(), anyio.current_time())
        if problem is None:
            self._wait = AGAIN
        else:
            self._later()
        return problem if not self._smoothing.addresses else None

    async def _read(self, path: str, names: list[str]) -> Failed | None:
        """Read these nodes; says what is wrong when some could not be read."""
        fired = self._session.fired
        jobs = [(f"{path}/{name}", fired if Members.rewritable(name) else None) for name in names]
        understand = partial(_understand, len(path) + 1, self._place.endpoint)
        problem: KazooException = ConnectionLoss()
        done = left = 0
        try:
            await checkpoint()
            outcomes = await self._usable().read(jobs, understand)
            for name, (node, _) in zip(names, jobs, strict=True):
                outcome = outcomes.get(node, problem)
                if outcome is None:
                    self._members.gone(name)
                elif isinstance(outcome, Entry | Vector):
                    self._members.read(name, outcome)
                elif isinstance(outcome, KazooException):
                    self._members.changed(name)
                    problem, left = outcome, left + 1
                else:
                    self._members.read(name, str(outcome))
                    self._complain(node, str(outcome))
                done += 1
                if not done % SLICE:
                    await checkpoint()
        finally:
            for name in names[done:]:
                self._members.changed(name)
        if not left:
            return None
        return Failed(f"{left} of the {len(names)} nodes in {path} cannot be read: {_reason(problem)}")

    def _later(self) -> None:
        self._again_at = anyio.current_time() + self._wait * self._rng.uniform(0.5, 1.0)
        self._wait = min(self._wait * 2, AGAIN_MOST)

    def _complain(self, node: str, reason: str) -> None:
        self._logged += 1
        if self._logged <= LOGGED:
            last = "; further ones are not logged" if self._logged == LOGGED else ""
            logger.warning("%s: %s is left out: %s%s", self._place.ensemble, shown(node), reason, last)

    def _state(self) -> Addr | None:
        if self._smoothing.addresses:
            return Bound(self._smoothing.addresses)
        if not self._listed:
            return None
        return Neg(self._members.why_none if self._exists else f"there is no {self._place.path}")

    async def _pause(self) -> None:
        if self._stale:
            return
        self._wake = anyio.Event()
        until = min(self._relist_at, self._again_at, self._smoothing.deadline or float("inf"))
        with anyio.move_on_after(max(0.0, until - anyio.current_time())):
            await self._wake.wait()


def _understand(cut: int, endpoint: str, node: str, data: bytes) -> Entry | Vector:
    return parse(node[cut:], data, endpoint)


def _reason(error: KazooException) -> str:
    if isinstance(error, NoAuthError):
        return "not allowed to read it; give a user that is, as in zk://user:password@host/path"
    return f"{type(error).__name__} {error}".strip()


def _same(one: Addr, other: Addr | None) -> bool:
    """Equal, weights and metadata too."""
    if isinstance(one, Bound) and isinstance(other, Bound):
        return len(one.addresses) == len(other.addresses) and all(
            a is b or (a == b and a.weight == b.weight and a.metadata == b.metadata)
            for a, b in zip(one.addresses, other.addresses, strict=True)
        )
    return one == other
