"""Results as text: for the terminal and for Markdown from the same rows, and as JSON to be put together again later."""

import json
from collections.abc import Sequence
from math import isinf, isnan

from benchmarks.report import Rows
from benchmarks.scenarios.model import Check, Outcome
from benchmarks.scenarios.runner import Result, decode, encode, load


def number(value: object) -> str:
    """One cell: numbers as they were rounded, infinity as "never"."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if isnan(value):
            return "-"
        if isinf(value):
            return "never"
        # Rounding first: 16 digits of 0.1 + 0.2 are no news.
        return f"{round(value, 6):,.10g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def spread(values: Sequence[object]) -> str:
    """The lowest to the highest of what the seeds gave, or the one value that all gave."""
    known = [value for value in values if isinstance(value, int | float)]
    if not known:
        return str(values[0]) if values and values[0] is not None else "-"
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low} to {high}"


def rows_of(result: Result) -> Rows:
    """The table of a scenario, the first row its heading."""
    first = result.outcomes[0].rows
    if not first:
        return []
    columns = list(first[0])
    alike = zip(*(outcome.rows for outcome in result.outcomes), strict=True)
    return [columns, *([spread([row.get(column) for row in rows]) for column in columns] for rows in alike)]


def checks_of(result: Result) -> Rows:
    """The checks of a scenario, the first row the heading."""
    alike = zip(*(outcome.checks for outcome in result.outcomes), strict=True)
    found = ([one[0].what, spread([each.value for each in one]), one[0].bound, _verdict(one)] for one in alike)
    return [["check", "found", "wanted", ""], *found]


def _verdict(checks: Sequence[Check]) -> str:
    failed = sum(not one.ok for one in checks)
    if not failed:
        return "ok"
    return "FAILED" if failed == len(checks) else f"FAILED {failed} of {len(checks)}"


def _is_text(rows: Rows, result: Result, column: int) -> bool:
    name = rows[0][column]
    return name in ("check", "") or any(isinstance(row.get(name), str) for row in result.outcomes[0].rows)


def as_text(result: Result) -> str:
    """Title, table and checks for the terminal."""
    title = f"{load(result.name).TITLE} ({result.name}; seeds {_seeds(result)}; {result.seconds:.0f} s a seed)"
    parts = [title, "=" * len(title)]
    for rows in (rows_of(result), checks_of(result)):
        if rows:
            parts += [_columns(rows, result), ""]
    return "\n".join(parts)


def _columns(rows: Rows, result: Result) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [_is_text(rows, result, column) for column in range(len(widths))]
    lines = []
    for row in rows:
        cells = zip(row, widths, texts, strict=True)
        lines.append("  ".join(cell.ljust(w) if text else cell.rjust(w) for cell, w, text in cells).rstrip())
    return "\n".join(lines)


def _seeds(result: Result) -> str:
    return ", ".join(map(str, result.seeds))


def tables(result: Result) -> str:
    """Table and checks as Markdown."""
    parts = []
    for rows in (rows_of(result), checks_of(result)):
        if rows:
            rule = [":--" if _is_text(rows, result, column) else "--:" for column in range(len(rows[0]))]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]))
    return "\n\n".join(parts)


def as_markdown(results: Sequence[Result]) -> str:
    """Everything that was found, for the repository."""
    about = (
        "What `python -m benchmarks.scenarios` found, over several seeds: the lowest to the highest value. What each "
        "scenario is, and its chart, is in [docs/scenarios.md](../../docs/scenarios.md)."
    )
    parts = ["# Scenarios", about]
    for result in results:
        module = load(result.name)
        parts += [f"## {module.TITLE}", module.ABOUT.strip(), tables(result), f"Seeds {_seeds(result)}."]
    return "\n\n".join(parts) + "\n"


def as_json(result: Result) -> str:
    """Tables and checks of every seed; no series, which are only for the chart."""
    plain = [encode(Outcome(outcome.rows, {}, outcome.checks)) for outcome in result.outcomes]
    whole = {"name": result.name, "seeds": result.seeds, "seconds": round(result.seconds, 1), "outcomes": plain}
    return json.dumps(whole, indent=1) + "\n"


def from_json(text: str) -> Result:
    """The reverse of `as_json`."""
    whole = json.loads(text)
    return Result(whole["name"], whole["seeds"], [decode(plain) for plain in whole["outcomes"]], whole["seconds"])


__all__ = ["as_json", "as_markdown", "as_text", "from_json", "number", "spread", "tables"]
