"""What a simulation consists of, as values: servers, clients, the load, and what goes wrong when.

All times are seconds from the beginning. ``Scenario(…).run()`` plays it in virtual time, and gives a `Report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from ..core.errors import ConfigurationError
from ..core.priority import Priority
from ..core.stack import Stack
from .checks import number, one_of, whole
from .faults import Fault
from .latency import Latency, as_latency
from .network import WIRES, Wire
from .workers import ABANDONED, Abandoned

if TYPE_CHECKING:
    from .cluster import Cluster, Host
    from .report import Report

__all__ = ["Calls", "Clients", "Load", "Scenario", "Servers"]

Layers = Sequence[Any] | Callable[[int], Sequence[Any]]
Change = Callable[[Stack], Stack]

T = TypeVar("T")

DEFAULT_NAME: Final = "servers"


def _several(given: T | Sequence[T]) -> tuple[T, ...]:
    return tuple(given) if isinstance(given, Sequence) else (given,)


def _priority(value: Any) -> Priority:
    if isinstance(value, str) and value.upper() in Priority.__members__:
        return Priority[value.upper()]
    if isinstance(value, Priority):
        return value
    names = ", ".join(repr(each.name.lower()) for each in Priority)
    raise ConfigurationError(f"priority={value!r}: there are {names}")


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What a server's handler calls before it answers: the next tier, through a client of its own.

    Attributes:
        to: The name of the servers that it calls.
        layers: Of that client, as for `meshlib.mux.client`; or a function from the server's number to them.
        stack: Changes that client's stack.
        fan_out: How many calls it makes at once. The handler fails if one of them does.
        idempotent: May these be repeated?
    """

    to: str
    layers: Layers = ()
    stack: Change | None = None
    fan_out: int = 1
    idempotent: bool = True

    def __post_init__(self) -> None:
        whole("fan_out", self.fan_out, 1)


@dataclass(frozen=True)
class Servers:
    """Servers that are alike.

    Attributes:
        count: How many.
        latency: How long the handler takes: seconds, or a `Latency`.
        name: The name that they are found under. Several `Servers` may share one; their numbers go on.
        workers: How many requests are worked on at once, the others waiting their turn; ``None`` for all of them.
        abandoned: What becomes of work whose caller has given up, where there are workers; see `Workers`.
        layers: Of each server, as for `meshlib.mux.serve`; or a function from the server's number to them.
        stack: Changes their stack.
        calls: What the handler calls after its own work, if anything.
        handler: Instead of all that: a function from the `Host` to the service that it serves.
        weight: The weight of their addresses.
        metadata: What their addresses say of them, such as ``{"zone": "a"}``.
    """

    count: int = 1
    latency: Latency | float = 0.01
    name: str = field(default=DEFAULT_NAME, kw_only=True)
    workers: int | None = field(default=None, kw_only=True)
    abandoned: Abandoned = field(default="dropped", kw_only=True)
    layers: Layers = field(default=(), kw_only=True)
    stack: Change | None = field(default=None, kw_only=True)
    calls: Calls | None = field(default=None, kw_only=True)
    handler: Callable[[Host], Any] | None = field(default=None, kw_only=True)
    weight: float = field(default=1.0, kw_only=True)
    metadata: dict[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        whole("count", self.count, 1)
        as_latency(self.latency)
        if self.workers is not None:
            whole("workers", self.workers, 1)
        one_of("abandoned", self.abandoned, ABANDONED)


@dataclass(frozen=True)
class Clients:
    """Clients that are alike, each with connections, balancer and budget of its own.

    Attributes:
        count: How many.
        layers: Of each, as for `meshlib.mux.client`; or a function from the client's number to them.
        to: The name that they call.
        name: What they are called, with a number, in metrics and errors.
        stack: Changes their stack.
    """

    count: int = 1
    layers: Layers = ()
    to: str = field(default=DEFAULT_NAME, kw_only=True)
    name: str = field(default="clients", kw_only=True)
    stack: Change | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        whole("count", self.count, 1)


@dataclass(frozen=True)
class Load:
    """Requests that come at their own pace, whether or not earlier ones have been answered (an open loop).

    Attributes:
        rate: Requests a second, of all clients together; they take turns.
        start: When it begins.
        until: When it ends; ``None`` for the end of the scenario.
        to: The rate at the end, which it then approaches in a straight line.
        spacing: ``"even"``, or ``"poisson"`` for arrivals that know nothing of each other.
        priority: Of each request.
        idempotent: May requests be repeated?
        timeout: The deadline that the caller of the client sets, in seconds from the arrival; ``None`` for none.
        fan_out: How many calls one request makes at once; it is answered when all are, and fails when one does.
        clients: Whose calls these are.
        name: What to call it in the report.
    """

    rate: float
    start: float = field(default=0.0, kw_only=True)
    until: float | None = field(default=None, kw_only=True)
    to: float | None = field(default=None, kw_only=True)
    spacing: Literal["even", "poisson"] = field(default="poisson", kw_only=True)
    priority: Priority | str = field(default=Priority.DEFAULT, kw_only=True)
    idempotent: bool = field(default=True, kw_only=True)
    timeout: float | None = field(default=None, kw_only=True)
    fan_out: int = field(default=1, kw_only=True)
    clients: str = field(default="clients", kw_only=True)
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        number("rate", self.rate, above=0)
        number("start", self.start)
        if self.until is not None:
            number("until", self.until, above=self.start)
        if self.to is not None:
            number("to", self.to)
        if self.timeout is not None:
            number("timeout", self.timeout, above=0)
        one_of("spacing", self.spacing, ("even", "poisson"))
        whole("fan_out", self.fan_out, 1)
        object.__setattr__(self, "priority", _priority(self.priority))


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A whole simulation.

    Attributes:
        servers: One kind, or several.
        clients: One kind, or several.
        load: One kind, or several.
        faults: What goes wrong, and when; see ``faults.py``.
        duration: Seconds of load.
        seed: Of everything that is left to chance.
        wire: ``"direct"``, or ``"mux"`` for real sessions, which take two or three times as long.
        network: One-way latency between any two: seconds, or a `Latency`.
        settle: Seconds after the load that requests may take to end; what has not ended by then counts as failed.
        within: An answer counts as a success if it took no longer than so many seconds.
        windows: Stretches of time to report on, as (since, until); by default those between the faults.
        during: An async function of the `Cluster` that runs beside the load, for what no fault of the list says.
        title: What to call it.
    """

    servers: Servers | Sequence[Servers]
    load: Load | Sequence[Load]
    clients: Clients | Sequence[Clients] = Clients()
    faults: Sequence[Fault] = ()
    duration: float = 60.0
    seed: int = 1
    wire: Wire = "direct"
    network: Latency | float = 0.0
    settle: float = 60.0
    within: float = float("inf")
    windows: Sequence[tuple[float, float]] = ()
    during: Callable[[Cluster], Any] | None = None
    title: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("servers", Servers), ("clients", Clients), ("load", Load)):
            given = getattr(self, name)
            if not (many := _several(given)) or not all(isinstance(each, kind) for each in many):
                raise ConfigurationError(f"{name}={given!r}: give {kind.__name__}(…), or several in a list")
        number("duration", self.duration, above=0)
        number("settle", self.settle)
        if not self.within > 0:
            raise ConfigurationError(f"within={self.within!r}: give seconds, above 0")
        for window in self.windows:
            if not (len(window) == 2 and 0 <= window[0] < window[1]):
                raise ConfigurationError(f"windows: {window!r} is none; give (since, until) in seconds, since < until")
        if self.wire not in WIRES:
            raise ConfigurationError(f"wire={self.wire!r}: there are {' and '.join(map(repr, WIRES))}")
        as_latency(self.network)
        names = {each.name for each in self.server_kinds}
        calling = [each.to for each in self.client_kinds]
        calling += [each.calls.to for each in self.server_kinds if each.calls is not None]
        for to in calling:
            if to not in names:
                raise ConfigurationError(f"to={to!r}: there are no such servers; there are {', '.join(sorted(names))}")
        callers = {each.name for each in self.client_kinds}
        for load in self.loads:
            if load.clients not in callers:
                there = ", ".join(sorted(callers))
                raise ConfigurationError(f"clients={load.clients!r}: there are no such clients; there are {there}")

    @property
    def server_kinds(self) -> tuple[Servers, ...]:
        """The kinds of servers, one or several."""
        return _several(self.servers)

    @property
    def client_kinds(self) -> tuple[Clients, ...]:
        """The kinds of clients, one or several."""
        return _several(self.clients)

    @property
    def loads(self) -> tuple[Load, ...]:
        """The loads, one or several."""
        return _several(self.load)

    def run(self) -> Report:
        """Play it in virtual time. The same scenario gives the same report."""
        from .cluster import play
        from .virtual import run_virtual

        return run_virtual(play, self, seed=self.seed)
