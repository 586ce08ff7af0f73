"""Headers, both ways: what is written is read again, and what is hostile is ignored and counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.clock import Clock
from meshlib.core.context import Context, TraceId
from meshlib.core.env import NoMetrics
from meshlib.core.priority import Priority
from meshlib.http.headers import LONGEST, HeaderReader, encode_headers

CLOCK = Clock()
TRACE = TraceId(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, None, True)
PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def read(*headers: tuple[bytes, bytes], trust: bool = True) -> tuple[Context, int]:
    counter = NoMetrics().counter("")
    return HeaderReader(CLOCK, trust=trust, undecodable=counter).read(headers), counter.value


printable = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40)
contexts = st.builds(
    Context,
    trace=st.none()
    | st.builds(
        TraceId,
        st.integers(1, 2**128 - 1),
        st.integers(1, 2**64 - 1),
        st.none(),
        st.booleans(),
        st.just(False),
        st.sampled_from(["", "vendor=1"]),
    ),
    dtab=st.sampled_from([(), (("/s/a", "/s/b"),), (("/s", "zk://z:1/p"), ("/s/u", "9 * /s/v1 & /s/v2"))]),
    attempt=st.integers(0, 2**31 - 1),
    client_id=printable,
    baggage=printable,
    priority=st.sampled_from(Priority),
)


@given(contexts, st.none() | st.floats(0, 1e6))
def test_what_is_written_is_read_again(context, left):
    if left is not None:
        context = context.evolve(deadline=CLOCK.now() + left)
    again, undecodable = read(*encode_headers(context, CLOCK))
    assert undecodable == 0
    if left is None:
        assert again == context
    else:
        assert again.deadline == pytest.approx(context.deadline, abs=2)
        assert again.evolve(deadline=None) == context.evolve(deadline=None)


@given(st.text(), st.text())
def test_nothing_that_a_caller_says_becomes_a_header_of_its_own(baggage, client_id):
    for name, value in encode_headers(Context(baggage=baggage, client_id=client_id), CLOCK):
        assert name in (b"baggage", b"meshlib-client-id")
        assert all(0x20 <= byte < 0x7F for byte in value)


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        ([(b"traceparent", PARENT)], TRACE),
        ([(b"b3", b"4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1")], TRACE),
        ([(b"b3", b"a3ce929d0e0e4736-00f067aa0ba902b7")], TraceId(0xA3CE929D0E0E4736, TRACE.span, None, None)),
        ([(b"b3", b"a3ce929d0e0e4736-00f067aa0ba902b7-d")], TraceId(0xA3CE929D0E0E4736, TRACE.span, None, True, True)),
        ([(b"b3", b"a3ce929d0e0e4736-00f067aa0ba902b7-0-00000000000000aa")],
         TraceId(0xA3CE929D0E0E4736, TRACE.span, 0xAA, False)),
        ([(b"x-b3-traceid", b"A3CE929D0E0E4736"), (b"x-b3-spanid", b"00f067aa0ba902b7"), (b"x-b3-sampled", b"true")],
         TraceId(0xA3CE929D0E0E4736, TRACE.span, None, True)),
        ([(b"b3", b"0")], None),
        ([(b"traceparent", PARENT), (b"b3", b"a3ce929d0e0e4736-00000000000000aa-0")], TRACE),
    ],
)  # fmt: skip
def test_traces_of_others(headers, trace):
    context, undecodable = read(*headers)
    assert context.trace == trace
    assert undecodable == 0


def test_whom_nobody_trusts_says_neither_where_calls_go_nor_who_goes_first():
    trace = TraceId(5, 7, None, True)
    said = Context(
        trace=trace,
        dtab=(("/s", "/t"),),
        priority=Priority.CRITICAL,
        client_id="billing",
        attempt=1,
        baggage="tenant=root",
    )
    assert read(*encode_headers(said, CLOCK)) == (said, 0)
    assert read(*encode_headers(said, CLOCK), trust=False) == (Context(trace=trace), 0)  # nor who calls, and so on


DEADLINE = b"finagle-ctx-com.twitter.finagle.deadline"
RETRIES = b"finagle-ctx-com.twitter.finagle.retries"
HOSTILE = [
    *[(DEADLINE, value) for value in (
        b"", b"soon", b"1", b"1 2 3", b"-1 5", b"1.0 2.0", b"1e9 2e9", b"99999999999999999999 1", b"1\x002", b"0x1 0x2",
        b" ", b"nan nan", b"1  2", b"\xd9\xa1 \xd9\xa2", b"9" * 9000)],
    *[(RETRIES, value) for value in (
        b"", b"-1", b"x", b"1.5", b"1e3", b"99999999999", b"\xd9\xa1", b" 1", b"0x10", b"1" * 9000)],
    *[(b"traceparent", value) for value in (
        b"", b"00", PARENT[:-1], PARENT + b"0", PARENT.upper(), b"ff" + PARENT[2:], PARENT.replace(b"-", b"_"),
        b"00-" + b"0" * 32 + PARENT[35:], PARENT[:36] + b"0" * 16 + b"-01", b"\x00" * 55, b"\xff" * 55, b"a" * 9000)],
    *[(b"b3", value) for value in (
        b"", b"x", b"-", b"--", b"----", b"a-b", b"a3ce929d0e0e4736-00f067aa0ba902b7-x", b"0" * 16 + b"-" + b"0" * 16,
        b"a3ce929d0e0e4736-00f067aa0ba902b7-1-zz", b"a" * 9000)],
    *[(b"dtab-local", value) for value in (
        b"/s", b"/s =>", b"=> /t", b"/s => (", b"/s => /t ; /u", b"\xff\xfe", b"/s => " + b"(" * 5000, b"nonsense",
        b"/s => 9999999999999999999999999 *", b"/s => /t" * 2000, b"\x00")],
    *[(b"meshlib-priority", value) for value in (b"", b"highest", b"CRITICAL", b"1", b"\xff", b"c" * 9000)],
    *[(b"meshlib-client-id", value) for value in (b"\x00", b"\xff\xfe", b"a\nb", b"x" * 9000)],
    *[(b"baggage", value) for value in (b"\x00", b"a=\xff", b"a=1\r\nx: y", b"b" * 9000)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), HOSTILE, ids=lambda part: repr(part[:24]))
def test_what_cannot_be_read_is_ignored_and_counted(name, value):
    context, undecodable = read((name, value), (b"x-own", b"1"))
    assert context == Context()
    assert undecodable == 1 or value == b""  # which says nothing, and there is nothing wrong with that


def test_there_are_many_of_them():
    assert len(HOSTILE) > 70


def test_what_is_said_twice_counts_once_and_baggage_is_joined():
    context, undecodable = read((RETRIES, b"1"), (RETRIES, b"2"), (b"baggage", b"a=1"), (b"baggage", b"b=2"))
    assert (context.attempt, context.baggage, undecodable) == (1, "a=1,b=2", 1)


@given(st.lists(st.tuples(st.sampled_from(sorted({name for name, _ in HOSTILE})), st.binary(max_size=60)), max_size=12))
def test_whatever_comes_it_is_read_or_ignored(headers):
    read(*headers)


def test_the_longest_value_is_read():
    assert len(read((b"baggage", b"b" * LONGEST))[0].baggage) == LONGEST
