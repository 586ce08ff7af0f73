"""Statuses and errors, each in terms of the other."""

import pickle

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from multidict import MultiDict

import meshlib
from meshlib.core.classify import ResponseClass, complete
from meshlib.core.pushback import LONGEST_WAIT
from meshlib.grpc.status import (
    FAILURES,
    Exhausted,
    excess,
    judge,
    pushback,
    raised,
    status_of,
    to_mesh,
    to_status,
)

FINAL = {"grpc-retry-pushback-ms": "0", "meshlib-nack": "final"}
NACK = {"grpc-retry-pushback-ms": "0", "meshlib-nack": "true"}


@pytest.mark.parametrize(
    ("status", "trailers", "kind", "retryable", "processed", "after"),
    [
        (Status.CANCELLED, {}, meshlib.RemoteError, True, None, None),
        (Status.UNKNOWN, {}, meshlib.RemoteError, True, True, None),
        (Status.INVALID_ARGUMENT, {}, meshlib.InvalidArgument, False, False, None),
        (Status.DEADLINE_EXCEEDED, {}, meshlib.DeadlineExceeded, False, None, None),
        (Status.NOT_FOUND, {}, meshlib.RemoteError, False, True, None),
        (Status.ALREADY_EXISTS, {}, meshlib.RemoteError, False, True, None),
        (Status.PERMISSION_DENIED, {}, meshlib.RemoteError, False, True, None),
        (Status.RESOURCE_EXHAUSTED, {}, meshlib.Rejected, False, None, None),
        (Status.RESOURCE_EXHAUSTED, {"grpc-retry-pushback-ms": "20"}, meshlib.Rejected, True, None, 0.02),
        (Status.FAILED_PRECONDITION, {}, meshlib.RemoteError, False, True, None),
        (Status.ABORTED, {}, meshlib.RemoteError, False, True, None),
        (Status.ABORTED, {"grpc-retry-pushback-ms": "5"}, meshlib.RemoteError, True, True, 0.005),
        (Status.OUT_OF_RANGE, {}, meshlib.RemoteError, False, True, None),
        (Status.UNIMPLEMENTED, {}, meshlib.UnknownMethod, False, False, None),
        (Status.INTERNAL, {}, meshlib.RemoteError, True, True, None),
        (Status.UNAVAILABLE, {}, meshlib.RemoteError, True, None, None),
        (Status.UNAVAILABLE, {"grpc-retry-pushback-ms": "-1"}, meshlib.RemoteError, True, None, -1),
        (Status.UNAVAILABLE, NACK, meshlib.Rejected, True, False, None),
        (Status.UNAVAILABLE, FINAL, meshlib.Rejected, False, False, None),
        (Status.UNAVAILABLE, {**NACK, "grpc-retry-pushback-ms": "7"}, meshlib.Rejected, True, False, 0.007),
        (Status.DATA_LOSS, {}, meshlib.RemoteError, False, True, None),
        (Status.UNAUTHENTICATED, {}, meshlib.RemoteError, False, True, None),
    ],
)
def test_each_status_is_an_error(status, trailers, kind, retryable, processed, after):
    error = to_mesh(status, "no", ["rich"], trailers, MultiDict(a="b"), "h:1")
    assert isinstance(error, kind)
    assert type(error) in (kind, Exhausted)
    assert (error.retryable, error.processed, error.retry_after) == (retryable, processed, after)
    assert (status_of(error), to_status(error)) == (status, (status, "no"))
    both = raised(error)
    assert isinstance(both, kind)
    assert isinstance(both, GRPCError)
    assert (both.status, both.message, both.details, both.trailing_metadata["a"]) == (status, "no", ["rich"], "b")
    assert str(both) == "no [endpoint h:1]"


@pytest.mark.parametrize("status", list(Status))
def test_only_what_the_server_is_to_blame_for_is_a_failure(status):
    if status is Status.OK:
        assert judge(None, "reply", None) is ResponseClass.SUCCESS
        return
    verdict = complete(judge)(None, None, to_mesh(status))
    failed = verdict in (ResponseClass.FAILURE, ResponseClass.RETRYABLE)
    assert failed == (status in FAILURES or status is Status.CANCELLED)


def test_an_answer_beyond_our_own_limits_is_no_refusal_and_says_nothing_bad_of_the_server():
    error = excess("too much", "h:1")
    assert isinstance(error, meshlib.RemoteError)
    assert not isinstance(error, meshlib.Rejected)
    assert (status_of(error), error.retryable, error.processed) == (Status.RESOURCE_EXHAUSTED, False, True)
    assert complete(judge)(None, None, error) is ResponseClass.SUCCESS
    assert complete(judge)(None, None, excess("too much", sent=False)) is ResponseClass.FAILURE
    assert complete(judge)(None, None, to_mesh(Status.RESOURCE_EXHAUSTED)) is ResponseClass.FAILURE
    both = raised(error)
    assert (both.status, both.message) == (Status.RESOURCE_EXHAUSTED, "too much")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (meshlib.DeadlineExceeded("x"), Status.DEADLINE_EXCEEDED),
        (meshlib.AttemptTimeout("x"), Status.DEADLINE_EXCEEDED),
        (meshlib.Rejected("x"), Status.UNAVAILABLE),
        (meshlib.CircuitOpen("x"), Status.UNAVAILABLE),
        (meshlib.ConnectError("x"), Status.UNAVAILABLE),
        (meshlib.ConnectionLost("x"), Status.UNAVAILABLE),
        (meshlib.NoEndpoints("x"), Status.UNAVAILABLE),
        (meshlib.ResolutionError("x"), Status.UNAVAILABLE),
        (meshlib.ServiceClosed("x"), Status.CANCELLED),
        (meshlib.RemoteError("x"), Status.UNKNOWN),
        (meshlib.InvalidArgument("x"), Status.INVALID_ARGUMENT),
        (meshlib.InvalidReply("x"), Status.INTERNAL),
        (meshlib.UnknownService("x"), Status.UNIMPLEMENTED),
        (meshlib.UnknownMethod("x"), Status.UNIMPLEMENTED),
        (meshlib.ProtocolError("x"), Status.INTERNAL),
        (meshlib.ConfigurationError("x"), Status.INTERNAL),
    ],
)
def test_each_error_is_a_status_and_one_that_grpclibs_callers_catch(error, status):
    error.endpoint = "h:1"
    error.__cause__ = KeyError("why")
    error.add_note("a note")
    both = raised(error)
    assert isinstance(both, type(error))
    assert isinstance(both, GRPCError)
    assert both.status is status
    assert both.message == str(both) == "x [endpoint h:1]"
    assert (both.details, both.trailing_metadata) == (None, None)
    assert both.__cause__ is error.__cause__
    assert both.__notes__ == ["a note"]
    assert raised(both) is both
    assert type(raised(type(error)("y"))) is type(both)
    with pytest.raises(type(error)):
        raise both
    with pytest.raises(GRPCError):
        raise both


def test_too_many_of_a_callers_is_exhausted():
    error = meshlib.Rejected("x")
    error.over_rate = True
    assert status_of(error) is Status.RESOURCE_EXHAUSTED
    again = to_mesh(Status.RESOURCE_EXHAUSTED, "x", None, {"meshlib-nack": "true"})
    assert again.over_rate
    assert again.requeueable


def test_without_a_message_there_is_none():
    both = raised(to_mesh(Status.NOT_FOUND))
    assert both.message is None
    assert str(both) == "the server answered NOT_FOUND"


def test_other_exceptions():
    assert status_of(None) is Status.OK
    assert status_of(GRPCError(Status.NOT_FOUND)) is Status.NOT_FOUND
    assert status_of(KeyError()) is Status.UNKNOWN


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        (" 250 ", 0.25),
        ("-1", -1.0),
        ("", -1.0),
        ("1.5", -1.0),
        ("soon", -1.0),
        ("٣", -1.0),
        ("9" * 18, LONGEST_WAIT),
        ("9" * 19, -1.0),
    ],
)
def test_pushback(value, seconds):
    assert pushback(value) == seconds


def test_an_error_of_both_kinds_can_be_shown_and_does_not_pretend_to_be_picklable():
    both = raised(to_mesh(Status.NOT_FOUND, "x"))
    assert repr(both) == "RemoteError('x')"
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(both)
