"""Runs scenarios, each seed in a process of its own, a few at a time."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType

from benchmarks.scenarios.model import Chart, Check, Outcome

NAMES = (
    "beyond_round_robin",
    "fast_failing_host",
    "metastable",
    "tail_at_scale",
    "recovery",
    "thundering_herd",
    "overload",
    "aperture",
    "balancersim",
)
"""In the order in which they are told."""

_ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    """One scenario, and what each seed gave."""

    name: str
    seeds: list[int]
    outcomes: list[Outcome]
    seconds: float
    """Processor time for a seed on the machine that ran it, roughly: how long the slowest process took."""

    @property
    def ok(self) -> bool:
        return all(check.ok for outcome in self.outcomes for check in outcome.checks)


def load(name: str) -> ModuleType:
    """The scenario of that name."""
    return importlib.import_module(f"benchmarks.scenarios.{name}")


def chart_of(name: str) -> Chart | None:
    """How its series are drawn, if they are."""
    chart: Chart | None = getattr(load(name), "CHART", None)
    return chart


def once(name: str, seed: int, quick: bool) -> Outcome:
    """Run a scenario here."""
    outcome: Outcome = load(name).run(seed, quick)
    return outcome


def apart(name: str, seed: int, quick: bool) -> tuple[Outcome, float]:
    """Run a scenario in a process of its own; gives the seconds it took as well.

    Raises:
        RuntimeError: It failed; says how.
    """
    command = [sys.executable, "-m", "benchmarks.scenarios.runner", name, str(seed), str(int(quick))]
    began = perf_counter()
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"scenario {name} with seed {seed} failed:\n{done.stderr}")
    return decode(json.loads(done.stdout.splitlines()[-1])), perf_counter() - began


def run(
    names: Sequence[str], seeds: Sequence[int], quick: bool, jobs: int, note: Callable[[Result], None]
) -> list[Result]:
    """Run every scenario for every seed, ``jobs`` at a time; ``note`` is told each scenario's result as it is there."""
    results: list[Result] = []
    with ThreadPoolExecutor(jobs) as pool:
        runs = {name: [pool.submit(apart, name, seed, quick) for seed in seeds] for name in names}
        try:
            for name, futures in runs.items():
                done = [future.result() for future in futures]
                outcomes = [outcome for outcome, _ in done]
                results.append(Result(name, list(seeds), outcomes, max(seconds for _, seconds in done)))
                note(results[-1])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def encode(outcome: Outcome) -> dict[str, object]:
    """As JSON has it."""
    return asdict(outcome)


def decode(plain: dict[str, object]) -> Outcome:
    """The reverse of `encode`."""
    rows, series, checks = plain["rows"], plain["series"], plain["checks"]
    assert isinstance(rows, list)
    assert isinstance(series, dict)
    assert isinstance(checks, list)
    points = {name: [(x, y) for x, y in line] for name, line in series.items()}
    return Outcome(rows, points, [Check(**one) for one in checks])


if __name__ == "__main__":
    print(json.dumps(encode(once(sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3]))))))
