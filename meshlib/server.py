"""A server: a handler with a stack of layers around it, behind a listener. Read `default_layers` to know what happens.

Closing is graceful: the listener closes first, every session is drained, what is under way is waited for until the
grace period is over, and the rest is cancelled.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol, cast

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketListener

from .core.clock import Clock
from .core.env import Env
from .core.service import as_service
from .core.stack import Layer, Stack
from .core.supervisor import Supervisor
from .filters.limit import ConcurrencyLimit
from .filters.mapping import ErrorMapping
from .filters.timeout import ServerDeadline
from .serving import BaseServer, server_env
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


class Server(BaseServer):
    """Serves a service on an address.

    ``async with Server(…) as server`` or ``server = await Server(…)``; `aclose` ends it, in any task.

    Args:
        service: Any async callable of one request.
        address: ``host:port`` (port 0 takes a free one) or ``unix:///path``.
        acceptor: The protocol.
        layers: Each replaces the default at its place; plain filters are added above the handler.
        label: What the server is called in metrics, spans and logs.
        stack: Changes the stack in ways that a layer alone cannot say: ``lambda s: s.remove("limit")``.
        clock: What time it is; for tests.
        seed: Of the server's random choices; for tests.
        options: ``grace``, ``announce``, ``advertise``: see `BaseServer`.

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
        stack: Callable[[Stack], Stack] | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        built = Stack(PLACES, default_layers()).with_layers(*layers)
        if stack is not None:
            built = stack(built)
        super().__init__(address, server_env(label, address, acceptor.protocol, clock, seed), built, **options)
        self._acceptor = acceptor
        self._service = self.stack.build(self.env, as_service(service))
        self._listeners: list[SocketListener] = []
        self._accepting = Supervisor(f"listener of {self.env.label!r}")
        self._connections: set[ServerConnection] = set()
        self._base = contextvars.Context()
        self._accepts = self.registry.counter("connects")
        self.registry.gauge("connections", lambda: len(self._connections))

    @property
    def connections(self) -> tuple[ServerConnection, ...]:
        """The connections that are open."""
        return tuple(self._connections)

    async def _open(self) -> str:
        self._base = contextvars.copy_context()
        self._listeners = await self._bind()
        return self._address

    async def _bind(self) -> list[SocketListener]:
        if self._unix:
            return [await anyio.create_unix_listener(self._unix)]
        multi = await anyio.create_tcp_listener(local_host=self._host or None, local_port=self._port)
        bound: Any = multi.extra(SocketAttribute.local_address)
        host, port = bound[:2]
        self._address = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
        # anyio types a MultiListener by its streams, so the kind of its listeners is lost; these are all sockets.
        return cast("list[SocketListener]", [*multi.listeners])

    def _accept(self) -> None:
        for listener in self._listeners:
            self._accepting.start(self._accept_from, listener, name="accept")

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

    async def _stop_accepting(self) -> None:
        await self._accepting.aclose()
        for listener in self._listeners:
            await listener.aclose()

    async def _drain(self) -> None:
        async with anyio.create_task_group() as group:
            for connection in self._connections:
                group.start_soon(connection.drain)

    async def _abort(self) -> None:
        for connection in tuple(self._connections):
            connection.abort()

    @property
    def _busy(self) -> str:
        return f"{len(self._connections)} connections"
