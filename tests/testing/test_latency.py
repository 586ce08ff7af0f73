"""Each model has the distribution that it says it has."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib import ConfigurationError
from meshlib.testing import Latency, constant, exponential, lognormal, pareto, replayed, uniform
from meshlib.testing.latency import as_latency

N = 40_000


def draw(model: Latency, n: int = N, seed: int = 1) -> list[float]:
    sample = model.sampler(random.Random(seed))
    return [sample() for _ in range(n)]


@pytest.mark.parametrize(
    "model",
    [constant(0.1), uniform(0.1, 0.3), exponential(0.05), lognormal(0.1, 0.5), pareto(0.01, 2.5), pareto(0.01, 1, 1.0)],
    ids=repr,
)
def test_the_mean_is_the_mean(model: Latency) -> None:
    assert statistics.fmean(draw(model)) == pytest.approx(model.mean, rel=0.03)


@pytest.mark.parametrize(
    ("model", "q", "value"),
    [
        (uniform(1, 2), 0.25, 1.25),
        (exponential(1), 0.9, math.log(10)),
        (lognormal(0.1, 0.5), 0.5, 0.1),
        (lognormal(0.1, 0.5), 0.99, 0.1 * math.exp(0.5 * 2.326)),
        (pareto(0.01, 1.9), 0.98, 0.01 * 50 ** (1 / 1.9)),
        (pareto(0.01, 1.0, 0.1), 0.95, 0.1),
    ],
    ids=repr,
)
def test_the_quantiles_are_those_of_the_closed_form(model: Latency, q: float, value: float) -> None:
    assert sorted(draw(model))[int(q * N)] == pytest.approx(value, rel=0.05)


def test_a_pareto_with_a_small_shape_has_no_mean_unless_it_is_bounded() -> None:
    assert pareto(0.01, 0.9).mean == math.inf
    assert pareto(0.01, 0.9, most=10).mean < 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.integers())
def test_a_replay_goes_round_in_order_from_somewhere(times: list[float], seed: int) -> None:
    drawn = draw(replayed(times), 2 * len(times), seed)
    assert any(drawn[: len(times)] == times[n:] + times[:n] for n in range(len(times)))
    assert drawn[len(times) :] == drawn[: len(times)]


def test_a_file_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "times.txt"
    path.write_text("100  # ms\n\n# nothing\n250\n")
    model = replayed(path, unit=0.001)
    assert sorted(draw(model, 2)) == pytest.approx([0.1, 0.25])
    assert model.mean == pytest.approx(0.175)
    path.write_text("100\nabout 5\n")
    with pytest.raises(ConfigurationError, match=r"times\.txt, line 2: 'about 5' is no number"):
        replayed(path)
    with pytest.raises(ConfigurationError, match="No such file"):
        replayed(tmp_path / "other.txt")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: constant(-1), r"constant\(-1\): give seconds, 0 or more"),
        (lambda: constant(math.nan), r"constant\(nan\)"),
        (lambda: uniform(2, 1), r"uniform\(2, 1\): .*low <= high"),
        (lambda: exponential(0), "above 0"),
        (lambda: lognormal(0), "give the median"),
        (lambda: pareto(1, 0), "both above 0"),
        (lambda: pareto(1, 2, most=0.5), "most above least"),
        (lambda: replayed([]), "at least one time"),
        (lambda: replayed([-1.0]), "0 or more"),
        (lambda: as_latency("fast"), "is no latency"),  # type: ignore[arg-type]
        (lambda: as_latency(True), "is no latency"),
    ],
)
def test_wrong_parameters_are_told(make: Any, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        make()


def test_they_print_as_they_are_typed() -> None:
    for model in (constant(0.1), uniform(0.1, 0.2), exponential(1.0), lognormal(0.1, 0.3), pareto(0.1, 2.0, 3.0)):
        assert eval(repr(model)) == model
