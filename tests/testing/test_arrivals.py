"""When requests come."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.testing.arrivals import arrivals


def test_even_spacing_is_even_and_leaves_out_the_end() -> None:
    assert list(arrivals(4, None, 1.0, 2.0, None)) == [1.0, 1.25, 1.5, 1.75]


@pytest.mark.parametrize(("rate", "to"), [(100, 300), (300, 100), (0.001, 200), (200, 0)])
def test_a_ramp_has_the_area_of_its_trapezium_at_every_moment(rate: float, to: float) -> None:
    times = list(arrivals(rate, to, 0.0, 10.0, None))
    for until in (2.5, 5.0, 10.0):
        area = (rate + rate + (to - rate) * until / 10) / 2 * until
        assert sum(at < until for at in times) == pytest.approx(area, abs=1.1)


def test_poisson_arrivals_know_nothing_of_each_other() -> None:
    times = list(arrivals(1000, None, 0.0, 60.0, random.Random(1)))
    assert len(times) == pytest.approx(60_000, rel=0.02)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.05), "exponential gaps have their mean as deviation"


@given(st.floats(0.1, 50), st.none() | st.floats(0, 50), st.floats(0, 5), st.floats(0.1, 5), st.none() | st.integers())
def test_arrivals_are_in_order_and_within_the_time(
    rate: float, to: float | None, start: float, lasts: float, seed: int | None
) -> None:
    rng = None if seed is None else random.Random(seed)
    times = list(arrivals(rate, to, start, start + lasts, rng))
    assert times == sorted(times)
    assert all(start <= at < start + lasts for at in times)
