"""The adaptive limit: within its bounds whatever happens, and at the right number when it is needed."""

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import adaptive
from meshlib.core.errors import ConfigurationError
from meshlib.filters.adaptive import AdaptiveLimit


class Workers:
    """A service of ``workers`` that each take ``took`` seconds, offered ever as much as the limit lets in."""

    def __init__(self, limit, workers, took):
        self.limit, self.workers, self.took = limit, workers, took
        self.now = 0.0
        self.free = [0.0] * workers
        self.ends = []
        self.served = 0

    def run(self, seconds, demand=10**9):
        """Keep ``demand`` requests under way, or as many as may be."""
        until = self.now + seconds
        while self.now < until:
            while len(self.ends) < min(self.limit.limit, demand):
                done = max(self.now, heapq.heappop(self.free)) + self.took
                heapq.heappush(self.free, done)
                heapq.heappush(self.ends, (done, self.now))
            self.now, began = heapq.heappop(self.ends)
            self.limit.finished(self.now, self.now - began, len(self.ends) + 1)
            self.served += 1


def limit(seed=1, **settings):
    return AdaptiveLimit(adaptive(**settings), random.Random(seed))


# --- where it ends up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "took"), [(1, 0.01), (2, 0.2), (10, 0.01), (50, 0.05), (300, 0.2), (3, 2.0)])
def test_under_overload_it_is_a_little_more_than_the_service_works_on(workers, took):
    service = Workers(limit(), workers, took)
    service.run(30 + 150 * took)
    assert workers <= service.limit.steady <= 1.25 * workers + 2 * workers**0.5 + 4
    assert service.limit.baseline == pytest.approx(took, rel=0.05)


def test_a_baseline_that_was_taken_in_the_middle_of_an_overload_is_mended():
    service = Workers(limit(initial=100), 10, 0.01)
    service.run(0.5)
    assert service.limit.baseline is None or service.limit.baseline > 0.03  # nothing else has been seen yet
    service.run(30)
    assert service.limit.baseline == pytest.approx(0.01)
    assert service.limit.limit <= 20


def test_the_baseline_does_not_creep_up_through_half_an_hour_of_overload():
    service = Workers(limit(), 10, 0.1)
    service.run(10)
    for _ in range(30):
        service.run(60)
        assert service.limit.baseline <= 0.101
    assert service.limit.steady <= 20


def test_checking_the_baseline_costs_next_to_no_throughput():
    service = Workers(limit(), 10, 0.01)
    service.run(20)
    served = service.served
    service.run(100)
    assert service.served - served >= 0.98 * 100 * 1000


def test_a_service_that_has_become_slower_gets_as_much_as_before():
    service = Workers(limit(), 50, 0.01)
    service.run(30)
    service.took = 0.03
    service.run(60)
    assert service.limit.baseline == pytest.approx(0.03, rel=0.1)
    assert service.limit.steady >= 50


def test_a_service_that_has_lost_workers_is_followed_within_seconds():
    service = Workers(limit(), 100, 0.01)
    service.run(30)
    assert service.limit.steady >= 100
    service.free = service.free[:20]
    service.run(10)
    assert service.limit.steady <= 45


def test_a_burst_of_demand_finds_a_limit_that_grows_fast_at_first():
    service = Workers(limit(), 500, 0.01)
    service.run(2)
    assert service.limit.steady >= 400


# --- when it holds ----------------------------------------------------------------------------------------------------


def test_it_never_grows_while_less_than_half_of_it_is_used():
    service = Workers(limit(), 100, 0.01)
    service.run(60, demand=9)
    assert service.limit.limit == 20
    assert service.limit.baseline == pytest.approx(0.01)


def test_it_never_shrinks_for_what_is_slow_without_being_many():
    service = Workers(limit(), 100, 0.01)
    service.run(10, demand=9)
    service.took = 1.0
    service.run(60, demand=9)
    assert service.limit.limit == 20


def test_replies_that_come_at_once_say_nothing():
    one = limit()
    for i in range(100_000):
        assert not one.finished(i * 1e-3, 50e-6, 20)
    assert one.limit == 20
    assert one.baseline is None


def test_what_runs_out_of_time_inside_counts_as_overload():
    one, now = limit(), 0.0
    before = one.limit
    for _ in range(60):
        for _ in range(10):
            now += 0.1
            one.finished(now, 0.01, before)
        for _ in range(2):
            one.dropped(before)
    assert one.limit < before


def test_a_few_callers_without_patience_are_no_overload():
    one, now = limit(), 0.0
    for _ in range(60):
        for _ in range(20):
            now += 0.05
            one.finished(now, 0.01, 20)
        one.dropped(20)
    assert one.limit >= 20


def test_a_late_event_loop_counts_as_overload():
    one, now = limit(), 0.0
    for _ in range(1000):
        now += 0.05
        one.finished(now, 0.01, one.limit, overloaded=True)
    assert one.limit <= 5


def test_a_check_ends_even_if_nothing_succeeds_any_more():
    service = Workers(limit(), 10, 0.01)
    while not service.limit.checking:
        service.run(0.01)
    assert service.limit.limit < service.limit.steady
    assert not service.limit.failed(service.now)
    assert service.limit.failed(service.now + 100)
    assert service.limit.limit == service.limit.steady


def test_checks_of_two_servers_do_not_fall_together():
    times = []
    for seed in range(8):
        service = Workers(limit(seed), 10, 0.01)
        service.run(5)
        while not service.limit.checking:
            service.run(0.01)
        times.append(service.now)
    assert max(times) - min(times) > 2


# --- whatever happens -------------------------------------------------------------------------------------------------

events = st.lists(
    st.tuples(
        st.sampled_from(["finished", "overloaded", "dropped", "failed"]),
        st.floats(0, 5),
        st.floats(0, 100) | st.just(1e-9),
        st.integers(0, 5000),
        st.integers(1, 60),
    ),
    max_size=60,
)


@given(st.data(), events, st.integers(0, 9))
def test_it_stays_within_its_bounds(data, happened, seed):
    least = data.draw(st.integers(1, 50))
    first = data.draw(st.integers(least, 100))
    most = data.draw(st.integers(first, 2000))
    one = AdaptiveLimit(adaptive(first, min_limit=least, max_limit=most), random.Random(seed))
    now = 0.0
    for kind, wait, took, active, times in happened:
        for _ in range(times):
            now += wait
            before = one.limit
            changed = False
            if kind == "dropped":
                one.dropped(active)
            elif kind == "failed":
                changed = one.failed(now)
            else:
                changed = one.finished(now, took, active, kind == "overloaded")
            assert least <= one.limit <= most
            assert one.limit == before or changed
            assert one.baseline is None or one.baseline > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial": 0},
        {"initial": 2.5},
        {"initial": True},
        {"min_limit": 0},
        {"min_limit": 21},
        {"max_limit": 19},
        {"max_limit": "1000"},
    ],
)
def test_bounds_that_make_no_sense_are_told_at_construction(wrong):
    with pytest.raises(ConfigurationError, match="give whole numbers of requests"):
        adaptive(**wrong)


def test_it_prints_as_it_is_typed():
    assert repr(adaptive(30, max_limit=50)) == "adaptive(initial=30, min_limit=1, max_limit=50)"
    assert (
        repr(meshlib.concurrency_limit(adaptive(), queue=5))
        == "concurrency_limit(adaptive(initial=20, min_limit=1, max_limit=1000), queue=5)"
    )
    assert "baseline unknown" in repr(limit())
