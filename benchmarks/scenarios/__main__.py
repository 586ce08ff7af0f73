"""``python -m benchmarks.scenarios``: run scenarios over several seeds, print tables and checks, and write them."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scenarios import chart, docs, report, runner

_ROOT = Path(__file__).parents[2]
_OUT = _ROOT / "benchmarks" / "results"
_DOCS = _ROOT / "docs"


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    quick: bool
    jobs: int
    out: Path | None


def parse(arguments: list[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scenarios", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(runner.NAMES)} (default: all)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many seeds, from 1 (default 5)")
    parser.add_argument("--quick", action="store_true", help="shorter runs of the same shape; nothing is written")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time (default 2)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the results (default benchmarks/results)")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in runner.NAMES]
    if unknown:
        parser.error(f"there is no scenario {unknown[0]!r}; there are {', '.join(runner.NAMES)}")
    if given.seeds < 1 or given.jobs < 1:
        parser.error("--seeds and --jobs take numbers from 1")
    names = tuple(name for name in runner.NAMES if not given.names or name in given.names)
    out = given.out if given.out is not None or given.quick else _OUT
    return Options(names, tuple(range(1, given.seeds + 1)), given.quick, given.jobs, out)


def write(results: list[runner.Result], out: Path, charts: Path, page: Path | None) -> None:
    """Put results where the last ones were, and everything known together again."""
    kept = out / "scenarios"
    kept.mkdir(parents=True, exist_ok=True)
    charts.mkdir(parents=True, exist_ok=True)
    for result in results:
        (kept / f"{result.name}.json").write_text(report.as_json(result), encoding="utf-8")
        how, series = runner.chart_of(result.name), result.outcomes[0].series
        if how is not None and series:
            drawn = chart.as_svg(runner.load(result.name).TITLE, how, series)
            (charts / f"{result.name}.svg").write_text(drawn, encoding="utf-8")
    files = [kept / f"{name}.json" for name in runner.NAMES]
    known = [report.from_json(file.read_text("utf-8")) for file in files if file.exists()]
    (out / "scenarios.md").write_text(report.as_markdown(known), encoding="utf-8")
    if page is not None and page.exists():
        tables = {result.name: report.tables(result) for result in known}
        page.write_text(docs.filled(page.read_text("utf-8"), tables), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Run, print and write; 1 when a check failed."""
    options = parse(arguments)
    results = runner.run(
        options.names,
        options.seeds,
        options.quick,
        options.jobs,
        lambda result: print(report.as_text(result), flush=True),
    )
    if options.out is not None:
        ours = options.out == _OUT
        charts = _DOCS / "scenarios" if ours else options.out / "charts"
        write(results, options.out, charts, _DOCS / "scenarios.md" if ours else None)
        print(f"written: {options.out / 'scenarios.md'}", file=sys.stderr)
    failed = [result.name for result in results if not result.ok]
    if failed:
        print(f"checks FAILED in {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
