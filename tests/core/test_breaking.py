"""The circuit: what outcomes say, and when it opens, asks, and closes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib.core.backoff import EqualJitter, Exponential
from meshlib.core.breaking import Circuit, Outcome, State, in_words, outcome_of
from meshlib.core.classify import ResponseClass, classify
from meshlib.core.thresholds import Thresholds
from tests import breaking
from tests.breaking import Model

RNG = random.Random(1)


def with_pushback(error):
    error.retry_after = 3.0
    return error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, Outcome.SUCCESS),
        (ValueError("x"), Outcome.FAILURE),
        (meshlib.RemoteError("x"), Outcome.FAILURE),
        (meshlib.DeadlineExceeded("x"), Outcome.FAILURE),
        (meshlib.AttemptTimeout("x"), Outcome.FAILURE),
        (meshlib.ConnectError("x"), Outcome.FAILURE),
        (meshlib.ProtocolError("x"), Outcome.FAILURE),
        (meshlib.ConnectionLost("x"), Outcome.LOST),
        (breaking.too_busy(), Outcome.REFUSED),
        (with_pushback(meshlib.RemoteError("x")), Outcome.REFUSED),
        (with_pushback(meshlib.Rejected("x")), Outcome.REFUSED),
        (meshlib.Rejected("never left"), Outcome.NOTHING),
        (with_pushback(meshlib.CircuitOpen("x")), Outcome.NOTHING),
        (meshlib.ServiceClosed("x"), Outcome.NOTHING),
        (meshlib.InvalidArgument("x"), Outcome.NOTHING),
        (meshlib.UnknownMethod("x"), Outcome.NOTHING),
        (meshlib.UnknownService("x"), Outcome.NOTHING),
    ],
    ids=repr,
)
def test_what_the_end_of_a_call_says(error, outcome):
    assert outcome_of(classify, "request", None if error else "reply", error) is outcome


def test_the_classifier_has_the_first_word():
    assert outcome_of(lambda *_: ResponseClass.IGNORABLE, 1, None, ValueError()) is Outcome.NOTHING
    assert outcome_of(lambda *_: ResponseClass.SUCCESS, 1, None, ValueError()) is Outcome.SUCCESS
    assert outcome_of(lambda *_: ResponseClass.FAILURE, 1, "a 500", None) is Outcome.FAILURE
    assert outcome_of(lambda *_: ResponseClass.RETRYABLE, 1, None, meshlib.ServiceClosed()) is Outcome.NOTHING


def test_failures_in_words():
    assert in_words(None) == "a reply that is a failure"
    assert in_words(ValueError()) == "ValueError"
    assert in_words(meshlib.ConnectionLost("reset")) == "ConnectionLost: reset"
    assert in_words(ValueError("a\nb")) == "ValueError: a\\nb"


def circuit(**given):
    return Circuit(Thresholds(**given), EqualJitter(5, 300))


def fail(it, n=1, now=0.0, outcome=Outcome.FAILURE):
    return [it.failed(it.now_valid, outcome, now, RNG, "E: x") for _ in range(n)]


def test_five_failures_in_a_row_open_it():
    it = circuit(success_rate=None)
    assert fail(it, 4) == [""] * 4
    it.succeeded(it.now_valid, 0)
    assert fail(it, 5) == ["", "", "", "", "failures"]
    assert it.reason == "5 failures in a row: E: x"


@pytest.mark.parametrize("good", [3, 4])
def test_less_than_80_percent_of_at_least_5_open_it_and_exactly_80_percent_do_not(good):
    it = circuit(failures=None)
    for _ in range(good):
        it.succeeded(it.now_valid, 0)
    codes = fail(it, 5 - good)
    assert codes[-1] == ("success_rate" if good == 3 else "")


def test_a_burst_of_failures_after_much_success_long_ago_opens_it():
    it = circuit(failures=None)
    for n in range(1000):
        it.succeeded(it.now_valid, n / 1000)
    codes = fail(it, 5, now=100)
    assert codes == ["", "", "", "", "success_rate"]
    assert it.reason == "0 of 5 succeeded within 30 s, below 80 %: E: x"


def test_refusals_count_for_the_rate_and_not_for_the_run():
    it = circuit(success_rate=None)
    assert fail(it, 100, outcome=Outcome.REFUSED) == [""] * 100
    assert fail(circuit(), 5, outcome=Outcome.REFUSED)[-1] == "success_rate"


def test_a_lost_connection_counts_once_in_the_run_however_many_calls_were_on_it():
    it = circuit(success_rate=None)
    for _ in range(4):
        under_way = [it.now_valid] * 50
        assert [it.failed(mine, Outcome.LOST, 0, RNG, "lost") for mine in under_way] == [""] * 50
    assert it.failed(it.now_valid, Outcome.LOST, 0, RNG, "lost") == "failures"
    mixed = circuit(failures=None, min_requests=50)
    under_way = [mixed.now_valid] * 50
    assert [mixed.failed(mine, Outcome.LOST, 0, RNG, "lost") for mine in under_way][-1] == "success_rate"


def test_waits_are_equal_jittered_doubled_by_failed_probes_and_small_again_after_a_revival():
    it, now = circuit(failures=1), 0.0
    fail(it)
    assert it.until == 5
    for n in range(1, 12):
        now = it.until
        mine = it.probe(now)
        assert it.failed(mine, Outcome.FAILURE, now, RNG, "x") == "probe"
        longest = min(300, 5 * 2**n)
        assert longest / 2 <= it.until - now <= longest
    now = it.until
    assert it.succeeded(it.probe(now), now)
    fail(it, now=now)
    assert it.until == pytest.approx(now + 5)


@pytest.mark.parametrize(("asked", "wait"), [(1, 5), (60, 60), (1e6, 300)])
def test_who_asks_to_be_left_alone_is_left_alone_up_to_a_limit(asked, wait):
    it = circuit(failures=1)
    it.failed(it.now_valid, Outcome.FAILURE, 0, RNG, "x", asked)
    assert it.until == wait


def test_only_the_wait_that_is_waited_for_brings_a_probe():
    it = circuit(failures=1)
    fail(it)
    assert not it.wait_is_over(4.0)
    assert it.wait_is_over(it.until)
    assert it.state is State.PROBE_DUE
    assert not it.wait_is_over(it.until)
    assert repr(it) == "<Circuit probe due: 1 failure in a row: E: x>"


@given(
    st.lists(
        st.one_of(
            st.just("begin"),
            st.tuples(st.integers(0, 20), st.sampled_from(list(breaking.OUTCOMES))),
            st.sampled_from([1.0, 5.0, 20.0]),
        ),
        max_size=80,
    )
)
def test_it_does_as_the_model_does(steps):
    limits = Thresholds(breaking.FAILURES, breaking.RATE, breaking.WINDOW, breaking.AT_LEAST)
    it, model, now, calls = Circuit(limits, Exponential(5, 40)), Model(), 0.0, []
    for step in steps:
        if step == "begin":
            mine = it.now_valid if it.state is State.CLOSED else it.probe(now)
            told = model.begin(now)
            assert (mine is None) == (told is None)
            calls.append((Circuit.STRAGGLER if mine is None else mine, told))
        elif isinstance(step, float):
            now += step
        elif calls:
            mine, told = calls.pop(step[0] % len(calls))
            outcome = Outcome(step[1])
            if outcome is Outcome.SUCCESS:
                it.succeeded(mine, now)
            elif outcome is Outcome.NOTHING:
                it.nothing(mine)
            else:
                it.failed(mine, outcome, now, RNG, "x")
            model.end(told, step[1], now)
        if it.state is State.OPEN and now >= it.until:
            it.wait_is_over(it.until)
        model.look(now)
        assert it.state.value == model.state
        if it.state is State.OPEN:
            assert it.until == model.until
