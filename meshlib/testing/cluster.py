"""A simulated cluster: real clients and real servers in a network in memory, a load, and a timeline of faults.

`Scenario.run` is all that most need. In a test of your own, `Cluster` can be entered and driven by hand, under
`run_virtual`: its `hosts` can be slowed, crashed and removed at any time, and its `clients` called.
"""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import anyio

from ..client import Client
from ..core.context import VAR, Context
from ..core.env import Env
from ..core.errors import ConfigurationError, MeshError
from ..core.priority import Priority
from ..core.service import Filter, Service
from ..core.stack import Stack
from ..core.supervisor import Supervisor
from ..mux.request import Request
from .arrivals import arrivals
from .faults import Fault, Which
from .host import Host, call_all, layers_for
from .network import Name, Network
from .record import UNSENT, Events, Record
from .report import Report
from .scenario import Change, Load, Scenario

__all__ = ["Cluster", "Host", "play"]

UNFINISHED: Final = "Unfinished"
"""The outcome of a request that had not ended when the simulation was over."""


class _Sent(Filter[Any, Any, Any, Any]):
    """Notes each attempt that leaves a client."""

    place: ClassVar[str] = "simulated"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, cluster: Cluster, host: int = UNSENT) -> None:
        self._cluster = cluster
        self._host = host
        self._sent: Events = cluster.record.sent

    def build(self, env: Env, service: Any) -> Any:
        return _Sent(self._cluster, self._cluster.numbers[str(env.address)]).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        number = self._sent.add(self._cluster.now(), self._host)
        try:
            return await service(request)
        except MeshError as error:
            if error.processed is False and not getattr(error, "by_peer", False):
                self._sent.host[number] = UNSENT  # no connection, or no more of it: no server has seen it
            raise

    def __repr__(self) -> str:
        return "simulated()"


class Cluster:
    """A cluster, ready to run. Enter it on trio, in virtual time.

    Attributes:
        scenario: What it simulates.
        network: Where its servers are.
        hosts: Its servers, by name (``"servers/0"``), in order.
        clients: Its clients, by the name of their kind.
        names: The names that its servers are found under.
        numbers: The number of each server, by address.
        record: What has happened.
        supervisor: Its background tasks.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.network = Network(scenario.network, seed=scenario.seed, wire=scenario.wire)
        self.network.on_connect = self._connected
        self.record = Record()
        self.supervisor = Supervisor("simulation")
        self.hosts: dict[str, Host] = {}
        self.names: dict[str, Name] = {}
        self.numbers: dict[str, int] = {}
        self.clients: dict[str, list[Client[Any, Any]]] = {}
        self._made: list[Client[Any, Any]] = []
        self._started = 0.0
        self._requests = 0

    def now(self) -> float:
        """Seconds from the beginning."""
        return anyio.current_time() - self._started

    # --- building -----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        tiers = {name: n for n, name in enumerate(dict.fromkeys(spec.name for spec in self.scenario.server_kinds))}
        for spec in self.scenario.server_kinds:
            tier = tiers[spec.name]
            for _ in range(spec.count):
                index = sum(host.spec.name == spec.name for host in self.hosts.values())
                address = f"10.{tier}.{index // 250}.{index % 250 + 1}:80"
                host = Host(self, spec, index, len(self.hosts), address)
                self.hosts[host.name] = host
                self.numbers[address] = host.number
        for name in tiers:
            members = [host.where for host in self.hosts.values() if host.spec.name == name]
            self.names[name] = self.network.name(name, members)
        for host in self.hosts.values():
            host.start()
        rng = random.Random(f"{self.scenario.seed}/clients")
        for kind in self.scenario.client_kinds:
            several = self.clients.setdefault(kind.name, [])
            for _ in range(kind.count):
                index = len(several)
                layers = layers_for(kind.layers, index)
                label = f"{kind.name}/{index}"
                several.append(self.make_client(label, kind.to, layers, kind.stack, rng.getrandbits(64)))

    def make_client(
        self, label: str, to: str, layers: tuple[Any, ...], change: Change | None, seed: int
    ) -> Client[Any, Any]:
        """A client of the servers named ``to``, whose attempts are counted."""

        def stack(given: Stack) -> Stack:
            changed = given if change is None else change(given)
            at = changed.places.index("pool")
            return Stack((*changed.places[:at], _Sent.place, *changed.places[at:]), (*changed.layers, _Sent(self)))

        client = self.network.client(self.names[to].target, *layers, label=label, stack=stack, seed=seed)
        self._made.append(client)
        return client

    def _connected(self, client: str, address: str, accepted: bool) -> None:
        events = self.record.connects if accepted else self.record.refused
        events.add(self.now(), self.numbers[address])

    def which(self, servers: Which) -> list[Host]:
        """The servers that ``servers`` means: a number or name, several of them, or ``None`` for all.

        Raises:
            ConfigurationError: There is no such server.
        """
        if servers is None:
            return list(self.hosts.values())
        first = self.scenario.server_kinds[0].name
        found = []
        for each in (servers,) if isinstance(servers, int | str) else servers:
            name = f"{first}/{each}" if isinstance(each, int) else each
            if name not in self.hosts:
                raise ConfigurationError(f"servers={each!r}: there is no {name}; there are {', '.join(self.hosts)}")
            found.append(self.hosts[name])
        return found

    # --- running ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._started = anyio.current_time()
        self._build()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            for client in self._made:
                await client.aclose()
            for host in self.hosts.values():
                host.stop()
            await self.supervisor.join()
            await self.supervisor.aclose()

    async def play(self) -> None:
        """Put the load on it while the faults take their course, until every request has ended."""
        end = self.scenario.duration + self.scenario.settle
        timeline = _timeline(self, end)
        self._happen(timeline)  # what is so from the beginning is so before the first request
        async with anyio.create_task_group() as beside:
            beside.start_soon(self._run_faults, timeline)
            if self.scenario.during is not None:
                beside.start_soon(self.scenario.during, self)
            with anyio.CancelScope(deadline=self._started + end):
                async with anyio.create_task_group() as requests:
                    for number, load in enumerate(self.scenario.loads):
                        requests.start_soon(self._generate, requests, number, load)
            beside.cancel_scope.cancel()

    async def _run_faults(self, timeline: list[Any]) -> None:
        while timeline:
            await anyio.sleep_until(self._started + timeline[0][0])
            self._happen(timeline)

    def _happen(self, timeline: list[Any]) -> None:
        while timeline and timeline[0][0] <= self.now():
            timeline.pop(0)[2]()

    async def _generate(self, group: Any, number: int, load: Load) -> None:
        clients = self.clients[load.clients]
        rng = random.Random(f"{self.scenario.seed}/load {number}") if load.spacing == "poisson" else None
        until = self.scenario.duration if load.until is None else min(load.until, self.scenario.duration)
        request = Request(idempotent=load.idempotent)
        priority = load.priority if isinstance(load.priority, Priority) else Priority[load.priority.upper()]
        context = Context(priority=priority)
        if until <= load.start:
            return
        for turn, at in enumerate(arrivals(load.rate, load.to, load.start, until, rng)):
            await anyio.sleep_until(self._started + at)
            client = clients[turn % len(clients)]
            if load.timeout is not None:
                context = Context(self._started + at + load.timeout, priority=priority)
            group.start_soon(self._request, client, request, context, load.fan_out, number)

    async def _request(
        self, client: Client[Any, Any], request: Request, context: Context, fan_out: int, load: int
    ) -> None:
        at = self.now()
        error = UNFINISHED
        VAR.set(context)
        try:
            if fan_out == 1:
                await client(request)
            else:
                await call_all(client, request, fan_out)
            error = ""
        except MeshError as failure:
            error = type(failure).__name__
        finally:
            self.record.request(at, self.now() - at, error, load)

    def report(self) -> Report:
        """What has happened so far."""
        return Report(self.scenario, [host.name for host in self.hosts.values()], self.record)


def _timeline(cluster: Cluster, end: float) -> list[Any]:
    """Everything that begins or ends, in order; what ends at a moment does so before others begin."""
    events: list[Any] = []
    undo: dict[tuple[int, float, str], Any] = {}

    def add(fault: Fault, number: int, host: Host, begins: float, ends: float) -> None:
        key = (number, begins, host.name)

        def begin() -> None:
            undo[key] = fault.begin(host, ends)

        events.append((begins, len(events) + (1 << 30), begin))
        if ends < end:
            events.append((ends, len(events), lambda: undo.pop(key)()))

    for number, fault in enumerate(cluster.scenario.faults):
        for host in cluster.which(fault.servers):
            for begins, ends in fault.spells(end):
                add(fault, number, host, begins, ends)
    return sorted(events, key=lambda event: event[:2])


async def play(scenario: Scenario) -> Report:
    """Play a scenario. Needs trio, and virtual time unless one has a lot of the other kind."""
    async with Cluster(scenario) as cluster:
        await cluster.play()
    return cluster.report()
