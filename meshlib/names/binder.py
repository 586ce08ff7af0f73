"""Calls under a logical name: how it is bound, and what to do until it is.

The name is followed through the base and the local Dtab (`follow`); what is left is a tree whose leaves are targets,
and each target has one cluster (`Clusters`). Every call walks the tree as things are at that moment (`Walk`): once for
each try of the retry layer above, while requeues below stay with the cluster. What is not known yet is waited for,
`PATIENCE` seconds at most; then calls fail at once until it is.

Trees are kept by local Dtab until the base changes, so an override costs one walk of the Dtabs the first time. When the
base changes, its targets are resolved first, and calls go on as before until they are (for `PATIENCE` seconds at most).

The request is handed on as it is: what a target had no use for of the path is not made its destination (as Finagle's
MuxBindingFactory does), since destinations here say which method of a service is meant. Source: Finagle,
naming/BindingFactory.scala, DynNameFactory.scala.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import anyio

from ..core.context import VAR
from ..core.deadlines import kept, patience_of
from ..core.env import Env, elsewhere
from ..core.errors import MeshError, NoEndpoints, ResolutionError, ServiceClosed, shown
from ..core.service import Status
from ..core.supervisor import Job
from .addr import Addr, Bound, Failed, Pending
from .base import BaseDtab
from .clusters import IDLE, Clusters, Entry, MakeCluster, OpenWatch
from .delegation import Delegation
from .dtab import EMPTY_DTAB, Dtab
from .explain import look
from .interpreter import follow
from .path import Path
from .target import Target, redacted
from .tree import Tree
from .walk import GRACE, Walk, walkable

__all__ = ["Binder"]

TREES: Final = 128
"""How many local Dtabs are remembered; a walk costs some 20 µs for each name on the way, a tree some kilobytes."""
PATIENCE: Final = 3.0
"""Seconds until a name must be known, as for a first ready endpoint (``balancing/balancer.py``)."""

Pairs = tuple[tuple[str, str], ...]


_PENDING: Final = Pending()


class _Route:
    """What the name stands for under one local Dtab."""

    __slots__ = ("seen", "tree", "unknown_since", "used")

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.used, self.seen = 0, -1
        self.unknown_since: float | None = None


class Binder:
    """The service of a logical name.

    Args:
        path: The name.
        base: Its base Dtab.
        env: The client's.
        make: Makes a cluster for a watch.
        open_watch: Makes a watch for a target.
    """

    def __init__(self, path: Path, base: BaseDtab, env: Env, make: MakeCluster, open_watch: OpenWatch) -> None:
        self.path, self.base = path, base
        self._open_watch = open_watch
        self.clusters = Clusters(env, make, open_watch, self._tell)
        self._walk = Walk(self.clusters, env.rng, env.clock)
        self._env, self._clock = env, env.clock
        self._routes: OrderedDict[Pairs, _Route] = OrderedDict()
        self._changed: anyio.Event | None = None
        self._base_unknown_since: float | None = None
        self._closed = self._started = False
        metrics = env.metrics.scope("name")
        self._walks, self._malformed = metrics.counter("delegations"), metrics.counter("dtab_malformed")
        base.show(metrics)
        self._dtab: Dtab | None = None
        self._changing: Job | None = None
        base.current.watch(self._base_changed)

    # --- a call -------------------------------------------------------------------------------------------------------

    async def __call__(self, request: Any) -> Any:
        """Make the call under what the name stands for now.

        Raises:
            ResolutionError: Nobody knows yet what it stands for, or it leads nowhere.
            NoEndpoints: There is no such name, or it has no endpoints.
        """
        pairs = VAR.get().dtab
        route = self._routes.get(pairs)
        self.clusters.tick += 1
        found = _PENDING if route is None else self._walk.choose(route.tree)
        if type(found) is not Entry:
            found = await self._settled(request, pairs)
        elif route is not None:
            route.used = self.clusters.tick
            route.unknown_since = None
        found.active += 1
        try:
            return await found.service(request)
        finally:
            found.active -= 1

    async def _settled(self, request: Any, pairs: Pairs) -> Entry:
        """Wait until it is known which cluster to call.

        Raises:
            MeshError: There is none; says why.
        """
        if self._env.supervisor.elsewhere:
            raise elsewhere(self._env)
        self.start()
        waits = patience_of(request, PATIENCE)
        own = self._clock.now() + waits
        await self._base_known(own)
        route = self._route(pairs)
        deadline = VAR.get().deadline
        found: Entry | Addr = self._walk.choose(route.tree)
        while isinstance(found, Pending):
            now = self._clock.now()
            if route.unknown_since is None:
                route.unknown_since = now
            patient = min(own, route.unknown_since + PATIENCE)
            if not await self._something_changed(min(patient - now, GRACE), deadline):
                raise kept(f"{self.path} to be resolved")
            route = self._route(pairs)
            found = self._walk.choose(route.tree)
            if isinstance(found, Pending) and self._clock.now() >= patient:
                break
        if isinstance(found, Entry):
            route.unknown_since = None
            return found
        if not isinstance(found, Pending):
            route.unknown_since = None
        error = self._none(found, pairs, waits)
        error.impatient = isinstance(found, Pending) and waits < PATIENCE
        raise error

    async def _base_known(self, own: float = float("inf")) -> None:
        deadline = VAR.get().deadline
        while self._dtab is None:
            now = self._clock.now()
            if self._base_unknown_since is None:
                self._base_unknown_since = now
            patient = min(own, self._base_unknown_since + PATIENCE)
            if now >= patient:
                problem = self.base.problem or "nothing was read from it"
                error = ResolutionError(f"{self.path}: there is no base Dtab yet: {self.base.target}: {problem}")
                error.impatient = patient == own
                raise error
            if not await self._something_changed(patient - now, deadline):
                raise kept(f"the base Dtab {self.base.target}")

    async def _something_changed(self, most: float, deadline: float | None) -> bool:
        """Wait for a change, at most so many seconds; ``False`` if the deadline passed first."""
        now = self._clock.now()
        left = most if deadline is None else min(most, deadline - now)
        with anyio.CancelScope(deadline=anyio.current_time() + max(0.0, left)):
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()
        if self._closed:
            raise ServiceClosed("the client is closed")
        return deadline is None or self._clock.now() < deadline

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    # --- which --------------------------------------------------------------------------------------------------------

    def _route(self, pairs: Pairs) -> _Route:
        route = self._routes.get(pairs)
        if route is None:
            malformed = Dtab.of_pairs(pairs)[1]
            self._malformed.value += malformed
            self._walks.value += 1
            route = self._routes[pairs] = _Route(walkable(self.delegation(pairs).tree()))
            while len(self._routes) > TREES:
                self._routes.popitem(last=False)
        elif pairs:
            self._routes.move_to_end(pairs)
        route.used = self.clusters.tick
        return route

    def delegation(self, pairs: Pairs) -> Delegation:
        """The way from the name to its targets under a local Dtab, and the base as it is now."""
        base = self._dtab or EMPTY_DTAB
        return follow(base + Dtab.of_pairs(pairs)[0], self.path, len(base))

    # --- the base -----------------------------------------------------------------------------------------------------

    def _base_changed(self, dtab: Dtab | None) -> None:
        if self._dtab is None or not self._started:
            self._apply(dtab)
        elif self._changing is None and not self._closed:
            self._changing = self._env.supervisor.start(self._change, name=f"bind {self.path} again")

    async def _change(self) -> None:
        """Let the targets of the new base be resolved before calls go there."""
        latest = self._clock.now() + PATIENCE
        try:
            while (left := latest - self._clock.now()) > 0:
                tree = follow(self.base.current.value or EMPTY_DTAB, self.path).tree()
                if not isinstance(self._walk.choose(walkable(tree)), Pending):
                    break
                await self._something_changed(left, None)
        except ServiceClosed:
            return
        except MeshError:
            pass  # of which calls are told, since they come upon the same
        finally:
            self._changing = None
        self._apply(self.base.current.value)

    def _apply(self, dtab: Dtab | None) -> None:
        """From now on every tree is another one. Clusters of the same targets stay."""
        self._dtab = dtab
        self._routes.clear()
        self._base_unknown_since = None
        self._tell()

    # --- when there is none -------------------------------------------------------------------------------------------

    def _none(self, found: Addr, pairs: Pairs, waited: float) -> NoEndpoints | ResolutionError:
        way = self.delegation(pairs).resolved(self.state_of)
        if isinstance(found, Failed):
            return ResolutionError(f"{self.path} leads nowhere: {found.cause}")
        if isinstance(found, Pending):
            return ResolutionError(f"{self.path} has not been resolved within {waited:g} s: {way.brief()}")
        base, local = self._dtab or EMPTY_DTAB, Dtab.of_pairs(pairs)[0]
        under = f"base Dtab {shown(redacted(str(base))) or 'empty'}"
        under += f", local Dtab {shown(redacted(str(local)))}" if pairs else ""
        problem = "it has no endpoints" if isinstance(found, Bound) else "no such name"
        return NoEndpoints(f"{self.path}: {problem}: {way.brief()}; {under}")

    async def delegate(self) -> Delegation:
        """Where a call made here and now would go, and why.

        Raises:
            ResolutionError: The base Dtab has not been read yet.
        """
        await self._base_known()
        return await look(self.delegation(VAR.get().dtab), self._open_watch, self.state_of)

    def state_of(self, target: Target) -> Addr | None:
        """What a target stands for, as far as this client looks."""
        return next((each.watch.addr.value for each in self.clusters.entries if each.watch.target == target), None)

    # --- beginning and end --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to follow the base, and to resolve what the name stands for under it alone."""
        if not self._started and not self._closed:
            self._started = True
            self.base.start(self._env)
            self._env.supervisor.start(self._begin, name=f"bind {self.path}")
            self._env.supervisor.start(self.clusters.sweep, name="expire idle clusters")
            self._env.supervisor.start(self._sweep, name="forget idle trees")

    async def _begin(self) -> None:
        await self.base.current.wait_for(lambda dtab: dtab is not None)
        try:
            self._walk.choose(self._route(()).tree)
        except MeshError:
            return  # which calls are told, since they come upon the same

    async def _sweep(self) -> None:
        while True:
            await anyio.sleep(IDLE)
            for pairs, route in list(self._routes.items()):
                if route.used == route.seen:
                    del self._routes[pairs]
                route.seen = route.used

    def close(self) -> None:
        """End all clusters; those who wait are told."""
        self._closed = True
        self.clusters.close()
        self._tell()

    @property
    def status(self) -> Status:
        """The best of its clusters'."""
        return max((entry.cluster.status for entry in self.clusters.entries), default=Status.BUSY)

    @property
    def nodes(self) -> tuple[Any, ...]:
        """The endpoints of all clusters."""
        return tuple(node for entry in self.clusters.entries for node in entry.cluster.nodes)

    def __repr__(self) -> str:
        return f"<{self.path} under {self.base!r}: {self.clusters!r}>"
