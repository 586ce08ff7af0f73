"""Classifiers: rules that leave cases open, and the default that decides those."""

import logging

import pytest

import meshlib
from meshlib import mux
from meshlib.core.classify import (
    ResponseClass,
    Rule,
    classifier,
    classify,
    complete,
    is_idempotent,
    retry_connection_losses,
    retry_server_errors,
    retry_timeouts,
)
from meshlib.core.errors import ConfigurationError

SUCCESS, FAILURE, RETRYABLE, IGNORABLE = ResponseClass


def final(error):
    error.finalize("the retry budget is spent")
    return error


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (None, SUCCESS),
        (meshlib.ConnectionLost(), RETRYABLE),
        (meshlib.RemoteError(), FAILURE),
        (final(meshlib.ConnectionLost()), FAILURE),
        (ValueError(), FAILURE),
        (KeyboardInterrupt(), IGNORABLE),
    ],
    ids=repr,
)
def test_the_default(error, means):
    assert classify("x", None, error) is means


@pytest.mark.parametrize(
    ("rule", "yes", "no"),
    [
        (retry_timeouts, [meshlib.DeadlineExceeded(), meshlib.AttemptTimeout(), TimeoutError()], [OSError()]),
        (retry_connection_losses, [meshlib.ConnectionLost(), ConnectionResetError()], [OSError(), TimeoutError()]),
        (retry_server_errors, [meshlib.RemoteError()], [meshlib.InvalidArgument(), ValueError()]),
    ],
    ids=repr,
)
def test_the_ready_made_ones_decide_their_own_kind_and_leave_the_rest_open(rule, yes, no):
    assert [rule("x", None, error) for error in yes] == [RETRYABLE] * len(yes)
    assert [rule("x", None, error) for error in [*no, None]] == [None] * (len(no) + 1)


@pytest.mark.parametrize("rule", [retry_timeouts, retry_connection_losses, retry_server_errors], ids=repr)
def test_what_is_final_stays_final(rule):
    errors = [meshlib.DeadlineExceeded(), meshlib.ConnectionLost(), meshlib.RemoteError()]
    assert RETRYABLE not in [rule("x", None, final(error)) for error in errors]


def test_rules_are_asked_in_order_until_one_decides():
    asked = []

    @classifier
    def empty(request, reply, error):
        asked.append("empty")
        return FAILURE if reply == "" else None

    rule = empty.or_else(retry_timeouts).or_else(lambda request, reply, error: SUCCESS)
    assert rule("x", "", None) is FAILURE
    assert rule("x", None, TimeoutError()) is RETRYABLE
    assert rule("x", None, KeyError()) is SUCCESS
    assert asked == ["empty"] * 3
    assert repr(empty.or_else(retry_timeouts)) == "empty.or_else(retry_timeouts)"
    assert empty("x", "full", None) is None


def test_what_a_rule_leaves_open_the_default_decides():
    whole = complete(retry_server_errors)
    assert whole("x", None, meshlib.RemoteError()) is RETRYABLE
    assert whole("x", None, meshlib.ConnectionLost()) is RETRYABLE
    assert whole("x", None, ValueError()) is FAILURE
    assert whole("x", "reply", None) is SUCCESS
    assert complete(classify) is classify


@pytest.mark.parametrize("answer", [None, "failure", True, 1 / 1, KeyError])
def test_a_classifier_that_fails_or_gives_nonsense_has_decided_nothing_and_is_told_once(answer, caplog):
    def odd(request, reply, error):
        if answer is KeyError:
            raise KeyError("missing")
        return answer

    whole = complete(odd)
    with caplog.at_level(logging.ERROR, "meshlib"):
        for _ in range(3):
            assert whole("x", None, meshlib.ConnectionLost()) is RETRYABLE
            assert whole("x", "reply", None) is SUCCESS
    assert len(caplog.records) == (0 if answer is None else 1)


@pytest.mark.parametrize("wrong", [None, "strict", 3])
def test_what_is_no_function_is_told_at_construction(wrong):
    for make in (complete, classifier, Rule):
        with pytest.raises(ConfigurationError, match=r"give a function of \(request, reply, error\)"):
            make(wrong)
    with pytest.raises(ConfigurationError, match="give a function"):
        mux.client("127.0.0.1:1", classifier=wrong)


def test_a_client_survives_a_classifier_that_raises():
    client = mux.client("127.0.0.1:1", classifier=lambda request, reply, error: 1 / 0)
    assert client.env.classifier("x", "reply", None) is SUCCESS


def test_a_request_says_itself_whether_it_may_be_sent_twice():
    assert is_idempotent(mux.Request(idempotent=True))
    assert not is_idempotent(mux.Request())
    assert not is_idempotent("x")
