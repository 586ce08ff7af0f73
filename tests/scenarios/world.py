"""A simulated cluster in which anything may happen, and what must hold whatever does.

A *walk* is a list of `Step`s. `play` takes it in virtual time over the real stacks and real Mux sessions, heals what
was broken, waits for what is under way, and checks the books. The same walk and seed give the same history.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import anyio
import trio

import meshlib
from meshlib.core.context import VAR
from meshlib.core.env import Env
from meshlib.core.priority import Priority
from meshlib.core.service import Filter
from meshlib.filters.budget import RetryBudget
from meshlib.testing import Clients, Cluster, Host, Load, Scenario, Servers, lognormal, run_virtual

__all__ = ["SERVERS", "WEIGHTS", "History", "Step", "a_walk", "play"]

SERVERS = 4
CLIENTS = 2
TIMEOUT = 2.0
GRACE = 1.0
"""Seconds within which a client has heard of a change of the name; here it takes none, but a scheduler may choose."""
LATE = 0.05
"""Deadlines are kept by a wheel of 10 ms ticks, coarser further off."""


@dataclass(frozen=True)
class Step:
    """One thing that happens: ``kind`` to the server ``which``, with an ``amount`` in [0, 1)."""

    kind: str
    which: int = 0
    amount: float = 0.0

    def __repr__(self) -> str:
        return f"Step({self.kind!r}, {self.which}, {self.amount:g})"


WEIGHTS = {
    "send": 12,
    "send_once": 4,
    "burst": 6,
    "cancel": 2,
    "advance": 12,
    "wait": 4,
    "add": 3,
    "remove": 2,
    "slow": 2,
    "fail": 2,
    "heal": 3,
    "hang": 1,
    "unhang": 2,
    "crash": 2,
    "restart": 2,
    "start": 4,
    "darken": 1,
    "lighten": 2,
}
"""How often each kind of step is taken; repairs more often than damage, or all would be broken for ever."""


def a_walk(seed: int, steps: int) -> list[Step]:
    """Steps drawn by chance."""
    rng = random.Random(seed)
    kinds = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=steps)
    return [Step(kind, rng.randrange(SERVERS), rng.random()) for kind in kinds]


@dataclass
class History:
    """What came of a walk."""

    outcomes: list[str] = field(default_factory=list)
    attempts: int = 0
    unsent: int = 0
    ended: float = 0.0
    metrics: list[dict[str, float]] = field(default_factory=list)


class _Watch(Filter[Any, Any, Any, Any]):
    """Sees each attempt after every layer of ours has let it through, directly above the connection."""

    place: ClassVar[str] = "fault"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, world: _World, address: str = "") -> None:
        self._world = world
        self._address = address

    def build(self, env: Env, service: Any) -> Any:
        return type(self)(self._world, str(env.address)).bind(service)

    async def apply(self, request: Any, service: Any) -> Any:
        now = anyio.current_time()
        deadline = VAR.get().deadline
        assert deadline is None or now <= deadline + LATE, f"an attempt began {now - deadline:.3f} s after its deadline"
        gone = self._world.gone.get(self._address)
        assert gone is None or now <= gone + GRACE, f"{self._address} was picked {now - gone:.3f} s after it had left"
        self._world.history.attempts += 1
        self._world.under_way += 1
        try:
            return await service(request)
        except meshlib.MeshError as error:
            if error.processed is False and not getattr(error, "by_peer", False):
                self._world.history.unsent += 1
            raise
        finally:
            self._world.under_way -= 1

    def __repr__(self) -> str:
        return "watch()"


class _World:
    """The cluster while a walk is taken."""

    def __init__(self, seed: int, layers: tuple[Any, ...]) -> None:
        self.seed = seed
        self.layers = layers
        self.gone: dict[str, float] = {}
        self.under_way = 0
        self.history = History()
        self.calls: list[tuple[int, anyio.CancelScope]] = []
        self.down = [0] * SERVERS
        self.absent = [False] * SERVERS
        self.hanging = [False] * SERVERS
        self.cluster: Cluster = Cluster(
            Scenario(
                servers=Servers(SERVERS, lognormal(0.05, 0.05), layers=(meshlib.concurrency_limit(30),)),
                clients=Clients(CLIENTS, (meshlib.timeout(TIMEOUT), *layers, _Watch(self))),
                load=Load(1),
                wire="mux",
                network=0.001,
                seed=seed,
            )
        )

    # --- what may happen ----------------------------------------------------------------------------------------------

    async def take(self, group: Any, step: Step) -> None:
        host = list(self.cluster.hosts.values())[step.which]
        if step.kind in ("send", "send_once"):
            self.send(group, step, idempotent=step.kind == "send")
        elif step.kind == "burst":
            for n in range(20):
                self.send(group, Step("send", (step.which + n) % SERVERS, step.amount), idempotent=True)
        elif step.kind == "cancel" and self.calls:
            self.calls[int(step.amount * len(self.calls))][1].cancel()
        elif step.kind == "advance":
            await anyio.sleep(step.amount)
        elif step.kind == "wait":
            await anyio.sleep(40 * step.amount)
        else:
            self.befall(host, step)

    def send(self, group: Any, step: Step, *, idempotent: bool) -> None:
        number = len(self.history.outcomes)
        self.history.outcomes.append("")
        client = self.cluster.clients["clients"][step.which % CLIENTS]
        priority = list(Priority)[int(step.amount * 3)]
        timeout = (0.05, 0.5, None)[int(step.amount * 30) % 3]
        group.start_soon(self.call, client, number, idempotent, priority, timeout)

    async def call(self, client: Any, number: int, idempotent: bool, priority: Any, timeout: float | None) -> None:
        VAR.set(meshlib.Context(priority=priority))
        began = anyio.current_time()
        with anyio.CancelScope() as scope:
            self.calls.append((number, scope))
            try:
                await self.request(client, idempotent, timeout)
                self.end(number, "answered")
            except meshlib.MeshError as error:
                self.end(number, type(error).__name__)
            finally:
                self.calls.remove((number, scope))
        if scope.cancelled_caught:
            self.end(number, "cancelled")
        took = anyio.current_time() - began
        assert took <= min(TIMEOUT, timeout or TIMEOUT) + LATE, f"a call took {took:.3f} s"

    async def request(self, client: Any, idempotent: bool, timeout: float | None) -> None:
        request = meshlib.mux.Request(b"x", idempotent=idempotent)
        if timeout is None:
            await client(request)
        else:
            with meshlib.deadline(timeout):
                await client(request)

    def end(self, number: int, outcome: str) -> None:
        assert not self.history.outcomes[number], (
            f"call {number} ended twice: {self.history.outcomes[number]}, {outcome}"
        )
        self.history.outcomes[number] = outcome

    def befall(self, host: Host, step: Step) -> None:
        n = step.which
        if step.kind == "add" and self.absent[n]:
            self.absent[n] = False
            self.gone.pop(host.address, None)
            host.add()
        elif step.kind == "remove" and not self.absent[n]:
            self.absent[n] = True
            self.gone[host.address] = anyio.current_time()
            host.remove()
        elif step.kind == "slow":
            host.slowed.append(lambda now: 1 + 50 * step.amount)
        elif step.kind == "fail":
            host.failing.append((step.amount, 0.001, lambda: meshlib.RemoteError("told to fail")))
        elif step.kind == "heal":
            host.slowed.clear()
            host.failing.clear()
        elif step.kind == "hang" and not self.hanging[n]:
            self.hanging[n] = True
            host.hang()
        elif step.kind == "unhang" and self.hanging[n]:
            self.hanging[n] = False
            host.unhang()
        elif step.kind == "crash" and not self.down[n]:
            self.down[n] = 1
            host.crash()
        elif step.kind == "restart" and not self.down[n]:
            host.stop(grace=5 * step.amount)
            host.start()
        elif step.kind == "start" and self.down[n]:
            self.down[n] = 0
            host.start()
        elif step.kind == "darken":
            self.cluster.network.darken(host.address)
        elif step.kind == "lighten":
            self.cluster.network.lighten(host.address)

    def heal(self) -> None:
        for n, host in enumerate(self.cluster.hosts.values()):
            for kind in ("heal", "unhang", "start", "lighten", "add"):
                self.befall(host, Step(kind, n))

    # --- what must hold -----------------------------------------------------------------------------------------------

    async def check(self) -> None:
        assert all(self.history.outcomes), "a call has no outcome"
        assert not self.under_way, "an attempt has not been given back"
        # Every breaker has let a probe through by then: 300 s is the longest that one stays open.
        for _ in range(8):
            await anyio.sleep(60)
            for client in self.cluster.clients["clients"]:
                for _ in range(2 * SERVERS):
                    await self.request(client, True, None)
        elapsed = anyio.current_time() - self.cluster._started
        calls = len(self.history.outcomes) + 8 * CLIENTS * 2 * SERVERS
        sent = self.history.attempts - self.history.unsent
        share, reserve = 0.2 + 0.02, CLIENTS * (100 + 10 * elapsed)
        assert sent <= (1 + share) * calls + reserve, f"{sent} attempts for {calls} calls"
        for client in self.cluster.clients["clients"]:
            self.check_client(client)
        for host in self.cluster.hosts.values():
            assert host.server is not None
            numbers = host.server.metrics()
            assert numbers["limit/concurrency"] == numbers["pending"] == 0, f"{host.name} is not at rest: {numbers}"

    def check_client(self, client: Any) -> None:
        numbers = client.metrics()
        self.history.metrics.append({k: v for k, v in numbers.items() if not k.endswith("_bytes")})
        assert numbers["pending"] == 0
        assert numbers["loadbalancer/load"] == 0
        assert numbers["loadbalancer/size"] == SERVERS
        assert numbers["loadbalancer/available"] == SERVERS, [repr(node) for node in client.endpoints]
        turns = client.env.params[RetryBudget].turns
        assert (turns.taken, turns.waiting, turns.calls) == (0, 0, 0), f"a turn was not given back: {turns!r}"
        for node in client.endpoints:
            assert node.load == 0, f"{node!r} has load, and nothing is under way"
        assert numbers["requests"] == numbers["success"] + numbers["failures"]


async def _play(walk: list[Step], seed: int, layers: tuple[Any, ...]) -> History:
    tasks = trio.lowlevel.current_statistics().tasks_living
    world = _World(seed, layers)
    async with world.cluster:
        async with anyio.create_task_group() as group:
            for step in walk:
                await world.take(group, step)
            world.heal()
        await world.check()
        world.history.ended = world.cluster.now()
    await anyio.sleep(1)
    left = trio.lowlevel.current_statistics().tasks_living - tasks
    assert left == 0, f"{left} tasks are left"
    return world.history


def play(walk: list[Step], seed: int, layers: tuple[Any, ...] = ()) -> History:
    """Take a walk; give its history.

    Raises:
        AssertionError: Something that must hold does not. Its notes say how to take the same walk again.
    """
    try:
        return run_virtual(_play, walk, seed, layers, seed=seed)
    except BaseException as error:
        kinds = Counter(step.kind for step in walk)
        error.add_note(f"seed {seed}, {len(walk)} steps ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})")
        raise
