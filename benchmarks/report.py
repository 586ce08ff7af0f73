"""Results as text: tables for the terminal and for Markdown from the same rows, and JSON with every slice."""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean

from benchmarks.model import Cell, Results
from benchmarks.subjects import ENTRIES, REFERENCES, TITLES

Rows = list[list[str]]

_NUMBERS = ["calls/s", "noise", "others", "p50 ms", "p99 ms", "client µs", "server µs"]
_LEGEND = (
    "Rates are the median of the slices; noise is how far the slices lie apart, and others is the share of "
    "the machine that other programs took meanwhile. Client and server µs are the processor time that each side spends "
    "on a call. The vs columns divide the rate by that of the subject named."
)


def environment() -> dict[str, str]:
    """What the numbers depend on besides the code."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }
    for package in dict.fromkeys([entry.package for entry in ENTRIES] + ["h2", "uvloop"]):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, "unknown")
    except OSError:
        return platform.processor() or "unknown"


def size(body: int) -> str:
    """A body size as it is spoken of."""
    return f"{body / 1000:g} kB" if body >= 1000 else f"{body} B"


def tables(results: Results) -> Iterator[tuple[str, Rows]]:
    """Titled tables, the first row of each its heading: one for each loop and body size, then the summary."""
    subjects = results.subjects()
    references = [reference for reference in REFERENCES if reference in subjects]
    heading = ["callers", "subject", *_NUMBERS, *(f"vs {reference}" for reference in references)]
    for loop, body in dict.fromkeys((loop, body) for loop, body, _ in results.places()):
        rows = [heading]
        for callers in results.plan.callers:
            for cell in results.at(loop, body, callers).values():
                ratios = [_ratio(results.ratio(cell, reference)) for reference in references]
                rows.append([str(callers), TITLES[cell.subject], *_numbers(cell), *ratios])
        yield f"{loop}, {size(body)} bodies", rows
    summary = [["subject", *(f"vs {reference}" for reference in references)]]
    summary += [[TITLES[subject], *(_range(results, subject, other) for other in references)] for subject in subjects]
    yield "All cells: geometric mean of the ratios (lowest to highest)", summary


def _numbers(cell: Cell) -> list[str]:
    numbers = cell.median
    return [
        f"{numbers.rate:,.0f}",
        f"{cell.spread:.0%}",
        f"{numbers.others:.0%}",
        f"{numbers.p50_ms:.2f}",
        f"{numbers.p99_ms:.2f}",
        f"{numbers.client_us:.1f}",
        f"{numbers.server_us:.1f}",
    ]


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _range(results: Results, subject: str, reference: str) -> str:
    found = [results.ratio(cell, reference) for cell in results.cells if cell.subject == subject]
    ratios = [ratio for ratio in found if ratio]
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"


def _is_text(column: int, rows: Rows) -> bool:
    return rows[0][column] in ("subject", "layer")


def as_columns(rows: Rows) -> str:
    """Rows in aligned columns, with a gap between groups of callers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for above, row in zip([rows[0], *rows], rows, strict=False):
        if row[0] != above[0] and rows[0][0] == "callers":
            lines.append("")
        padded = [
            text.ljust(width) if _is_text(column, rows) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def as_text(results: Results) -> str:
    """Tables for the terminal."""
    return "\n\n".join(f"{title}\n{'=' * len(title)}\n{as_columns(rows)}" for title, rows in tables(results))


def as_markdown(results: Results, chart: str) -> str:
    """The same tables, with the chart, what they mean and where they were measured."""
    plan = results.plan
    where = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    how = (
        "An echo of the body, client and server in separate processes on the same machine, each on a core of its own "
        f"where there are two and processes can be pinned. Each cell was measured for {plan.seconds:g} s in "
        f"{plan.rounds} slices, the subjects taking turns. {_LEGEND}"
    )
    parts = ["# Echo", how, where, f"![calls per second]({chart})"]
    for title, rows in tables(results):
        rule = [":--" if _is_text(column, rows) else "--:" for column in range(len(rows[0]))]
        table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
        parts += [f"## {title}", table]
    return "\n\n".join(parts) + "\n"


def as_json(results: Results) -> str:
    """Everything, with the ratios that the tables show."""
    cells = [
        {**asdict(cell), "ratios": {reference: results.ratio(cell, reference) for reference in REFERENCES}}
        for cell in results.cells
    ]
    whole = {"environment": results.environment, "plan": asdict(results.plan), "cells": cells}
    return json.dumps(whole, indent=1) + "\n"
