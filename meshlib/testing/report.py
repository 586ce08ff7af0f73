"""What came of a simulation: arithmetic over its `Record`.

A *window* is ``since``, included, to ``until``, excluded, in seconds; requests belong to it by when they came, attempts
by when they were sent. Unless said otherwise everything is over the whole time and all loads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, nan
from typing import TYPE_CHECKING, Final

from ..core.priority import Priority
from .record import OK, UNSENT, Events, Record

if TYPE_CHECKING:
    from .scenario import Scenario

__all__ = ["PERCENTILES", "Report", "Slice", "percentile"]

FOREVER: Final = float("inf")
PERCENTILES: Final = (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999)


def percentile(ordered: Sequence[float], q: float) -> float:
    """The least value that a share ``q`` of them does not exceed (the nearest rank); not a number if there are none."""
    if not ordered:
        return nan
    return ordered[max(0, ceil(q * len(ordered) - 1e-9) - 1)]


@dataclass(frozen=True, slots=True)
class Slice:
    """A stretch of time in a report.

    Attributes:
        since: Its beginning, in seconds.
        requests: How many came.
        success: The share that succeeded; not a number if none came.
        p50: The median latency in seconds.
        p99: Of a hundred requests, the slowest but one.
        sent: How many attempts went to each server.
    """

    since: float
    requests: int
    success: float
    p50: float
    p99: float
    sent: tuple[int, ...]


class Report:
    """The outcome of one simulation.

    Args:
        scenario: What was simulated.
        servers: The names of the servers, by number.
        record: What happened.
    """

    def __init__(self, scenario: Scenario, servers: Sequence[str], record: Record) -> None:
        self.scenario = scenario
        self.servers = tuple(servers)
        self.record = record
        order = sorted(range(len(record)), key=record.at.__getitem__)
        self._at = [record.at[i] for i in order]
        self._rows = [(record.took[i], record.outcome[i], record.load[i]) for i in order]
        self._loads = scenario.loads
        self._events = {
            "sent": _by_server(record.sent, len(servers)),
            "handled": _by_server(record.handled, len(servers)),
            "connects": _by_server(record.connects, len(servers)),
            "refused": _by_server(record.refused, len(servers)),
        }

    # --- requests -----------------------------------------------------------------------------------------------------

    def _window(
        self, since: float, until: float, priority: Priority | None, load: int | str | None
    ) -> list[tuple[float, int, int]]:
        rows = self._rows[bisect_left(self._at, since) : bisect_left(self._at, until)]
        if priority is None and load is None:
            return rows
        wanted = {
            number
            for number, each in enumerate(self._loads)
            if (priority is None or each.priority is priority) and (load is None or load in (number, each.name))
        }
        return [row for row in rows if row[2] in wanted]

    def _within(self, within: float | None) -> float:
        return self.scenario.within if within is None else within

    def requests(
        self,
        since: float = 0.0,
        until: float = FOREVER,
        *,
        priority: Priority | None = None,
        load: int | str | None = None,
    ) -> int:
        """How many requests came."""
        return len(self._window(since, until, priority, load))

    def success(
        self,
        since: float = 0.0,
        until: float = FOREVER,
        *,
        within: float | None = None,
        priority: Priority | None = None,
        load: int | str | None = None,
    ) -> float:
        """The share of requests that were answered, ``within`` so many seconds; not a number if none came.

        The default of ``within``, here and below, is the scenario's.
        """
        return _success(self._window(since, until, priority, load), self._within(within))

    def goodput(
        self, since: float, until: float, *, within: float | None = None, priority: Priority | None = None
    ) -> float:
        """Answers a second, to requests that came in the window."""
        rows = self._window(since, until, priority, None)
        limit = self._within(within)
        return sum(outcome == OK and took <= limit for took, outcome, _ in rows) / (until - since)

    def latency(
        self,
        q: float,
        since: float = 0.0,
        until: float = FOREVER,
        *,
        answered: bool = False,
        priority: Priority | None = None,
        load: int | str | None = None,
    ) -> float:
        """The ``q``-quantile (0.99 for p99) of the seconds that requests took; with ``answered``, of those alone."""
        rows = self._window(since, until, priority, load)
        return percentile(sorted(took for took, outcome, _ in rows if not answered or outcome == OK), q)

    def errors(
        self,
        since: float = 0.0,
        until: float = FOREVER,
        *,
        priority: Priority | None = None,
        load: int | str | None = None,
    ) -> dict[str, int]:
        """How many requests failed, by the name of the error, most frequent first."""
        rows = self._window(since, until, priority, load)
        count = Counter(self.record.kinds[outcome] for _, outcome, _ in rows if outcome != OK)
        return dict(sorted(count.items(), key=lambda item: (-item[1], item[0])))

    def recovery(
        self,
        after: float,
        *,
        success: float = 0.99,
        within: float | None = None,
        window: float = 1.0,
        until: float = FOREVER,
    ) -> float:
        """Seconds from ``after`` until the share of success is back for good: in every later window, at least so much.

        Args:
            after: When the trouble was over.
            success: What counts as back.
            within: Answers count if they took no longer than this.
            window: Seconds over which the share is taken; recovery is told to this precision.
            until: Where to stop looking, by default where the requests end.

        Returns:
            0 if it never was worse, infinity if the last window still is.
        """
        last = min(until, self._at[-1] + 1e-9) if self._at else after
        recovered = after
        for n in range(max(0, ceil((last - after) / window))):
            since = after + n * window
            rows = self._window(since, min(since + window, last), None, None)
            if rows and _success(rows, self._within(within)) < success:
                recovered = since + window
        return FOREVER if recovered > after and recovered >= last else recovered - after

    # --- servers ------------------------------------------------------------------------------------------------------

    def numbers(self, servers: int | str | Iterable[int | str] | None) -> frozenset[int]:
        """The numbers of servers: given by number, by name, or by the name of their kind; ``None`` for all.

        Raises:
            KeyError: There is no such server.
        """
        if servers is None:
            return frozenset(range(len(self.servers)))
        found: set[int] = set()
        for each in (servers,) if isinstance(servers, int | str) else servers:
            new = {n for n, name in enumerate(self.servers) if each in (n, name, name.rpartition("/")[0])}
            if not new:
                raise KeyError(f"there is no server {each!r}; there are {', '.join(self.servers)}")
            found |= new
        return frozenset(found)

    def sent(
        self, servers: int | str | Iterable[int | str] | None = None, since: float = 0.0, until: float = FOREVER
    ) -> int:
        """How many attempts were sent to these servers."""
        return self._count("sent", servers, since, until)

    def handled(
        self, servers: int | str | Iterable[int | str] | None = None, since: float = 0.0, until: float = FOREVER
    ) -> int:
        """How many requests reached the handlers of these servers: what their own layers let through."""
        return self._count("handled", servers, since, until)

    def connects(
        self,
        servers: int | str | Iterable[int | str] | None = None,
        since: float = 0.0,
        until: float = FOREVER,
        *,
        refused: bool = False,
    ) -> int:
        """How many connections were made to these servers; or ``refused``, since they were down."""
        return self._count("refused" if refused else "connects", servers, since, until)

    def share(self, server: int | str, since: float = 0.0, until: float = FOREVER) -> float:
        """The share of the attempts to servers of its kind that went to this one; not a number if there were none."""
        [number] = self.numbers(server)
        kind = self.servers[number].rpartition("/")[0]
        total = self.sent(kind, since, until)
        return self.sent(number, since, until) / total if total else nan

    def amplification(self, servers: str | None = None, since: float = 0.0, until: float = FOREVER) -> float:
        """Attempts sent to the servers of that name for each call made; not a number if there were no calls.

        Args:
            servers: The name; ``None`` for the one that the first load calls.
            since: Where the window begins.
            until: Where it ends.
        """
        rows = self._window(since, until, None, None)
        calls = sum(self._loads[load].fan_out for _, _, load in rows)
        return self.sent(servers or self.servers[0].rpartition("/")[0], since, until) / calls if calls else nan

    def rates(self, server: int | str, step: float = 1.0, what: str = "sent") -> list[float]:
        """How much came to a server each second, step by step.

        Args:
            server: Which.
            step: Seconds over which it is counted.
            what: ``"sent"``, ``"handled"``, ``"connects"`` or ``"refused"``.
        """
        [number] = self.numbers(server)
        at = self._events[what][number]
        return [_between(at, n * step, (n + 1) * step) / step for n in range(self._steps(step))]

    def _count(self, what: str, servers: int | str | Iterable[int | str] | None, since: float, until: float) -> int:
        events = self._events[what]
        return sum(_between(events[number], since, until) for number in self.numbers(servers))

    def _steps(self, step: float) -> int:
        return ceil(self.scenario.duration / step - 1e-9)

    # --- over time ----------------------------------------------------------------------------------------------------

    def slices(self, step: float = 1.0, *, within: float | None = None) -> list[Slice]:
        """The time of the load in steps of so many seconds."""
        slices = []
        for n in range(self._steps(step)):
            since, until = n * step, (n + 1) * step
            rows = self._window(since, until, None, None)
            took = sorted(row[0] for row in rows)
            sent = tuple(_between(at, since, until) for at in self._events["sent"])
            slices.append(
                Slice(
                    since,
                    len(rows),
                    _success(rows, self._within(within)),
                    percentile(took, 0.5),
                    percentile(took, 0.99),
                    sent,
                )
            )
        return slices

    def __str__(self) -> str:
        from .table import as_table

        return as_table(self)

    def svg(self) -> str:
        """A chart of it, as the text of an SVG file."""
        from .chart import as_svg

        return as_svg(self)

    def __repr__(self) -> str:
        return (
            f"<Report: {self.requests()} requests, {self.success():.3%} answered>"
            if len(self._at)
            else "<Report: nothing>"
        )


def _success(rows: Sequence[tuple[float, int, int]], within: float) -> float:
    return sum(outcome == OK and took <= within for took, outcome, _ in rows) / len(rows) if rows else nan


def _by_server(events: Events, servers: int) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in range(servers)]
    for at, host in zip(events.at, events.host, strict=True):
        if host != UNSENT:
            found[host].append(at)
    for each in found:
        each.sort()
    return found


def _between(at: Sequence[float], since: float, until: float) -> int:
    return bisect_left(at, until) - bisect_left(at, since)
