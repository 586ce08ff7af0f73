"""What goes wrong in a simulation, as values on a timeline.

Each fault names the servers that it befalls, by number (of the first name) or as ``"name/number"``, and lasts from
``at`` to ``until``; with a ``period`` it comes and goes (flaps), there for the first ``share`` of each period.

* `slow`: everything takes longer, by a factor that may change over its time (a cold start: ``slow(5, to=1)``).
* `errors`: a share of the requests fails, each after so long.
* `hang`: requests are accepted and never answered; the connection lives.
* `black_hole`: nothing arrives in either direction, and nobody is told.
* `crash`: connections are reset, work under way is lost, new connections are refused.
* `restart`: the server drains for ``grace`` seconds, is away, and comes back as new.
* `remove` and `add`: the server leaves the name, or joins it late; it runs all the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from ..core.errors import ConfigurationError, Rejected, RemoteError

if TYPE_CHECKING:
    from .cluster import Host

__all__ = ["FOREVER", "Fault", "add", "black_hole", "crash", "errors", "hang", "remove", "restart", "slow"]

FOREVER: Final = float("inf")

Which = int | str | Sequence[int | str] | None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that befalls servers for a time. Make one with the functions of this module.

    Attributes:
        servers: Whom; ``None`` for all.
        at: When it begins, in seconds.
        until: When it ends.
        period: It comes again every so many seconds; ``None`` for once, without a break.
        share: The share of each period that it is there.
    """

    servers: Which = None
    at: float = 0.0
    until: float = FOREVER
    period: float | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        what = type(self).__name__.strip("_").lower()
        if not 0 <= self.at < self.until:
            raise ConfigurationError(f"{what}(at={self.at!r}, until={self.until!r}): give 0 <= at < until, in seconds")
        if self.period is not None and not (self.period > 0 and 0 < self.share < 1):
            raise ConfigurationError(
                f"{what}(period={self.period!r}, share={self.share!r}): give seconds, and a share below 1"
            )

    def spells(self, end: float) -> Iterator[tuple[float, float]]:
        """When it begins and ends, each time, before ``end``."""
        if self.period is None:
            if self.at < end:
                yield self.at, self.until
            return
        n = 0
        while (begins := self.at + n * self.period) < min(self.until, end):
            yield begins, min(begins + self.period * self.share, self.until)
            n += 1

    @abstractmethod
    def begin(self, host: Host, until: float) -> Callable[[], object]:
        """Let it befall ``host``, presumably until then; the result ends it."""


@dataclass(frozen=True, kw_only=True)
class _Slow(Fault):
    factor: float
    to: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.factor > 0 and (self.to is None or self.to > 0)):
            raise ConfigurationError(f"slow({self.factor!r}, to={self.to!r}): give factors above 0")
        if self.to is not None and self.until == FOREVER:
            raise ConfigurationError(f"slow({self.factor!r}, to={self.to!r}): say until= when it has come to that")

    def begin(self, host: Host, until: float) -> Callable[[], object]:
        begins, first, last = host.now(), self.factor, self.to

        def factor(now: float) -> float:
            if last is None:
                return first
            return first + (last - first) * min(1.0, (now - begins) / (until - begins))

        host.slowed.append(factor)
        return lambda: host.slowed.remove(factor)


Failure = Literal["failed", "refused"] | Callable[[], Exception]


@dataclass(frozen=True, kw_only=True)
class _Errors(Fault):
    rate: float = 1.0
    after: float = 0.001
    kind: Failure = "failed"
    make: Callable[[], Exception] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.rate <= 1 and self.after >= 0):
            raise ConfigurationError(f"errors({self.rate!r}, after={self.after!r}): give a share up to 1, and seconds")
        known: dict[Any, Callable[[], Exception]] = {"failed": _failed, "refused": _refused}
        make = self.kind if callable(self.kind) else known.get(self.kind)
        if make is None:
            raise ConfigurationError(
                f"errors(kind={self.kind!r}): there are 'failed' and 'refused', or give a function"
            )
        object.__setattr__(self, "make", make)

    def begin(self, host: Host, until: float) -> Callable[[], object]:
        entry = (self.rate, self.after, self.make)
        host.failing.append(entry)
        return lambda: host.failing.remove(entry)


def _failed() -> Exception:
    return RemoteError("a simulated failure")


def _refused() -> Exception:
    return Rejected("a simulated refusal")


@dataclass(frozen=True, kw_only=True)
class _Hang(Fault):
    def begin(self, host: Host, until: float) -> Callable[[], object]:
        host.hang()
        return host.unhang


@dataclass(frozen=True, kw_only=True)
class _BlackHole(Fault):
    def begin(self, host: Host, until: float) -> Callable[[], object]:
        host.network.darken(host.address)
        return lambda: host.network.lighten(host.address)


@dataclass(frozen=True, kw_only=True)
class _Crash(Fault):
    def begin(self, host: Host, until: float) -> Callable[[], object]:
        host.crash()
        return host.start


@dataclass(frozen=True, kw_only=True)
class _Restart(Fault):
    grace: float = 10.0

    def begin(self, host: Host, until: float) -> Callable[[], object]:
        host.stop(self.grace)
        return host.start


@dataclass(frozen=True, kw_only=True)
class _Remove(Fault):
    def begin(self, host: Host, until: float) -> Callable[[], object]:
        host.remove()
        return host.add


def slow(
    factor: float,
    servers: Which = None,
    *,
    to: float | None = None,
    at: float = 0.0,
    until: float = FOREVER,
    period: float | None = None,
    share: float = 0.5,
) -> Fault:
    """Everything takes ``factor`` times as long; the factor moves in a straight line to ``to`` by ``until``."""
    return _Slow(factor=factor, to=to, servers=servers, at=at, until=until, period=period, share=share)


def errors(
    rate: float = 1.0,
    servers: Which = None,
    *,
    after: float = 0.001,
    kind: Failure = "failed",
    at: float = 0.0,
    until: float = FOREVER,
    period: float | None = None,
    share: float = 0.5,
) -> Fault:
    """A share of the requests fails, ``after`` so many seconds, without any work.

    Args:
        rate: The share, above 0 and up to 1.
        servers: Whom it befalls.
        after: Seconds until the failure.
        kind: ``"failed"`` for a `RemoteError`, ``"refused"`` for a nack (`Rejected`), or a function that makes the
            exception which the handler raises.
        at: When it begins.
        until: When it ends.
        period: See `Fault`.
        share: See `Fault`.
    """
    return _Errors(rate=rate, after=after, kind=kind, servers=servers, at=at, until=until, period=period, share=share)


def hang(
    servers: Which = None, *, at: float = 0.0, until: float = FOREVER, period: float | None = None, share: float = 0.5
) -> Fault:
    """Requests are accepted and not answered until it ends. Pings are answered: only the handlers are stuck."""
    return _Hang(servers=servers, at=at, until=until, period=period, share=share)


def black_hole(
    servers: Which = None, *, at: float = 0.0, until: float = FOREVER, period: float | None = None, share: float = 0.5
) -> Fault:
    """Nothing arrives in either direction, pings included, and connects time out. What is sent arrives when it ends."""
    return _BlackHole(servers=servers, at=at, until=until, period=period, share=share)


def crash(
    servers: Which = None, *, at: float = 0.0, until: float = FOREVER, period: float | None = None, share: float = 0.5
) -> Fault:
    """Connections are reset and work is lost; connects are refused until it ends, and then a new server is there."""
    return _Crash(servers=servers, at=at, until=until, period=period, share=share)


def restart(
    servers: Which = None,
    *,
    at: float = 0.0,
    down: float = 1.0,
    grace: float = 10.0,
    period: float | None = None,
    share: float = 0.5,
) -> Fault:
    """The server drains for at most ``grace`` seconds; ``down`` seconds after it began, a new one is there.

    What has not been answered when either is over is lost. Connects are refused all that time.
    """
    return _Restart(servers=servers, at=at, until=at + down, grace=min(grace, down), period=period, share=share)


def remove(
    servers: Which = None, *, at: float = 0.0, until: float = FOREVER, period: float | None = None, share: float = 0.5
) -> Fault:
    """The server is not in the name until it ends. It runs, and finishes what it has."""
    return _Remove(servers=servers, at=at, until=until, period=period, share=share)


def add(servers: Which = None, *, at: float) -> Fault:
    """The server joins the name only then."""
    return _Remove(servers=servers, at=0.0, until=at)
