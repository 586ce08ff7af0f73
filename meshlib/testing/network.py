"""A network in memory: real clients and real servers in one process, joined by address instead of by sockets.

`Network.listen` puts a server at an address and `Network.client` makes a client of it; everything between the two is
what it is in production, but for the bytes' way. Links have latency, can be cut, and can be dark: then nothing arrives,
and nobody is told. `Network.name` is a name whose addresses the test decides, while clients follow it.

Two wires carry the requests: ``mux`` runs real Mux sessions over `duplex` streams, ``direct`` hands each request to the
server's stack (see ``direct.py``).
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, ClassVar, Final, Literal

import anyio
from anyio.abc import ByteStream

from ..client import Client, Connector, Liveness, Transport
from ..core.env import Env
from ..core.errors import ConfigurationError, ConnectError
from ..core.service import Session
from ..core.var import Var
from ..mux.client import MuxConnector
from ..mux.server import MuxAcceptor
from ..names.addr import Addr, Address, Bound
from ..names.bind import Bind
from ..names.dtab import Dtab
from ..names.resolver import Watch
from ..names.target import Target
from ..server import Server
from .direct import DirectAcceptor, DirectSession, Line
from .latency import Latency, as_latency
from .memory import MemoryStream, duplex

__all__ = ["Name", "Network", "Wire"]

Wire = Literal["mux", "direct"]
WIRES: Final = ("mux", "direct")


class Name:
    """A name whose addresses you decide; made by `Network.name`. Clients follow it as they follow a file.

    Attributes:
        target: What a client would call it.
        state: What it stands for: `Bound`, `Neg`, `Failed` or `Pending`. `Var.set` may set any of them.
    """

    def __init__(self, target: str, addresses: Iterable[Address | str] = ()) -> None:
        self.target = target
        self.state: Var[Addr] = Var(Bound.of(map(_address, addresses)))

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses it stands for now."""
        return self.state.value.addresses if isinstance(self.state.value, Bound) else ()

    def set(self, addresses: Iterable[Address | str]) -> None:
        """Let it stand for these, and no others."""
        self.state.set(Bound.of(map(_address, addresses)))

    def add(self, *addresses: Address | str) -> None:
        """Let it stand for these as well."""
        self.set((*self.addresses, *addresses))

    def remove(self, *addresses: Address | str) -> None:
        """Let it stand for these no more."""
        gone = set(map(_address, addresses))
        self.set(each for each in self.addresses if each not in gone)

    settle: ClassVar[float] = 0.0
    """As a resolver: its states count at once, so that tests need not wait."""

    async def watch(self, target: Target) -> AsyncIterator[Addr]:
        """It is a resolver as well."""
        async for addr in self.state.states():
            yield addr

    def __repr__(self) -> str:
        return f"<{self.target}: {self.state.value}>"


class _Bind(Bind):
    """Follows the names of a network, wherever a Dtab may lead to them, and other targets as ever."""

    def __init__(self, network: Network, base: Dtab | str | None) -> None:
        super().__init__(base)
        self._network = network

    def open_watch(self, target: Target, env: Env) -> Watch:
        if target.scheme != "memory":
            return super().open_watch(target, env)
        return Watch(target, self._network.name(target.text), env)


class _Link:
    """One connection: who has it with whom, and what it runs over."""

    def __init__(self, client: str, address: str, carrier: MemoryStream | Line) -> None:
        self.client = client
        self.address = address
        self.carrier = carrier

    def touches(self, client: str | None, address: str | None) -> bool:
        return client in (None, self.client) and address in (None, self.address)


class Network:
    """Servers by address, and the links to them.

    Args:
        latency: Seconds that a message takes from one end to the other: a number, or a `Latency` to draw them from.
        seed: Of the latencies.
        wire: What links are made of when a connector does not say: ``"mux"`` or ``"direct"``.

    Attributes:
        servers: The servers that listen, by address.
    """

    def __init__(self, latency: Latency | float = 0.0, *, seed: int = 0, wire: Wire = "mux") -> None:
        model = as_latency(latency)
        self.wire = _wire(wire)
        self.servers: dict[str, Server] = {}
        self.latency = model.sampler(random.Random(f"network {seed}")) if model.mean > 0 else None
        self._links: dict[_Link, None] = {}
        self._dark: dict[tuple[str | None, str | None], None] = {}
        self._names: dict[str, Name] = {}
        self._changed = anyio.Event()
        self.on_connect: Callable[[str, str, bool], None] | None = None
        """Called for each connect with the client, the address, and whether somebody listened there."""

    # --- who is there -------------------------------------------------------------------------------------------------

    def listen(self, server: Server, address: str = "") -> str:
        """Let ``server`` have an address here, by default the one that it was made with; give that address.

        It must not be started by itself (then it would listen on a socket as well). Its `aclose` drains it as ever; who
        connects after that is refused.
        """
        address = address or server.env.name
        self.servers[str(Address.parse(address))] = server
        return address

    def leave(self, address: str) -> Server | None:
        """Refuse connections to ``address`` from now on; those that there are stay. Gives the server that was there."""
        return self.servers.pop(str(Address.parse(address)), None)

    def name(self, name: str, addresses: Iterable[Address | str] = ()) -> Name:
        """The name ``memory://name``: made at its first mention, with these addresses, and the same ever after."""
        target = f"memory://{name.removeprefix('memory://')}"
        if target not in self._names:
            self._names[target] = Name(target, addresses)
        return self._names[target]

    def connector(self, client: str = "client", wire: Wire | None = None) -> Connector:
        """How a client called ``client`` connects to the servers here."""
        return _Direct(self, client) if _wire(wire or self.wire) == "direct" else _Mux(self, client)

    @property
    def acceptor(self) -> Any:
        """How a `Server` of this network's own wire accepts."""
        return DirectAcceptor() if self.wire == "direct" else MuxAcceptor()

    def client(self, target: str, *layers: Any, label: str = "", **options: Any) -> Client[Any, Any]:
        """A client of ``target``: ``memory://name`` for a name of this network, addresses, or a logical path.

        Args:
            target: Where to.
            layers: As for `meshlib.mux.client`.
            label: What it is called; links know it under this name.
            options: As for `meshlib.client.Client`; ``connector`` may be one with another wire.
        """
        connector = options.pop("connector", None) or self.connector(label or "client")
        bases = [layer.base for layer in layers if isinstance(layer, Bind)]
        layers = (*(layer for layer in layers if not isinstance(layer, Bind)), _Bind(self, *(bases[-1:] or [None])))
        return Client(target, connector, *layers, label=label, **options)

    # --- what may happen to links -------------------------------------------------------------------------------------

    def cut(self, address: str | None = None, client: str | None = None) -> int:
        """Reset every connection of ``client`` with ``address`` (``None``: of all, with all); how many there were."""
        cut = [link for link in self._links if link.touches(client, address)]
        for link in cut:
            self._links.pop(link, None)
            link.carrier.cut()
        return len(cut)

    def darken(self, address: str | None = None, client: str | None = None) -> None:
        """Let nothing arrive between ``client`` and ``address`` (``None``: all). Connects hang until they time out."""
        self._dark[client, address] = None
        for link in self._links:
            if link.touches(client, address):
                link.carrier.hold()

    def lighten(self, address: str | None = None, client: str | None = None) -> None:
        """End what `darken` began, for the same two; what was on its way arrives."""
        self._dark.pop((client, address), None)
        for link in self._links:
            if link.touches(client, address) and not self._is_dark(link.client, link.address):
                link.carrier.hold(False)
        self._changed.set()
        self._changed = anyio.Event()

    def connections(self, address: str | None = None, client: str | None = None) -> int:
        """How many connections there are."""
        return sum(link.touches(client, address) for link in self._links)

    def _is_dark(self, client: str, address: str) -> bool:
        dark = self._dark
        return bool(dark) and any(
            key in dark for key in ((None, None), (client, None), (None, address), (client, address))
        )

    async def connect(self, client: str, address: str, carrier: tuple[Any, Any]) -> Any:
        """Join both ends of ``carrier``, ours and theirs; give ours.

        Raises:
            ConnectionRefusedError: Nobody listens there.
        """
        if self.latency is not None:  # a packet there, and one back
            await anyio.sleep(self.latency() + self.latency())
        else:
            await anyio.lowlevel.checkpoint()
        while self._is_dark(client, address):
            await self._changed.wait()
        server = self.servers.get(address)
        if server is not None and server.env.supervisor.closed:
            server = None
        if self.on_connect is not None:
            self.on_connect(client, address, server is not None)
        if server is None:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = carrier
        link = _Link(client, address, ours)
        self._links[link] = None
        server.env.supervisor.start(self._serve, server, theirs, link, name="connection")
        return ours

    async def _serve(self, server: Server, theirs: Any, link: _Link) -> None:
        try:
            await server.serve_stream(theirs, link.client)
        finally:
            self._links.pop(link, None)

    def __repr__(self) -> str:
        return f"<Network of {len(self.servers)} servers: {len(self._links)} connections>"


class _Mux(MuxConnector):
    """Real Mux sessions over streams in memory."""

    def __init__(self, network: Network, client: str) -> None:
        super().__init__()
        self._network = network
        self._client = client

    async def open(self, address: Address) -> ByteStream:
        stream: ByteStream = await self._network.connect(
            self._client, str(address), duplex(latency=self._network.latency)
        )
        return stream


class _Direct:
    """Requests handed over as they are."""

    protocol: ClassVar[str] = "direct"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, network: Network, client: str) -> None:
        self._network = network
        self._client = client

    async def connect(self, address: Address, env: Env, liveness: Liveness | None) -> Session[Any, Any]:
        timeout = transport.connect_timeout if (transport := env.params.get(Transport)) else 1.0
        line = Line(self._network.latency)
        with anyio.CancelScope(deadline=anyio.current_time() + timeout):
            try:
                await self._network.connect(self._client, str(address), (line, line))
                await line.accepted.wait()
            except BaseException:
                line.cut("the client gave up connecting")
                raise
            if line.lost:
                raise ConnectError("the server closed the connection during the handshake", endpoint=str(address))
            return DirectSession(line, str(address), env, liveness)
        raise ConnectError(f"no connection within {timeout:g} s", endpoint=str(address))


def _wire(wire: str) -> Wire:
    if wire == "mux":
        return "mux"
    if wire == "direct":
        return "direct"
    raise ConfigurationError(f"wire={wire!r}: there are {' and '.join(map(repr, WIRES))}")


def _address(value: Address | str) -> Address:
    return value if isinstance(value, Address) else Address.parse(value)
