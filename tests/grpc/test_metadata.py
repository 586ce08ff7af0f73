"""What travels with a request as metadata, both ways; and hostile values."""

import base64
import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.clock import Clock
from meshlib.core.context import Context, TraceId
from meshlib.core.errors import InvalidArgument
from meshlib.core.priority import Priority
from meshlib.grpc.metadata import (
    MOST_CARRIED,
    ContextReader,
    decode_binary,
    decode_metadata,
    decode_timeout,
    encode_context,
    encode_timeout,
)
from meshlib.telemetry.metrics import Registry

CLOCK = Clock(lambda: 100.0)


def reader(**options):
    registry = Registry()
    made = ContextReader(CLOCK, undecodable=registry.counter("undecodable"), **options)
    return made, lambda: registry.snapshot()["undecodable"]


contexts = st.builds(
    Context,
    trace=st.none()
    | st.builds(
        TraceId,
        st.integers(1, 2**128 - 1),
        st.integers(1, 2**64 - 1),
        sampled=st.booleans(),
        state=st.sampled_from(("", "a=b,c=d")),
    ),
    dtab=st.sampled_from(((), (("/s/a", "/s/b"),), (("/s/a", "/s/b"), ("/s", "/zk")))),
    attempt=st.integers(0, 2**31 - 1),
    client_id=st.sampled_from(("", "shop/7")),
    baggage=st.sampled_from(("", "user=1,b=2")),
    priority=st.sampled_from(Priority),
)


@given(contexts)
def test_what_is_written_is_read(context):
    made, undecodable = reader()
    read = made.read(encode_context(context))
    assert read == context
    assert made.read([(name.encode(), value.encode()) for name, value in encode_context(context)]) == context
    assert undecodable() == 0


@given(contexts)
def test_a_caller_that_is_not_trusted_says_not_where_calls_go_nor_what_they_matter(context):
    made, _ = reader(trust=False)
    read = made.read(encode_context(context))
    assert read == Context(trace=context.trace)


@given(contexts)
def test_a_stranger_is_told_the_number_of_tries_alone(context):
    names = [name for name, _ in encode_context(context, propagate=False)]
    assert names == ["grpc-previous-rpc-attempts"] * bool(context.attempt)


@given(state=st.integers(0, 8192), baggage=st.integers(0, 8192), client=st.integers(0, 8192), dtab=st.integers(0, 4000))
def test_what_travels_along_is_bounded_and_dropped_in_order(state, baggage, client, dtab):
    where = (("/s", "/" + "t" * dtab),) if dtab else ()
    context = Context(
        trace=TraceId(1, 2, state="s" * state),
        baggage="b" * baggage,
        client_id="c" * client,
        dtab=where,
        priority=Priority.CRITICAL,
    )
    pairs = encode_context(context)
    found = dict(pairs)
    assert found["traceparent"]
    assert found["meshlib-priority"] == "critical"
    assert ("dtab-local" in found) == bool(dtab)
    rest = {name: value for name, value in pairs if name != "traceparent"}
    assert sum(map(len, rest)) + sum(map(len, rest.values())) <= MOST_CARRIED
    dispensable = [("baggage", baggage), ("tracestate", state), ("meshlib-client-id", client)]
    dropped = [(name, size) for name, size in dispensable if size and name not in found]
    assert not dropped or sum(size for _, size in dispensable) + dtab > MOST_CARRIED - 100
    if dropped:  # whatever is kept stands after all that are not
        last = dispensable.index(dropped[-1])
        assert all(name not in found for name, _ in dispensable[:last])


@pytest.mark.parametrize("tree", ["/" + "t" * MOST_CARRIED, "/t\r\nx: y", "/ä"])
def test_a_dtab_that_cannot_be_sent_is_refused_since_the_request_would_go_elsewhere(tree):
    with pytest.raises(InvalidArgument, match="the local Dtab has"):
        encode_context(Context(dtab=(("/s", tree),)))


@given(st.floats(1e-9, 1e10))
def test_a_timeout_is_written_as_the_protocol_has_it_and_never_longer_than_it_is(seconds):
    text = encode_timeout(seconds)
    assert len(text) <= 9
    assert text[:-1].isdigit()
    read = decode_timeout(text.encode())
    assert read <= seconds * (1 + 1e-9) or seconds < 1e-8
    if 1e-6 < seconds < 1e7:
        assert read >= seconds * 0.99 or seconds - read <= 1e-6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "1n"), (0.25, "250000u"), (30, "30000m"), (2e5, "200000S"), (1e9, "277777H"), (math.inf, "99999999H")],
)
def test_timeouts(seconds, text):
    assert encode_timeout(seconds) == text


@pytest.mark.parametrize("value", [b"", b"5", b"m", b"-5m", b"5x", b"123456789m", b"1.5S", b" 5m", "٣m".encode()])
def test_a_malformed_timeout_is_ignored_and_counted(value):
    made, undecodable = reader()
    assert made.read([(b"grpc-timeout", value)]).deadline is None
    assert undecodable() == 1


def test_a_deadline_is_now_and_what_is_left():
    made, _ = reader()
    assert made.read([("grpc-timeout", "250m")]).deadline == 100.25


HOSTILE = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "grpc-timeout",
                "grpc-previous-rpc-attempts",
                "grpc-trace-bin",
                "traceparent",
                "tracestate",
                "baggage",
                "dtab-local",
                "meshlib-client-id",
                "meshlib-priority",
                "other",
            )
        ),
        st.text(max_size=60) | st.sampled_from(("/s => /t", "1", "\0", "x" * 9000, "(" * 3000)),
    ),
    max_size=12,
)


@given(HOSTILE)
def test_whatever_comes_is_a_context(pairs):
    made, _ = reader()
    context = made.read(pairs)
    assert 0 <= context.attempt < 2**31
    assert context.trace is None or context.trace.trace


def test_what_is_said_twice_says_nothing_but_baggage_adds_up():
    made, undecodable = reader()
    context = made.read([("grpc-timeout", "1S"), ("grpc-timeout", "9S"), ("baggage", "a=1"), ("baggage", "b=2")])
    assert context.deadline == 101
    assert context.baggage == "a=1,b=2"
    assert undecodable() == 1


def census(trace=1, span=2, flags=1, version=0):
    parts = (
        bytes((version, 0))
        + trace.to_bytes(16)
        + b"\1"
        + span.to_bytes(8)
        + (b"" if flags is None else bytes((2, flags)))
    )
    return base64.b64encode(parts).decode().rstrip("=")


def test_open_census_is_read_where_there_is_no_traceparent():
    made, undecodable = reader()
    assert made.read([("grpc-trace-bin", census())]).trace == TraceId(1, 2, None, True)
    assert made.read([("grpc-trace-bin", census(flags=None))]).trace == TraceId(1, 2, None, False)
    both = [("grpc-trace-bin", census()), ("traceparent", f"00-{7:032x}-{8:016x}-00")]
    assert made.read(both).trace == TraceId(7, 8, None, False)
    broken = [("grpc-trace-bin", census()), ("traceparent", "nonsense")]
    assert made.read(broken).trace == TraceId(1, 2, None, True)
    assert undecodable() == 1
    for wrong in (census(version=9), census(trace=0), census(span=0), "!!!", "", "AAAA"):
        assert made.read([("grpc-trace-bin", wrong)]).trace is None
    assert undecodable() == 7


def test_metadata_is_as_grpclib_gives_it():
    headers = [
        (":status", "200"),
        ("content-type", "x"),
        ("grpc-status", "0"),
        ("a", "1"),
        ("a", "2"),
        ("b-bin", "AAE"),
    ]
    metadata = decode_metadata([*headers, ("c-bin", "AA,AQ=="), ("d-bin", "???")])
    assert metadata.getall("a") == ["1", "2"]
    assert metadata["b-bin"] == b"\0\1"
    assert metadata.getall("c-bin") == [b"\0", b"\1"]
    assert set(metadata) == {"a", "b-bin", "c-bin"}


@given(st.binary(max_size=50))
def test_binary_values_with_and_without_padding(data):
    text = base64.b64encode(data).decode()
    assert decode_binary(text) == decode_binary(text.rstrip("=")) == data


@given(st.text(max_size=20))
def test_any_text_is_binary_or_refused(text):
    with contextlib.suppress(ValueError):
        assert isinstance(decode_binary(text), bytes)
