"""The load of a node: what raises and lowers the estimate, by how much, and what it costs to be asked again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import ConfigurationError
from meshlib.balancing.load import LAST_LOOK, LONGEST_REST, NACKED, UNMEASURED, least_loaded, peak_ewma

DECAY, PENALTY = 10.0, 5.0
times = st.floats(0, 100)
tooks = st.floats(1e-6, 100)


def meter(**more):
    return peak_ewma(**more).meter()


def measured(estimate, now=0.0):
    node = meter()
    node.succeeded(estimate, now)
    return node


def used(node, now):
    node.used = now
    return node


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_least_loaded_counts_and_learns_nothing():
    node = least_loaded().meter()
    node.pending = 3
    for event in (node.succeeded, node.failed, node.timed_out, node.censored):
        event(9.0, 1.0)
    assert node.cost(1.0) == 3
    assert not node.due(1e9)
    assert node.describe(1.0) == "3 under way"


def test_a_node_that_was_never_measured_gets_exactly_one_probe():
    node = meter()
    assert node.cost(0) == 0
    node.pending, node.begun = 1, 0.0
    assert node.cost(0) == UNMEASURED + 1
    assert node.cost(1e6) > measured(LONGEST_REST).cost(0)
    node.pending = 2
    assert node.cost(0) == UNMEASURED + 2


def test_the_cost_is_the_estimate_for_each_under_way_and_one_more():
    node = measured(0.1)
    assert node.cost(0) == pytest.approx(0.1)
    node.pending, node.begun = 3, 0.0
    assert node.cost(0) == pytest.approx(0.4)


def test_what_waits_counts_before_it_is_answered():
    node = measured(0.1)
    node.pending, node.begun = 2, 0.0
    assert node.cost(0.05) == pytest.approx(0.3, rel=0.01)
    assert node.cost(1.0) == pytest.approx(3.0)
    assert node.cost(5.0) == pytest.approx(15.0)
    node.pending, node.begun = 0, 0.0
    assert node.cost(5.0) < 0.1


@given(st.lists(st.tuples(times, tooks), min_size=1, max_size=5), st.lists(times, min_size=2, max_size=10))
def test_what_is_remembered_of_an_idle_node_only_fades_and_is_never_negative(samples, reads):
    node = meter()
    for at, took in sorted(samples):
        node.succeeded(took, at)
    costs = [node.cost(100 + at) for at in sorted(reads)]
    assert costs == sorted(costs, reverse=True)
    assert min(costs) >= 0


def test_reading_changes_nothing():
    often, once = measured(1.0), measured(1.0)
    for step in range(1000):
        often.cost(step / 100)
    often.succeeded(0.8, 10)
    once.succeeded(0.8, 10)
    assert often.estimate == once.estimate


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_slow_answer_raises_it_at_once_and_the_decay_lowers_it():
    node = measured(0.1)
    node.succeeded(1.0, 1)
    assert node.estimate == 1.0
    node.succeeded(0.6, 1 + DECAY)
    assert node.estimate == pytest.approx(0.6 + 0.4 * math.exp(-1))


def test_far_below_it_counts_for_ten_times_the_time():
    node = measured(1.0)
    node.succeeded(0.1, 1)
    assert node.estimate == pytest.approx(0.1 + 0.9 * math.exp(-1))


@given(st.lists(st.tuples(times, tooks), min_size=1, max_size=30))
def test_it_stays_between_the_least_and_the_greatest_sample(samples):
    node = meter()
    for at, took in samples:  # in any order: answers need not come in the order of their clock readings
        node.succeeded(took, at)
        seen = [took for _, took in samples]
        assert min(seen) * (1 - 1e-9) <= node.estimate <= max(seen) * (1 + 1e-9)


@given(st.lists(st.tuples(times, tooks, st.sampled_from(["ok", "fail", "nack", "late", "gone"])), max_size=30))
def test_whatever_happens_it_stays_between_the_least_sample_and_the_greatest_or_the_cap(events):
    node = meter()
    for at, took, kind in sorted(events):
        if kind == "ok":
            node.succeeded(took, at)
        elif kind == "late":
            node.timed_out(took, at)
        elif kind == "gone":
            node.censored(took, at)
        else:
            node.failed(took, at, nacked=kind == "nack")
        tooks = [took for _, took, _ in events]
        assert node.estimate == 0 or min(tooks) * (1 - 1e-9) <= node.estimate <= max(LONGEST_REST, *tooks)
        assert node.cost(at) >= 0


def test_one_blip_is_forgiven_in_about_two_seconds_and_a_node_that_is_often_slow_is_not():
    blip, often = measured(2.0), measured(2.0)
    answers = 90  # a second
    for n in range(1, 3 * answers):
        at = n / answers
        blip.succeeded(0.17, at)
        often.succeeded(2.0 if n % 10 == 0 else 0.17, at)
        if at > 2:
            assert blip.estimate < 0.45
            assert often.estimate > 1.5


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_fast_failure_is_no_fast_answer():
    node = measured(0.1)
    node.failed(0.001, 1)
    assert node.estimate == PENALTY


def test_failures_in_a_row_cost_more_and_more_up_to_a_cap():
    node, seen = measured(0.1), []
    for n in range(1, 12):
        node.failed(0.001, n)
        seen.append(node.estimate)
    assert seen[:4] == [5, 10, 20, 40]
    assert seen[-1] == LONGEST_REST
    node.succeeded(0.1, 30)
    node.estimate = 0.1
    node.failed(0.001, 31)
    assert node.estimate == PENALTY


def test_requests_that_fail_together_are_one_failure():
    node = measured(0.1)
    for _ in range(100):
        node.failed(0.5, 1.0)
    assert node.estimate == PENALTY
    node.failed(0.001, 1.1)
    assert node.estimate == 2 * PENALTY


def test_a_failure_that_took_longer_than_the_penalty_counts_for_what_it_took():
    node = measured(0.1)
    node.failed(20.0, 30)
    assert node.estimate == 20


def test_a_refusal_costs_less_unless_it_says_for_how_long():
    node = measured(0.1)
    node.failed(0.001, 1, nacked=True)
    assert node.estimate == pytest.approx(PENALTY * NACKED)
    node.failed(0.0, 1, rest=30, nacked=True)
    assert node.estimate == 30
    node.failed(0.0, 1, rest=1e9)
    assert node.estimate == LONGEST_REST
    less = measured(0.1)
    less.failed(0.001, 1, rest=2)
    assert less.estimate == PENALTY
    nothing = measured(0.1)
    nothing.failed(0.001, 1, rest=-1)
    assert nothing.estimate == PENALTY


def test_a_penalty_does_not_lower_what_is_worse_already():
    node = measured(60.0)
    node.failed(0.001, 1)
    assert node.cost(1) == pytest.approx(60 * math.exp(-0.1))


def test_a_timeout_is_a_failure_if_there_was_time_for_an_answer():
    node = measured(0.1)
    node.timed_out(0.05, 1)
    assert node.estimate == 0.1
    node.timed_out(0.2, 1)
    assert node.estimate == PENALTY
    node.timed_out(0.05, 2)  # it has shown nothing since that speaks for it
    assert node.estimate == 2 * PENALTY
    node.succeeded(0.1, 30)
    before = node.estimate
    node.timed_out(0.001, 31)
    assert node.estimate == before
    unknown = meter()
    unknown.timed_out(0.001, 1)
    assert unknown.estimate == PENALTY


@given(tooks, tooks, times)
def test_a_request_that_was_cancelled_may_raise_it_and_never_lowers_it(estimate, took, now):
    node = measured(estimate)
    before = node.cost(now)
    node.censored(took, now)
    assert node.cost(now) == pytest.approx(max(before, took))


def test_a_cancelled_first_request_leaves_a_node_unknown():
    node = meter()
    node.censored(0.001, 1)
    assert node.cost(1) == 0


# --- finding out ------------------------------------------------------------------------------------------------------


def test_a_node_is_due_when_it_was_idle_for_its_patience_which_doubles():
    node = used(measured(1.0), 0)
    waits = []
    for _ in range(6):
        now = node.used
        wait = next(tenths / 10 for tenths in range(1, 1000) if node.due(now + tenths / 10))
        waits.append(wait)
        node.looked()
        node.used = now + wait
    assert waits == pytest.approx([1, 2, 4, 8, 8, 8], abs=0.11)
    node.succeeded(0.1, node.used)
    assert node.due(node.used + 1)


def test_a_busy_node_is_not_due():
    node = used(measured(1.0), 0)
    node.pending = 1
    assert not node.due(1e6)


def test_a_node_that_failed_is_left_alone_for_the_penalty_and_for_what_it_asked():
    node = used(measured(0.1), 0)
    node.failed(0.001, 0)
    assert [node.due(at) for at in (4.9, 5)] == [False, True]
    node.looked()
    assert [node.due(at) for at in (LAST_LOOK - 0.1, LAST_LOOK)] == [False, True]
    asked = used(measured(0.1), 0)
    asked.failed(0.001, 0, rest=60)
    assert [asked.due(at) for at in (59, 61)] == [False, True]
    again = used(measured(0.1), 0)
    again.failed(0.001, 0, rest=60)
    again.failed(0.001, 1, rest=2)
    assert not again.due(59)


def test_a_new_process_begins_anew():
    node = measured(0.1)
    node.failed(0.001, 0, rest=100)
    node.pending = 1
    node.forget()
    assert (node.estimate, node.pending) == (0, 1)
    node.pending = 0
    assert node.cost(0) == 0
    assert used(node, 0).due(1)
    node.failed(0.001, 2)
    assert node.estimate == PENALTY


# --- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_are_used():
    node = meter(decay=1.0, penalty=2.0)
    node.failed(0.001, 0)
    assert node.estimate == 2.0
    assert node.cost(1) == pytest.approx(2 * math.exp(-1))


@pytest.mark.parametrize("wrong", [{"decay": 0}, {"decay": -1}, {"penalty": 0}, {"penalty": True}, {"decay": "10"}])
def test_wrong_parameters_are_told_at_once(wrong):
    (name,) = wrong
    with pytest.raises(ConfigurationError, match=rf"peak_ewma\({name}=.*\): give seconds"):
        peak_ewma(**wrong)


def test_they_print_as_they_are_typed():
    assert repr(peak_ewma()) == "peak_ewma(decay=10, penalty=5)"
    assert repr(least_loaded()) == "least_loaded()"
    assert repr(eval(repr(peak_ewma(3, 4)), vars(meshlib))) == "peak_ewma(decay=3, penalty=4)"
    node = measured(0.25)
    assert node.describe(0) == "cost 0.25 s: 250 ms, 0 under way"
    assert meter().describe(0) == "not measured, 0 under way"
