from __future__ import annotations

import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.clock import Clock
from meshlib.core.context import Context, TraceId
from meshlib.core.priority import Priority
from meshlib.mux.codec import decode, encode_tdispatch
from meshlib.mux.contexts import ContextReader, encode_context
from meshlib.mux.messages import Contexts, Dtab
from meshlib.telemetry.metrics import Counter

from .strategies import blobs, pairs, rules, texts

DEADLINE = b"com.twitter.finagle.Deadline"
TRACE = b"com.twitter.finagle.tracing.TraceContext"
RETRIES = b"com.twitter.finagle.Retries"
CLIENT_ID = b"com.twitter.finagle.thrift.ClientIdContext"
PRIORITY = b"meshlib.Priority"
KNOWN = {DEADLINE, TRACE, RETRIES, CLIENT_ID, b"traceparent", b"tracestate", b"baggage", PRIORITY}
FOLDED = {key.lower() for key in KNOWN}

EPOCH = 1_700_000_000 * 10**9


def clock(now: float = 1000.0, epoch: int = EPOCH) -> Clock:
    return Clock(lambda: now, lambda: epoch)


def sent(context: Context, extra: Contexts = (), at: Clock | None = None) -> Contexts:
    """The contexts of a request made under ``context``, as they come out of a frame."""
    return decode(encode_tdispatch(2, encode_context(context, at or clock(), extra), "", (), b"")[4:]).contexts


def read(*contexts: tuple[bytes, bytes], dtab: Dtab = (), trust: bool = True, at: Clock | None = None) -> Context:
    return ContextReader(at or clock(), trust=trust).read(contexts, dtab)


def ids(bits: int) -> st.SearchStrategy[int]:
    return st.integers(1, 2**bits - 1)


@st.composite
def traces(draw: Any) -> TraceId:
    span = draw(ids(64))
    debug = draw(st.booleans())
    return TraceId(
        draw(ids(128)),
        span,
        draw(st.none() | ids(64).filter(lambda parent: parent != span)),
        # To debug is to sample: W3C, where the id travels too, has no word for the one without the other.
        True if debug else draw(st.none() | st.booleans()),
        debug,
        draw(st.text("abc=,1", max_size=20)),
    )


contexts = st.builds(
    Context,
    deadline=st.none() | st.floats(1000.0, 1e6),
    trace=st.none() | traces(),
    attempt=st.integers(0, 2**31 - 1),
    client_id=texts,
    baggage=texts,
    opaque=st.lists(st.tuples(blobs.filter(lambda key: key.lower() not in FOLDED), blobs), max_size=4).map(tuple),
    priority=st.sampled_from(Priority),
)


# --- there and back ---------------------------------------------------------------------------------------------------


@given(contexts, rules)
def test_what_is_sent_is_what_is_understood(context: Context, dtab: Dtab) -> None:
    undecodable = Counter()
    arrived = ContextReader(clock(), undecodable=undecodable).read(sent(context), dtab)

    assert undecodable.value == 0
    if context.deadline is not None:
        assert math.isclose(arrived.deadline, context.deadline, abs_tol=1e-6)
    assert arrived == context.evolve(deadline=arrived.deadline, dtab=dtab)


@given(contexts, pairs)
def test_contexts_of_the_request_itself_go_last_and_arrive(context: Context, extra: Contexts) -> None:
    assert sent(context, extra)[len(sent(context)) :] == extra


@given(contexts)
def test_what_goes_on_to_the_next_hop_is_what_came(context: Context) -> None:
    first = sent(context)
    second = sent(read(*first))
    without_deadline = [[pair for pair in hop if pair[0] != DEADLINE] for hop in (first, second)]
    assert without_deadline[0] == without_deadline[1]


@given(pairs.map(lambda all_: tuple(pair for pair in all_ if pair[0].lower() not in FOLDED)))
def test_contexts_that_nobody_knows_pass_through_unchanged_and_in_order(unknown: Contexts) -> None:
    assert sent(read(*unknown)) == unknown


def test_nothing_is_sent_of_a_context_that_is_empty() -> None:
    assert encode_context(Context(), clock()) == b"\0\0"


# --- layouts: finagle.md 6.3, written by hand -------------------------------------------------------------------------


def test_a_deadline_is_two_instants_of_wall_time_in_nanoseconds() -> None:
    ((key, value),) = sent(Context(deadline=1000.25))
    assert key == DEADLINE
    assert value == EPOCH.to_bytes(8, "big") + (EPOCH + 250_000_000).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("trace", "finagle", "w3c"),
    [
        (
            TraceId(0xC, 0xA, 0xB, sampled=True),
            "000000000000000a 000000000000000b 000000000000000c 0000000000000006 0000000000000000",
            b"00-0000000000000000000000000000000c-000000000000000a-01",
        ),
        (
            TraceId(0xC, 0xA),
            "000000000000000a 000000000000000a 000000000000000c 0000000000000000 0000000000000000",
            b"00-0000000000000000000000000000000c-000000000000000a-00",
        ),
        (
            TraceId(0xFF << 64 | 0xC, 0xA, 0xB, sampled=False, debug=True),
            "000000000000000a 000000000000000b 000000000000000c 0000000000000003 00000000000000ff",
            b"00-00000000000000ff000000000000000c-000000000000000a-01",
        ),
    ],
    ids=["a sampled child", "a root, undecided", "128 bits, debug"],
)
def test_a_trace_goes_out_in_finagles_form_and_in_w3cs(trace: TraceId, finagle: str, w3c: bytes) -> None:
    assert sent(Context(trace=trace)) == ((TRACE, bytes.fromhex(finagle)), (b"traceparent", w3c))


def test_the_rest_is_plain() -> None:
    assert sent(Context(attempt=3, client_id="shop", baggage="a=1")) == (
        (RETRIES, b"\0\0\0\x03"),
        (CLIENT_ID, b"shop"),
        (b"baggage", b"a=1"),
    )
    state = TraceId(1, 2, state="vendor=x")
    assert dict(sent(Context(trace=state)))[b"tracestate"] == b"vendor=x"


def test_the_32_bytes_of_finagle_24_are_read() -> None:
    value = bytes.fromhex("ce48bfd98574aed6 000000000000000b 000000000000000a 0000000000000006")
    assert read((TRACE, value)).trace == TraceId(0xA, 0xCE48BFD98574AED6, 0xB, sampled=True)


def test_a_span_that_is_its_own_parent_is_a_root() -> None:
    value = struct.pack(">QQQQ", 7, 7, 7, 0)
    assert read((TRACE, value)).trace == TraceId(7, 7, None)


def test_ids_are_compared_without_regard_to_case() -> None:
    assert read((RETRIES.upper(), b"\0\0\0\x02"), (b"TraceParent", b"x")).attempt == 2


@pytest.mark.parametrize(("priority", "word"), [(Priority.CRITICAL, b"critical"), (Priority.SHEDDABLE, b"sheddable")])
def test_a_priority_is_a_word_and_the_default_one_is_not_sent(priority: Priority, word: bytes) -> None:
    assert sent(Context(priority=priority)) == ((PRIORITY, word),)
    assert sent(Context(priority=Priority.DEFAULT)) == ()
    assert read((PRIORITY, word)).priority is priority
    assert read((PRIORITY, b"default")).priority is Priority.DEFAULT


@pytest.mark.parametrize("word", [b"", b"CRITICAL", b"critical ", b"2", b"urgent", b"\xff", "krítical".encode()])
def test_a_priority_that_is_not_known_here_is_the_default_one_and_no_error(word: bytes) -> None:
    undecodable = Counter()
    context = ContextReader(clock(), undecodable=undecodable).read(((PRIORITY, word), (CLIENT_ID, b"shop")))
    assert context == Context(client_id="shop")
    assert undecodable.value == 0


@given(st.binary(max_size=12) | st.sampled_from([b"critical", b"default", b"sheddable"]), st.booleans())
def test_whatever_is_said_of_the_priority_it_is_one_and_a_stranger_has_none(word: bytes, trust: bool) -> None:
    names = {priority.name.lower().encode(): priority for priority in Priority}
    context = read((PRIORITY, word), trust=trust)
    assert context == Context(priority=names.get(word, Priority.DEFAULT) if trust else Priority.DEFAULT)


# --- deadlines on hosts whose clocks disagree -------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [-3600, -1, 0, 1, 3600])
def test_a_deadline_is_read_as_what_was_left_whatever_the_other_clock_shows(skew: float) -> None:
    caller = clock(now=50.0)
    callee = clock(now=9000.0, epoch=EPOCH + int(skew * 1e9))
    arrived = read(*sent(Context(deadline=52.5), at=caller), at=callee)
    assert arrived.deadline == 9002.5


def test_a_deadline_that_has_passed_arrives_as_one_that_has_passed() -> None:
    ((_, value),) = sent(Context(deadline=990.0))
    assert struct.unpack(">qq", value) == (EPOCH, EPOCH)
    assert read((DEADLINE, value)).deadline == 1000.0
    assert read((DEADLINE, struct.pack(">qq", EPOCH, EPOCH - 10**9))).deadline == 1000.0


@pytest.mark.parametrize("seconds", [1e10, 1e18, math.inf])
def test_a_deadline_further_off_than_the_wire_can_say_is_the_furthest_it_can(seconds: float) -> None:
    ((_, value),) = sent(Context(deadline=seconds))
    assert struct.unpack(">qq", value) == (EPOCH, 2**63 - 1)


@pytest.mark.parametrize("instants", [(-(2**63), 2**63 - 1), (2**63 - 1, -(2**63)), (0, 2**63 - 1), (-1, -1)])
def test_any_deadline_that_came_in_can_go_out(instants: tuple[int, int]) -> None:
    context = read((DEADLINE, struct.pack(">qq", *instants)))
    assert context.deadline >= 1000.0
    assert len(sent(context)) == 1


# --- two forms of one trace -------------------------------------------------------------------------------------------


def w3c(trace: int, span: int, flags: int = 1, version: int = 0, rest: bytes = b"") -> tuple[bytes, bytes]:
    return (b"traceparent", b"%02x-%032x-%016x-%02x" % (version, trace, span, flags) + rest)


def finagle(trace: int, span: int, parent: int | None = None, flags: int = 0) -> tuple[bytes, bytes]:
    return (TRACE, struct.pack(">QQQQ", span, span if parent is None else parent, trace, flags))


def test_a_caller_that_speaks_w3c_alone_is_understood() -> None:
    assert read(w3c(0xABC << 64 | 5, 7), (b"tracestate", b"v=1")).trace == TraceId(
        0xABC << 64 | 5, 7, None, sampled=True, state="v=1"
    )
    assert read(w3c(5, 7, flags=0)).trace == TraceId(5, 7, None, sampled=False)


def test_finagle_says_which_span_and_w3c_adds_the_high_half_and_the_state() -> None:
    """A Finagle in between renews its own context alone, so the span in ``traceparent`` is a hop behind."""
    context = read(finagle(5, 8, 7, flags=6), w3c(0xABC << 64 | 5, 7), (b"tracestate", b"v=1"))
    assert context.trace == TraceId(0xABC << 64 | 5, 8, 7, sampled=True, state="v=1")


def test_a_traceparent_of_another_trace_is_left_aside() -> None:
    assert read(finagle(5, 8), w3c(6, 7), (b"tracestate", b"v=1")).trace == TraceId(5, 8)


@pytest.mark.parametrize(
    ("flags", "sampled", "expected"),
    [(0, 1, True), (0, 0, None), (2, 1, False), (6, 0, True)],
    ids=["W3C decides", "undecided by both", "Finagle says no", "Finagle says yes"],
)
def test_who_has_decided_about_sampling_is_believed(flags: int, sampled: int, expected: bool | None) -> None:
    """W3C cannot say "undecided"; beside a Finagle context that can, its 0 says no more than that."""
    assert read(finagle(5, 8, flags=flags), w3c(5, 7, flags=sampled)).trace.sampled is expected


def test_later_versions_of_traceparent_are_read_as_far_as_they_are_known() -> None:
    assert read(w3c(5, 7, version=1, rest=b"-more")).trace == TraceId(5, 7, None, sampled=True)


# --- whom to trust, and what to make of nonsense ----------------------------------------------------------------------


def test_a_stranger_may_not_say_where_our_calls_go() -> None:
    rule = (("/s/users", "/s/evil"),)
    assert read(dtab=rule).dtab == rule
    assert read(dtab=rule, trust=False).dtab == ()


def test_a_stranger_is_believed_in_nothing_but_the_deadline_and_the_trace() -> None:
    said = (
        (CLIENT_ID, b"billing"),
        (RETRIES, b"\0\0\0\1"),
        (b"baggage", b"tenant=root"),
        (b"com.example.opaque", b"x"),
        (DEADLINE, struct.pack(">qq", 10**9, 2 * 10**9)),
        w3c(5, 7),
    )
    believed, stranger = read(*said), read(*said, trust=False)
    assert (believed.client_id, believed.attempt, believed.baggage) == ("billing", 1, "tenant=root")
    assert stranger == Context(deadline=stranger.deadline, trace=believed.trace, waited=stranger.waited)
    assert stranger.deadline is not None


NONSENSE = {
    "a deadline of 15 bytes": (DEADLINE, bytes(15)),
    "a deadline of 17 bytes": (DEADLINE, bytes(17)),
    "no deadline": (DEADLINE, b""),
    "a trace of 31 bytes": (TRACE, bytes(31)),
    "a trace of zeros": (TRACE, bytes(32)),
    "a wide trace of zeros": (TRACE, bytes(40)),
    "a trace without a span": (TRACE, struct.pack(">QQQQ", 0, 0, 5, 0)),
    "a number of tries of 3 bytes": (RETRIES, b"\0\0\1"),
    "a client id that is no text": (CLIENT_ID, b"\xff"),
    "baggage that is no text": (b"baggage", b"\xc3"),
    "a tracestate that is not ASCII": (b"tracestate", "é".encode()),
    "an empty traceparent": (b"traceparent", b""),
    "a traceparent of zeros": w3c(0, 0),
    "a traceparent without a span": w3c(5, 0),
    "a traceparent in capitals": (b"traceparent", w3c(0xABC, 0xDEF)[1].upper()),
    "a traceparent of version ff": w3c(5, 7, version=0xFF),
    "a traceparent of version 0 with more": w3c(5, 7, rest=b"-more"),
}


@pytest.mark.parametrize("pair", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_under_a_known_id_is_ignored_and_counted(pair: tuple[bytes, bytes]) -> None:
    undecodable = Counter()
    reader = ContextReader(clock(), undecodable=undecodable)
    context = reader.read((pair, (CLIENT_ID, b"shop"), (b"other", b"1")))
    assert context == Context(client_id="shop", opaque=((b"other", b"1"),))
    assert undecodable.value == 1


@pytest.mark.parametrize("number", [-1, -(2**31)])
def test_a_negative_number_of_tries_is_none(number: int) -> None:
    assert read((RETRIES, struct.pack(">i", number))).attempt == 0


def test_the_last_try_that_fits_the_wire_can_be_followed_by_another() -> None:
    """A caller may claim any number of tries; our own requeue of what it asked for adds to it."""
    context = read((RETRIES, struct.pack(">i", 2**31 - 1)))
    ((_, value),) = sent(context.evolve(attempt=context.attempt + 1))
    assert struct.unpack(">i", value) == (2**31 - 1,)


@given(st.lists(st.tuples(st.sampled_from(sorted(KNOWN)) | blobs, blobs | st.binary(min_size=32, max_size=40))))
def test_whatever_came_in_can_be_sent_on(received: list[tuple[bytes, bytes]]) -> None:
    second_hop = sent(read(*sent(read(*received))))
    assert sent(read(*second_hop)) == second_hop
