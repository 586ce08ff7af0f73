"""The balancer: follows a name, keeps a node for each endpoint, and sends each request to one that is ready.

Updates are applied as a difference: an endpoint that stays keeps its node, with its connection and its load. One that
leaves gets no new requests and is closed when its last one is answered.

While no endpoint is ready, requests wait for the first one, for at most `PATIENCE` seconds after the last was lost;
from then on they fail at once, with the reason for each endpoint, until one is ready again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

import anyio

from ..core.context import VAR, CallRecord
from ..core.deadlines import kept
from ..core.env import Env, elsewhere
from ..core.errors import NoEndpoints, ResolutionError, ServiceClosed
from ..core.health import Health
from ..core.service import Status
from ..names.addr import Addr, Address, Bound, Failed, Neg, Pending
from ..names.resolver import Watch
from .choose import P2C, Chooser
from .node import Node

__all__ = ["Balance", "Balancer"]

PATIENCE: Final = 3.0

MakeNode = Callable[[Address, Health], Node]


class Balance:
    """The layer: a balancer over whatever the name stands for.

    Args:
        chooser: How to choose among the ready nodes.
    """

    place: ClassVar[str] = "balance"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, chooser: Chooser | None = None) -> None:
        self.chooser = chooser or P2C()

    def build(self, env: Env, below: MakeNode) -> Any:
        """A balancer for the watch that was left by the layer above."""
        return env.shared(Balancer, lambda: Balancer(env, self.chooser, below))

    def __repr__(self) -> str:
        return f"balance({self.chooser!r}, patience={PATIENCE:g} s)"


class Balancer:
    """A service that sends each request to one of its nodes."""

    def __init__(self, env: Env, chooser: Chooser, make_node: MakeNode) -> None:
        self._env = env
        self._pick = chooser.pick
        self._make_node = make_node
        self._nodes: dict[Address, Node] = {}
        self._ready: list[Node] = []
        self._leaving: set[Node] = set()
        self._addr: Addr = Pending()
        self._unready_since: float | None = None
        self._someone_ready: anyio.Event | None = None
        self._unwatch: Callable[[], None] | None = None
        self._closed = False
        metrics = env.metrics.scope("loadbalancer")
        self._adds, self._removes = metrics.counter("adds"), metrics.counter("removes")
        metrics.gauge("size", lambda: len(self._nodes))
        metrics.gauge("available", lambda: len(self._ready))
        metrics.gauge("load", lambda: sum(node.load for node in self._nodes.values()))

    def follow(self, watch: Watch) -> None:
        """Take endpoints from ``watch``, now and whenever they change."""
        self._unwatch = watch.addr.watch(self._update)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node, ready or not."""
        return tuple(self._nodes.values())

    @property
    def status(self) -> Status:
        """The best of the nodes' (Finagle: of none, closed)."""
        return max((node.status for node in self._nodes.values()), default=Status.CLOSED)

    # --- the request path: nothing here looks at all nodes ------------------------------------------------------------

    async def __call__(self, request: Any) -> Any:
        """Send the request to one node.

        Raises:
            NoEndpoints: None is ready, and none became ready in time.
        """
        record = VAR.get().record
        ready = self._ready
        if not ready or self._closed:
            await self._first_ready()
            ready = self._ready
        node = self._pick(ready, self._env.rng)
        if record is not None:
            if record.tried and node.address in record.tried:
                node = self._another(record, node)
            record.endpoint = node.address
        node.load += 1
        try:
            return await node.service(request)
        except Exception as error:
            if record is not None:
                record.failed(error)
            raise
        finally:
            node.load -= 1
            if node.removed and not node.load:
                self._retire(node)

    def _another(self, record: CallRecord, node: Node) -> Node:
        fresh = [other for other in self._ready if other.address not in record.tried]
        return self._pick(fresh, self._env.rng) if fresh else node

    async def _first_ready(self) -> None:
        if self._env.supervisor.elsewhere:
            raise elsewhere(self._env)  # nothing will ever become ready here
        now = self._env.clock.now()
        if self._unready_since is None:
            self._unready_since = now
        patient = self._unready_since + PATIENCE
        deadline = VAR.get().deadline
        left = (patient if deadline is None else min(patient, deadline)) - now
        with anyio.CancelScope(deadline=anyio.current_time() + max(0.0, left)):
            while not self._ready and not self._closed and left > 0:
                if self._someone_ready is None:
                    self._someone_ready = anyio.Event()
                await self._someone_ready.wait()
        if self._closed:
            raise ServiceClosed("the client is closed")
        if not self._ready and deadline is not None and deadline < patient:
            raise kept(self._none_ready().message)
        if not self._ready:
            raise self._none_ready()

    def _none_ready(self) -> NoEndpoints | ResolutionError:
        name, addr = self._env.name, self._addr
        if isinstance(addr, Pending):
            return ResolutionError(f"{name} has not been resolved within {PATIENCE:g} s")
        if isinstance(addr, Failed):
            return ResolutionError(f"{name} cannot be resolved: {addr.cause}")
        if isinstance(addr, Neg):
            return NoEndpoints(f"{name}: no such name")
        if not self._nodes:
            return NoEndpoints(f"{name} resolves to no endpoints")
        shown = [f"{node.address} ({node.health.reason or node.status.name.lower()})" for node in self.nodes[:20]]
        more = f", and {len(self._nodes) - 20} more" if len(self._nodes) > 20 else ""
        return NoEndpoints(f"no endpoint of {name} is ready: {', '.join(shown)}{more}")

    # --- changes ------------------------------------------------------------------------------------------------------

    def _update(self, addr: Addr) -> None:
        self._addr = addr
        wanted = {a: a for a in addr.addresses} if isinstance(addr, Bound) else {}
        for address in [a for a in self._nodes if a not in wanted]:
            node = self._nodes.pop(address)
            node.removed = True
            self._removes.value += 1
            if node.load:
                self._leaving.add(node)
            else:
                self._retire(node)
        for address in wanted:
            node_here = self._nodes.get(address)
            if node_here is None:
                self._nodes[address] = self._back(address) or self._make_node(address, Health(self._refresh))
                self._adds.value += 1
            else:
                node_here.address = address  # its weight or metadata may have changed
        self._refresh()

    def _back(self, address: Address) -> Node | None:
        """The node there that has left but not finished its last requests, if there is one: it stays after all."""
        for node in self._leaving:
            if node.address == address:
                self._leaving.discard(node)
                node.removed = False
                node.address = address
                return node
        return None

    def _refresh(self) -> None:
        ready = [node for node in self._nodes.values() if node.health.status is Status.OPEN]
        self._ready = ready or [node for node in self._nodes.values() if node.health.serves]
        if self._ready:
            self._unready_since = None
            if self._someone_ready is not None:
                self._someone_ready.set()
                self._someone_ready = None
        elif self._unready_since is None:
            self._unready_since = self._env.clock.now()

    def _retire(self, node: Node) -> None:
        self._leaving.discard(node)
        node.close()

    def close(self) -> None:
        """Close every node; those who wait for one are told."""
        self._closed = True
        if self._unwatch is not None:
            self._unwatch()
        for node in (*self._nodes.values(), *self._leaving):
            node.close()
        self._ready = []
        if self._someone_ready is not None:
            self._someone_ready.set()
            self._someone_ready = None

    def __repr__(self) -> str:
        return f"<Balancer of {self._env.name}: {len(self._ready)} of {len(self._nodes)} ready>"
