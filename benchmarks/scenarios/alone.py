"""Plays a scenario with balancers alone: no layers above them, no connections below, and an event loop of forty lines.

What is compared is the real `Balancer`, with real coroutines waiting in it; only what would be the same for all of them
is left out, and so is trio, which makes it ten times as fast. It knows one kind of servers, that are slow or fail, and
one load. `tests/scenarios/test_scenarios.py` holds it against the simulator.
"""

import random
from collections.abc import Callable, Coroutine, Generator
from heapq import heappop, heappush
from types import SimpleNamespace
from typing import Any

from meshlib.balancing.balance import Balance
from meshlib.balancing.node import Node
from meshlib.core.clock import Clock
from meshlib.core.env import Env
from meshlib.core.errors import MeshError
from meshlib.core.health import Health
from meshlib.core.supervisor import Supervisor
from meshlib.core.var import Var
from meshlib.mux.request import Request, Response
from meshlib.names.addr import Addr, Address, Bound
from meshlib.testing import Report, Scenario
from meshlib.testing.arrivals import arrivals
from meshlib.testing.latency import as_latency
from meshlib.testing.record import Record

_REPLY = Response()


class _Loop:
    """Virtual time, and what is to be done when."""

    def __init__(self) -> None:
        self.time = 0.0
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._count = 0

    def now(self) -> float:
        return self.time

    def at(self, time: float, do: Callable[[], object]) -> None:
        """What is due at the same time is done in the order in which it was asked for."""
        self._count += 1
        heappush(self._due, (time, self._count, do))

    def run(self) -> None:
        while self._due:
            self.time, _, do = heappop(self._due)
            do()

    def start(self, job: Coroutine[float, None, None]) -> None:
        """Run ``job`` until it sleeps, and again whenever it has slept."""

        def step() -> None:
            try:
                seconds = job.send(None)
            except StopIteration:
                return
            self.at(self.time + seconds, step)

        step()


class _Sleep:
    """``await _Sleep(seconds)``."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __await__(self) -> Generator[float, None, None]:
        yield self.seconds


class _Idle(Supervisor):
    """Starts nothing: what balancers do in the background is about connections that have long been idle."""

    def start(self, *args: Any, **kwargs: Any) -> Any:
        return None


class _Host:
    """A server: as much of one as faults of the kinds `slow` and `errors` touch."""

    def __init__(self, name: str, number: int, scenario: Scenario, loop: _Loop, record: Record) -> None:
        self.name, self.number, self.now = name, number, loop.now
        self.address = Address.parse(f"10.0.0.{number + 1}:80")
        self.slowed: list[Callable[[float], float]] = []
        self.failing: list[tuple[float, float, Callable[[], Exception]]] = []
        self._rng = random.Random(f"{scenario.seed}/{name}")
        self._sample = as_latency(scenario.server_kinds[0].latency).sampler(self._rng)
        self._sent = record.sent

    async def __call__(self, request: Request) -> Response:
        self._sent.add(self.now(), self.number)
        for rate, after, make in self.failing:
            if rate >= 1 or self._rng.random() < rate:
                await _Sleep(after)
                raise make()
        seconds = self._sample()
        for factor in self.slowed:
            seconds *= factor(self.now())
        await _Sleep(seconds)
        return _REPLY


def play(scenario: Scenario) -> Report:
    """Play it; the clients' only layer must be a ``balance(…)``, and only `slow` and `errors` may befall servers.

    Raises:
        ValueError: The scenario is about more than that.
    """
    [kind], [load], [spec] = scenario.client_kinds, scenario.loads, scenario.server_kinds
    if spec.workers is not None or spec.calls is not None or load.fan_out != 1 or load.timeout is not None:
        raise ValueError("balancers alone know no queues, no tiers, no fan-out and no timeouts")
    loop, record = _Loop(), Record()
    hosts = [_Host(f"{spec.name}/{n}", n, scenario, loop, record) for n in range(spec.count)]
    at_address = {host.address: host for host in hosts}
    addresses: Var[Addr] = Var(Bound.of(host.address for host in hosts))
    rng = random.Random(f"{scenario.seed}/clients")

    def client(index: int) -> Any:
        [layer] = kind.layers(index) if callable(kind.layers) else kind.layers
        if not isinstance(layer, Balance):
            raise ValueError(f"{layer!r} is more than balancing")
        env = Env(clock=Clock(loop.now), rng=random.Random(rng.getrandbits(64)), supervisor=_Idle())

        def node(address: Address, health: Health) -> Node:
            return Node(address, at_address[address], env.evolve(address=address, health=health, closers=[]))

        balancer = layer.build(env, node)
        balancer.follow(SimpleNamespace(addr=addresses))
        return balancer

    clients = [client(index) for index in range(kind.count)]
    end = scenario.duration + scenario.settle
    for fault in scenario.faults:
        wanted = range(len(hosts)) if fault.servers is None else fault.servers
        for number in (wanted,) if isinstance(wanted, int | str) else wanted:
            host = next(host for host in hosts if number in (host.number, host.name))
            for begins, ends in fault.spells(end):
                _befall(loop, fault, host, begins, ends, end)

    async def request(turn: int, at: float) -> None:
        error = ""
        try:
            await clients[turn % len(clients)](Request(idempotent=load.idempotent))
        except MeshError as failure:
            error = type(failure).__name__
        record.request(at, loop.time - at, error, 0)

    until = scenario.duration if load.until is None else min(load.until, scenario.duration)
    chance = random.Random(f"{scenario.seed}/load 0") if load.spacing == "poisson" else None
    times = enumerate(arrivals(load.rate, load.to, load.start, until, chance))

    def arrive(turn: int, at: float) -> None:
        loop.start(request(turn, at))
        following = next(times, None)
        if following is not None:
            loop.at(following[1], lambda: arrive(*following))

    first = next(times, None)
    if first is not None:
        loop.at(first[1], lambda: arrive(*first))
    loop.run()
    return Report(scenario, [host.name for host in hosts], record)


def _befall(loop: _Loop, fault: Any, host: _Host, begins: float, ends: float, end: float) -> None:
    undo: list[Callable[[], object]] = []
    loop.at(begins, lambda: undo.append(fault.begin(host, ends)))
    if ends < end:
        loop.at(ends, lambda: undo.pop()())
