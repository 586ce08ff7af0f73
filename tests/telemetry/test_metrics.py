"""Counters, gauges and histograms: cheap to write, and right when somebody reads them."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.telemetry.metrics import QUANTILES, Counter, LogHistogram, Registry

VALUES = st.one_of(
    st.floats(1e-15, 1e18),
    st.just(0.0),
    st.integers(0, 2000).map(float),
    st.sampled_from([0.25, 0.5, 1.0, 2.0**-10, 2.0**40]),
)


def histogram_of(values) -> LogHistogram:
    histogram = LogHistogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(st.lists(VALUES, min_size=1, max_size=60), st.floats(0, 1))
def test_a_quantile_is_within_a_64th_of_the_exact_nearest_rank(values, q):
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    assert histogram_of(values).quantile(q) == pytest.approx(exact, rel=1 / 64 + 1e-9, abs=0)


@given(st.lists(VALUES, min_size=1, max_size=60))
def test_quantiles_never_leave_the_extremes_and_never_fall(values):
    histogram = histogram_of(values)
    quantiles = [histogram.quantile(q / 20) for q in range(21)]
    assert quantiles == sorted(quantiles)
    assert min(values) <= quantiles[0]
    assert quantiles[-1] <= max(values)


def test_a_single_value_is_given_exactly():
    assert histogram_of([123.456]).quantile(0.5) == 123.456


def test_nothing_is_not_taken_for_a_quarter():
    assert histogram_of([0, 0, 0, 1]).quantile(0.5) == 0
    assert histogram_of([0, 0.25, 0.25]).quantile(0.9) == 0.25


@given(st.lists(st.floats(), max_size=200))
def test_whatever_is_recorded_counts_and_breaks_nothing(values):
    histogram = histogram_of(values)
    assert histogram.count == len(values)
    assert all(math.isfinite(number) for number in histogram.snapshot().values())
    assert histogram.quantile(1.0) <= 1e18


def test_negative_values_and_nan_count_as_nothing_and_infinity_as_the_largest():
    histogram = histogram_of([-5.0, -math.inf, math.nan])
    assert (histogram.count, histogram.sum, histogram.quantile(1.0)) == (3, 0.0, 0.0)
    assert histogram_of([math.inf]).quantile(0.5) == 1e18


def test_its_memory_is_bounded_whatever_is_recorded():
    rng = random.Random(1)
    histogram = LogHistogram()
    for exponent in range(-200, 200):
        for _ in range(200):
            histogram.record(math.ldexp(0.5 + rng.random() / 2, exponent))
    histogram.record(0.0)
    assert histogram.count == 80_001
    assert len(histogram._buckets) <= 4096


def test_an_empty_histogram_has_a_count_and_nothing_else():
    assert LogHistogram().snapshot() == {"count": 0}
    assert LogHistogram().quantile(0.5) == 0.0


def test_a_snapshot_has_count_sum_extremes_mean_and_quantiles():
    snapshot = histogram_of([1, 2, 3, 4]).snapshot()
    assert {name: snapshot[name] for name in ("count", "sum", "min", "max", "avg")} == {
        "count": 4, "sum": 10, "min": 1, "max": 4, "avg": 2.5,
    }  # fmt: skip
    assert set(snapshot) == {"count", "sum", "min", "max", "avg", *(name for name, _ in QUANTILES)}
    assert snapshot["p50"] == pytest.approx(2, rel=1 / 64)
    assert repr(histogram_of([1])) == "LogHistogram(count=1, p50=1, p99=1)"


# --- registries -------------------------------------------------------------------------------------------------------


def test_a_metric_is_made_once_and_is_the_same_from_every_scope():
    registry = Registry()
    registry.scope("a").scope("b").counter("hits").value += 1
    registry.scope("a", "b").counter("hits").value += 1
    assert registry.counter("a/b/hits").value == 2
    assert registry.histogram("h") is registry.histogram("h")


def test_a_snapshot_holds_every_number_below_its_scope_by_its_name_there():
    registry = Registry()
    registry.counter("requests").value = 3
    registry.gauge("pending", lambda: 7)
    endpoint = registry.scope("endpoints", "h:1")
    endpoint.counter("requests").value = 2
    endpoint.histogram("latency").record(5.0)
    everything = registry.snapshot()
    assert everything["requests"] == 3
    assert everything["pending"] == 7
    assert everything["endpoints/h:1/latency.max"] == 5.0
    assert endpoint.snapshot()["requests"] == 2
    assert "pending" not in endpoint.snapshot()


def test_a_gauge_is_read_when_somebody_looks_and_the_latest_has_the_name():
    registry, value = Registry(), [1]
    registry.gauge("g", lambda: value[0])
    value[0] = 2
    assert registry.snapshot() == {"g": 2}
    registry.gauge("g", lambda: 9)
    assert registry.snapshot() == {"g": 9}


def test_dropping_a_scope_forgets_it_and_nothing_beside_it():
    registry = Registry()
    for address in ("h:1", "h:10"):
        registry.scope("endpoints", address).counter("requests").value = 1
    registry.scope("endpoints", "h:1").drop()
    assert registry.snapshot() == {"endpoints/h:10/requests": 1}
    registry.drop()
    assert registry.snapshot() == {}


def test_a_name_that_changes_its_kind_is_given_the_kind_that_was_asked_for():
    registry = Registry()
    registry.gauge("x", lambda: 1)
    assert isinstance(registry.counter("x"), Counter)
    assert isinstance(registry.histogram("x"), LogHistogram)


def test_they_print():
    registry = Registry()
    registry.counter("a").value = 1
    assert repr(registry) == "<Registry /: 1 metrics>"
    assert repr(registry.scope("x")).startswith("<Registry x/")
    assert repr(registry.counter("a")) == "Counter(1)"
