"""An ASGI app behind a listener of its own, with the server stack around it, run by uvicorn or hypercorn.

uvicorn where it will do; hypercorn under trio and for HTTP/2, which uvicorn does not have. Both are given a socket that
is bound already, so that the address is known, and told when to end, so that they end as every server of the house
does: withdrawn, then drained. To drain is to answer with ``Connection: close`` for a while before the listener closes,
since HTTP/1.1 has no other word for it, and then to wait for what is under way.
"""

from __future__ import annotations

import contextvars
import functools
import socket
import ssl as tls
from typing import Any, Final

import anyio

from ..core.errors import ConfigurationError
from ..core.supervisor import Supervisor
from ..serving import BaseServer
from .asgi import Middleware
from .drain import LINGER
from .engines import Engine, engine_for
from .lifespan import Lifespan
from .listening import bind

__all__ = ["HttpServer", "serve"]

OPTIONS: Final = frozenset(("trust_context", "health", "ready", "route", "stack", "clock", "seed"))
"""Of `Middleware`. Its times are the server's: ``linger`` and ``grace``."""
LAST_WORDS: Final = 2.0
"""Seconds after the grace period in which requests that were cut off are answered, and the app's lifespan ends."""


class HttpServer(BaseServer):
    """Serves an ASGI app. See `serve`.

    Attributes:
        middleware: The stack around the app.
    """

    def __init__(
        self,
        middleware: Middleware,
        address: str,
        *,
        ssl: tls.SSLContext | None = None,
        http2: bool = False,
        linger: float = LINGER,
        **options: Any,
    ) -> None:
        # The middleware's own tasks end with the app's life, after which another server may begin it anew.
        env = middleware.env.evolve(name=address, supervisor=Supervisor(f"server {middleware.env.label!r}"))
        super().__init__(address, env, middleware.stack, **options)
        self.middleware = middleware
        self._ssl, self._http2, self._linger = ssl, http2, linger
        self._engine: Engine | None = None
        self._lifespan: Lifespan | None = None
        self._serving = Supervisor(f"listener of {self.env.label!r}")  # what the app's lifespan ends is the other one
        self._running: anyio.Event | None = None
        self._failure: Exception | None = None
        self.registry.gauge("connections", lambda: 0 if self._engine is None else self._engine.connections)

    async def _open(self) -> str:
        sockets, address = await bind(self._unix, self._host, self._port)
        try:
            if self._unix:
                await self._remember_socket()
            self._lifespan = Lifespan(self.middleware, self._serving)
            self._engine = engine_for(self._app, sockets, self._ssl, http2=self._http2)
            try:
                await self._lifespan.begin()
            except RuntimeError as error:
                raise ConfigurationError(f"{self.env.label}: the app could not start: {error}") from error
            self._running, self._failure = anyio.Event(), None
            run = functools.partial(self._run, self._engine, self._running, sockets)
            self._serving.start(run, name="serve HTTP", context=contextvars.copy_context())
            await self._engine.started.wait()
            if self._running.is_set() and not self._closing:
                failure = self._failure
                raise ConfigurationError(
                    f"{self.env.label}: the server could not start: {failure or 'it has ended at once'}"
                ) from failure
        except BaseException:
            await self._take_back(sockets)
            raise
        return address

    async def _take_back(self, sockets: list[socket.socket]) -> None:
        """Undo what was begun: whoever connects is to find nobody, and another attempt a clean table."""
        for each in sockets:
            each.close()
        with anyio.CancelScope(shield=True):
            await self._serving.stop()
            if self._socket is not None:
                await self._remove_socket(anyio.Path(self._unix), self._socket)
        self._engine = self._lifespan = self._running = self._socket = None

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        assert self._lifespan is not None  # noqa: S101
        if scope["type"] == "lifespan":  # hypercorn asks whatever one says; the app has answered us already
            for _ in range(2):
                await send({"type": f"{(await receive())['type']}.complete"})
            return
        scope["state"] = self._lifespan.state.copy()
        await self.middleware(scope, receive, send)

    async def _run(self, engine: Engine, running: anyio.Event, sockets: list[socket.socket]) -> None:
        try:
            await engine.run()
        except Exception as error:
            if engine.started.is_set():
                raise  # it is logged
            self._failure = error
        finally:
            for each in sockets:
                each.close()
            engine.started.set()
            running.set()

    async def _stop_accepting(self) -> None:
        self.middleware.drain()
        engine = self._engine
        if engine is not None and engine.connections:
            # Whoever has a connection learns from its next answer that it is the last.
            with anyio.move_on_after(min(self._linger, self.grace)):
                while engine.connections:  # noqa: ASYNC110 - the servers do not tell when one ends
                    await anyio.sleep(0.02)
        if engine is not None:
            engine.end()

    async def _drain(self) -> None:
        await self.middleware.wait_idle(float("inf"))
        if self._running is not None and self._lifespan is not None:
            await self._running.wait()
            await self._lifespan.end()

    async def _abort(self) -> None:
        if self._running is None or self._engine is None or self._lifespan is None:
            return
        with anyio.move_on_after(LAST_WORDS):
            await self.middleware.wait_idle(0)
            self._engine.hurry()
            await self._running.wait()
            await self._lifespan.end()
        await self._serving.aclose()
        await self.middleware.env.supervisor.stop()

    @property
    def _busy(self) -> str:
        return f"{0 if self._engine is None else self._engine.connections} connections"


def serve(
    app: Any,
    address: str = "http://127.0.0.1:0",
    *layers: Any,
    ssl: tls.SSLContext | None = None,
    http2: bool = False,
    label: str = "",
    grace: float | None = None,
    linger: float = LINGER,
    announce: Any = (),
    advertise: str = "",
    **options: Any,
) -> HttpServer:
    """Serve an ASGI app: ``async with http.serve(app, "http://127.0.0.1:8000") as server`` or ``await`` it.

    Args:
        app: FastAPI, Starlette or any other; one that is a `Middleware` is taken as it is.
        address: ``http://host:port`` or ``https://host:port`` (port 0 takes a free one), ``unix:///path``.
        layers: Of the server stack; see `Middleware`.
        ssl: With the server's certificate; it makes the difference between http and https.
        http2: Offer HTTP/2, by hypercorn.
        label: What the server is called in metrics, spans and logs; by default its address.
        grace: Seconds that closing waits for requests under way.
        linger: Seconds for which closing answers with ``Connection: close`` before the listener closes, while there are
            connections.
        announce: Where to announce the address; see `meshlib.serving.BaseServer`.
        advertise: The address to announce, if it is another.
        options: Of `Middleware`: ``trust_context``, ``health``, ``ready``, ``route``, ``stack``, ``clock``, ``seed``.

    Raises:
        ConfigurationError: Something makes no sense, or the package that would serve is not installed.
    """
    scheme, slashes, rest = address.partition("://")
    if slashes and scheme not in ("http", "https", "unix"):
        raise ConfigurationError(f"http.serve(…, {address!r}): expected http://host:port or https://host:port")
    if (scheme == "https") != (ssl is not None) and scheme != "unix":
        wanted = "ssl= is given, so say https://" if ssl is not None else "https:// needs ssl=, with a certificate"
        raise ConfigurationError(f"http.serve(…, {address!r}): {wanted}")
    if not (isinstance(linger, int | float) and linger >= 0):
        raise ConfigurationError(f"http.serve(linger={linger!r}): give seconds, 0 or more")
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise ConfigurationError(f"http.serve(…, {unknown[0]}=…): an ASGI app takes {', '.join(sorted(OPTIONS))}")
    if isinstance(app, Middleware):
        if layers or options:
            raise ConfigurationError("http.serve(Middleware(…), …): give layers and options to the Middleware")
        middleware = app
    else:
        middleware = Middleware(app, *layers, label=label or address, linger=None, **options)
    where = address if scheme == "unix" or not slashes else rest.rstrip("/")
    more = {} if grace is None else {"grace": grace}
    return HttpServer(
        middleware, where, ssl=ssl, http2=http2, linger=linger, announce=announce, advertise=advertise, **more
    )
