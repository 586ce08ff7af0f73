"""Thresholds, and the exact count over a window that they are compared with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib import ConfigurationError
from meshlib.core.backoff import Constant, EqualJitter
from meshlib.core.thresholds import SLICES, Thresholds, Window, backoff_of, shown_backoff

STEPS = st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=200)


@given(steps=STEPS, at_last=st.floats(0, 50))
def test_what_is_counted_is_all_of_nine_tenths_of_the_window_and_nothing_older_than_the_window(steps, at_last):
    window, now, events = Window(30), 1000.0, []
    for wait, good in steps:
        now += wait
        (window.success if good else window.failure)(now)
        events.append((now, good))
    now += at_last
    counted = window.counts(now)
    for i, good in enumerate((True, False)):
        least = sum(1 for at, kind in events if kind is good and at > now - 30 * (SLICES - 1) / SLICES)
        most = sum(1 for at, kind in events if kind is good and at > now - 30 - 1e-6)
        assert least <= counted[i] <= most


@given(steps=STEPS)
def test_a_window_holds_no_more_than_its_slices(steps):
    window, now = Window(30), 0.0
    for wait, _ in steps:
        now += wait
        window.success(now)
        assert len(window._past) < SLICES + 1


def test_a_burst_counts_in_full():
    window = Window(30)
    for _ in range(100):
        window.success(1.0)
    for _ in range(300):
        window.failure(1.0)
    assert window.counts(1.0) == (100, 300), "where a moving average over time gives a burst next to no weight"


def test_a_cleared_window_is_empty():
    window = Window(30)
    window.success(1.0)
    window.failure(5.0)
    window.clear()
    assert window.counts(5.0) == (0, 0)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"failures": 0}, "1 or more"),
        ({"failures": 2.5}, "1 or more"),
        ({"failures": True}, "1 or more"),
        ({"success_rate": 80}, "0.8 for 80 %"),
        ({"success_rate": 0}, "0.8 for 80 %"),
        ({"window": 0}, "above 0"),
        ({"window": float("nan")}, "above 0"),
        ({"min_requests": 0}, "1 or more"),
        ({"failures": None, "success_rate": None}, "nothing would ever open it"),
    ],
)
def test_wrong_thresholds_are_told_at_construction(given, right):
    with pytest.raises(ConfigurationError, match=right):
        Thresholds(**given)


def test_a_pair_of_seconds_is_an_equal_jitter_and_a_backoff_is_itself():
    assert backoff_of("open_for", (5, 300)) == EqualJitter(5, 300)
    assert backoff_of("open_for", Constant(3)) == Constant(3)
    assert shown_backoff(EqualJitter(5, 300)) == "(5, 300)"
    assert shown_backoff(Constant(3)) == "Constant(seconds=3)"


@pytest.mark.parametrize("given", [(5,), (0, 1), (3, 2), ("a", "b"), 5, None, (1, float("inf"))])
def test_what_is_no_backoff_is_told(given):
    with pytest.raises(ConfigurationError, match="open_for="):
        backoff_of("open_for", given)
