"""What runs an ASGI app on a socket: uvicorn on asyncio, hypercorn on trio and for HTTP/2.

Neither hears signals here, nor logs accesses: the server that owns them ends them, and the stack counts requests.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl as tls
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import anyio

from ..core.errors import ConfigurationError
from ..core.supervisor import running_trio

__all__ = ["Engine", "engine_for"]

App = Any
FOREVER = 1e9
"""Seconds: the grace period is its owner's."""


class Engine(Protocol):
    """One server, for one run."""

    started: anyio.Event
    """Set once it accepts, or has failed."""

    @property
    def connections(self) -> int:
        """How many are open, or may be."""
        ...

    async def run(self) -> None:
        """Serve until told to end."""
        ...

    def end(self) -> None:
        """Accept no more, and return once all requests have been answered."""
        ...

    def hurry(self) -> None:
        """Wait for them no longer."""
        ...


def engine_for(app: App, sockets: list[socket.socket], ssl: tls.SSLContext | None, *, http2: bool) -> Engine:
    """The engine for the event loop that runs now.

    Raises:
        ConfigurationError: It is not installed.
    """
    on_trio = bool(running_trio())
    try:
        if on_trio or http2:
            return _hypercorn(app, sockets, ssl, http2=http2, on_trio=on_trio)
        return _uvicorn(app, sockets, ssl)
    except ImportError as error:
        name, why = (
            ("hypercorn", "HTTP/2 or another event loop than asyncio") if on_trio or http2 else ("uvicorn", "http://")
        )
        extra = "hypercorn" if name == "hypercorn" else "http-server"
        raise ConfigurationError(
            f"serving {why} needs {name}, which is not installed: pip install 'meshlib-rpc[{extra}]'"
        ) from error


def _uvicorn(app: App, sockets: list[socket.socket], ssl: tls.SSLContext | None) -> Engine:
    import uvicorn

    class Uvicorn(uvicorn.Server):
        """uvicorn, without its signals."""

        def __init__(self) -> None:
            super().__init__(
                uvicorn.Config(
                    app, log_config=None, access_log=False, server_header=False, lifespan="off", interface="asgi3"
                )
            )
            self.config.load()
            self.config.ssl = ssl
            self.is_up = anyio.Event()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            self.is_up.set()

    server = Uvicorn()

    class Running:
        started = server.is_up

        @property
        def connections(self) -> int:
            return len(server.server_state.connections)

        async def run(self) -> None:
            try:
                await server.serve(sockets=sockets)
            finally:
                for task in server.server_state.tasks:  # none, unless we were cancelled
                    task.cancel()
                for connection in tuple(server.server_state.connections):
                    connection.transport.abort()

        def end(self) -> None:
            server.should_exit = True

        def hurry(self) -> None:
            server.force_exit = True

    return Running()


def _hypercorn(
    app: App, sockets: list[socket.socket], ssl: tls.SSLContext | None, *, http2: bool, on_trio: bool
) -> Engine:
    if on_trio:
        from hypercorn.trio import serve
    else:
        from hypercorn.asyncio import serve  # type: ignore[assignment]  # the same but for the event loop
    from hypercorn.config import Config, Sockets

    started, ending = anyio.Event(), anyio.Event()
    quiet = logging.getLogger("meshlib.hypercorn")

    class OurConfig(Config):
        graceful_timeout = FOREVER
        shutdown_timeout = FOREVER
        include_server_header = False
        accesslog = None
        errorlog = quiet
        alpn_protocols = ["h2", "http/1.1"] if http2 else ["http/1.1"]

        @property
        def ssl_enabled(self) -> bool:
            return ssl is not None

        def create_ssl_context(self) -> tls.SSLContext | None:
            if ssl is not None:
                ssl.set_alpn_protocols(self.alpn_protocols)
            return ssl

        def create_sockets(self) -> Sockets:
            started.set()  # the lifespan has begun, and the sockets listen already
            return Sockets(sockets, [], []) if ssl is not None else Sockets([], sockets, [])

    open_connections = Seen(app, OurConfig.keep_alive_timeout)

    class Running:
        def __init__(self) -> None:
            self.started = started

        @property
        def connections(self) -> int:
            return open_connections.count

        async def run(self) -> None:
            await serve(open_connections, OurConfig(), shutdown_trigger=ending.wait, mode="asgi")

        def end(self) -> None:
            ending.set()

        def hurry(self) -> None:
            pass

    return Running()


class Seen:
    """An ASGI app that knows on which connections there have been requests lately.

    hypercorn does not say how many connections are open. One with a request under way is; one without may be, until
    hypercorn closes it for being idle, or it was said to be the last on it. Those of which no request has come yet are
    not seen, nor is more than one of a client that has no address, as on a Unix socket.

    Args:
        app: The app below.
        idle: Seconds after which an idle connection is closed.
        now: What time it is, in seconds.
    """

    def __init__(self, app: App, idle: float, now: Callable[[], float] = anyio.current_time) -> None:
        self._app, self._idle, self._now = app, idle, now
        self._busy: dict[Any, int] = {}
        self._left: dict[Any, float] = {}
        """When the last request on it ended; the oldest first."""

    @property
    def count(self) -> int:
        """How many there may be."""
        self._forget()
        return len(self._busy) + len(self._left)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Note one request, or pass on what is none."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        client = tuple(scope.get("client") or ())
        last = False

        async def sent(message: Any) -> None:
            nonlocal last
            if message["type"] == "http.response.start":
                last = (b"connection", b"close") in message.get("headers", ())
            await send(message)

        self._left.pop(client, None)
        self._busy[client] = self._busy.get(client, 0) + 1
        try:
            await self._app(scope, receive, sent)
        finally:
            self._busy[client] -= 1
            if not self._busy[client]:
                del self._busy[client]
                self._forget()
                if not (last and client):
                    self._left[client] = self._now()

    def _forget(self) -> None:
        since = self._now() - self._idle
        while self._left:
            client = next(iter(self._left))
            if self._left[client] > since:
                return
            del self._left[client]
