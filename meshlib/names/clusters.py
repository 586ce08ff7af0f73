"""The clusters of one client that binds logical names: one for each target, kept from call to call.

A cluster is a watch, with a balancer and all below it, in a `Supervisor` of its own, so that it can be closed alone.
All names that are bound to one target share its cluster, whichever Dtabs they were bound under; so a local Dtab that
leads to a target in use costs no connections.

Those that nobody has used for `IDLE` seconds are closed: they leave no request behind, for one with a request under way
is never idle. At most `MOST` are kept. If one more is needed the one that was used longest ago goes; if all are busy
there is one more, until it is idle (Finagle then makes one that serves a single request, and connects again for the
next). Source: Finagle, naming/BindingFactory.scala, factory/ServiceFactoryCache.scala.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import anyio

from ..core.env import Env
from ..core.errors import ServiceClosed
from ..core.service import Status
from ..core.supervisor import Supervisor
from .target import Target
from .watch import Watch

__all__ = ["Cluster", "Clusters", "Entry", "MakeCluster", "OpenWatch"]

IDLE: Final = 600.0
"""Seconds after which a cluster that was not used is closed (Finagle: 10 minutes for each of its caches)."""
SWEEP: Final = IDLE / 10
"""Seconds from one look for idle clusters to the next: calls need not read a clock for it."""
MOST: Final = 64
"""How many are kept. Finagle keeps 8, which those who route by request have to build again and again; 64 of ten
endpoints each are some hundred connections, well below a process's usual limit of 1024 files."""
DRAIN: Final = 5.0
"""Seconds for the connections of a closed cluster to say goodbye; no request is under way on them."""


class Cluster(Protocol):
    """All that serves one bound name."""

    @property
    def service(self) -> Callable[[Any], Any]:
        """Calls one of its endpoints."""
        ...

    @property
    def status(self) -> Status:
        """The best of its endpoints'."""
        ...

    @property
    def nodes(self) -> tuple[Any, ...]:
        """Its endpoints."""
        ...

    def start(self) -> None:
        """Begin to resolve and to connect."""
        ...

    def close(self) -> None:
        """End its connections, and its watch."""
        ...


MakeCluster = Callable[[Watch, Env], Cluster]
OpenWatch = Callable[[Target, Env], Watch]


class Entry:
    """A cluster that is kept.

    Attributes:
        watch: What its target stands for.
        service: Calls one of its endpoints.
        active: Requests under way.
        used: When it was used last, counted in calls (`Clusters.tick`).
        closed: It is kept no more.
        opened: When it was made, on `Clock.now`.
    """

    __slots__ = (
        "active",
        "closed",
        "cluster",
        "ended",
        "env",
        "idle_since",
        "opened",
        "seen",
        "service",
        "used",
        "watch",
    )

    def __init__(self, watch: Watch, cluster: Cluster, env: Env) -> None:
        self.watch, self.cluster, self.env = watch, cluster, env
        self.service = cluster.service
        self.active = self.used = 0
        self.closed = False
        self.ended = anyio.Event()
        self.opened = self.idle_since = env.clock.now()
        self.seen = -1


class Clusters:
    """The clusters of one client.

    Args:
        env: The client's.
        make: Makes a cluster for a watch.
        open_watch: Makes a watch for a target; raises `ConfigurationError` if it makes no sense.
        changed: Called whenever a target stands for something else.

    Attributes:
        tick: Counts calls; whoever begins one adds 1. It tells which cluster was used last without reading a clock.
    """

    def __init__(self, env: Env, make: MakeCluster, open_watch: OpenWatch, changed: Callable[[], None]) -> None:
        self.tick = 0
        self._env, self._make, self._open_watch, self._changed = env, make, open_watch, changed
        self._entries: dict[str, Entry] = {}
        self._closed = False
        metrics = env.metrics.scope("name")
        self._opened, self._expired = metrics.counter("clusters_opened"), metrics.counter("clusters_expired")
        self._evicted, self._overflows = metrics.counter("clusters_evicted"), metrics.counter("clusters_overflow")
        metrics.gauge("clusters", lambda: len(self._entries))
        metrics.gauge("endpoints", lambda: sum(len(each.watch.endpoints) for each in self._entries.values()))

    def entry(self, target: Target) -> Entry:
        """The cluster of a target, made if there is none.

        Raises:
            ConfigurationError: The target makes no sense.
            ServiceClosed: The client is closed.
        """
        found = self._entries.get(target.text)
        return self._open(target) if found is None else found

    def _open(self, target: Target) -> Entry:
        if self._closed:
            raise ServiceClosed("the client is closed")
        # In angle brackets, since one target may begin as another does, and metrics leave by the beginning of their
        # names.
        metrics = self._env.metrics.scope("bound", f"<{target}>")
        supervisor = Supervisor(f"{self._env.label!r}, bound to {target}")
        params = self._env.params.copy()
        env = self._env.evolve(name=str(target), metrics=metrics, params=params, supervisor=supervisor)
        try:
            watch = params[Watch] = self._open_watch(target, env)
            entry = Entry(watch, self._make(watch, env), env)
        except BaseException:
            metrics.drop()
            raise
        if len(self._entries) >= MOST:
            self._make_room()
        self._entries[target.text] = entry
        entry.used = self.tick
        self._opened.value += 1
        entry.cluster.start()
        watch.addr.watch(lambda _: None if entry.closed else self._changed())
        self._env.supervisor.start(self._keep, entry, name=f"cluster of {target}")
        return entry

    async def _keep(self, entry: Entry) -> None:
        """Lives as long as the cluster, or the client; ends what runs in the background of it."""
        try:
            await entry.ended.wait()
            with anyio.move_on_after(DRAIN):
                await entry.env.supervisor.join()
        finally:
            with anyio.CancelScope(shield=True):
                await entry.env.supervisor.aclose()

    def _make_room(self) -> None:
        # What this very call has looked at is not to go for another branch of the same tree.
        idle = [each for each in self._entries.values() if not each.active and each.used < self.tick]
        if idle:
            self._evicted.value += 1
            self._end(min(idle, key=lambda each: each.used))
        else:
            self._overflows.value += 1

    def _end(self, entry: Entry) -> None:
        del self._entries[entry.watch.target.text]
        entry.closed = True
        entry.cluster.close()
        entry.env.metrics.drop()
        entry.ended.set()

    async def sweep(self) -> None:
        """Look for idle clusters, for ever."""
        while True:
            await anyio.sleep(SWEEP)
            self.expire()

    def expire(self) -> None:
        """Close what nobody has used for `IDLE` seconds, and what is too much and was not used since the last time."""
        now = self._env.clock.now()
        for entry in sorted(self._entries.values(), key=lambda each: each.used):
            if entry.active or entry.used != entry.seen:
                entry.seen, entry.idle_since = entry.used, now
            elif now - entry.idle_since >= IDLE or len(self._entries) > MOST:
                self._expired.value += 1
                self._end(entry)

    def close(self) -> None:
        """End all connections."""
        self._closed = True
        for entry in self._entries.values():
            entry.cluster.close()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Those that are kept now."""
        return tuple(self._entries.values())

    def __repr__(self) -> str:
        return ", ".join(repr(entry.watch) for entry in self._entries.values())
