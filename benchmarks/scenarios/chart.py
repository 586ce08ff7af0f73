"""Lines over time (or whatever the horizontal axis is) as an SVG file, drawn by hand: a panel for each group of series.

All panels share their scales, so that they can be compared.
"""

from math import ceil, floor, inf, isfinite, log10
from xml.sax.saxutils import escape

from benchmarks.scenarios.model import Chart, Point

_PALETTE = ("#9aa5b1", "#d9822b", "#8f6bb3", "#1f6feb", "#2da44e", "#cf222e", "#6cb2f7", "#bf8700")
_INK, _FAINT, _GRID, _GROUND = "#24292f", "#6b7480", "#e4e8ec", "#ffffff"
_WIDTH, _HEIGHT = 400, 200  # of a plot
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 34, 46  # around it
_MARGIN, _HEADER = 14, 44
_MOST_POINTS = 400

Panels = dict[str, dict[str, list[Point]]]


def panels_of(series: dict[str, list[Point]]) -> Panels:
    """The series by panel: ``"panel: line"``, or one panel without a name."""
    panels: Panels = {}
    for name, points in series.items():
        panel, _, line = name.rpartition(": ")
        panels.setdefault(panel, {})[line] = points
    return panels


class _Scale:
    """From values to places on an axis, with round values to mark."""

    def __init__(self, values: list[float], start: float, end: float, log: bool) -> None:
        finite = [value for value in values if isfinite(value) and (value > 0 or not log)] or [1.0]
        self.log, self.start, self.end = log, start, end
        if log:
            self.low, self.high = (10.0 ** floor(log10(min(finite))), 10.0 ** ceil(log10(max(finite))))
            if self.low == self.high:
                self.high *= 10
            decades = round(log10(self.high / self.low))
            self.marks = [self.low * 10**power for power in range(decades + 1)]
        else:
            step = _step(max(finite) - min(0.0, *finite))
            self.low = floor(min(0.0, *finite) / step) * step
            self.marks = [self.low + step * index for index in range(max(1, ceil((max(finite) - self.low) / step)) + 1)]
            self.high = self.marks[-1]

    def at(self, value: float) -> float:
        if self.log:
            share = log10(max(value, self.low) / self.low) / log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, share) * (self.end - self.start)


def _step(span: float) -> float:
    rough = (span or 1.0) / 5
    power = 10.0 ** floor(log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _text(x: float, y: float, words: str, anchor: str = "middle", fill: str = _FAINT, extra: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {place}{' ' + extra if extra else ''}>{escape(words)}</text>"


def _label(value: float) -> str:
    if value >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{round(value, 6):g}"


def _thin(points: list[Point]) -> list[Point]:
    """No more points than can be told apart; the highest of each stretch, since peaks are what matters."""
    width = ceil(len(points) / _MOST_POINTS)
    if width <= 1:
        return points
    return [max(points[i : i + width], key=lambda point: point[1]) for i in range(0, len(points), width)]


def _panel(
    title: str, lines: dict[str, list[Point]], chart: Chart, x: _Scale, y: _Scale, colours: dict[str, str]
) -> str:
    left, right, top, bottom = x.start, x.end, y.end, y.start
    drawn = [_text(left, top - 12, title, "start", _INK, 'font-size="12" font-weight="600"')] if title else []
    for mark in y.marks:
        at = y.at(mark)
        drawn.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_GRID}"/>')
        drawn.append(_text(left - 7, at + 4, _label(mark), "end"))
    drawn += [_text(x.at(mark), bottom + 16, _label(mark)) for mark in x.marks if mark <= x.high]
    drawn.append(_text((left + right) / 2, bottom + 34, chart.x))
    middle = (top + bottom) / 2
    turned = f'transform="rotate(-90 {left - 46:.1f} {middle:.1f})"'
    drawn.append(_text(left - 46, middle, chart.y, extra=turned))
    for name, points in lines.items():
        kept = [(px, py) for px, py in _thin(points) if isfinite(px) and abs(py) < inf]
        places = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in kept)
        look = f'fill="none" stroke="{colours[name]}" stroke-width="1.6" stroke-linejoin="round"'
        drawn.append(f'<polyline points="{places}" {look}><title>{escape(name)}</title></polyline>')
    drawn.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}" stroke="{_FAINT}"/>')
    return "\n".join(drawn)


def as_svg(title: str, chart: Chart, series: dict[str, list[Point]]) -> str:
    """The whole chart."""
    panels = panels_of(series)
    names = list(dict.fromkeys(line for lines in panels.values() for line in lines))
    colours = {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(names)}
    xs = [px for points in series.values() for px, _ in points]
    ys = [py for points in series.values() for _, py in points]
    columns = min(2, len(panels))
    plot = _WIDTH if columns == 2 else 2 * _WIDTH
    cell_width, cell_height = _LEFT + plot + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    width = 2 * _MARGIN + columns * cell_width
    legend, rows = _legend(names, colours, width)
    header = _HEADER + 20 * rows
    height = header + ceil(len(panels) / columns) * cell_height + _MARGIN
    drawn = [_text(_MARGIN + 4, 28, title, "start", _INK, 'font-size="16" font-weight="600"'), *legend]
    for index, (panel, lines) in enumerate(panels.items()):
        left = _MARGIN + index % columns * cell_width + _LEFT
        top = header + index // columns * cell_height + _TOP
        x = _Scale(xs, left, left + plot, False)
        y = _Scale(ys, top + _HEIGHT, top, chart.log)
        drawn.append(_panel(panel, lines, chart, x, y, colours))
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-size="11" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    ground = f'<rect width="{width}" height="{height}" fill="{_GROUND}"/>'
    return "\n".join([opening, f"<title>{escape(title)}</title>", ground, *drawn, "</svg>"]) + "\n"


def _legend(names: list[str], colours: dict[str, str], width: float) -> tuple[list[str], int]:
    """The names with their colours, in as many rows as they take: nothing here can measure text."""
    drawn: list[str] = []
    x, row = _MARGIN + 4.0, 0
    for name in names:
        taken = 40 + 6.2 * len(name)
        if x + taken > width - _MARGIN and x > _MARGIN + 4:
            x, row = _MARGIN + 4.0, row + 1
        y = 42 + 20 * row
        drawn.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="2" fill="{colours[name]}"/>')
        drawn.append(_text(x + 18, y + 10, name, "start", _INK))
        x += taken
    return drawn, row + 1
