"""What a scenario gives: rows for its table, series for its chart, and checks with the bounds that it has to keep.

A scenario is a module of this package with ``TITLE``, ``ABOUT`` (what it shows and where it comes from), ``CHART`` if
its series are to be drawn, and ``run(seed, quick) -> Outcome``. The same seed gives the same outcome, bit for bit.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

Point = tuple[float, float]

_BOUND = re.compile(r"(>=|<=|>|<) ([0-9.e+-]+)|([0-9.e+-]+) to ([0-9.e+-]+)")


@dataclass(frozen=True)
class Check:
    """One thing that has to hold: the value found, and the bound as it is written: ``>= 99.95`` or ``95 to 96``."""

    what: str
    value: float
    bound: str
    ok: bool


def check(what: str, value: float, bound: str) -> Check:
    """Compare ``value`` with ``bound``: ``>= 1``, ``<= 1``, ``> 1``, ``< 1`` or ``1 to 2``. NaN never holds."""
    low, high = _limits(bound)
    held = low <= value <= high and not (bound[:2] in ("> ", "< ") and value in (low, high) and isfinite(value))
    return Check(what, value, bound, held)


def _limits(bound: str) -> tuple[float, float]:
    found = _BOUND.fullmatch(bound)
    if found is None:
        raise ValueError(f"{bound!r} is no bound: write '>= 1', '<= 1', '> 1', '< 1' or '1 to 2'")
    operator, limit, low, high = found.groups()
    if operator is None:
        return float(low), float(high)
    return (float(limit), inf) if operator.startswith(">") else (-inf, float(limit))


@dataclass
class Outcome:
    """What one run found.

    Attributes:
        rows: The table. Texts name a row and are the same for every seed; numbers are measured, already rounded to what
            is worth showing, ``inf`` standing for "never" and ``None`` for what does not apply.
        series: Lines of the chart, ``(x, y)`` in order. ``"panel: line"`` puts a line into a panel of its own.
        checks: In a fixed order, whatever the seed.
    """

    rows: list[dict[str, object]] = field(default_factory=list)
    series: dict[str, list[Point]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """How the series are drawn: what the axes measure, and whether the upright one is logarithmic."""

    x: str
    y: str
    log: bool = False


def percentile(values: Sequence[float], q: float) -> float:
    """The value that ``q`` percent of the sorted ``values`` do not exceed (the nearest rank); NaN of none."""
    if not values:
        return float("nan")
    rank = -(-len(values) * q // 100)  # rounded up
    return values[min(len(values), max(1, int(rank))) - 1]
