"""The server stack around any ASGI app.

For each request, from the outside in: its headers become the `Context` that the app and the calls it makes run under;
the stack of ``meshlib/server.py`` stands around the app (span, metrics, deadline, limit); a deadline that passes, or a
client that leaves, cancels the app. What the stack refuses is answered here, as problem+json. What the app raises goes
on to the server as it would have without us, since the framework's own handlers and logs are made for it. What the app
does after its response concerns no layer and no caller any more; only to drain is to wait for it.

Inside another `Middleware`, one that has been given nothing does nothing: it was most likely added twice. One with
layers, or that does not trust, does what it was told inside the other's work, under the other's context.

Requests for health are passed on untouched: a server that is full must still be able to say that it is alive.
On SIGTERM the app drains; see ``drain.py``.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import anyio
import anyio.lowlevel

from ..core.classify import ResponseClass, classify
from ..core.clock import Clock
from ..core.context import SCOPE, VAR, Context
from ..core.deadlines import passed
from ..core.env import Env
from ..core.errors import ConfigurationError, DeadlineExceeded, MeshError, Rejected
from ..core.events import Decisions
from ..core.stack import Stack
from ..core.supervisor import Job, Supervisor
from ..filters.mapping import is_meant
from ..server import PLACES, default_layers
from ..serving import GRACE
from ..telemetry.http import HttpServerTracing
from ..telemetry.metrics import Registry
from ..telemetry.stats import Stats
from .completion import Early
from .drain import LINGER, SignalWatch
from .exchange import NOTICE, Exchange
from .headers import HeaderReader
from .problem import Answer, answer_to, problem
from .routes import RouteStats, route_of

__all__ = ["HEALTH", "READY", "Middleware"]

App = Callable[[Any, Any, Any], Awaitable[None]]

READY: Final = ("/ready", "/readyz", "/health/ready", "/-/ready")
"""Paths of readiness: 503 once the app drains."""
HEALTH: Final = (*READY, "/health", "/healthz", "/health/live", "/live", "/livez", "/-/healthy", "/ping")
"""Paths that no limit applies to."""
MOST_HEADERS: Final = 65_536
"""Bytes of all headers: h11's limit for one request's head. Servers that have none of their own are given this one."""
PATIENCE: Final = 0.1
"""Seconds after which somebody looks whether a request's client is still there. Quicker ones are spared the task."""
LAST_WORDS: Final = 2.0
"""Seconds for the answers to requests that were cut off, where the process ends after them."""
LEFT: Final = Answer(499)
"""For a client that has left. No server sends it, but what stands around us may be lost without an answer."""
MARK: Final = "meshlib"
DISCONNECT: Final = "ClientDisconnect"
"""What Starlette raises where an app reads a body whose client has left. By its name: not every app is Starlette's."""


class Middleware:
    """The server stack around an ASGI app: ``app.add_middleware(meshlib.http.Middleware)``, or ``Middleware(app)``.

    Args:
        app: The app.
        layers: Each replaces the default at its place; plain filters are added above the app, and see an `Exchange`
            (``method``, ``path``, ``scope``; ``status`` once it is answered) both as request and as reply.
        label: What the server is called in metrics, spans and logs.
        trust_context: ``False`` for servers that face strangers: of what a caller sends along, only the deadline and
            the trace are kept; see `meshlib.core.context.Context.distrusted`.
        health: Paths that no limit applies to; neither are they counted.
        ready: Those of them that say whether new requests are welcome: 503 while the app drains.
        route: What a request's route is, given its scope after the app has had it; for frameworks that do not say.
        linger: Seconds from SIGTERM until the server hears of it. ``None``: SIGTERM is none of ours.
        grace: Seconds from then on, after which requests that are still under way are cancelled.
        stack: Changes the stack in ways that a layer alone cannot say: ``lambda s: s.remove("limit")``.
        clock: What time it is; for tests.
        seed: Of random choices; for tests.

    Attributes:
        draining: New requests are not welcome.

    A request that passes it finds it as ``scope["meshlib"]``, for `metrics`.

    Raises:
        ConfigurationError: A layer or an option makes no sense.
    """

    def __init__(
        self,
        app: App,
        *layers: Any,
        label: str = "http",
        trust_context: bool = True,
        health: Iterable[str] = HEALTH,
        ready: Iterable[str] = READY,
        route: Callable[[Any], str] = route_of,
        linger: float | None = LINGER,
        grace: float = GRACE,
        stack: Callable[[Stack], Stack] | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
    ) -> None:
        if not callable(app):
            raise ConfigurationError(f"Middleware({app!r}): give an ASGI app first")
        if isinstance(health, str) or isinstance(ready, str):
            raise ConfigurationError("Middleware(health=…, ready=…): give lists of paths")
        if not grace >= 0 or not (linger is None or linger >= 0):
            raise ConfigurationError(f"Middleware(linger={linger!r}, grace={grace!r}): give seconds, 0 or more")
        self.app = app
        self.registry = Registry()
        self.stack = Stack(PLACES, default_layers()).with_layers(HttpServerTracing(), Early(Stats()))
        # What the app raises is for the framework and the server to handle, whose users expect it there.
        self.stack = self.stack.remove("errors").insert_after("stats", RouteStats(route)).with_layers(*layers)
        if stack is not None:
            self.stack = stack(self.stack)
        self._clock = clock = clock or Clock()
        self.env = Env(
            kind="server",
            label=label,
            name=label,
            protocol="http",
            clock=clock,
            rng=random.Random(seed),
            metrics=self.registry,
            events=Decisions(clock, self.registry),
            supervisor=Supervisor(f"server {label!r}"),
            classifier=_judge,
        )
        self._told_nothing = not layers and trust_context and stack is None and health == HEALTH and ready == READY
        self._trust = trust_context
        self._ready = frozenset(ready)
        self._health = frozenset(health) | self._ready
        self._linger, self._grace = linger, grace
        undecodable = self.registry.counter("undecodable_headers")
        self._reader = HeaderReader(clock, trust=trust_context, undecodable=undecodable)
        self._disconnects = self.registry.counter("disconnects")
        self._service = self.stack.build(self.env, self._call)
        self._exchanges: set[Exchange] = set()
        self._empty: anyio.Event | None = None
        self._looking: Job | None = None
        self._signals = SignalWatch(self._terminated)
        self.draining = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI connection."""
        kind, outer = scope["type"], scope.get(MARK)
        if outer is not None and (self._told_nothing or outer is self):
            await self.app(scope, receive, send)
        elif kind == "http":
            path = scope["path"]
            if path not in self._health:
                root = scope.get("root_path")
                if root and path.startswith(root):  # as the app knows it
                    path = path[len(root) :]
            if path not in self._health:
                await self._handle(scope, receive, send, outer)
            elif path in self._ready and (self.draining or (outer is not None and outer.draining)):
                await problem(503, "the server is draining").send(send)
            else:
                await self.app(scope, receive, send)
        elif kind == "lifespan":
            await self._live(scope, receive, send, outer)
        elif kind == "websocket":
            await self._connect(scope, receive, send, outer)
        else:
            await self.app(scope, receive, send)

    async def _connect(self, scope: Any, receive: Any, send: Any, outer: Any) -> None:
        # A WebSocket's messages are the app's own; what it calls inherits the context all the same.
        token = VAR.set(self._context(scope["headers"], outer).evolve(deadline=None))
        try:
            await self.app(scope, receive, send)
        finally:
            VAR.reset(token)

    def _context(self, headers: Any, outer: Any) -> Context:
        if outer is None:
            return self._reader.read(headers)
        context = VAR.get()
        return context if self._trust else context.distrusted()

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _handle(self, scope: Any, receive: Any, send: Any, outer: Any) -> None:
        if outer is None:
            if self._linger is not None and not self._signals.watching and not self.draining:
                self._signals.start()  # servers without lifespan say nothing before the first request
            scope[MARK] = self
        headers = scope["headers"]
        if sum(map(_size, headers)) > MOST_HEADERS:
            await problem(431, f"headers of more than {MOST_HEADERS} bytes").send(send)
            return
        context = self._context(headers, outer)
        cancel = anyio.CancelScope()
        exchange = Exchange(scope, receive, send, self.env, cancel)
        if self.draining:
            exchange.close_after()
        self._exchanges.add(exchange)
        if self._looking is None:
            self._looking = self.env.supervisor.start(self._look, name="clients that leave")
        in_context, in_scope = VAR.set(context), SCOPE.set(cancel)
        answer = LEFT
        try:
            with cancel:
                await self._service(exchange)
                return
            if exchange.complete:  # what it did afterwards was cut off: nobody waits for that
                return
            if exchange.gone:
                self._disconnects.value += 1
            else:
                answer = answer_to(self._cut_off(context.deadline))
        except MeshError as error:
            if exchange.started or not self._is_ours(error, context.deadline):
                raise
            answer = answer_to(error)
        finally:
            VAR.reset(in_context)
            SCOPE.reset(in_scope)
            self._exchanges.discard(exchange)
            if self._empty is not None and not self._exchanges:
                self._empty.set()
            exchange.end()
            if exchange.watcher is not None:
                exchange.watcher.cancel()
        if not exchange.started:
            # A response that has begun cannot be taken back: the server sees it end too early, and cuts the connection.
            await exchange.conclude(answer)

    async def _call(self, exchange: Exchange) -> Exchange:
        exchange.deadline = deadline = VAR.get().deadline
        try:
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except Exception as error:
            if isinstance(error, MeshError) and self._is_ours(error, deadline):
                exchange.forget()
            else:
                await exchange.release()
            # A body that breaks off is the client's doing, and no crash of ours.
            if not (exchange.gone and type(error).__name__ == DISCONNECT):
                raise
        except BaseException:
            if exchange.lifted:  # so it was not the deadline, though it may have passed; nobody is to think so
                VAR.set(VAR.get().evolve(deadline=None))
            raise
        if not exchange.complete:
            await self._see_why(exchange)
        return exchange

    async def _see_why(self, exchange: Exchange) -> None:
        """The app has returned, and has not answered, or not to the end."""
        await exchange.release()
        if exchange.complete:
            return
        if exchange.late:
            raise self._cut_off(exchange.deadline)
        if exchange.gone or exchange.dismissed or exchange.cancel.cancel_called:
            exchange.cancel.cancel()
            await anyio.lowlevel.checkpoint()

    def _cut_off(self, deadline: float | None) -> MeshError:
        if passed(deadline, self._clock):
            return DeadlineExceeded("the deadline passed while the request was handled", processed=True)
        error = Rejected("the server is closing, and the request was still under way")
        error.processed = None
        return error

    def _is_ours(self, error: MeshError, deadline: float | None) -> bool:
        return is_meant(error) or (isinstance(error, DeadlineExceeded) and passed(deadline, self._clock))

    async def _look(self) -> None:
        """See to it that requests which take their time are watched, all of them by one task."""
        try:
            while self._exchanges:
                await anyio.sleep(PATIENCE)
                since = self._clock.now() - PATIENCE
                for exchange in self._exchanges:
                    if exchange.began <= since and exchange.watchable:
                        exchange.watcher = self.env.supervisor.start(exchange.watch, name=exchange.dest)
        finally:
            self._looking = None

    # --- the life of the app ------------------------------------------------------------------------------------------

    async def _live(self, scope: Any, receive: Any, send: Any, outer: Any) -> None:
        scope.setdefault(MARK, self)
        self.draining = False  # it may have served before

        async def sent(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete" and self._linger is not None and outer is None:
                self._signals.start()
            if message["type"].startswith("lifespan.shutdown."):
                await self._end_life()  # before it is told: hypercorn cancels whoever goes on after it
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            await self._end_life()

    async def _end_life(self) -> None:
        self._signals.stop()
        with anyio.CancelScope(shield=True):
            await self.env.supervisor.stop()

    def drain(self) -> None:
        """New requests are not welcome any more: readiness is off, and connections end with their next answer."""
        self.draining = True
        for exchange in self._exchanges:
            exchange.close_after()

    async def wait_idle(self, grace: float | None = None) -> None:
        """Wait for the requests under way; cancel what is left after the grace period.

        Args:
            grace: Seconds, if not those of the middleware.
        """
        try:
            await self._until_idle(self._grace if grace is None else grace)
            listening = [exchange for exchange in self._exchanges if exchange.dismiss()]
            if listening:
                await anyio.sleep(NOTICE)
        finally:
            for exchange in tuple(self._exchanges):
                exchange.cancel.cancel()

    async def _until_idle(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            while self._exchanges:
                if self._empty is None or self._empty.is_set():
                    self._empty = anyio.Event()
                await self._empty.wait()

    def _terminated(self) -> None:
        self.drain()
        self.env.supervisor.start(self._end, name="drain")

    async def _end(self) -> None:
        await anyio.sleep(self._linger or 0.0)
        if self._signals.alone:  # to pass it on is to end the process, with all that is under way
            await self.wait_idle()
            await self._until_idle(LAST_WORDS)
        self._signals.pass_on()
        await self.wait_idle()

    def metrics(self) -> dict[str, float]:
        """Every number this server keeps, by name."""
        return self.registry.snapshot()

    @property
    def events(self) -> Decisions:
        """What its layers decide, and why: ``middleware.events.listen(print)``."""
        return self.env.events

    def __repr__(self) -> str:
        state = ", draining" * self.draining
        return f"middleware {self.env.label!r} ({len(self._exchanges)} requests{state})\n" + self.stack.describe()


def _size(header: tuple[bytes, bytes]) -> int:
    return len(header[0]) + len(header[1])


def _judge(request: Any, reply: Any, error: BaseException | None) -> ResponseClass:
    return ResponseClass.FAILURE if getattr(reply, "failed", False) else classify(request, reply, error)
