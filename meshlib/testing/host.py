"""A simulated server: the real server stack around a handler that takes its time, and may be made to suffer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import anyio

from ..client import Client
from ..core.context import CLOCK, VAR
from ..core.deadlines import passed
from ..core.errors import DeadlineExceeded, MeshError, RemoteError
from ..mux.request import Request, Response
from ..names.addr import Address
from ..server import Server
from .latency import as_latency
from .network import Network
from .scenario import Layers, Servers
from .workers import Workers

if TYPE_CHECKING:
    from .cluster import Cluster

__all__ = ["Host", "call_all", "layers_for"]

REPLY: Final = Response()
LAST_BREATH: Final = 0.001
"""Seconds for the tasks of a crashed server to notice. Its connections are gone by then, so nobody sees them do it."""


class Host:
    """One simulated server, through all its lives.

    Attributes:
        name: Such as ``"servers/3"``.
        number: Among all servers of the simulation.
        address: Where it is.
        network: The network that it is in.
        spec: What kind of server it is.
        server: The server that runs there now; ``None`` while it is down.
        workers: Its workers, where it has a limited number.
        client: Its own client, where its handler calls others.
        slowed: By which factors its work takes longer now; each is a function of the time.
        failing: Which shares of requests fail now: (share, seconds until then, what makes the exception).
    """

    def __init__(self, cluster: Cluster, spec: Servers, index: int, number: int, address: str) -> None:
        self.name = f"{spec.name}/{index}"
        self.index = index
        self.number = number
        self.spec = spec
        self.address = str(address)
        self.network: Network = cluster.network
        self.now = cluster.now
        self.rng = random.Random(f"{cluster.scenario.seed}/{self.name}")
        self.slowed: list[Callable[[float], float]] = []
        self.failing: list[tuple[float, float, Callable[[], Exception]]] = []
        self.server: Server | None = None
        self.workers: Workers | None = None
        self.client: Client[Any, Any] | None = None
        self._cluster = cluster
        self._sample = as_latency(spec.latency).sampler(self.rng)
        self._down = 1
        self._absent = 0
        self._hanging = 0
        self._unhung = anyio.Event()

    # --- its life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let it run again, as new, unless something else keeps it down."""
        self._down -= 1
        if self._down:
            return
        spec = self.spec
        service = spec.handler(self) if spec.handler is not None else self.handle
        self.server = Server(
            self._counted(service),
            self.address,
            self.network.acceptor,
            *layers_for(spec.layers, self.index),
            label=self.name,
            stack=spec.stack,
            seed=self.rng.getrandbits(64),
        )
        if spec.workers is not None:
            self.workers = Workers(spec.workers, spec.abandoned, self.server.env.supervisor)
        if spec.calls is not None:
            calls = spec.calls
            layers = layers_for(calls.layers, self.index)
            label = f"{self.name} -> {calls.to}"
            self.client = self._cluster.make_client(label, calls.to, layers, calls.stack, self.rng.getrandbits(64))
        self.network.listen(self.server, self.address)

    def stop(self, grace: float = 0.0) -> None:
        """Take it down, letting it finish what it has for at most ``grace`` seconds."""
        self._down += 1
        if self.server is None:
            return
        server, self.server = self.server, None
        client, self.client = self.client, None
        self.network.leave(self.address)
        self._cluster.supervisor.start(_end, server, client, grace, name=f"end of {self.name}")

    def crash(self) -> None:
        """Take it down, as a kill does: connections are reset, and what it was doing is lost."""
        self.network.leave(self.address)
        self.network.cut(self.address)
        if self.client is not None:
            self.network.cut(client=self.client.env.label)
        self.stop(LAST_BREATH)

    def remove(self) -> None:
        """Take it out of the name."""
        self._absent += 1
        if self._absent == 1:
            self._cluster.names[self.spec.name].remove(self.address)

    def add(self) -> None:
        """Put it back into the name, unless something else keeps it out."""
        self._absent -= 1
        if not self._absent:
            self._cluster.names[self.spec.name].add(self.where)

    def hang(self) -> None:
        """Answer nothing from now on."""
        self._hanging += 1
        if self._hanging == 1:
            self._unhung = anyio.Event()

    def unhang(self) -> None:
        """Go on."""
        self._hanging -= 1
        if not self._hanging:
            self._unhung.set()

    @property
    def where(self) -> Address:
        """Its address, with weight and metadata."""
        return Address.parse(self.address, self.spec.weight, tuple(sorted(self.spec.metadata.items())))

    @property
    def up(self) -> bool:
        """Does it run?"""
        return self.server is not None

    # --- its work -----------------------------------------------------------------------------------------------------

    def _counted(self, service: Any) -> Any:
        handled, number, now = self._cluster.record.handled, self.number, self.now

        async def count(request: Request) -> Response:
            handled.add(now(), number)
            reply: Response = await service(request)
            return reply

        return count

    def seconds(self) -> float:
        """How long the next piece of work takes, as things are now."""
        seconds = self._sample()
        for factor in self.slowed:
            seconds *= factor(self.now())
        return seconds

    async def work(self) -> None:
        """Wait for a worker, if they are limited, and do one piece of work."""
        if self.workers is not None:
            await self.workers.work(self.seconds)
        else:
            await anyio.sleep(self.seconds())

    async def handle(self, request: Request) -> Response:
        """What it does with a request if it was not told otherwise: fail or hang if it must, work, call the next."""
        for rate, after, make in self.failing:
            if rate >= 1 or self.rng.random() < rate:
                await anyio.sleep(after)
                raise make()
        while self._hanging:
            await self._unhung.wait()
        await self.work()
        if self.spec.calls is not None and self.client is not None:
            calls = self.spec.calls
            await self._call(self.client, Request(idempotent=calls.idempotent), calls.fan_out)
        return REPLY

    async def _call(self, client: Client[Any, Any], request: Request, fan_out: int) -> None:
        """Call the next tier. Its failure is told as the server's own error mapping tells it, but not logged."""
        try:
            await call_all(client, request, fan_out)
        except MeshError as error:
            if isinstance(error, DeadlineExceeded) and passed(VAR.get().deadline, CLOCK):
                raise DeadlineExceeded("the deadline passed while the request was handled", processed=True) from error
            opaque = RemoteError(f"{type(error).__name__} of {client.env.name}")
            if "retryable" in vars(error) and not error.retryable:
                opaque.finalize(error.verdict)
            raise opaque from error

    def __repr__(self) -> str:
        return f"<{self.name} at {self.address}: {'up' if self.up else 'down'}>"


async def call_all(client: Callable[[Request], Any], request: Request, fan_out: int) -> None:
    """Make so many calls at once, and wait for all.

    Raises:
        MeshError: That of the first one that failed; the others are cancelled.
    """
    if fan_out == 1:
        await client(request)
        return
    failures: list[MeshError] = []

    async def one() -> None:
        try:
            await client(request)
        except MeshError as error:
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for _ in range(fan_out):
            group.start_soon(one)
    if failures:
        raise failures[0]


def layers_for(layers: Layers, index: int) -> tuple[Any, ...]:
    """The layers of the client or server of that number."""
    return tuple(layers(index) if callable(layers) else layers)


async def _end(server: Server, client: Client[Any, Any] | None, grace: float) -> None:
    await server.aclose(grace)
    if client is not None:
        await client.aclose()
