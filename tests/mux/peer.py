"""A peer written by hand: says exactly what it is told to, and tells what it hears. And sessions for it to talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import ByteStream, TaskGroup

from meshlib.client import Liveness
from meshlib.core.clock import Clock
from meshlib.core.env import Env
from meshlib.core.supervisor import Supervisor
from meshlib.mux import Limits, Request, Response
from meshlib.mux.client import open_session
from meshlib.mux.client_session import ClientSession
from meshlib.mux.codec import decode, encode
from meshlib.mux.framer import Framer, Reassembler
from meshlib.mux.messages import Contexts, Message, Rerr, Rinit, Rping, Tinit, Tping
from meshlib.mux.server import MuxAcceptor
from meshlib.mux.server_session import ServerSession
from meshlib.server import Server
from meshlib.telemetry.metrics import Registry
from meshlib.testing import MemoryStream, duplex

PROBE = bytes.fromhex("0000000f7f000001") + b"tinit check"
HUGE = Limits(max_frame=2**31 - 1)


async def settle(turns: int = 40) -> None:
    """Let everything that can happen now happen. With streams in memory nothing else is under way."""
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()


class RawPeer:
    """One end of a connection.

    Attributes:
        frames: Every frame that came, without its size, in order.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.frames: list[bytes] = []
        self._framer = Framer(HUGE.max_frame)
        self._reassembler = Reassembler(HUGE)
        self._messages: list[Message] = []

    async def send(self, *what: Message | bytes) -> None:
        """Messages, or bytes as they are, all in one send."""
        await self.stream.send(b"".join(item if isinstance(item, bytes) else encode(item) for item in what))

    async def receive(self) -> Message:
        """The next message. Only a test that fails waits for the time limit."""
        with anyio.fail_after(30):
            while not self._messages:
                for frame in self._framer.feed(await self.stream.receive()):
                    self.frames.append(frame)
                    whole = self._reassembler.add(frame)
                    if whole is not None:
                        self._messages.append(decode(whole))
        return self._messages.pop(0)

    async def receive_n(self, n: int) -> list[Message]:
        """The next ``n`` messages, in an order that does not depend on chance."""
        return sorted([await self.receive() for _ in range(n)], key=lambda m: (m.tag, repr(m)))

    async def expect(self, *messages: Message) -> None:
        """The next messages are these."""
        for message in messages:
            assert await self.receive() == message

    async def ended(self) -> None:
        """Nothing more comes, and the other side closes."""
        try:
            message = await self.receive()
        except anyio.EndOfStream:
            return
        raise AssertionError(f"expected the end, and {message} came")

    async def silent(self) -> None:
        """Nothing comes now: the answer to a ping, which is sent in order, is the next that does."""
        await settle()
        await self.send(Tping(0x7777))
        await self.expect(Rping(0x7777))

    async def accept(self, headers: Contexts = (), version: int = 1) -> Tinit:
        """Negotiate as a server."""
        probe = await self.receive()
        assert probe == Rerr(1, "tinit check")
        await self.send(PROBE)
        offer = await self.receive()
        assert isinstance(offer, Tinit)
        await self.send(Rinit(offer.tag, version, headers))
        return offer

    async def connect(self, headers: Contexts = ()) -> Rinit:
        """Negotiate as a client."""
        await self.send(PROBE)
        await self.expect(Rerr(1, "tinit check"))
        await self.send(Tinit(1, 1, headers))
        answer = await self.receive()
        assert isinstance(answer, Rinit)
        return answer


class ClientRig:
    """A client session, and the server that is played by hand."""

    def __init__(self, session: ClientSession, peer: RawPeer, env: Env, registry: Registry) -> None:
        self.session = session
        self.peer = peer
        self.env = env
        self.registry = registry

    def counter(self, name: str) -> int:
        """A number below ``mux/``."""
        return self.registry.counter(f"mux/{name}").value

    @property
    def stream(self) -> MemoryStream:
        """The peer's end of the connection."""
        assert isinstance(self.peer.stream, MemoryStream)
        return self.peer.stream


@asynccontextmanager
async def client_rig(
    *,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    liveness: Liveness | None = None,
    headers: Contexts = (),
    capacity: int = 65536,
    accept: Callable[[RawPeer], Awaitable[Any]] | None = None,
) -> AsyncIterator[ClientRig]:
    """A client session over memory, past its handshake."""
    here, there = duplex(capacity)
    registry = Registry()
    env = Env(label="test", metrics=registry, supervisor=Supervisor("test"), clock=Clock())
    peer = RawPeer(there)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(accept or (lambda p: p.accept(headers)), peer)
            session = await open_session(here, "peer:1", env, limits, liveness)
        yield ClientRig(session, peer, env, registry)
    finally:
        with anyio.CancelScope(shield=True):
            await env.supervisor.aclose()
            await there.aclose()


class ServerRig:
    """A server, and clients of it that are played by hand."""

    def __init__(self, server: Server, capacity: int) -> None:
        self.server = server
        self._capacity = capacity
        self._peers: list[RawPeer] = []

    async def open(self, *, negotiate: bool = True, headers: Contexts = ()) -> RawPeer:
        """A new connection."""
        here, there = duplex(self._capacity)
        self.server.env.supervisor.start(self.server.serve_stream, here)
        peer = RawPeer(there)
        self._peers.append(peer)
        if negotiate:
            await peer.connect(headers)
        return peer

    @property
    def session(self) -> ServerSession:
        """The server's end of the only connection."""
        (connection,) = self.server.connections
        assert isinstance(connection, ServerSession)
        return connection

    def counter(self, name: str) -> float:
        """A number below ``mux/``."""
        return self.server.metrics().get(f"mux/{name}", 0)

    async def aclose(self) -> None:
        """Close everything at once."""
        with anyio.CancelScope(shield=True):
            await self.server.aclose(grace=0)
            for peer in self._peers:
                await peer.stream.aclose()


async def echo(request: Request) -> Response:
    """The same body."""
    return Response(request.body)


@asynccontextmanager
async def server_rig(
    service: Callable[[Request], Awaitable[Response]] = echo,
    *layers: Any,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    trust_context: bool = True,
    capacity: int = 65536,
    grace: float = 10.0,
) -> AsyncIterator[ServerRig]:
    """A server without a listener: its connections are in memory."""
    acceptor = MuxAcceptor(limits, trust_context=trust_context)
    rig = ServerRig(
        Server(service, "127.0.0.1:0", acceptor, *layers, label="test", clock=Clock(), grace=grace), capacity
    )
    try:
        yield rig
    finally:
        await rig.aclose()


class Call:
    """A call under way in a task of its own.

    Attributes:
        outcome: The reply or the error; ``None`` while there is neither, or when the call was cancelled.
    """

    def __init__(self, group: TaskGroup, service: Callable[[Request], Awaitable[Response]], request: Request) -> None:
        self.outcome: Any = None
        self.ended = anyio.Event()
        self._scope = anyio.CancelScope()
        group.start_soon(self._run, service, request)

    async def _run(self, service: Callable[[Request], Awaitable[Response]], request: Request) -> None:
        with self._scope:
            try:
                self.outcome = await service(request)
            except Exception as error:
                self.outcome = error
        self.ended.set()

    def cancel(self) -> None:
        self._scope.cancel()

    async def result(self) -> Any:
        """The outcome, waited for."""
        with anyio.fail_after(30):
            await self.ended.wait()
        return self.outcome
