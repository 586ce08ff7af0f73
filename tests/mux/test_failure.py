from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.errors import (
    AttemptTimeout,
    ConnectError,
    DeadlineExceeded,
    InvalidArgument,
    MeshError,
    Rejected,
    RemoteError,
    UnknownMethod,
    UnknownService,
)
from meshlib.core.pushback import LONGEST_WAIT
from meshlib.mux.failure import from_wire, read_retry_after, to_wire
from meshlib.mux.messages import ReplyStatus

from .strategies import pairs

RETRYABLE, REJECTED, FINAL = 1, 2, 4


def flags(number: int) -> tuple[bytes, bytes]:
    return (b"MuxFailure", struct.pack(">q", number))


def final(error: MeshError) -> MeshError:
    error.finalize("the retry budget is spent")
    return error


# --- what a server says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "number"),
    [
        (Rejected("full"), ReplyStatus.NACK, RETRYABLE | REJECTED),
        (ConnectError("nobody there"), ReplyStatus.NACK, RETRYABLE | REJECTED),
        (Rejected("for good", retryable=False), ReplyStatus.ERROR, REJECTED | FINAL),
        (RemoteError("failed"), ReplyStatus.ERROR, None),
        (final(RemoteError("failed")), ReplyStatus.ERROR, FINAL),
        (final(DeadlineExceeded("late")), ReplyStatus.ERROR, FINAL),
        (DeadlineExceeded("late"), ReplyStatus.ERROR, None),
        (InvalidArgument("bad"), ReplyStatus.ERROR, None),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, Exception) else None,
)
def test_an_error_becomes_a_status_flags_and_a_text(error: MeshError, status: ReplyStatus, number: int | None) -> None:
    said, contexts, body = to_wire(error)
    assert said is status
    assert body.decode() == error.message
    assert dict(contexts).get(b"MuxFailure") == (None if number is None else struct.pack(">q", number))


def test_only_what_was_said_of_this_failure_is_final_not_what_is_true_of_its_kind() -> None:
    """`RemoteError` is not retryable by kind; that binds nobody further up."""
    assert not RemoteError("x").retryable
    assert to_wire(RemoteError("x"))[1] == ()


# --- what a client makes of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ReplyStatus)
@pytest.mark.parametrize("number", [None, *range(8)])
def test_flags_mean_what_they_mean_in_finagle(status: ReplyStatus, number: int | None) -> None:
    if status is ReplyStatus.OK:
        return
    error = from_wire(status, () if number is None else (flags(number),), b"why")
    number = number or 0
    unprocessed = status is ReplyStatus.NACK or bool(number & RETRYABLE)

    assert error.message == "why"
    if unprocessed or number & REJECTED:
        assert isinstance(error, Rejected)
        assert error.by_peer
        assert error.requeueable is (unprocessed and not number & FINAL)
    else:
        assert type(error) is RemoteError
        assert error.processed
    if number & FINAL:
        assert vars(error).get("retryable") is False, "nobody further up may try again either"


def test_a_nack_without_flags_may_go_elsewhere() -> None:
    error = from_wire(ReplyStatus.NACK, (), b"")
    assert isinstance(error, Rejected)
    assert error.requeueable
    assert error.message == "the server refused the request"


def test_unknown_flags_and_surplus_bytes_are_passed_over() -> None:
    error = from_wire(ReplyStatus.ERROR, ((b"MuxFailure", struct.pack(">q", 1 << 40 | REJECTED) + b"more"),), b"x")
    assert isinstance(error, Rejected)
    assert not error.requeueable


@pytest.mark.parametrize("value", [b"", b"\x01", bytes(7)])
def test_flags_cut_short_are_no_flags(value: bytes) -> None:
    assert type(from_wire(ReplyStatus.ERROR, ((b"MuxFailure", value),), b"x")) is RemoteError


def test_a_reason_that_is_no_text_is_still_shown() -> None:
    assert from_wire(ReplyStatus.ERROR, (), b"\xff!").message == "\ufffd!"


def test_contexts_of_a_failure_are_kept_for_the_caller() -> None:
    error = from_wire(ReplyStatus.ERROR, ((b"a", b"1"),), b"x")
    assert error.contexts == ((b"a", b"1"),)


@pytest.mark.parametrize(
    "case",
    {
        "nothing": b"",
        "a reserved byte": b"\xc1",
        "a number": msgspec.msgpack.encode(5),
        "a kind that is a number": msgspec.msgpack.encode({"kind": 5}),
        "no kind": msgspec.msgpack.encode({}),
        "nested without end": b"\x91" * 30_000,
        "not one of ours": msgspec.msgpack.encode({"kind": "SystemExit"}),
        "no text": b"\x81\xa4kind\xa1\xff",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_kind_that_makes_no_sense_is_no_kind(case: tuple[str, bytes]) -> None:
    assert type(from_wire(ReplyStatus.ERROR, ((b"meshlib.error", case[1]),), b"x")) is RemoteError


# --- for how long to leave it alone -----------------------------------------------------------------------------------


def pushing_back(error: MeshError, seconds: float | None) -> MeshError:
    error.retry_after = seconds
    return error


@pytest.mark.parametrize("error", [Rejected("full"), Rejected("full", retryable=False), RemoteError("x")], ids=repr)
@pytest.mark.parametrize(
    ("seconds", "arrives"),
    [(-0.5, -1.0), (None, None), (0.0, 0.0), (0.0001, 0.001), (1.5, 1.5), (1e9, 3600.0), (float("inf"), 3600.0)],
)
def test_how_long_a_server_wants_to_be_left_alone_travels(
    error: MeshError, seconds: float | None, arrives: float | None
) -> None:
    reply = to_wire(pushing_back(error, seconds))
    assert from_wire(*reply).retry_after == arrives
    assert (b"meshlib.RetryAfter" in dict(reply[1])) is (seconds is not None)


def test_it_is_milliseconds_in_digits_beside_what_finagle_reads() -> None:
    status, contexts, _ = to_wire(pushing_back(Rejected("full"), 0.25))
    assert status is ReplyStatus.NACK
    assert contexts == (flags(RETRYABLE | REJECTED), (b"meshlib.RetryAfter", b"250"))


def test_what_is_no_time_is_not_sent() -> None:
    assert from_wire(*to_wire(pushing_back(Rejected("full"), float("nan")))).retry_after is None


@pytest.mark.parametrize("value", [b"", b"-", b"-2", b"1.5", b" 5", b"5 ", b"0x10", b"1e3", "٣".encode(), b"9" * 17])
def test_what_is_no_number_of_milliseconds_says_nothing(value: bytes) -> None:
    error = from_wire(ReplyStatus.NACK, ((b"meshlib.RetryAfter", value),), b"full")
    assert isinstance(error, Rejected)
    assert error.retry_after is None


@given(st.binary(max_size=40) | st.integers(0, 10**20).map(lambda n: b"%d" % n))
def test_whatever_is_said_is_a_bounded_time_or_none(value: bytes) -> None:
    seconds = read_retry_after(value)
    assert seconds is None or 0 <= seconds <= LONGEST_WAIT or value == b"-1"
    assert (seconds is not None) == (
        value == b"-1" or (0 < len(value) <= 16 and all(c in b"0123456789" for c in value))
    )


# --- both -------------------------------------------------------------------------------------------------------------

ERRORS = {
    "rejected": Rejected("full"),
    "rejected for good": Rejected("full", retryable=False),
    "deadline": DeadlineExceeded("late"),
    "argument": InvalidArgument("not an int", path="order.items[2]"),
    "no method": UnknownMethod("no such method"),
    "no service": UnknownService("no such service"),
    "remote": RemoteError("internal error"),
    "final remote": final(RemoteError("internal error")),
    "final deadline": final(DeadlineExceeded("late")),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_an_error_arrives_as_what_it_was(error: MeshError) -> None:
    arrived = from_wire(*to_wire(error))
    assert type(arrived) is type(error)
    assert arrived.message == error.message
    assert arrived.requeueable is error.requeueable
    assert arrived.retryable is error.retryable
    assert getattr(arrived, "path", None) == getattr(error, "path", None)


@pytest.mark.parametrize("error", [e for e in ERRORS.values() if "retryable" in vars(e)], ids=lambda e: repr(e))
def test_what_is_final_stays_final_over_any_number_of_hops(error: MeshError) -> None:
    for _ in range(3):
        error = from_wire(*to_wire(error))
        assert vars(error)["retryable"] is False
        assert dict(to_wire(error)[1])[b"MuxFailure"][-1] & FINAL


def test_a_try_that_took_too_long_is_a_deadline_to_those_further_up() -> None:
    arrived = from_wire(*to_wire(AttemptTimeout("slow")))
    assert type(arrived) is DeadlineExceeded


@given(st.sampled_from([ReplyStatus.ERROR, ReplyStatus.NACK]), pairs, st.binary(max_size=50), st.binary(max_size=30))
def test_any_reply_becomes_an_error_that_can_be_sent_on(
    status: ReplyStatus, contexts: tuple[tuple[bytes, bytes], ...], body: bytes, value: bytes
) -> None:
    known = ((b"MuxFailure", value), (b"meshlib.error", value))
    error = from_wire(status, contexts + known, body)
    again = from_wire(*to_wire(error))
    assert again.requeueable is error.requeueable
    assert again.message == error.message
