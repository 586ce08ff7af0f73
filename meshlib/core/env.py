"""What a layer is told about the client or server that it is built into: Finagle's Stack.Params, as one typed object.

Filters composed by hand with ``>>`` have no client around them; they use an `Env` of their own with the defaults.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from .classify import Classifier, classify
from .clock import Clock
from .context import CLOCK
from .errors import ConfigurationError
from .events import Decisions
from .health import Health
from .supervisor import Supervisor

__all__ = ["Counter", "Env", "Histogram", "Metrics", "NoMetrics", "elsewhere"]

T = TypeVar("T")


class Counter(Protocol):
    """Counts things that happened."""

    value: int


class Histogram(Protocol):
    """The distribution of a quantity."""

    def record(self, value: float) -> None:
        """Take note of one value."""
        ...


class Metrics(Protocol):
    """A place for numbers, with names below one scope."""

    def counter(self, name: str) -> Counter:
        """The counter of that name, made when it is first asked for."""
        ...

    def histogram(self, name: str) -> Histogram:
        """The histogram of that name, made when it is first asked for."""
        ...

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Let ``read`` answer for ``name`` whenever somebody looks."""
        ...

    def scope(self, *names: str) -> Metrics:
        """The same place, one level down."""
        ...

    def drop(self) -> None:
        """Forget this scope and what is below it."""
        ...


class _Nothing:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def record(self, value: float) -> None:
        pass


class NoMetrics:
    """Numbers that nobody reads."""

    def counter(self, name: str) -> Counter:
        """A counter that nobody reads."""
        return _Nothing()

    def histogram(self, name: str) -> Histogram:
        """A histogram that nobody reads."""
        return _Nothing()

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Do nothing."""

    def scope(self, *names: str) -> Metrics:
        """The same."""
        return self

    def drop(self) -> None:
        """Do nothing."""


def elsewhere(env: Env) -> ConfigurationError:
    """The error of a client that is used on another event loop than before."""
    return ConfigurationError(
        f"{env.kind} {env.label!r} was used on another event loop before, and its connections ended with that; "
        "make one for each event loop"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """The surroundings of a layer.

    Attributes:
        kind: ``"client"`` or ``"server"``.
        label: What the client or server is called, in metrics, spans and errors.
        name: The target as the user wrote it, or the address a server listens on.
        protocol: ``"mux"``, …
        clock: What time it is.
        rng: Where chance comes from.
        metrics: Where numbers go.
        supervisor: Where background work goes.
        events: Where layers say what they decided, and why.
        classifier: What is a failure.
        address: The endpoint, for layers below the balancer.
        health: The endpoint's account of itself, for layers below the balancer.
        closers: What to close when the endpoint is dropped; layers append to it as they are built.
        deadline_kept: Every layer and session below bounds its own waits by the context's deadline.
        params: Values that some layers leave for others, by type.
    """

    kind: str = "client"
    label: str = ""
    name: str = ""
    protocol: str = ""
    clock: Clock = CLOCK
    rng: random.Random = field(default_factory=random.Random)
    metrics: Metrics = field(default_factory=NoMetrics)
    supervisor: Supervisor = field(default_factory=Supervisor)
    events: Decisions = field(default_factory=lambda: Decisions(CLOCK, NoMetrics()))
    classifier: Classifier = classify
    address: Any = None
    health: Health = field(default_factory=Health)
    closers: list[Callable[[], Any]] = field(default_factory=list)
    deadline_kept: bool = False
    params: dict[type, Any] = field(default_factory=dict)

    def shared(self, kind: type[T], make: Callable[[], T]) -> T:
        """The one ``kind`` of this client or server, made by whoever asks first."""
        if kind not in self.params:
            self.params[kind] = make()
        value: T = self.params[kind]
        return value

    def evolve(self, **changes: Any) -> Env:
        """A copy with some fields changed."""
        return replace(self, **changes)
