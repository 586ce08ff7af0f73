"""A report as an SVG file, drawn by hand: success, latency and load over time, with the faults as shaded spans.

The load panel has a line for each server; those that a fault befalls are in colour, the others, who are alike, in one
shade of grey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, isnan, log10
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from .report import Report, Slice

__all__ = ["as_svg"]

INK, FAINT, GRID, GROUND, SPAN = "#24292f", "#6b7480", "#e4e8ec", "#ffffff", "#fbeee0"
BLUE, ORANGE, GREY = "#1f6feb", "#d9822b", "#9aa5b1"
COLOURS: Final = ("#d9822b", "#8f6bb3", "#2f9e78", "#c2455d", "#6cb2f7", "#7a6a3a")

WIDTH, PLOT, GAP = 900, 170, 58
LEFT, RIGHT, TOP, BOTTOM = 66, 150, 78, 40
POINTS: Final = 120
"""About so many steps of time are drawn."""

QUICKEST: Final = 1e-4
"""Seconds; what fails at once takes none, for which a logarithm has no place."""

Point = tuple[float, float]


def as_svg(report: Report) -> str:
    """The whole chart."""
    scenario = report.scenario
    step = _step(scenario.duration)
    slices = report.slices(step)
    title = scenario.title or "simulation"
    answered = f"{report.success():.3%} answered, " if report.requests() else ""
    summary = f"{report.requests():,} requests, {answered}seed {scenario.seed}"
    drawn = [_text(LEFT, 32, title, INK, "start", 17, True), _text(LEFT, 53, summary, FAINT, "start", 12)]
    panels = (_success_panel, _latency_panel, _load_panel)
    for row, panel in enumerate(panels):
        drawn += panel(report, slices, step, TOP + row * (PLOT + GAP))
    height = TOP + len(panels) * (PLOT + GAP) - GAP + BOTTOM
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    ground = f'<rect width="{WIDTH}" height="{height}" fill="{GROUND}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *drawn, "</svg>"]) + "\n"


# --- panels -----------------------------------------------------------------------------------------------------------


def _success_panel(report: Report, slices: Sequence[Slice], step: float, top: float) -> list[str]:
    points = [(each.since + step / 2, each.success) for each in slices if not isnan(each.success)]
    least = min((y for _, y in points), default=1.0)
    low = next(low for low in (0.99, 0.9, 0.5, 0.0) if least >= low)
    ticks = [low + (1 - low) * n / 4 for n in range(5)]
    y = _linear(top, low, 1.0)
    within = "" if report.scenario.within == float("inf") else f" within {report.scenario.within:g} s"
    frame = _frame(report, top, f"answered{within}", [(tick, f"{tick * 100:g} %") for tick in ticks], y)
    return [*frame, _line(report, points, y, BLUE)]


def _latency_panel(report: Report, slices: Sequence[Slice], step: float, top: float) -> list[str]:
    times = [each.since + step / 2 for each in slices]
    columns = {"p50": [each.p50 for each in slices], "p99": [each.p99 for each in slices]}
    lines = {
        name: [(at, max(value, QUICKEST)) for at, value in zip(times, column, strict=True) if not isnan(value)]
        for name, column in columns.items()
    }
    values = [value for points in lines.values() for _, value in points] or [1.0]
    low, high = floor(log10(min(values))), max(ceil(log10(max(values))), floor(log10(min(values))) + 1)
    scale = _linear(top, low, high)

    def y(value: float) -> float:
        return scale(log10(value))

    ticks = [(10.0**power, _seconds(10.0**power)) for power in range(low, high + 1)]
    drawn = _frame(report, top, "latency", ticks, y)
    for n, (name, colour) in enumerate((("p99", ORANGE), ("p50", BLUE))):
        drawn += [_line(report, lines[name], y, colour), _key(n, top, name, colour)]
    return drawn


def _load_panel(report: Report, slices: Sequence[Slice], step: float, top: float) -> list[str]:
    befallen = _befallen(report)
    rates = [[each.sent[number] / step for each in slices] for number in range(len(report.servers))]
    highest = max((rate for line in rates for rate in line), default=1.0) or 1.0
    ticks = _round_ticks(highest)
    y = _linear(top, 0.0, ticks[-1])
    drawn = _frame(report, top, "attempts per second, by server", [(tick, f"{tick:,.4g}") for tick in ticks], y)
    times = [each.since + step / 2 for each in slices]
    for number, line in enumerate(rates):
        if number not in befallen:
            drawn.append(_line(report, list(zip(times, line, strict=True)), y, GREY, 1.0))
    coloured = befallen[: len(COLOURS)]
    for n, number in enumerate(coloured):
        drawn.append(_line(report, list(zip(times, rates[number], strict=True)), y, COLOURS[n]))
        drawn.append(_key(n, top, report.servers[number], COLOURS[n]))
    if len(rates) > len(befallen):
        drawn.append(_key(len(coloured), top, "others" if coloured else "each server", GREY))
    bottom = top + PLOT
    for tick in _round_ticks(report.scenario.duration, 8):
        if tick <= report.scenario.duration:
            drawn.append(_text(_x(report, tick), bottom + 17, f"{tick:g}", FAINT))
    drawn.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 33, "seconds", FAINT))
    return drawn


def _befallen(report: Report) -> list[int]:
    """The servers that a fault names, if it does not name them all."""
    found: dict[int, None] = {}
    for fault in report.scenario.faults:
        given = fault.servers
        if given is not None:
            first = report.servers[0].rpartition("/")[0]
            for each in (given,) if isinstance(given, int | str) else given:
                found[report.servers.index(f"{first}/{each}" if isinstance(each, int) else each)] = None
    return list(found) if len(found) < len(report.servers) else []


# --- strokes ----------------------------------------------------------------------------------------------------------


def _frame(
    report: Report,
    top: float,
    title: str,
    ticks: Sequence[tuple[float, str]],
    y: Callable[[float], float],
) -> list[str]:
    drawn = []
    duration = report.scenario.duration
    for fault in report.scenario.faults:
        for since, until in list(fault.spells(duration))[:POINTS]:
            x, end = _x(report, since), _x(report, min(until, duration))
            place = f'x="{x:.1f}" y="{top:.1f}" width="{end - x:.1f}" height="{PLOT}"'
            drawn.append(f'<rect {place} fill="{SPAN}"><title>{escape(repr(fault))}</title></rect>')
    drawn.append(_text(LEFT, top - 9, title, INK, "start", 13, True))
    for tick, label in ticks:
        at = y(tick)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        drawn.append(_text(LEFT - 7, at + 4, label, FAINT, "end"))
    bottom = top + PLOT
    drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="{FAINT}"/>')
    return drawn


def _line(report: Report, points: Sequence[Point], y: Callable[[float], float], colour: str, width: float = 1.8) -> str:
    path = " ".join(f"{_x(report, at):.1f},{y(value):.1f}" for at, value in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linejoin="round"/>'


def _key(n: int, top: float, words: str, colour: str) -> str:
    x, y = WIDTH - RIGHT + 14, top + 8 + 18 * n
    return f'<line x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2.5"/>' + _text(
        x + 22, y + 4, words, INK, "start"
    )


def _text(
    x: float, y: float, words: str, colour: str, anchor: str = "middle", size: int = 11, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{weight}'
    return f"<text {place}>{escape(words)}</text>"


def _x(report: Report, at: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * at / report.scenario.duration


def _linear(top: float, low: float, high: float) -> Callable[[float], float]:
    return lambda value: top + PLOT - PLOT * (min(max(value, low), high) - low) / (high - low)


def _round_ticks(highest: float, count: int = 4) -> list[float]:
    """Round values from 0, about ``count`` of them, the last at or above ``highest``."""
    rough = highest / count
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * n for n in range(ceil(highest / step - 1e-9) + 1)]


def _step(duration: float) -> float:
    """A round step of time, of which the duration has about `POINTS`."""
    return max(_round_ticks(duration, POINTS)[1], 1e-3)


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms" if value >= 1e-3 else f"{value * 1e6:g} µs"
