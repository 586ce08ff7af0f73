"""A bar chart of the rates as an SVG file, drawn by hand: a panel for each loop and body size.

Within a panel there is a group of bars for each number of callers and a bar for each subject, with its rate on top.
All panels of a body size share their scale, so that the loops can be compared as well.
"""

from math import ceil, log10
from xml.sax.saxutils import escape

from benchmarks.model import Results
from benchmarks.report import size
from benchmarks.subjects import ENTRIES, TITLES

_PALETTE = ("#9aa5b1", "#1f6feb", "#6cb2f7", "#d9822b", "#8f6bb3")
_COLOURS = {entry.key: colour for entry, colour in zip(ENTRIES, _PALETTE, strict=True)}
_INK, _FAINT, _GRID, _GROUND = "#24292f", "#6b7480", "#e4e8ec", "#ffffff"

_BAR, _GROUP_GAP = 27, 22
_PLOT_HEIGHT = 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 44, 44  # of a panel, around its plot
_MARGIN, _HEADER = 16, 78


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "middle", size_px: int = 11) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size_px}"'
    return f'<text {place} {style or f"""fill="{_INK}" """.strip()}>{escape(words)}</text>'


def _short(rate: float) -> str:
    if rate >= 100_000:
        return f"{rate / 1000:.0f}k"
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"


def _legend_width(subject: str) -> int:
    """About what a legend entry takes: nothing here can measure text."""
    return 40 + 7 * len(TITLES[subject])


def _steps(highest: float) -> list[float]:
    """Round values for the axis, the last at or above ``highest``."""
    rough = highest / 4
    power = 10.0 ** int(log10(rough)) if rough >= 1 else 1.0
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * index for index in range(ceil(highest / step) + 1)]


def _panel(results: Results, loop: str, body: int, steps: list[float], x: float, y: float, width: float) -> list[str]:
    left, right, bottom = x + _LEFT, x + width - _RIGHT, y + _TOP + _PLOT_HEIGHT
    faint = f'fill="{_FAINT}"'
    drawn = [_text(left, y + 18, f"{loop}, {size(body)} bodies", f'fill="{_INK}" font-weight="600"', "start", 13)]
    for step in steps:
        at = bottom - step / steps[-1] * _PLOT_HEIGHT
        drawn.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_GRID}"/>')
        drawn.append(_text(left - 7, at + 4, f"{step / 1000:g}k" if step >= 1000 else f"{step:g}", faint, "end"))
    subjects = results.subjects()
    group = (right - left) / len(results.plan.callers)
    for index, callers in enumerate(results.plan.callers):
        cells = results.at(loop, body, callers)
        middle = left + (index + 0.5) * group
        start = middle - len(subjects) * _BAR / 2
        for place, subject in enumerate(subjects):
            if subject not in cells:
                continue
            rate = cells[subject].median.rate
            height = rate / steps[-1] * _PLOT_HEIGHT
            bar_x, bar_y = start + place * _BAR, bottom - height
            shape = f'x="{bar_x + 1.5:.1f}" y="{bar_y:.1f}" width="{_BAR - 3}" height="{height:.1f}" rx="1.5"'
            hint = escape(f"{TITLES[subject]}, {callers} callers: {rate:,.0f} calls/s")
            drawn.append(f'<rect {shape} fill="{_COLOURS[subject]}"><title>{hint}</title></rect>')
            drawn.append(_text(bar_x + _BAR / 2, bar_y - 4, _short(rate), faint, size_px=9))
        drawn.append(_text(middle, bottom + 17, f"{callers}"))
    drawn.append(f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="{_FAINT}"/>')
    drawn.append(_text((left + right) / 2, bottom + 34, "callers", faint))
    return drawn


def as_svg(results: Results) -> str:
    """The whole chart."""
    places = results.places()
    loops = list(dict.fromkeys(loop for loop, _, _ in places))
    bodies = list(dict.fromkeys(body for _, body, _ in places))
    subjects = results.subjects()
    group = len(subjects) * _BAR + _GROUP_GAP
    panel_width = max(300, _LEFT + _RIGHT + group * len(results.plan.callers))
    panel_height = _TOP + _PLOT_HEIGHT + _BOTTOM
    width = max(2 * _MARGIN + panel_width * len(loops), 2 * _MARGIN + sum(map(_legend_width, subjects)))
    height = _HEADER + panel_height * len(bodies) + _MARGIN
    title = "Echo calls per second (higher is better)"
    drawn = [_text(_MARGIN + 8, 32, title, f'fill="{_INK}" font-weight="600"', "start", 17)]
    x = _MARGIN + 8
    for subject in subjects:
        drawn.append(f'<rect x="{x}" y="47" width="12" height="12" rx="2" fill="{_COLOURS[subject]}"/>')
        drawn.append(_text(x + 18, 57, TITLES[subject], anchor="start", size_px=12))
        x += _legend_width(subject)
    for row, body in enumerate(bodies):
        steps = _steps(max(cell.median.rate for cell in results.cells if cell.body == body) or 1.0)
        for column, loop in enumerate(loops):
            left, top = _MARGIN + column * panel_width, _HEADER + row * panel_height
            drawn += _panel(results, loop, body, steps, left, top, panel_width)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    ground = f'<rect width="{width}" height="{height}" fill="{_GROUND}"/>'
    return "\n".join([opening, f"<title>{title}</title>", ground, *drawn, "</svg>"]) + "\n"
