"""The balancer: follows a name, keeps a node for each endpoint, and sends each request to one that is ready.

Updates are applied as a difference: an endpoint that stays keeps its node, with its connection and its load. One that
leaves gets no new requests and is closed when its last one is answered.

While no endpoint is ready, requests wait for the first one, for at most `PATIENCE` seconds after the last was lost;
from then on they fail at once, with the reason for each endpoint, until one is ready again. A request that is less
patient says so (`patience_of`); nobody waits for a name whose source says that there is none, and will not look again
soon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import anyio

from ..core.classify import ResponseClass, classify
from ..core.context import VAR
from ..core.deadlines import kept, passed, patience_of
from ..core.env import Env, elsewhere
from ..core.errors import (
    ConfigurationError,
    DeadlineExceeded,
    InvalidArgument,
    NoEndpoints,
    Rejected,
    ResolutionError,
    ServiceClosed,
)
from ..core.health import Health
from ..core.service import Lasting, Status
from ..names.addr import Addr, Address, Bound, Failed, Neg, Pending
from ..names.resolver import Watch
from .choose import metric_of
from .load import Meter
from .node import Node
from .routing import Routing

__all__ = ["PATIENCE", "Balancer", "MakeNode"]

PATIENCE: Final = 3.0
EXPIRY: Final = 150.0
"""Seconds after which a node outside of an aperture gives up its connection (Finagle: ten times its smoothWin)."""
SWEEP: Final = EXPIRY / 2
OPEN: Final = Status.OPEN

MakeNode = Callable[[Address, Health], Node]


class Balancer:
    """A service that sends each request to one of its nodes.

    Args:
        env: The client's.
        make_node: Builds the layers below for one endpoint.
        chooser: How to choose among the nodes that may be used.
        panic: See `Routing`.
        slow_start: See `Routing`.
        zone: See `Routing`.
    """

    def __init__(
        self, env: Env, make_node: MakeNode, chooser: Any, panic: float = 0.5, slow_start: float = 10.0, zone: str = ""
    ) -> None:
        metrics = env.metrics.scope("loadbalancer")
        self._env, self._clock, self._events = env, env.clock, env.events
        self._classify = None if env.classifier is classify else env.classifier
        self._lasting: Callable[[Any], Lasting | None] | None = env.params.get(Lasting)
        self._make_node = make_node
        self._metric = metric_of(chooser)
        self._expires: bool = getattr(chooser, "expires", False)
        self._routing = Routing(env.evolve(metrics=metrics), chooser, panic, slow_start, zone)
        self._slow_start = slow_start
        self._nodes: dict[Address, Node] = {}
        self._leaving: dict[Address, Node] = {}
        self._serving = 0
        self._addr: Addr = Pending()
        self._unready_since: float | None = None
        self._someone_ready: anyio.Event | None = None
        self._unwatch: Callable[[], None] | None = None
        self._closed = False
        self._adds, self._removes = metrics.counter("adds"), metrics.counter("removes")
        self._updates, self._rebuilds = metrics.counter("updates"), metrics.counter("rebuilds")
        self._panicked, self._expired = metrics.counter("panicked"), metrics.counter("expired")
        metrics.gauge("size", lambda: len(self._nodes))
        metrics.gauge("available", lambda: self._count(Status.OPEN))
        metrics.gauge("busy", lambda: self._count(Status.BUSY))
        metrics.gauge("closed", lambda: self._count(Status.CLOSED))
        metrics.gauge("load", lambda: sum(node.load for node in self._nodes.values()))

    def follow(self, watch: Watch) -> None:
        """Take endpoints from ``watch``, now and whenever they change."""
        self._unwatch = watch.addr.watch(self._update)
        if self._expires:
            self._env.supervisor.start(self._sweep_for_ever, name="expire idle endpoints")

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node, ready or not."""
        return tuple(self._nodes.values())

    @property
    def status(self) -> Status:
        """The best of the nodes' (Finagle: of none, closed)."""
        return max((node.status for node in self._nodes.values()), default=Status.CLOSED)

    def _count(self, status: Status) -> int:
        return sum(node.health.status is status for node in self._nodes.values())

    # --- the request path: nothing here looks at all nodes, unless some have changed ----------------------------------

    async def __call__(self, request: Any) -> Any:
        """Send the request to one node.

        Raises:
            NoEndpoints: None is ready, and none became ready in time.
        """
        context = VAR.get()
        record = context.record
        if not self._serving:
            await self._first_ready(request)
        now = self._clock.now()
        routing = self._routing
        if routing.stale and routing.due(len(self._nodes), now):
            self._refresh(now)
        node = routing.pick(now)
        if node.health.status is not OPEN:
            node = self._not_open(node, now)
        if record is not None:
            if record.tried and node.address in record.tried:
                node = routing.fresh_one(node, record.tried, now)
            record.endpoint = node.address
        if self._events.wanted:
            self._events.note("pick", "chosen", routing.why(node, now), endpoint=node.address)
        meter = node.meter
        meter.pending += 1
        meter.begun += now
        meter.used = now
        if routing.watches_load:
            routing.changed(node, 1, now)
        held: Lasting | None = None
        try:
            reply = await node.service(request)
        except Exception as error:
            self._failed(meter, request, error, now)
            if record is not None:
                record.failed(error)
            raise
        except BaseException:
            ended = self._clock.now()
            if passed(context.deadline, self._clock):
                meter.timed_out(ended - now, ended)
            else:
                meter.censored(ended - now, ended)
            raise
        else:
            if self._classify is None:
                ended = self._clock.now()
                meter.succeeded(ended - now, ended)
            else:
                self._answered(meter, request, reply, now)
            if self._lasting is not None:
                held = self._lasting(reply)
            return reply
        finally:
            if held is None:
                self._release(node, now)
            else:  # load until it is closed
                meter.lasting += 1
                meter.begun -= now
                held.on_end(functools.partial(self._ended, node, now))

    def _release(self, node: Node, began: float) -> None:
        meter = node.meter
        meter.pending -= 1
        meter.begun = meter.begun - began if meter.pending > meter.lasting else 0.0
        if self._routing.watches_load:
            self._routing.changed(node, -1, self._clock.now())
        if node.removed and not meter.pending:
            self._retire(node)

    def _ended(self, node: Node, began: float, error: Exception | None) -> None:
        """The end of a reply that lasted beyond the call."""
        meter = node.meter
        if error is not None:
            now = self._clock.now()
            meter.failed(now - began, now, lasted=True)
        meter.lasting -= 1
        meter.begun += began
        self._release(node, began)

    def _not_open(self, node: Node, now: float) -> Node:
        """A pick that was not open: drawn again, or taken in panic."""
        node = self._routing.open_one(node, self._nodes.values(), now)
        if node.health.status is not OPEN:
            self._panicked.value += 1
            self._events.note("panic", "not_open", node.health.reason, endpoint=node.address)
        return node

    def _failed(self, meter: Meter, request: Any, error: Exception, began: float) -> None:
        now = self._clock.now()
        took = now - began
        if self._classify is not None:
            verdict = self._classify(request, None, error)
            if verdict is ResponseClass.SUCCESS:
                meter.succeeded(took, now)
                return
            if verdict is ResponseClass.IGNORABLE:
                meter.censored(took, now)
                return
        if isinstance(error, InvalidArgument | ConfigurationError):
            meter.censored(took, now)  # the request's fault: another server would say the same
        elif isinstance(error, DeadlineExceeded):
            meter.timed_out(took, now)
        else:
            rest = getattr(error, "retry_after", None)
            meter.failed(took, now, rest=rest, nacked=isinstance(error, Rejected))

    def _answered(self, meter: Meter, request: Any, reply: Any, began: float) -> None:
        """What a reply says of the node, where not every reply is a success."""
        now = self._clock.now()
        verdict = ResponseClass.SUCCESS if self._classify is None else self._classify(request, reply, None)
        if verdict is ResponseClass.SUCCESS:
            meter.succeeded(now - began, now)
        elif verdict is ResponseClass.IGNORABLE:
            meter.censored(now - began, now)
        else:
            meter.failed(now - began, now, rest=getattr(reply, "retry_after", None))

    async def _first_ready(self, request: Any) -> None:
        if self._env.supervisor.elsewhere:
            raise elsewhere(self._env)  # nothing will ever become ready here
        now = self._clock.now()
        if self._unready_since is None:
            self._unready_since = now
        patient = self._unready_since + PATIENCE
        own = now + patience_of(request, PATIENCE)
        impatient = own < patient
        patient = min(own, patient)
        deadline = VAR.get().deadline
        left = (patient if deadline is None else min(patient, deadline)) - now
        with anyio.CancelScope(deadline=anyio.current_time() + max(0.0, left)):
            while not self._serving and not self._closed and left > 0 and not self._hopeless:
                if self._someone_ready is None:
                    self._someone_ready = anyio.Event()
                await self._someone_ready.wait()
        if self._closed:
            raise ServiceClosed("the client is closed")
        if self._serving:
            return
        if self._hopeless:
            raise self._none_ready(PATIENCE)
        if deadline is not None and deadline < patient:
            raise kept(self._none_ready(PATIENCE).message)
        error = self._none_ready(own - now)
        error.impatient = impatient
        raise error

    @property
    def _hopeless(self) -> bool:
        return isinstance(self._addr, Neg) and self._addr.settled

    def _none_ready(self, waited: float) -> NoEndpoints | ResolutionError:
        name, addr = self._env.name, self._addr
        if isinstance(addr, Pending):
            return ResolutionError(f"{name} has not been resolved within {waited:g} s")
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
        self._updates.value += 1
        wanted = {a: a for a in addr.addresses} if isinstance(addr, Bound) else {}
        beside = bool(self._nodes.keys() & wanted.keys())
        for address in [a for a in self._nodes if a not in wanted]:
            node = self._nodes.pop(address)
            node.removed = True
            self._serving -= node.serves
            self._removes.value += 1
            if node.load:
                self._leaving[address] = node
            else:
                self._retire(node)
        for address in wanted:
            node_here = self._nodes.get(address)
            if node_here is None:
                self._add(address, warm=beside)
                self._adds.value += 1
            else:
                node_here.address = address  # its weight or metadata may have changed
        self._routing.members_changed()
        self._changed_some()

    def _add(self, address: Address, *, warm: bool) -> None:
        """A node for an endpoint that is new, or the one that has left but not finished its last requests."""
        node = self._leaving.pop(address, None)
        if node is None:
            node = self._make_node(address, Health(functools.partial(self._changed, address)))
            node.meter = self._metric.meter()
            if warm and self._slow_start:
                node.warm_from = self._clock.now()
        node.removed = False
        node.address = address
        node.was_open, node.serves = node.health.status is OPEN, node.health.serves
        self._serving += node.serves
        self._nodes[address] = node

    def _changed(self, address: Address) -> None:
        """A layer has marked the health of the node there."""
        node = self._nodes.get(address)
        if node is None or self._closed:
            return
        is_open, serves = node.health.status is OPEN, node.health.serves
        if is_open and not node.was_open:
            if not node.serves:
                node.meter.forget()
            if self._slow_start and self._serving - node.serves:
                node.warm_from = self._clock.now()
        self._serving += serves - node.serves
        node.was_open, node.serves = is_open, serves
        self._changed_some()

    def _changed_some(self) -> None:
        self._routing.stale = True
        if self._serving and not self._closed:
            self._unready_since = None
            self._wake()
        elif self._unready_since is None:
            self._unready_since = self._clock.now()
        if self._hopeless:
            self._wake()

    def _wake(self) -> None:
        if self._someone_ready is not None:
            self._someone_ready.set()
            self._someone_ready = None

    def _refresh(self, now: float) -> None:
        routing, was = self._routing, self._routing.panicking
        routing.refresh(self._nodes.values(), now)
        self._rebuilds.value += 1
        if routing.panicking is not was:
            told = f"{self._count(Status.OPEN)} of {len(self._nodes)} endpoints are open"
            self._events.note("panic", "began" if routing.panicking else "ended", told, call=False)

    async def _sweep_for_ever(self) -> None:
        while True:
            await anyio.sleep(SWEEP)
            self.expire()

    def expire(self) -> None:
        """Take the connections of nodes that are outside of the aperture, and have been idle for long."""
        now = self._clock.now()
        inside = set(map(id, self._routing.nodes))
        for address, node in list(self._nodes.items()):
            idle = not node.load and EXPIRY <= now - node.meter.used < float("inf")
            if idle and id(node) not in inside:
                self._serving -= node.serves
                node.removed = True
                node.close()
                self._add(address, warm=False)
                self._expired.value += 1
        self._routing.members_changed()
        self._changed_some()

    def _retire(self, node: Node) -> None:
        if self._leaving.get(node.address) is node:
            del self._leaving[node.address]
        node.close()

    def close(self) -> None:
        """Close every node; those who wait for one are told."""
        self._closed = True
        if self._unwatch is not None:
            self._unwatch()
        for node in (*self._nodes.values(), *self._leaving.values()):
            node.close()
        self._serving = 0
        self._wake()

    def __repr__(self) -> str:
        return f"<Balancer of {self._env.name}: {self._count(Status.OPEN)} of {len(self._nodes)} ready>"
