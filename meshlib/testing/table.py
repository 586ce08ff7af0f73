"""A report as text: what happened as a whole, between the faults, to each priority, and at each server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import inf, isnan
from typing import TYPE_CHECKING, Final

from ..core.priority import Priority
from .report import PERCENTILES

if TYPE_CHECKING:
    from .report import Report

__all__ = ["as_table", "windows_of"]

MOST_SERVERS: Final = 20
"""So many servers are listed; of more, those with the most and the fewest attempts."""
MOST_WINDOWS: Final = 12


def windows_of(report: Report) -> list[tuple[float, float]]:
    """The stretches of time worth telling apart: those that were asked for, else those between the faults."""
    scenario = report.scenario
    if scenario.windows:
        return list(scenario.windows)
    edges = {0.0, scenario.duration}
    for fault in scenario.faults:
        edges |= {edge for edge in (fault.at, fault.until) if edge < scenario.duration}
    ordered = sorted(edges)[: MOST_WINDOWS + 1]
    return list(pairwise(ordered))


def as_table(report: Report) -> str:
    """Everything, in lines of at most 120 characters or so."""
    scenario = report.scenario
    within = "" if scenario.within == inf else f" within {scenario.within:g} s"
    lines = [
        f"{scenario.title or 'simulation'}: {scenario.duration:g} s, seed {scenario.seed}, {scenario.wire} wire",
        "",
        f"requests       {report.requests():>10,}",
        f"answered       {_share(report.success()):>10}{within}",
        f"amplification  {_plain(report.amplification(), '.3f'):>10} attempts for each call",
        f"connections    {report.connects():>10,} made, {report.connects(refused=True):,} refused",
        "latency        " + ", ".join(f"p{q * 100:g} {_time(report.latency(q))}" for q in PERCENTILES),
    ]
    errors = report.errors()
    if errors:
        lines.append("errors         " + ", ".join(f"{name} {count:,}" for name, count in errors.items()))
    windows = windows_of(report)
    if len(windows) > 1 or scenario.windows:
        lines += ["", *_windows(report, windows)]
    priorities = [each for each in reversed(Priority) if report.requests(priority=each)]
    if len(priorities) > 1:
        lines += ["", *_priorities(report, priorities)]
    return "\n".join([*lines, "", *_servers(report)]) + "\n"


def _windows(report: Report, windows: Sequence[tuple[float, float]]) -> list[str]:
    rows = []
    for since, until in windows:
        rows.append(
            [
                f"{since:g} … {until:g} s",
                f"{report.requests(since, until):,}",
                _share(report.success(since, until)),
                *(_time(report.latency(q, since, until)) for q in (0.5, 0.99, 0.999)),
                _plain(report.amplification(since=since, until=until), ".3f"),
            ]
        )
    return _aligned(["window", "requests", "answered", "p50", "p99", "p99.9", "attempts/call"], rows)


def _priorities(report: Report, priorities: Iterable[Priority]) -> list[str]:
    rows = [
        [
            each.name.lower(),
            f"{report.requests(priority=each):,}",
            _share(report.success(priority=each)),
            *(_time(report.latency(q, priority=each)) for q in (0.5, 0.99, 0.999)),
        ]
        for each in priorities
    ]
    return _aligned(["priority", "requests", "answered", "p50", "p99", "p99.9"], rows)


def _servers(report: Report) -> list[str]:
    sent = [report.sent(number) for number in range(len(report.servers))]
    shown = list(range(len(sent)))
    left = len(shown) - MOST_SERVERS
    if left > 0:
        busiest = sorted(shown, key=lambda number: (-sent[number], number))
        shown = [*busiest[: MOST_SERVERS // 2], *busiest[-MOST_SERVERS // 2 :]]
    rows = [
        [
            report.servers[number],
            f"{sent[number]:,}",
            _share(report.share(number)),
            f"{report.handled(number):,}",
            f"{max(report.rates(number)):,.0f}",
            f"{report.connects(number):,}",
        ]
        for number in shown
    ]
    lines = _aligned(["server", "attempts", "share", "handled", "busiest second", "connections"], rows)
    if left > 0:
        lines.insert(1 + MOST_SERVERS // 2, f"… {left} more …")
    return lines


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    ]


def _plain(value: float, form: str) -> str:
    return "—" if isnan(value) else format(value, form)


def _share(value: float) -> str:
    return "—" if isnan(value) else f"{value:.3%}"


def _time(seconds: float) -> str:
    if isnan(seconds):
        return "—"
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 0.1
        else f"{seconds * 1e3:.0f} ms"
    )
