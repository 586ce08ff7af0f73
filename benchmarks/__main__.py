"""``python -m benchmarks``: run the matrix, print the tables, and write them with JSON and a chart."""

import argparse
import sys
from functools import partial
from pathlib import Path

import anyio

from benchmarks import chart, report, runner
from benchmarks.model import Plan, Results
from benchmarks.subjects import ENTRIES

_LOOPS = ("asyncio", "uvloop")
_NAME = "echo"


def parse(arguments: list[str]) -> tuple[Plan, Path]:
    """The plan that the options ask for, and where to write its results."""
    keys = [entry.key for entry in ENTRIES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 callers, 100 B bodies and 1 s only, unless said here")
    parser.add_argument("--callers", type=int, nargs="+", metavar="N", help="calls on their way at a time")
    parser.add_argument("--bodies", type=int, nargs="+", metavar="BYTES", help="sizes of request and reply")
    parser.add_argument("--loops", nargs="+", choices=_LOOPS, default=_LOOPS)
    parser.add_argument("--subjects", nargs="+", choices=keys, default=keys)
    parser.add_argument("--seconds", type=float, help="time measured for each subject in each cell (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="slices that this time is split into (default 3)")
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds of calls before each slice (default 0.3)")
    parser.add_argument("--retries", type=int, default=2, help="how often to retake a disturbed slice (default 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="directory of the results")
    options = parser.parse_args(arguments)
    plan = Plan(
        # In the order of the list of subjects, whatever order they were given in.
        subjects=tuple(key for key in keys if key in options.subjects),
        loops=tuple(options.loops),
        callers=tuple(options.callers or ((64,) if options.quick else (1, 16, 64, 256))),
        bodies=tuple(options.bodies or ((100,) if options.quick else (100, 10_000))),
        seconds=options.seconds or (1.0 if options.quick else 2.0),
        warmup=options.warmup,
        rounds=options.rounds,
        retries=options.retries,
    )
    return plan, options.out


def main() -> None:
    """Run, print and write."""
    plan, out = parse(sys.argv[1:])
    cells = anyio.run(runner.run, plan, partial(print, file=sys.stderr, flush=True))
    if not cells:
        sys.exit("nothing could be measured")
    results = Results(report.environment(), plan, cells)
    print(report.as_text(results))
    out.mkdir(parents=True, exist_ok=True)
    for ending, text in (
        ("json", report.as_json(results)),
        ("md", report.as_markdown(results, f"{_NAME}.svg")),
        ("svg", chart.as_svg(results)),
    ):
        path = out / f"{_NAME}.{ending}"
        path.write_text(text, encoding="utf-8")
        print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
