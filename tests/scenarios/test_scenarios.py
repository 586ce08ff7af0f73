"""The scenarios in ``benchmarks/scenarios``, each once and short, and the arithmetic of what runs and reports them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from math import inf, nan
from pathlib import Path
from xml.etree import ElementTree

import pytest

import meshlib
from benchmarks.scenarios import __main__ as command
from benchmarks.scenarios import alone, chart, docs, report, runner
from benchmarks.scenarios.latency import PRODUCTION, Quantiles
from benchmarks.scenarios.model import Chart, Outcome, check, percentile
from benchmarks.scenarios.runner import Result
from meshlib.core.stack import Stack
from meshlib.testing import Clients, Load, Scenario, Servers, errors, slow

ROOT = Path(__file__).parents[2]
QUICK = ("beyond_round_robin", "fast_failing_host", "recovery")
SHOWN = runner.NAMES if "MESHLIB_SCENARIOS" in os.environ else QUICK
"""Those that take seconds. ``MESHLIB_SCENARIOS=1`` for all, which take minutes; `python -m benchmarks.scenarios` is the
same at full length, over several seeds."""


# --- the scenarios ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, Future[tuple[Outcome, float]]]:
    """Every scenario under way, in processes of their own, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(runner.apart, name, 1, True) for name in SHOWN}
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SHOWN)
def test_scenario_shows_what_it_must(name: str, runs: dict[str, Future[tuple[Outcome, float]]]) -> None:
    outcome, _ = runs[name].result()
    assert outcome.checks
    assert [one for one in outcome.checks if not one.ok] == []
    result = Result(name, [1], [outcome], 0.0)
    assert runner.load(name).TITLE in report.as_text(result)
    how = runner.chart_of(name)
    if how is not None:
        assert ElementTree.fromstring(chart.as_svg("x", how, outcome.series)).tag.endswith("svg")


@pytest.mark.timeout(120)
def test_a_seed_gives_the_same_outcome_again_and_another_seed_another() -> None:
    first, _ = runner.apart("beyond_round_robin", 3, True)
    assert first == runner.apart("beyond_round_robin", 3, True)[0]
    assert first.rows != runner.apart("beyond_round_robin", 4, True)[0].rows


def test_a_scenario_that_fails_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"scenario nothing with seed 1 failed:(?s:.*)ModuleNotFoundError"):
        runner.apart("nothing", 1, True)


# --- balancers alone --------------------------------------------------------------------------------------------------


def _bare(stack: Stack) -> Stack:
    kept = ("source", "bind", "balance", "pool", "transport")
    return Stack(stack.places, (layer for layer in stack.layers if layer.place in kept))


def test_balancers_alone_do_as_they_do_in_the_simulator() -> None:
    def scenario(stack: object = None) -> Scenario:
        return Scenario(
            servers=Servers(5, PRODUCTION),
            clients=Clients(1, (meshlib.balance(meshlib.least_loaded()),), stack=stack),
            load=Load(300, spacing="even"),
            faults=[slow(10, 0, at=2, until=4), errors(1.0, 1, at=5, until=6), errors(0.3, 2, at=7)],
            duration=8,
            seed=1,
        )

    ours, theirs = alone.play(scenario()), scenario(_bare).run()
    assert ours.requests() == theirs.requests() == 2400
    assert ours.errors().keys() == theirs.errors().keys() == {"RemoteError"}
    for since, until in (0, 2), (2, 4), (5, 6), (7, 8):
        assert ours.success(since, until, within=1) == pytest.approx(theirs.success(since, until, within=1), abs=0.03)
        for server in range(5):
            assert ours.share(server, since, until) == pytest.approx(theirs.share(server, since, until), abs=0.06)
    assert ours.latency(0.5, 0, 2) == pytest.approx(theirs.latency(0.5, 0, 2), rel=0.01)


def test_balancers_alone_refuse_what_is_more() -> None:
    with pytest.raises(ValueError, match=r"timeout.* is more than balancing"):
        alone.play(Scenario(servers=Servers(1), clients=Clients(1, (meshlib.timeout(1),)), load=Load(1), duration=1))
    with pytest.raises(ValueError, match="no queues"):
        alone.play(Scenario(servers=Servers(1, workers=1), load=Load(1), duration=1))


def test_latencies_by_quantile_are_those() -> None:
    import random

    sample = PRODUCTION.sampler(random.Random(1))
    found = sorted(sample() for _ in range(40_000))
    for share, seconds in PRODUCTION.points[1:-1]:
        assert found[int(share * len(found))] == pytest.approx(seconds, rel=0.01)
    assert PRODUCTION.points[0][1] <= found[0] <= found[-1] <= PRODUCTION.points[-1][1]
    assert PRODUCTION.mean == pytest.approx(0.16956, rel=0.001)
    assert Quantiles(((0.0, 1.0), (0.5, 2.0), (1.0, 4.0))).mean == pytest.approx(2.25)


# --- checks, tables, charts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bound", "ok"),
    [
        (5, ">= 5", True),
        (4.999, ">= 5", False),
        (5, "<= 5", True),
        (5.001, "<= 5", False),
        (5, "> 5", False),
        (5.1, "> 5", True),
        (inf, "> 5", True),
        (5, "< 5", False),
        (4, "< 5", True),
        (inf, "<= 5", False),
        (95.45, "95.4 to 95.5", True),
        (95.51, "95.4 to 95.5", False),
        (nan, ">= 0", False),
        (nan, "<= 0", False),
        (-1, "<= 1e-3", True),
    ],
)
def test_check(value: float, bound: str, ok: bool) -> None:
    assert check("it", value, bound).ok is ok


@pytest.mark.parametrize("bound", ["5", "about 5", ">=5", "5 to", "=> 5"])
def test_a_bound_that_cannot_be_read(bound: str) -> None:
    with pytest.raises(ValueError, match="is no bound"):
        check("it", 1, bound)


def test_percentile() -> None:
    assert [percentile([1, 2, 3, 4], q) for q in (0, 25, 26, 50, 99, 100)] == [1, 1, 2, 2, 4, 4]
    assert percentile([], 50) != percentile([], 50)


def two_seeds(second: float = 2.5) -> Result:
    def outcome(value: float) -> Outcome:
        rows = [{"client": "a", "x": value, "n": 1000, "never": inf, "none": None}]
        return Outcome(rows, {"line": [(0.0, value)]}, [check("x is small", value, "<= 2.5")])

    return Result("recovery", [1, 2], [outcome(1.25), outcome(second)], 3.0)


def test_tables_show_the_range_over_the_seeds() -> None:
    assert report.tables(two_seeds()).splitlines() == [
        "| client | x | n | never | none |",
        "| :-- | --: | --: | --: | --: |",
        "| a | 1.25 to 2.5 | 1,000 | never | - |",
        "",
        "| check | found | wanted |  |",
        "| :-- | --: | --: | :-- |",
        "| x is small | 1.25 to 2.5 | <= 2.5 | ok |",
    ]
    assert two_seeds().ok
    assert not two_seeds(3).ok
    assert "FAILED 1 of 2" in report.as_text(two_seeds(3))


def test_results_survive_being_written() -> None:
    again = report.from_json(report.as_json(two_seeds()))
    assert report.tables(again) == report.tables(two_seeds())
    assert again.outcomes[0].series == {}


def test_the_page_keeps_the_tables_of_the_last_run() -> None:
    page = "a\n<!-- results: one -->\nold\n<!-- end -->\nb\n<!-- results: two -->\n<!-- end -->\n"
    filled = docs.filled(page, {"one": "| new |"})
    assert filled == page.replace("old\n", "\n| new |\n\n")
    assert docs.filled(filled, {"one": "| new |"}) == filled


def test_results_are_written_and_put_together(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- results: recovery -->\n<!-- end -->\n", "utf-8")
    command.write([two_seeds()], tmp_path / "out", tmp_path / "charts", page)
    assert "1.25 to 2.5" in (tmp_path / "out" / "scenarios.md").read_text("utf-8")
    assert "1.25 to 2.5" in page.read_text("utf-8")
    assert ElementTree.parse(tmp_path / "charts" / "recovery.svg")
    other = Result("aperture", [1], [Outcome(checks=[check("y", 1, "<= 2")])], 1.0)
    command.write([other], tmp_path / "out", tmp_path / "charts", page)
    together = (tmp_path / "out" / "scenarios.md").read_text("utf-8")
    assert together.index("1.25 to 2.5") < together.index("| y |"), "what was known stays, in the order of the list"


def test_a_chart_has_its_panels_and_lines() -> None:
    series = {"p <1>: a": [(0.0, 1.0), (1.0, inf)], "p <1>: b": [(0.0, 0.01)], "q: a": [(n, n) for n in range(5000)]}
    drawn = chart.as_svg("t & u", Chart("x", "y", log=True), series)
    root = ElementTree.fromstring(drawn)
    lines = [one for one in root.iter() if one.tag.endswith("polyline")]
    assert [len(line.get("points", "").split()) for line in lines[:2]] == [1, 1], "infinity is not drawn"
    assert len(lines[2].get("points", "").split()) <= 400
    assert {"p <1>", "q", "a", "b", "t & u"} <= {one.text for one in root.iter()}
    flat = chart.as_svg("flat", Chart("x", "y"), {"a": [(0.0, 0.0), (1.0, 0.0)]})
    assert "nan" not in flat
    assert ElementTree.fromstring(flat) is not None


def test_the_command_line() -> None:
    options = command.parse(["recovery", "aperture", "--seeds", "2", "--jobs", "1"])
    assert options.names == ("recovery", "aperture")
    assert options.seeds == (1, 2)
    assert options.out == ROOT / "benchmarks" / "results"
    assert command.parse(["--quick"]).out is None
    assert command.parse([]).names == runner.NAMES


@pytest.mark.parametrize("arguments", [["nothing"], ["--seeds", "0"], ["--jobs", "0"]])
def test_the_command_line_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert "error:" in capsys.readouterr().err


def test_a_failed_check_fails_the_command() -> None:
    program = (
        "import sys; from benchmarks.scenarios import __main__ as c, runner; from benchmarks.scenarios.model import *\n"
        "runner.apart = lambda name, seed, quick: (Outcome(checks=[check('x', 3, '<= 2')]), 0.1)\n"
        "sys.exit(c.main(['recovery', '--quick', '--seeds', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "checks FAILED in recovery" in done.stderr
