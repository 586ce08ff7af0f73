"""A gRPC server: grpclib's handlers under the stack of ``meshlib/server.py``.

`Server` stands where ``grpclib.server.Server`` does: the same handlers, ``start``, ``close``, ``wait_closed``, events,
and ``graceful_exit([server])``, which is how a program ends on SIGTERM. `serve` makes one as this library's other
servers are made. Both are the same object, so each has what the other has: layers, metrics, health, reflection,
announcements, and an end that takes nobody by surprise:

1. health says NOT_SERVING, and announcements are withdrawn, while calls are still answered;
2. the listener closes; each connection gets its GOAWAYs, and may finish what it has begun;
3. after the grace period the rest is answered UNAVAILABLE, and its handlers are cancelled;
4. the connections are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import socket
import ssl as tls
from collections.abc import Callable, Collection
from typing import Any, Final, Self, cast

from grpclib.config import Configuration
from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase
from grpclib.encoding.proto import ProtoCodec, ProtoStatusDetailsCodec, _googleapis_available

from ...core.clock import Clock
from ...core.errors import ConfigurationError
from ...core.stack import Layer, Stack
from ...core.supervisor import Job, Supervisor
from ...filters.limit import ConcurrencyLimit
from ...server import PLACES
from ...serving import BaseServer, server_env
from ...telemetry.grpc_server import GrpcServerTracing
from ...telemetry.stats import Stats
from .call import GrpcDeadline, Handling
from .connection import LINGER, ServerConnection
from .core import Serving
from .errors import GrpcErrors, judge_call
from .health import Health, is_bare
from .limits import CONNECTION_WINDOW, Limits, stream_window
from .methods import HEALTH, REFLECTION, MethodStats, mapping_of, services_of
from .reflection import Reflection

__all__ = ["Server", "default_layers", "serve"]

logger = logging.getLogger("meshlib.grpc")

BACKLOG: Final = 100
LOOK_EVERY: Final = 1.0
"""Seconds after which somebody looks for connections that say nothing; a quarter of the shortest limit, if less."""

Tls = tls.SSLContext | tuple[str, str]


def default_layers() -> tuple[Layer, ...]:
    """What a gRPC server does when it is told nothing."""
    return (
        GrpcServerTracing(),  # trace: a span under the caller's, if OpenTelemetry is configured
        Stats(),  #             stats: requests, success, failures, latency
        MethodStats(),  #       … and the same by method and status
        #                       authorize: nothing yet
        GrpcDeadline(),  #      deadline: no work for those who have given up
        ConcurrencyLimit(),  #  limit: full means a nack, and the caller goes elsewhere
        #                       timeout: none unless given
        GrpcErrors(),  #        errors: statuses travel, others become opaque and are logged
        #                       filters: what users add
    )


class Server(BaseServer):
    """Serves grpclib handlers.

    As with grpclib: ``server = Server([Greeter()])``, ``await server.start(host, port)``, and
    ``await server.wait_closed()``. Or with an address: ``async with`` it, or ``await`` it; see `serve`.

    Args:
        handlers: Instances of subclasses of the ``…Base`` classes that grpclib's plugin makes.
        layers: Each replaces the default at its place; plain filters are added above the handler, and see a
            `ServerCall`, both as request and as reply.
        codec: For messages, if they are not protobuf.
        status_details_codec: For rich status details; by default protobuf's, if googleapis-common-protos is there.
        config: grpclib's: windows and keepalive. Without one, the window of a connection is 16 MiB, and those of its
            streams are so small that all of them together cannot hold up the connection.
        address: ``host:port`` (port 0 takes a free one) or ``unix:///path``; may be left to `start`.
        ssl: A context with ``h2`` among its ALPN protocols, or the files of a certificate and its key.
        limits: What a client may ask of us.
        compression: ``"gzip"`` compresses the messages of replies, for clients that can read that.
        reflection: Answer grpc.reflection. By default only where callers are trusted.
        trust_context: ``False`` for servers that face strangers: of what travels with a request, only the deadline and
            the trace are kept.
        label: What the server is called in metrics, spans and logs.
        stack: Changes the stack in ways that a layer alone cannot say: ``lambda s: s.remove("limit")``.
        clock: What time it is; for tests.
        seed: Of the server's random choices; for tests.
        options: ``grace``, ``announce``, ``advertise``: see `BaseServer`.

    Attributes:
        health: Its health service; ``server.health.set("pkg.Service", False)``.

    Raises:
        ConfigurationError: A handler, a layer or an option makes no sense.
    """

    keyword = "grpc.Server"

    def __init__(
        self,
        handlers: Collection[Any],
        *layers: Any,
        codec: CodecBase | None = None,
        status_details_codec: StatusDetailsCodecBase | None = None,
        config: Configuration | None = None,
        address: str = "",
        ssl: Tls | None = None,
        limits: Limits | None = None,
        compression: str | None = None,
        reflection: bool | None = None,
        trust_context: bool = True,
        label: str = "",
        stack: Callable[[Stack], Stack] | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if compression not in (None, "gzip", "identity"):
            raise ConfigurationError(f"grpc.Server(compression={compression!r}): give 'gzip', or None")
        if not (limits is None or isinstance(limits, Limits)):
            raise ConfigurationError(f"grpc.Server(limits={limits!r}): give meshlib.grpc.Limits(…)")
        if codec is None:
            codec = ProtoCodec()
            if status_details_codec is None and _googleapis_available():
                status_details_codec = ProtoStatusDetailsCodec()
        built = Stack(PLACES, default_layers()).with_layers(*layers)
        if stack is not None:
            built = stack(built)
        env = server_env(label, address or "grpc", "grpc", clock, seed, classifier=judge_call)
        super().__init__(address or "0.0.0.0:0", env, built, **options)  # `start` is told, as grpclib's is
        self._has_address = bool(address)
        mapping = mapping_of(handlers)
        names = services_of(mapping)
        self.health = Health(names)
        if HEALTH not in names or is_bare(mapping):
            mapping |= self.health.__mapping__()
        else:
            logger.warning("%s: its health is a handler's own, which does not hear when the server drains", env.label)
        if (trust_context if reflection is None else reflection) and not set(REFLECTION) & set(names):
            mapping |= Reflection({*names, HEALTH}).__mapping__()
        limits = limits or Limits()
        config = config or Configuration(
            http2_connection_window_size=CONNECTION_WINDOW, http2_stream_window_size=stream_window(limits)
        )
        handling = Handling(env, limits, status_details_codec, gzip=compression == "gzip")
        self._serving = Serving(
            mapping,
            built,
            env,
            handling,
            limits,
            config.__for_server__(),
            codec=codec,
            trust=trust_context,
        )
        self.__dispatch__ = handling.dispatch
        """Where ``grpclib.events.listen`` listens."""
        self._listening: dict[str, Any] = {"ssl": _context(ssl), "backlog": BACKLOG}
        self._path: str | None = None
        self._server: asyncio.AbstractServer | None = None
        self._closer = Supervisor(f"closing of {env.label!r}")

    @property
    def connections(self) -> tuple[ServerConnection, ...]:
        """The connections that are open."""
        return tuple(self._serving.connections)

    # --- beginning ----------------------------------------------------------------------------------------------------

    async def start(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        path: str | None = None,
        family: int = socket.AF_UNSPEC,
        flags: int = socket.AI_PASSIVE,
        sock: socket.socket | None = None,
        backlog: int = BACKLOG,
        ssl: tls.SSLContext | None = None,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
    ) -> None:
        """Bind and accept. Its arguments are those of ``grpclib.server.Server.start``; with an address it needs none.

        Raises:
            OSError: The address cannot be bound.
            RuntimeError: It has been started, and is told again where.
            ServiceClosed: It has been closed.
        """
        told = host is not None or port is not None or path is not None or sock is not None
        if told:
            if path is not None and (host is not None or port is not None):
                raise ValueError("The 'path' parameter can not be used with the 'host' or 'port' parameters.")
            if self._closed is not None and not self._closing:
                raise RuntimeError("Server is already started")
            self._has_address = True
            self._listening["backlog"] = backlog
            if ssl is not None:
                self._listening["ssl"] = ssl
            self._unix = ""
            if sock is not None:
                self._listening["sock"] = sock
                self._path = "" if sock.family == getattr(socket, "AF_UNIX", None) else None
            elif path is not None:
                self._unix = self._path = str(path)
            else:
                more = {"reuse_address": reuse_address, "reuse_port": reuse_port}
                self._listening |= {"host": host, "port": port, "family": family, "flags": flags, **more}
        elif not self._has_address:
            raise RuntimeError("Server has no address: give one to start(), or to serve()")
        await super().start()

    async def _open(self) -> str:
        self._serving.base = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        options = dict(self._listening)
        if options["ssl"] is not None:
            options["ssl_handshake_timeout"] = self._serving.limits.handshake
            options["ssl_shutdown_timeout"] = LINGER
        if self._path is None and self._unix:
            self._path = self._unix
        if self._path is not None:
            self._server = await loop.create_unix_server(self._connection, self._path or None, **options)
        else:
            if "sock" not in options and "host" not in options:
                options |= {"host": self._host or None, "port": self._port}
            self._server = await loop.create_server(self._connection, **options)
        return self._bound_address()

    def _bound_address(self) -> str:
        sockets: Any = getattr(self._server, "sockets", ())
        bound = sockets[0].getsockname()
        if isinstance(bound, str | bytes):
            return f"unix://{bound if isinstance(bound, str) else bound.decode()}"
        host, port = bound[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _connection(self) -> ServerConnection:
        return ServerConnection(self._serving)

    def _accept(self) -> None:
        self.env.supervisor.start(self._serving.handling.wheel.run, name="deadlines")
        self.env.supervisor.start(self._look, name="connections that say nothing")

    async def _look(self) -> None:
        limits, config = self._serving.limits, self._serving.config
        shortest = [
            limits.handshake,
            config._keepalive_timeout,
            config._keepalive_time,
            limits.max_idle,
            limits.max_age,
        ]
        every = min(LOOK_EVERY, *(each / 4 for each in shortest if each is not None))
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(every)
            now = loop.time()
            for connection in self.connections:
                connection.tick(now)

    # --- ending -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Begin to close, in the background; `wait_closed` waits for the end. As ``graceful_exit`` wants it.

        Raises:
            RuntimeError: It has not been started.
        """
        if self._closed is None:
            raise RuntimeError("Server is not started")
        if not self._closing:
            self.health.drain()
            self._closer.launch(_Closing("closing"), self.aclose, (), contextvars.Context())

    async def aclose(self, grace: float | None = None) -> None:
        """Close gracefully; see the top of this module. In any task; twice is the same as once.

        Args:
            grace: Seconds to wait for calls under way, if not those of the server.
        """
        self.health.drain()
        await super().aclose(grace)

    async def wait_closed(self) -> None:
        """Wait until the server has been closed.

        Raises:
            RuntimeError: It has not been started, and has no address.
        """
        if self._closed is None and not self._has_address:
            raise RuntimeError("Server is not started")
        await super().wait_closed()

    async def __aenter__(self) -> Self:
        if self._has_address:
            await self.start()
        return self

    async def _stop_accepting(self) -> None:
        self._serving.refusing = True
        if self._server is not None:
            self._server.close()  # its own wait_closed waits, from Python 3.12 on, for connections

    async def _drain(self) -> None:
        for connection in self.connections:
            connection.drain()
        for connection in self.connections:
            await connection.closed.wait()

    async def _abort(self) -> None:
        left = self.connections
        for connection in left:
            connection.abort()
        for connection in left:
            await connection.closed.wait()  # `LINGER` at most

    @property
    def _busy(self) -> str:
        return f"{sum(each.busy for each in self.connections)} calls"


class _Closing(Job):
    """A job that may be made where no task runs, as in a signal's handler, and anyio's scopes cannot be."""

    __slots__ = ()

    def __init__(self, name: str) -> None:
        self.name, self.scope, self.task = name, cast(Any, contextlib.nullcontext()), None

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


def _context(given: Tls | None) -> tls.SSLContext | None:
    if given is None or isinstance(given, tls.SSLContext):
        return given
    if not (isinstance(given, tuple) and len(given) == 2):
        raise ConfigurationError(f"grpc.Server(ssl={given!r}): give an SSLContext, or (certificate file, key file)")
    context = tls.create_default_context(tls.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*given)
    context.set_alpn_protocols(["h2"])
    return context


def serve(handlers: Collection[Any], address: str = "127.0.0.1:0", *layers: Any, **options: Any) -> Server:
    """Serve grpclib handlers: ``async with grpc.serve([Greeter()], "127.0.0.1:9000") as server``, or ``await`` it.

    Args:
        handlers: See `Server`.
        address: ``host:port`` (port 0 takes a free one) or ``unix:///path``; ``grpc://`` may stand before it.
        layers: See `Server`.
        options: See `Server`.

    Raises:
        ConfigurationError: A handler, the address, a layer or an option makes no sense.
    """
    return Server(handlers, *layers, address=address.removeprefix("grpc://"), **options)
