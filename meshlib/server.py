"""A server: a handler with a stack of layers around it, behind a listener. Read `default_layers` to know what happens.

Closing is graceful: the listener closes first, every session is drained, what is under way is waited for until the
grace period is over, and the rest is cancelled.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import logging
import random
import socket
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Any, ClassVar, Final, Protocol, Self, cast

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketListener

from .core.clock import Clock
from .core.env import Env
from .core.errors import ConfigurationError, ServiceClosed
from .core.events import Decisions
from .core.service import as_service
from .core.stack import Layer, Stack
from .core.supervisor import Supervisor
from .filters.limit import ConcurrencyLimit
from .filters.mapping import ErrorMapping
from .filters.timeout import ServerDeadline
from .names.addr import Address, parse_hostport
from .names.announce import Announcement, Announcements, reachable
from .names.static import parse_address
from .telemetry.metrics import Registry
from .telemetry.stats import Stats
from .telemetry.tracing import ServerTracing

__all__ = ["PLACES", "Acceptor", "Server", "ServerConnection", "default_layers"]

logger = logging.getLogger("meshlib.server")

PLACES: Final = (
    "trace",
    "stats",
    "authorize",
    "deadline",
    "rate_limit",
    "limit",
    "timeout",
    "errors",
    "filters",
    "retry",
    "hedge",
    "budget",
    "attempt_timeout",
    "fault",
)
"""Every place of a server's stack, from the wire to the handler."""

GRACE: Final = 10.0
"""Seconds that closing waits for requests under way. Kubernetes kills 30 s after SIGTERM; this leaves room for more."""


def default_layers() -> tuple[Layer, ...]:
    """What a server does when it is told nothing."""
    return (
        ServerTracing(),  #     trace: a span under the caller's, if OpenTelemetry is configured
        Stats(),  #             stats: requests, success, failures, latency
        #                       authorize: nothing yet
        ServerDeadline(),  #    deadline: no work for those who have given up
        ConcurrencyLimit(),  #  limit: full means a nack, and the caller goes elsewhere
        #                       timeout: none unless given
        ErrorMapping(),  #      errors: declared ones travel, others become opaque and are logged
        #                       filters: what users add
    )


class ServerConnection(Protocol):
    """One accepted connection, speaking its protocol."""

    async def run(self) -> None:
        """Serve until it ends. Never raises."""
        ...

    async def drain(self) -> None:
        """End it gracefully."""
        ...

    def abort(self) -> None:
        """End it at once."""
        ...


class Acceptor(Protocol):
    """How a protocol serves an accepted connection."""

    protocol: ClassVar[str]
    """Its name, such as ``mux``."""

    def accept(
        self, stream: ByteStream, service: Any, peer: str, env: Env, base: contextvars.Context
    ) -> ServerConnection:
        """Wrap the stream."""
        ...


class Server:
    """Serves a service on an address.

    ``async with Server(…) as server`` or ``server = await Server(…)``; `aclose` ends it, in any task.

    Args:
        service: Any async callable of one request.
        address: ``host:port`` (port 0 takes a free one) or ``unix:///path``.
        acceptor: The protocol.
        layers: Each replaces the default at its place; plain filters are added above the handler.
        label: What the server is called in metrics, spans and logs.
        grace: Seconds that `aclose` waits for requests under way.
        stack: Changes the stack in ways that a layer alone cannot say: ``lambda s: s.remove("limit")``.
        clock: What time it is; for tests.
        seed: Of the server's random choices; for tests.
        announce: Where to announce the address, such as ``zk://host/path``, or several such targets. The server
            announces itself once it listens, in the background, and withdraws before it drains.
        advertise: The address to announce, if it is not the one that the server listens on; may have settings:
            ``10.0.0.7:9000?weight=2&zone=eu-1``. With ``host:0`` the port is the one that it listens on.

    Attributes:
        announcements: What is announced, and how that stands.

    Raises:
        ConfigurationError: The address, a layer, or what is to be announced makes no sense.
    """

    def __init__(
        self,
        service: Any,
        address: str,
        acceptor: Acceptor,
        *layers: Any,
        label: str = "",
        grace: float = GRACE,
        stack: Callable[[Stack], Stack] | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
        announce: str | Iterable[str] = (),
        advertise: str = "",
    ) -> None:
        if not grace >= 0:
            raise ConfigurationError(f"serve(grace={grace!r}): give seconds, 0 or more")
        self._unix = address.removeprefix("unix://") if address.startswith("unix://") else ""
        self._host, self._port = ("", 0) if self._unix else parse_hostport(address)
        self.registry = Registry()
        self.stack = Stack(PLACES, default_layers()).with_layers(*layers)
        if stack is not None:
            self.stack = stack(self.stack)
        clock = clock or Clock()
        self.env = Env(
            kind="server",
            label=label or address,
            name=address,
            protocol=acceptor.protocol,
            clock=clock,
            rng=random.Random(seed),
            metrics=self.registry,
            events=Decisions(clock, self.registry),
            supervisor=Supervisor(f"server {label or address!r}"),
        )
        self.grace = grace
        self._announcements = Announcements(announce, f"server {label or address!r}", self.env.rng)
        self._advertise = parse_address(advertise) if advertise else None
        self._acceptor = acceptor
        self._service = self.stack.build(self.env, as_service(service))
        self._listeners: list[SocketListener] = []
        self._address = f"unix://{self._unix}" if self._unix else ""
        self._accepting = Supervisor(f"listener of {label or address!r}")
        self._connections: set[ServerConnection] = set()
        self._base = contextvars.Context()
        self._closing = self._refusing = False
        self._closed: anyio.Event | None = None
        self._bound = anyio.Event()
        self._socket: tuple[int, int] | None = None
        self._accepts = self.registry.counter("connects")
        self.registry.gauge("connections", lambda: len(self._connections))
        if self._announcements.targets:
            self.registry.gauge("announce/announced", lambda: sum(each.announced for each in self.announcements))
            self.registry.gauge("announce/failures", lambda: sum(each.failures for each in self.announcements))

    @property
    def address(self) -> str:
        """Where it listens: ``host:port``, or ``unix:///path``.

        Raises:
            ServiceClosed: It has not been started.
        """
        if not self._address:
            raise ServiceClosed("the server has not been started; use `async with` or `await` it")
        return self._address

    @property
    def announcements(self) -> tuple[Announcement, ...]:
        """What it announces; each says whether it is announced, and why not."""
        return self._announcements.each

    @property
    def connections(self) -> tuple[ServerConnection, ...]:
        """The connections that are open."""
        return tuple(self._connections)

    async def start(self) -> None:
        """Bind and accept. Starting twice is the same as starting once.

        Raises:
            OSError: The address cannot be bound.
            ServiceClosed: It has been closed.
        """
        if self._closing:
            raise ServiceClosed(f"server {self.env.label!r} has been closed")
        if self._closed is not None:
            await self._bound.wait()
            if self._closed is None or self._closing:  # the first could not bind, or was told to end meanwhile
                await self.start()
            return
        self._closed, self._bound = anyio.Event(), anyio.Event()
        self._base = contextvars.copy_context()
        try:
            self._listeners = await self._bind()
        except BaseException:
            self._closed = None
            raise
        finally:
            self._bound.set()
        if self._closing:  # meanwhile, by another task, which found nothing to close yet
            await self._stop_accepting()
            raise ServiceClosed(f"server {self.env.label!r} has been closed")
        for listener in self._listeners:
            self._accepting.start(self._accept_from, listener, name="accept")
        if self._announcements.targets:
            self._announcements.start(self._announced_address())

    def _announced_address(self) -> Address:
        given = self._advertise
        if given is None:
            return reachable(self.address)
        port = given.port or Address.parse(self.address).port
        return Address(given.host, port, given.path, given.weight, given.metadata)

    async def _bind(self) -> list[SocketListener]:
        if self._unix:
            listener = await anyio.create_unix_listener(self._unix)
            try:
                with anyio.CancelScope(shield=True):  # one look at a local file, without which it could not be removed
                    made = await anyio.Path(self._unix).stat()
                    self._socket = (made.st_dev, made.st_ino)
            except BaseException:
                await listener.aclose()
                raise
            return [listener]
        multi = await anyio.create_tcp_listener(local_host=self._host or None, local_port=self._port)
        bound: Any = multi.extra(SocketAttribute.local_address)
        host, port = bound[:2]
        self._address = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
        # anyio types a MultiListener by its streams, so the kind of its listeners is lost; these are all sockets.
        return cast("list[SocketListener]", [*multi.listeners])

    async def _accept_from(self, listener: SocketListener) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if self._closing:
                    return
                if error.errno == errno.ECONNABORTED:  # while it was being accepted; others will come
                    await anyio.lowlevel.checkpoint()
                else:
                    # Most likely out of files or memory. That passes; a listener that gave up would never come back.
                    logger.error("%s: cannot accept a connection: %s; waiting", self.env.label, error)
                    await anyio.sleep(0.1)
                continue
            except anyio.ClosedResourceError:
                return
            self._accepts.value += 1
            self.env.supervisor.start(self._serve, stream, name="connection")

    async def _serve(self, stream: ByteStream) -> None:
        remote = stream.extra(SocketAttribute.remote_address, "")
        raw = stream.extra(SocketAttribute.raw_socket, None)
        if raw is not None and not self._unix:
            # A client whose machine is gone says nothing, and a server sends no pings: let the system find out.
            with contextlib.suppress(OSError):  # it may have ended already
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer = f"{remote[0]}:{remote[1]}" if isinstance(remote, tuple) else str(remote) or "a Unix socket"
        await self.serve_stream(stream, peer)

    async def serve_stream(self, stream: ByteStream, peer: str = "an in-memory stream") -> None:
        """Serve one connection that was accepted elsewhere, until it ends. A server that has closed serves no more."""
        if self._refusing:
            await stream.aclose()
            return
        connection = self._acceptor.accept(stream, self._service, peer, self.env, self._base)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    async def aclose(self, grace: float | None = None) -> None:
        """Stop accepting, drain, wait for what is under way, cancel the rest. In any task; twice is the same as once.

        Args:
            grace: Seconds to wait, if not those of the server.
        """
        first, self._closing = not self._closing, True
        if not first:
            if self._closed is not None:
                await self._closed.wait()
            return
        try:
            # First, so that clients hear of it while they are still answered: nobody comes to a closed door.
            await self._announcements.withdraw()
            self._refusing = True
            await self._stop_accepting()
            with anyio.move_on_after(self.grace if grace is None else grace) as scope:
                async with anyio.create_task_group() as group:
                    for connection in self._connections:
                        group.start_soon(connection.drain)
            if scope.cancelled_caught:
                logger.warning(
                    "%s: %d connections still busy after the grace period", self.env.label, len(self._connections)
                )
        finally:
            self._refusing = True
            for connection in tuple(self._connections):
                connection.abort()
            with anyio.CancelScope(shield=True):
                await self.env.supervisor.aclose()
            closed = self._closed = self._closed or anyio.Event()
            closed.set()

    async def _stop_accepting(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._accepting.aclose()
            for listener in self._listeners:
                await listener.aclose()
            if self._socket is not None:
                await self._remove_socket(anyio.Path(self._unix), self._socket)

    async def _remove_socket(self, path: anyio.Path, ours: tuple[int, int]) -> None:
        with contextlib.suppress(OSError):
            found = await path.stat()
            if (found.st_dev, found.st_ino) == ours:  # a successor may have put its own there
                await path.unlink()

    async def wait_closed(self) -> None:
        """Wait until the server has been closed."""
        if self._closed is None:
            await self.start()
        assert self._closed is not None  # noqa: S101
        await self._closed.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.__aenter__().__await__()

    @property
    def events(self) -> Decisions:
        """What its layers decide, and why: ``server.events.listen(print)``."""
        return self.env.events

    def metrics(self) -> dict[str, float]:
        """Every number this server keeps, by name."""
        return self.registry.snapshot()

    def __repr__(self) -> str:
        where = self._address or self.env.name
        state = "closed" if self._closing else f"{len(self._connections)} connections"
        return f"server {self.env.label!r} on {where} ({self.env.protocol}, {state})\n" + self.stack.describe()
