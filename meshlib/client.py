"""A client: a target plus a stack of layers. Read `default_layers` to know what happens to a request.

The stack has three parts. Above ``bind``, one logical call passes once. Between ``bind`` and ``balance`` it may pass
several times, once for each try that the layers above make. Below ``balance`` there is one copy for each endpoint.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, Self, TypeVar

import anyio

from .balancing.accrual import failure_accrual
from .balancing.balance import Balance
from .balancing.balancer import Balancer
from .balancing.failfast import failfast
from .balancing.node import Node
from .balancing.pool import Pool
from .core.classify import PartialClassifier, classify, complete
from .core.clock import Clock
from .core.env import Env, elsewhere
from .core.errors import ConfigurationError, ConnectError, MeshError, ServiceClosed
from .core.events import Decisions
from .core.health import Health
from .core.service import Lasting, ServiceFactory, Session, Status
from .core.stack import Layer, Stack
from .core.supervisor import Supervisor
from .filters.budget import budget_of
from .filters.requeue import Requeue
from .filters.retry import Retry
from .filters.source import Source
from .filters.throttle import throttle
from .filters.timeout import DEFAULT_TOTAL, TotalTimeout
from .names.addr import Address
from .names.bind import Bind, Binding
from .names.target import Target
from .names.watch import Watch
from .telemetry.metrics import Registry
from .telemetry.stats import EndpointStats, Stats
from .telemetry.tracing import ClientTracing

if TYPE_CHECKING:
    from .names.delegation import Delegation  # which only those need whose names are logical

__all__ = ["PLACES", "Client", "Connector", "Liveness", "Transport", "default_layers"]

Req = TypeVar("Req")
Rep = TypeVar("Rep")

PLACES: Final = (
    "trace",
    "stats",
    "source",
    "timeout",
    "rate_limit",
    "filters",
    "retry",
    "hedge",
    "bind",
    "requeue",
    "budget",
    "admission",
    "balance",
    "endpoint_stats",
    "accrual",
    "outlier",
    "failfast",
    "limit",
    "attempt_timeout",
    "fault",
    "pool",
    "liveness",
    "transport",
)
"""Every place of a client's stack, from the caller to the wire. Some are empty until a layer is given."""


def default_layers() -> tuple[Layer, ...]:
    """What a client does when it is told nothing."""
    return (
        ClientTracing(),  #              trace: an id for the call; a span if OpenTelemetry is configured
        Stats(),  #                      stats: requests, success, failures, latency of logical calls
        Source(),  #                     source: errors tell client, name, endpoints and reasons
        TotalTimeout(DEFAULT_TOTAL),  #  timeout: the deadline of the whole call
        #                                filters: what users add
        Retry(),  #                      retry: idempotent calls that failed in a way that may pass
        #                                hedge: nothing yet
        Bind(),  #                       bind: the name becomes clusters that follow it, by way of Dtabs
        Requeue(),  #                    requeue: what was never processed goes elsewhere
        throttle(),  #                   admission: less is sent while servers refuse most of it
        Balance(),  #                    balance: one of the ready endpoints, by P2C over peak EWMA
        # per endpoint
        EndpointStats(),  #              endpoint_stats: the same numbers for each attempt
        failure_accrual(),  #            accrual: an endpoint that keeps failing is left alone for a while
        #                                outlier: nothing unless given
        failfast(),  #                   failfast: no connection, no requests; reconnects in the background
        #                                attempt_timeout: none unless given
        Pool(),  #                       pool: one shared session
        Liveness(),  #                   liveness: pings
        Transport(),  #                  transport: connecting
    )


class Connector(Protocol):
    """How a protocol makes a session with an endpoint."""

    protocol: ClassVar[str]
    """Its name, such as ``mux``."""
    keeps_deadline: ClassVar[bool]
    """Do its sessions stop waiting when the context's deadline passes? See ``core/deadlines.py``."""
    # One whose replies may last beyond the call has a function ``lasting(reply)`` besides: see `Lasting`.

    async def connect(self, address: Address, env: Env, liveness: Liveness | None) -> Session[Any, Any]:
        """Connect, and do whatever handshake the protocol has.

        Raises:
            MeshError: It failed.
            OSError: It failed.
        """
        ...


class Liveness:
    """Finds out that a connection is dead although nobody closed it.

    Args:
        interval: Seconds from one ping to the next (Finagle's ThresholdFailureDetector: 5).
        timeout: Seconds to wait for its answer before the session is given up (likewise: 4).
    """

    place: ClassVar[str] = "liveness"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, interval: float = 5.0, timeout: float = 4.0) -> None:
        if not (interval > 0 and timeout > 0):
            raise ConfigurationError(f"liveness(interval={interval!r}, timeout={timeout!r}): give seconds above 0")
        self.interval, self.timeout = interval, timeout

    def build(self, env: Env, below: Any) -> Any:
        """Sessions do the pinging; they look here for how."""
        env.params[Liveness] = self
        return below

    def __repr__(self) -> str:
        return f"liveness(ping every {self.interval:g} s, answer within {self.timeout:g} s)"


class Transport(ServiceFactory[Any, Any]):
    """Makes connections.

    Args:
        connect_timeout: Seconds until a connect is given up (Finagle's Transporter: 1). A protocol's own handshake,
            which the server's own load may delay, may take as long again after it.
    """

    place: ClassVar[str] = "transport"
    keeps_deadline: ClassVar[bool] = True

    def __init__(
        self, connect_timeout: float = 1.0, connector: Connector | None = None, env: Env | None = None
    ) -> None:
        if not connect_timeout > 0:
            raise ConfigurationError(f"transport(connect_timeout={connect_timeout!r}): give seconds, above 0")
        self.connect_timeout = connect_timeout
        self._connector = connector
        self._env = env or Env()

    def build(self, env: Env, below: Connector) -> Any:
        """A factory of sessions with one endpoint. Protocols look in the parameters for the connect timeout."""
        env.params[Transport] = self
        return type(self)(self.connect_timeout, below, env)

    async def acquire(self) -> Session[Any, Any]:
        """Connect to the endpoint.

        Raises:
            ConnectError: It cannot be done, or not in time.
        """
        address, env = self._env.address, self._env
        assert self._connector is not None  # noqa: S101
        liveness = env.params.get(Liveness)
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + 2 * self.connect_timeout):
                return await self._connector.connect(address, env, liveness)
        except ConnectError as error:
            error.endpoint = error.endpoint or str(address)
            raise
        except MeshError as error:
            raise ConnectError(error.message, endpoint=str(address)) from error
        except OSError as error:
            raise ConnectError(describe(error), endpoint=str(address)) from error
        raise ConnectError(f"no session within {2 * self.connect_timeout:g} s of connecting", endpoint=str(address))

    def __repr__(self) -> str:
        return f"transport(connect_timeout={self.connect_timeout:g} s)"


def describe(error: OSError) -> str:
    """What an operating system's error says, in a few words; anyio wraps the real one."""
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    inner = cause if isinstance(cause, OSError) else error
    # asyncio puts words of its own where the system's would be; the number tells what those were.
    number = inner.errno or 0
    return f"connect failed: {os.strerror(number) if number > 0 else inner.strerror or inner}"


class _Cluster:
    """A watched target, and all that is below ``bind`` for it."""

    def __init__(self, service: Any, watch: Watch, env: Env) -> None:
        self.service = service
        self._watch = watch
        self._balancer: Balancer = env.params[Balancer]

    @property
    def status(self) -> Status:
        return self._balancer.status

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self._balancer.nodes

    def start(self) -> None:
        self._watch.start()
        self._balancer.follow(self._watch)

    def close(self) -> None:
        self._balancer.close()
        self._watch.close()


class Client(Generic[Req, Rep]):
    """A service over a target, with the client stack around it.

    Use it with ``async with``, or bare: it starts with the first call, and `aclose` ends it. It may be opened in one
    task and closed in another.

    Args:
        target: Where to: ``host:port[,host:port…]``, ``unix:///path``, ``file:///path``, ``dns://…``, ``srv://…``,
            ``zk://…``, ``k8s://…``, or ``/logical/path``, which Dtabs make one of these of.
        connector: The protocol.
        layers: Each replaces the default at its place; plain filters are added.
        label: What the client is called in metrics, spans and errors.
        stack: Changes the stack in ways that a layer alone cannot say: ``lambda s: s.insert_before("retry", mine)``.
        clock: What time it is; for tests.
        seed: Of the client's random choices; for tests.
        classifier: Which outcomes are failures; the default decides what it leaves open.

    Raises:
        ConfigurationError: The target or a layer makes no sense.
    """

    def __init__(
        self,
        target: str,
        connector: Connector,
        *layers: Any,
        label: str = "",
        stack: Callable[[Stack], Stack] | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
        classifier: PartialClassifier = classify,
    ) -> None:
        self.registry = Registry()
        self.stack = Stack(PLACES, default_layers()).with_layers(*layers)
        if stack is not None:
            self.stack = stack(self.stack)
        for place in ("bind", "balance", "pool", "transport"):
            if self.stack.find(place) is None:
                raise ConfigurationError(f"a client cannot do without a layer at {place!r}; replace it instead")
        clock = clock or Clock()
        parsed = Target.parse(target)
        shown = str(parsed)
        self.env = Env(
            kind="client",
            label=label or shown,
            name=shown,
            params={Target: parsed},
            protocol=connector.protocol,
            clock=clock,
            rng=random.Random(seed),
            metrics=self.registry,
            events=Decisions(clock, self.registry),
            supervisor=Supervisor(f"client {label or shown!r}"),
            classifier=complete(classifier),
        )
        self._service: Callable[[Req], Awaitable[Rep]] = self._build(connector)
        self._binding: Binding = self.env.params[Binding]
        self._started = False
        self._closed = False

    def _build(self, connector: Connector) -> Any:
        self.env.params[Lasting] = getattr(connector, "lasting", None)
        top, rest = self.stack.split("bind")
        middle, endpoint = rest.split("balance")
        below = self.stack.split("timeout")[1]
        kept = connector.keeps_deadline and all(getattr(layer, "keeps_deadline", False) for layer in below)
        budget = middle.find("budget")
        if budget is not None:  # one for all clusters, and for the layers above them
            budget.build(self.env, None)
            middle = middle.remove("budget")
        if isinstance(middle.find("requeue"), Requeue):
            budget_of(self.env).fed = True  # which the retries above must know, before there is any cluster

        def cluster(watch: Watch, env: Env) -> _Cluster:
            def node(address: Address, health: Health) -> Node:
                own = env.evolve(address=address, health=health, closers=[])
                return Node(address, endpoint.build(own, connector), own)

            return _Cluster(middle.build(env, node), watch, env)

        return top.build(self.env.evolve(deadline_kept=kept), cluster)

    async def __call__(self, request: Req) -> Rep:
        """Make one call.

        Raises:
            MeshError: It failed; the error says where, how often and why.
        """
        if not self._started:
            self.start()
        if self._closed:
            raise ServiceClosed(f"client {self.env.label!r} is closed")
        try:
            return await self._service(request)
        except Exception as error:
            if self.env.supervisor.elsewhere:
                raise elsewhere(self.env) from error
            raise

    def start(self) -> None:
        """Begin to resolve the target. Needs a running event loop; the first call does it as well."""
        if not self._started and not self._closed:
            self._binding.start()
            self._started = True

    async def aclose(self) -> None:
        """Close every connection. Calls under way fail; closing twice is the same as closing once."""
        self._closed = True
        if not self.env.supervisor.elsewhere:
            self._binding.close()
        await self.env.supervisor.aclose()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.__aenter__().__await__()

    @property
    def status(self) -> Status:
        """Closed once `aclose` was called, else the best of its endpoints' (busy before any is known)."""
        if self._closed:
            return Status.CLOSED
        return max(self._binding.status, Status.BUSY)

    @property
    def events(self) -> Decisions:
        """What its layers decide, and why: ``client.events.listen(print)``."""
        return self.env.events

    @property
    def endpoints(self) -> tuple[Node, ...]:
        """Its endpoints; each prints its status, the reason for it, and its load."""
        return self._binding.nodes

    async def delegate(self) -> Delegation:
        """Where a call made here and now would go, and why, as a tree that prints readably; see `meshlib.delegate`.

        Raises:
            ConfigurationError: The client's target is no logical path.
            ResolutionError: Its base Dtab has not been read yet.
        """
        if self._closed:
            raise ServiceClosed(f"client {self.env.label!r} is closed")
        self.start()
        return await self._binding.delegate()

    def metrics(self) -> dict[str, float]:
        """Every number this client keeps, by name: ``requests``, ``success``, ``request_latency_ms.p99``, …"""
        return self.registry.snapshot()

    def __repr__(self) -> str:
        head = f"client {self.env.label!r} -> {self._binding!r} ({self.env.protocol})"
        return (
            head + "\n" + self.stack.describe(heading=lambda p: "-- per endpoint --" if p == "endpoint_stats" else None)
        )
