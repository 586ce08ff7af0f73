"""Errors: what may be done about each, and what each says."""

import copy
import pickle

import pytest

import meshlib
from meshlib.core import errors
from meshlib.core.classify import ResponseClass, classify, is_idempotent
from meshlib.core.errors import Attempt, MeshError, shown
from meshlib.core.service import Call

KINDS = [getattr(errors, name) for name in errors.__all__ if name not in ("Attempt", "shown")]

FACTS = {
    # class                may anybody try again?  did a handler see it?  also a
    "MeshError": (False, None, Exception),
    "Rejected": (True, False, MeshError),
    "CircuitOpen": (False, False, meshlib.Rejected),
    "ConnectError": (True, False, ConnectionError),
    "ConnectionLost": (True, None, ConnectionError),
    "DeadlineExceeded": (False, None, TimeoutError),
    "AttemptTimeout": (True, None, meshlib.DeadlineExceeded),
    "NoEndpoints": (False, False, MeshError),
    "ResolutionError": (False, False, MeshError),
    "ServiceClosed": (False, False, MeshError),
    "RemoteError": (False, True, MeshError),
    "InvalidArgument": (False, False, ValueError),
    "InvalidReply": (False, True, ValueError),
    "UnknownService": (False, False, LookupError),
    "UnknownMethod": (False, False, LookupError),
    "ProtocolError": (False, None, MeshError),
    "ConfigurationError": (False, False, ValueError),
    "DtabError": (False, False, ValueError),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_facts_of_each_kind(kind):
    retryable, processed, also = FACTS[kind.__name__]
    error = kind("why")
    assert (error.retryable, error.processed) == (retryable, processed)
    assert error.requeueable is (retryable and processed is False)
    assert isinstance(error, also)
    assert isinstance(error, MeshError)
    assert (error.message, str(error)) == ("why", "why")
    assert classify(None, None, error) is (ResponseClass.RETRYABLE if retryable else ResponseClass.FAILURE)


def test_every_kind_has_its_facts_here_and_its_line_in_the_tree():
    assert {kind.__name__ for kind in KINDS} == set(FACTS)
    assert all(kind.__name__ in errors.__doc__ for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_can_be_copied_and_pickled(kind):
    error = kind("why")
    error.label, error.name, error.endpoint = "shop", "h:1,h:2", "h:1"
    error.attempts = (Attempt("h:1", "refused"),)
    error.elapsed = 1.5
    error.finalize("the retry budget is spent")
    for twin in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is kind
        assert (str(twin), twin.retryable, twin.attempts) == (str(error), False, error.attempts)


def test_the_facts_of_one_error_can_be_given():
    error = MeshError("x", retryable=True, processed=False, endpoint="h:1")
    assert (error.retryable, error.processed, error.endpoint, error.requeueable) == (True, False, "h:1", True)
    assert not MeshError.retryable


def test_a_final_error_says_so_and_why():
    error = meshlib.Rejected("full")
    error.finalize("the retry budget is spent")
    assert not error.retryable
    assert not error.requeueable
    assert str(error) == "full [not retried: the retry budget is spent]"
    assert meshlib.Rejected("another").retryable


def test_it_says_who_called_what_where_how_often_how_long_and_why_no_more():
    error = meshlib.ConnectError("connect failed: refused")
    error.label, error.name, error.endpoint = "shop", "a:1,b:2", "b:2"
    error.attempts = (Attempt("a:1", "Rejected: full"), Attempt("b:2", "ConnectError: refused"))
    error.elapsed = 0.0123
    error.verdict = "3 attempts were made"
    assert str(error) == (
        "connect failed: refused [client 'shop', name a:1,b:2, "
        "2 attempts (a:1: Rejected: full; b:2: ConnectError: refused), after 0.012 s, "
        "not retried: 3 attempts were made]"
    )
    assert error.message == "connect failed: refused"


def test_one_attempt_is_singular_and_an_endpoint_is_named_when_there_is_no_account():
    error = MeshError("x")
    error.attempts = (Attempt("a:1"),)
    assert str(error) == "x [1 attempt (a:1)]"
    assert str(MeshError("x", endpoint="a:1")) == "x [endpoint a:1]"


def test_a_name_that_is_the_label_is_not_repeated():
    error = MeshError("x")
    error.label = error.name = "a:1"
    assert str(error) == "x [client 'a:1']"


def test_of_many_attempts_the_last_five_are_shown():
    error = MeshError("x")
    error.attempts = tuple(Attempt(f"h:{i}") for i in range(8))
    assert str(error) == "x [8 attempts (… h:3; h:4; h:5; h:6; h:7)]"


def test_an_error_without_a_text_says_its_kind():
    assert str(meshlib.Rejected()) == "Rejected"


def test_paths_and_contexts_are_kept():
    assert meshlib.InvalidArgument("bad", path="order.price").path == "order.price"
    assert meshlib.InvalidReply("bad", path="x").path == "x"
    assert meshlib.RemoteError("bad", contexts=((b"k", b"v"),)).contexts == ((b"k", b"v"),)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("", ""),
        ("/users/get", "/users/get"),
        ("größer", "größer"),
        ("a\nERROR forged", "a\\nERROR forged"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("x" * 300, "x" * 200 + "…"),
    ],
)
def test_what_comes_from_a_peer_is_shown_on_one_short_line(text, seen):
    assert shown(text) == seen
    assert shown(text).isprintable()


# --- classification ---------------------------------------------------------------------------------------------------


def test_a_reply_is_a_success_whatever_it_is():
    assert all(classify(None, reply, None) is ResponseClass.SUCCESS for reply in (None, False, b"", ValueError("x")))


def test_an_error_of_somebody_else_is_a_failure_that_must_not_be_repeated():
    assert classify(None, None, ValueError("x")) is ResponseClass.FAILURE
    assert classify(None, None, OSError("x")) is ResponseClass.FAILURE


def test_a_cancellation_says_nothing():
    class Cancelled(BaseException):
        pass

    assert classify(None, None, Cancelled()) is ResponseClass.IGNORABLE


def test_a_budget_that_ran_dry_makes_a_failure_final():
    error = meshlib.Rejected("full")
    error.finalize("the retry budget is spent")
    assert classify(None, None, error) is ResponseClass.FAILURE


def test_requests_say_by_an_attribute_that_they_are_idempotent():
    assert not is_idempotent(object())
    assert not is_idempotent(meshlib.mux.Request())
    assert is_idempotent(meshlib.mux.Request(idempotent=True))
    assert is_idempotent(Call(print, (), {}))
