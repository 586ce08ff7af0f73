"""The sliding distribution of latencies: its quantiles against the sorted samples, and what it forgets when."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.latencies import LEAST, Latencies

SECONDS = st.floats(1e-5, 1e3)


@given(st.lists(SECONDS, min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_is_the_nearest_rank_within_a_bucket_and_never_below_it(samples, share):
    latencies = Latencies()
    for sample in samples:
        latencies.record(sample)
    exact = sorted(samples)[max(1, math.ceil(share * len(samples))) - 1]
    (found,) = latencies.quantiles(share)
    assert exact <= found <= exact * (1 + 1 / 32)
    assert sum(sample > found for sample in samples) <= (1 - share) * len(samples)


@given(st.lists(SECONDS, min_size=1), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5).map(sorted))
def test_several_quantiles_at_once_are_those_asked_one_by_one(samples, shares):
    latencies = Latencies()
    for sample in samples:
        latencies.record(sample)
    assert latencies.quantiles(*shares) == tuple(latencies.quantiles(share)[0] for share in shares)


@given(
    st.lists(st.tuples(st.floats(0, 30), SECONDS), max_size=60),
    st.integers(1, 5),
    st.floats(0.5, 20),
)
def test_what_is_older_than_all_slices_is_forgotten_and_what_is_younger_than_all_but_one_is_kept(steps, slices, width):
    latencies = Latencies(slices, width)
    now, told = 0.0, []
    latencies.roll(now)
    for wait, sample in steps:
        now += wait
        latencies.roll(now)
        latencies.record(sample)
        told.append(now)
    kept = sum(now - at < (slices - 1) * width for at in told)
    at_most = sum(now - at <= slices * width for at in told)
    assert kept <= latencies.count <= at_most


def test_nothing_recorded_is_no_latency():
    latencies = Latencies()
    assert latencies.count == 0
    assert latencies.quantiles(0.5, 0.99) == (0.0, 0.0)


@pytest.mark.parametrize("odd", [0.0, -1.0, math.nan])
def test_a_clock_that_steps_back_breaks_nothing(odd):
    latencies = Latencies()
    latencies.record(odd)
    assert latencies.count == 1
    assert latencies.quantiles(1.0)[0] == pytest.approx(LEAST, rel=1 / 32)


def test_it_tells_what_it_holds():
    latencies = Latencies()
    latencies.record(0.1)
    assert repr(latencies) == "<Latencies: 1 samples, p50 102 ms, p99 102 ms>"
