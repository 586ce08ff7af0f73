from __future__ import annotations

import logging

import anyio
import pytest

from meshlib.client import Liveness
from meshlib.core.context import Context, TraceId, use
from meshlib.core.env import Env
from meshlib.core.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    MeshError,
    Rejected,
    RemoteError,
)
from meshlib.core.service import Status
from meshlib.mux import Limits, Request, Response
from meshlib.mux.client import open_session
from meshlib.mux.client_session import UNANSWERED
from meshlib.mux.codec import MuxError, encode
from meshlib.mux.connection import HIGH_WATER
from meshlib.mux.messages import (
    Message,
    Rdiscarded,
    Rdispatch,
    Rdrain,
    ReplyStatus,
    Rerr,
    Rinit,
    Rping,
    Rreq,
    Tdiscarded,
    Tdispatch,
    Tdrain,
    Tinit,
    Tlease,
    Tping,
    Treq,
    Unknown,
)
from meshlib.mux.tags import TagPool
from meshlib.telemetry.metrics import Registry
from meshlib.testing import duplex, run_virtual

from .peer import PROBE, Call, RawPeer, client_rig, settle

OK, ERROR, NACK = ReplyStatus


def ok(tag: int, body: bytes = b"") -> Rdispatch:
    return Rdispatch(tag, OK, (), body)


def flags(number: int) -> tuple[bytes, bytes]:
    return (b"MuxFailure", number.to_bytes(8, "big"))


# --- requests and replies ---------------------------------------------------------------------------------------------


async def test_a_request_is_the_bytes_that_the_protocol_says() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        Call(group, rig.session, Request(b"body", "/users", ((b"k", b"v"),)))
        await rig.peer.receive()
        expected = "02 000002 0001 0001 6b 0001 76 0006" + b"/users".hex() + "0000" + b"body".hex()
        assert rig.peer.frames[-1].hex() == expected.replace(" ", "")
        await rig.peer.send(ok(2))


async def test_replies_find_their_callers_in_any_order() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        calls = {}
        for n in range(5):
            calls[n + 2] = Call(group, rig.session, Request(b"%d" % n))
            assert await rig.peer.receive() == Tdispatch(n + 2, body=b"%d" % n)
        assert rig.session.pending == 5
        for tag in (4, 2, 6, 5, 3):
            await rig.peer.send(Rdispatch(tag, OK, ((b"t", b"%d" % tag),), b"reply %d" % tag))
        for tag, call in calls.items():
            assert await call.result() == Response(b"reply %d" % tag, ((b"t", b"%d" % tag),))
        assert rig.session.pending == 0


async def test_the_lowest_free_tag_is_used_next() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        for expected in (2, 3, 4, 5):
            Call(group, rig.session, Request())
            await rig.peer.expect(Tdispatch(expected))
        await rig.peer.send(ok(4), ok(2))
        await settle()
        for expected in (2, 4, 6):
            Call(group, rig.session, Request())
            await rig.peer.expect(Tdispatch(expected))
        await rig.peer.send(*(ok(tag) for tag in (2, 3, 4, 5, 6)))


async def test_requests_of_one_turn_leave_in_one_send() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        calls = [Call(group, rig.session, Request(b"%d" % n)) for n in range(10)]
        await settle()
        assert rig.stream.unread == 10 * len(encode(Tdispatch(2, body=b"0")))
        await rig.peer.send(*(ok(tag) for tag in range(2, 12)))
        assert [type(await call.result()) for call in calls] == [Response] * 10


async def test_a_large_request_is_cut_as_the_server_asked_and_a_reply_in_fragments_is_one_reply() -> None:
    async with client_rig(headers=((b"mux-framer", b"\0\0\0\x64"),)) as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request(b"q" * 250))
        await rig.peer.expect(Tdispatch(2, body=b"q" * 250))
        assert [len(frame) - 4 for frame in rig.peer.frames[-3:]] == [100, 100, 56]
        payload = encode(ok(2, b"reply"))[8:]
        for n, byte in enumerate(payload):
            more = 0x80 if n < len(payload) - 1 else 0
            await rig.peer.send(b"\0\0\0\x05\xfe" + bytes([more, 0, 2, byte]))
        assert (await call.result()).body == b"reply"


async def test_a_stream_that_gives_one_byte_at_a_time_is_read() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        rig.session.connection._stream.chunk = 1
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(ok(2, b"slowly"))
        assert (await call.result()).body == b"slowly"


@pytest.mark.parametrize(
    "request_",
    [Request(b"", "d" * 40_000), Request(b"", "", ((b"k", bytes(40_000)),)), Request(b"", "\ud800"), Request("text")],
    ids=["destination", "context", "surrogate", "a text for a body"],
)
async def test_a_request_that_cannot_be_written_is_its_callers_problem_alone(request_: Request) -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        with pytest.raises((InvalidArgument, ValueError, TypeError)):
            await rig.session(request_)
        assert rig.session.pending == rig.session._tags.in_use == 0
        Call(group, rig.session, Request(b"fine"))
        await rig.peer.expect(Tdispatch(2, body=b"fine"))
        await rig.peer.send(ok(2))


async def test_the_callers_context_goes_with_each_request() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        with use(Context(client_id="shop", dtab=(("/s", "/t"),), opaque=((b"x", b"1"),), attempt=1)):
            Call(group, rig.session, Request(contexts=((b"y", b"2"),)))
        assert await rig.peer.receive() == Tdispatch(
            2,
            (
                (b"com.twitter.finagle.Retries", b"\0\0\0\1"),
                (b"com.twitter.finagle.thrift.ClientIdContext", b"shop"),
                (b"x", b"1"),
                (b"y", b"2"),
            ),
            "",
            (("/s", "/t"),),
        )
        Call(group, rig.session, Request())
        await rig.peer.expect(Tdispatch(3))
        await rig.peer.send(ok(2), ok(3))


# --- failures ---------------------------------------------------------------------------------------------------------

FAILURES = {
    "an error": (Rdispatch(2, ERROR, ((b"k", b"v"),), b"why"), RemoteError, "why", False),
    "a nack": (Rdispatch(2, NACK, (), b"busy"), Rejected, "busy", True),
    "a nack of Finagle's": (Rdispatch(2, NACK, (flags(3),)), Rejected, "the server refused the request", True),
    "restartable": (Rdispatch(2, ERROR, (flags(1),), b"again"), Rejected, "again", True),
    "rejected for good": (Rdispatch(2, ERROR, (flags(6),), b"never"), Rejected, "never", False),
    "final": (Rdispatch(2, ERROR, (flags(4),), b"over"), RemoteError, "over", False),
    "an old error": (Rreq(2, ERROR, b"why"), RemoteError, "why", False),
    "an old nack": (Rreq(2, NACK), Rejected, "the server refused the request", True),
    "discarded unasked": (Rdiscarded(2), RemoteError, "the server answered with Rdiscarded", False),
}


@pytest.mark.parametrize(("reply", "kind", "text", "requeueable"), FAILURES.values(), ids=FAILURES)
async def test_a_reply_that_is_not_ok_is_an_error_that_says_where(
    reply: Message, kind: type[MeshError], text: str, *, requeueable: bool
) -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(reply)
        error = await call.result()
        assert type(error) is kind
        assert error.message == text
        assert error.endpoint == "peer:1"
        assert error.requeueable is requeueable
        assert rig.session.pending == rig.session._tags.in_use == 0


async def test_an_old_reply_to_a_new_request_is_taken() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(Rreq(2, OK, b"old"))
        assert await call.result() == Response(b"old")


@pytest.mark.parametrize(
    "message",
    [ok(99), Rreq(99, OK), Rdiscarded(99), Rerr(99, "?"), ok(2)],
    ids=["Rdispatch", "Rreq", "", "Rerr", "free"],
)
async def test_replies_that_nobody_waits_for_are_counted_and_passed_over(message: Message) -> None:
    async with client_rig() as rig:
        await rig.peer.send(message)
        await rig.peer.silent()
        assert rig.counter("unexpected_replies") == 1


async def test_the_second_reply_to_one_request_is_passed_over() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(ok(2, b"first"), ok(2, b"second"))
        assert (await call.result()).body == b"first"
        await settle()
        assert rig.counter("unexpected_replies") == 1


@pytest.mark.parametrize("message", [Unknown(7, 99), Tdispatch(7), Treq(7), Tinit(7, 1)], ids=repr)
async def test_a_question_that_no_client_can_answer_is_answered_with_an_error(message: Message) -> None:
    async with client_rig() as rig:
        await rig.peer.send(message)
        answer = await rig.peer.receive()
        assert isinstance(answer, Rerr)
        assert answer.tag == 7
        assert answer.why.startswith("Unexpected mux")
        await rig.peer.silent()
        assert rig.counter("unexpected_messages") == 1


@pytest.mark.parametrize("message", [Unknown(7, -99), Rdrain(7), Rinit(7, 1), Unknown(7, 0)], ids=repr)
async def test_an_answer_that_makes_no_sense_is_not_answered(message: Message) -> None:
    async with client_rig() as rig:
        await rig.peer.send(message)
        await rig.peer.silent()
        assert rig.counter("unexpected_messages") == 1


async def test_when_no_tag_is_free_requests_are_refused_before_the_wire() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        rig.session._tags = TagPool(3)
        Call(group, rig.session, Request())
        Call(group, rig.session, Request())
        assert [m.tag for m in await rig.peer.receive_n(2)] == [2, 3]
        with pytest.raises(Rejected, match="every tag of the session is in use") as caught:
            await rig.session(Request())
        assert caught.value.requeueable
        await rig.peer.silent()
        await rig.peer.send(ok(2), ok(3))


# --- cancelling -------------------------------------------------------------------------------------------------------


async def test_a_request_that_has_not_left_is_taken_back_and_its_tag_is_free() -> None:
    async with client_rig(capacity=1000) as rig, anyio.create_task_group() as group:
        # The first fills the pipe, so the second cannot leave.
        Call(group, rig.session, Request(bytes(3000)))
        await settle()
        second = Call(group, rig.session, Request(b"never sent"))
        await settle()
        assert rig.session.pending == 2
        second.cancel()
        await second.ended.wait()
        assert rig.session.pending == rig.session._tags.in_use == 1
        Call(group, rig.session, Request(b"third"))
        await rig.peer.expect(Tdispatch(2, body=bytes(3000)), Tdispatch(3, body=b"third"))
        await rig.peer.send(ok(2), ok(3))


ANSWERS = {
    "Rdiscarded": Rdiscarded(2),
    "a reply": ok(2, b"too late"),
    "an error": Rdispatch(2, ERROR),
    "an old reply": Rreq(2, OK),
    "Rerr": Rerr(2, "?"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_a_request_that_has_left_is_discarded_and_its_tag_kept_until_any_answer(answer: Message) -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request(b"x"))
        await rig.peer.expect(Tdispatch(2, body=b"x"))
        call.cancel()
        await call.ended.wait()
        assert call.outcome is None
        await rig.peer.expect(Tdiscarded(0, 2, "the caller cancelled the request"))
        assert rig.session.pending == 1

        other = Call(group, rig.session, Request(b"y"))
        await rig.peer.expect(Tdispatch(3, body=b"y"))
        await rig.peer.send(answer, ok(3, b"mine"))
        assert (await other.result()).body == b"mine"
        assert rig.session.pending == 0
        Call(group, rig.session, Request(b"z"))
        await rig.peer.expect(Tdispatch(2, body=b"z"))
        await rig.peer.send(ok(2))
        await settle()
        assert rig.counter("unexpected_replies") == 0


async def test_a_request_of_which_half_has_left_is_discarded_and_the_rest_stays() -> None:
    headers = ((b"mux-framer", b"\0\0\0\x64"),)
    async with client_rig(headers=headers, capacity=300) as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request(bytes(5000)))
        await settle()
        call.cancel()
        await rig.peer.expect(Tdiscarded(0, 2, "the caller cancelled the request"))
        fragments = [frame for frame in rig.peer.frames if frame[0] == 2]
        assert 0 < len(fragments) < 50
        assert all(frame[1] & 0x80 for frame in fragments)
        assert rig.session.pending == 1
        await rig.peer.send(Rdiscarded(2))
        await settle()
        assert rig.session.pending == 0


async def test_a_reply_in_the_moment_of_the_cancellation_leaves_nothing_behind() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        pending = rig.session._pending[2]
        await rig.peer.send(ok(2))
        while not pending.answered.is_set():
            await anyio.lowlevel.checkpoint()
        call.cancel()
        await call.ended.wait()
        assert rig.session.pending == rig.session._tags.in_use == 0
        await rig.peer.silent()


# --- draining ---------------------------------------------------------------------------------------------------------


def test_draining_refuses_what_is_new_and_waits_for_what_is_under_way() -> None:
    async def play() -> None:
        async with client_rig() as rig, anyio.create_task_group() as group:
            left: list[Status] = []
            rig.session.on_leave = lambda: left.append(rig.session.status)
            first = Call(group, rig.session, Request(b"1"))
            await rig.peer.receive()
            second = Call(group, rig.session, Request(b"2"))
            await rig.peer.receive()
            await rig.peer.send(Tdrain(1))
            await rig.peer.expect(Rdrain(1))
            assert left == [Status.CLOSED]
            assert "draining" in repr(rig.session)

            with pytest.raises(Rejected, match="the server is draining") as caught:
                await rig.session(Request(b"3"))
            assert caught.value.requeueable
            await anyio.sleep(100)
            await rig.peer.silent()

            await rig.peer.send(ok(3, b"b"))
            assert (await second.result()).body == b"b"
            await rig.peer.silent()
            await rig.peer.send(ok(2, b"a"))
            assert (await first.result()).body == b"a"
            await rig.peer.ended()
            assert left == [Status.CLOSED]
            assert (rig.counter("draining"), rig.counter("drained")) == (1, 1)
            with pytest.raises(Rejected, match="the session has drained"):
                await rig.session(Request(b"4"))

    run_virtual(play)


@pytest.mark.parametrize("tag", [1, 9])
async def test_an_idle_session_agrees_to_drain_before_it_closes(tag: int) -> None:
    async with client_rig() as rig:
        await rig.peer.send(Tdrain(tag))
        await rig.peer.expect(Rdrain(tag))
        await rig.peer.ended()
        assert rig.session.status is Status.CLOSED
        assert (rig.counter("draining"), rig.counter("drained")) == (1, 1)


async def test_a_discarded_request_is_under_way_until_it_is_answered() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(Tdrain(1))
        await rig.peer.expect(Rdrain(1))
        call.cancel()
        await rig.peer.expect(Tdiscarded(0, 2, "the caller cancelled the request"))
        await rig.peer.silent()
        await rig.peer.send(Rdiscarded(2))
        await rig.peer.ended()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_never_answers_a_discard_does_not_keep_a_session_from_ending(when: str) -> None:
    """Finagle's does not, when only a part of the request had come; and nobody here waits for the answer."""

    async def play() -> None:
        async with client_rig() as rig, anyio.create_task_group() as group:
            call = Call(group, rig.session, Request())
            await rig.peer.receive()
            if when == "before":
                call.cancel()
                await call.ended.wait()
            rig.session.retire()
            if when == "after":
                await anyio.sleep(100)
                call.cancel()
            started = anyio.current_time()
            await rig.peer.expect(Tdiscarded(0, 2, "the caller cancelled the request"))
            await rig.peer.ended()
            assert started + UNANSWERED <= anyio.current_time() <= started + UNANSWERED + 0.1

    run_virtual(play)


async def test_taking_back_the_last_request_completes_a_drain() -> None:
    async with client_rig(capacity=1000) as rig, anyio.create_task_group() as group:
        first = Call(group, rig.session, Request(bytes(3000)))
        await settle()
        second = Call(group, rig.session, Request())
        await settle()
        await rig.peer.send(Tdrain(1))
        await settle()
        second.cancel()
        await rig.peer.expect(Tdispatch(2, body=bytes(3000)), Rdrain(1))
        await rig.peer.send(ok(2))
        assert (await first.result()).body == b""
        await rig.peer.ended()


async def test_a_retired_session_ends_once_it_is_idle() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        rig.session.retire()
        with pytest.raises(Rejected):
            await rig.session(Request())
        await rig.peer.silent()
        await rig.peer.send(ok(2, b"last"))
        assert (await call.result()).body == b"last"
        await rig.peer.ended()


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_that_ran_out_makes_the_session_busy_but_requests_still_go() -> None:
    async def play() -> None:
        async with client_rig() as rig, anyio.create_task_group() as group:
            session = rig.session
            assert session.status is Status.OPEN
            await rig.peer.send(Tlease(0, 0, 1500))
            await settle()
            assert session.status is Status.OPEN
            await anyio.sleep(1.4)
            assert session.status is Status.OPEN
            await anyio.sleep(0.2)
            assert session.status is Status.BUSY
            call = Call(group, session, Request(b"still"))
            await rig.peer.expect(Tdispatch(2, body=b"still"))
            await rig.peer.send(ok(2, b"served"))
            assert (await call.result()).body == b"served"
            await rig.peer.send(Tlease(0, 0, 60_000))
            await settle()
            assert session.status is Status.OPEN
            assert rig.counter("leased") == 2
            await rig.peer.send(Tlease(0, 0, 0))
            await anyio.sleep(0.001)
            assert session.status is Status.BUSY
            await rig.peer.send(Tlease(0, 0, 2**64 - 1))
            await settle()
            assert session.status is Status.OPEN

    run_virtual(play)


def test_the_owner_of_a_session_is_told_when_its_lease_runs_out_and_when_there_is_a_new_one() -> None:
    async def play() -> None:
        async with client_rig() as rig:
            told: list[tuple[float, bool]] = []
            started = anyio.current_time()
            rig.session.on_lease = lambda leased: told.append((round(anyio.current_time() - started, 1), leased))
            await rig.peer.send(Tlease(0, 0, 2000))
            await anyio.sleep(1)
            await rig.peer.send(Tlease(0, 0, 5000))
            await anyio.sleep(9)
            await rig.peer.send(Tlease(0, 0, 1000))
            await settle()
            assert told == [(0.0, True), (1.0, True), (6.0, False), (10.0, True)]

    run_virtual(play)


async def test_a_lease_in_an_unknown_unit_ends_the_session() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(Tlease(0, 1, 5))
        error = await call.result()
        assert isinstance(error, ConnectionLost)
        assert "a lease in unit 1" in error.message
        await rig.peer.ended()


# --- pings ------------------------------------------------------------------------------------------------------------


async def test_a_servers_ping_is_answered_under_its_tag() -> None:
    async with client_rig() as rig:
        await rig.peer.send(Tping(1), Tping(0), Tping(77))
        await rig.peer.expect(Rping(1), Rping(0), Rping(77))


def test_the_server_is_pinged_every_5_seconds() -> None:
    async def play() -> None:
        async with client_rig(liveness=Liveness()) as rig:
            started = anyio.current_time()
            times = []
            for late in (0.0, 3.9, 1.0, 0.0):
                await rig.peer.expect(Tping(1))
                times.append(anyio.current_time() - started)
                await anyio.sleep(late)
                await rig.peer.send(Rping(1))
            assert times == pytest.approx([0, 5, 10, 15])
            await settle()
            assert rig.session.status is Status.OPEN
            assert rig.registry.histogram("mux/ping_latency_us").count == 4
            assert rig.registry.histogram("mux/ping_latency_us").max == pytest.approx(3.9e6)

    run_virtual(play)


def test_a_session_whose_ping_is_not_answered_within_4_seconds_is_given_up() -> None:
    async def play() -> None:
        async with client_rig(liveness=Liveness()) as rig, anyio.create_task_group() as group:
            left = []
            rig.session.on_leave = lambda: left.append(anyio.current_time())
            await rig.peer.expect(Tping(1))
            await rig.peer.send(Rping(1))
            calls = [Call(group, rig.session, Request()) for _ in range(3)]
            await rig.peer.receive_n(3)
            await rig.peer.expect(Tping(1))
            asked = anyio.current_time()
            for call in calls:
                error = await call.result()
                assert isinstance(error, ConnectionLost)
                assert error.message == "no answer to a ping within 4 s"
                assert error.retryable
                assert error.processed is None
            assert anyio.current_time() == pytest.approx(asked + 4)
            assert left == [anyio.current_time()]
            assert rig.counter("ping_failures") == 1
            await rig.peer.ended()

    run_virtual(play)


def test_a_server_that_is_busy_talking_is_not_given_up() -> None:
    """The answer to a ping may wait behind a large reply; silence is what counts."""

    async def play() -> None:
        async with client_rig(liveness=Liveness()) as rig, anyio.create_task_group() as group:
            await rig.peer.expect(Tping(1))
            call = Call(group, rig.session, Request())
            await rig.peer.receive()
            started = anyio.current_time()
            reply = encode(ok(2, bytes(19)))
            for byte in reply[:-1]:
                await rig.peer.send(bytes([byte]))
                await anyio.sleep(3.0)
            await rig.peer.send(reply[-1:])
            assert (await call.result()).body == bytes(19)
            assert anyio.current_time() > started + 80
            assert rig.session.status is Status.OPEN
            await rig.peer.ended()
            assert rig.counter("ping_failures") == 1

    run_virtual(play)


def test_without_liveness_nothing_is_pinged() -> None:
    async def play() -> None:
        async with client_rig() as rig:
            await anyio.sleep(1000)
            await rig.peer.silent()

    run_virtual(play)


def test_an_answer_to_a_ping_that_nobody_sent_is_harmless() -> None:
    async def play() -> None:
        async with client_rig(liveness=Liveness()) as rig:
            await rig.peer.expect(Tping(1))
            await rig.peer.send(Rping(1), Rping(1), Rping(5))
            await settle()
            await rig.peer.expect(Tping(1))
            asked = anyio.current_time()
            await rig.peer.ended()
            assert anyio.current_time() == pytest.approx(asked + 4)

    run_virtual(play)


# --- servers that know no Tdispatch -----------------------------------------------------------------------------------


async def knows_no_handshake(peer: RawPeer) -> None:
    await peer.receive()
    await peer.send(Rerr(1, "unexpected message"))


async def test_a_server_that_has_negotiated_knows_tdispatch_and_means_its_rerr() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request(b"charge"))
        await rig.peer.receive()
        await rig.peer.send(Rerr(2, "no"))
        assert type(await call.result()) is RemoteError, "and the request is not sent a second time"


async def test_a_server_that_answers_the_first_request_with_rerr_is_spoken_to_in_treq() -> None:
    async with client_rig(accept=knows_no_handshake) as rig, anyio.create_task_group() as group:
        trace = TraceId(5, 8, 7, debug=True)
        with use(Context(trace=trace)):
            call = Call(group, rig.session, Request(b"x", "/dropped"))
        assert isinstance(await rig.peer.receive(), Tdispatch)
        await rig.peer.send(Rerr(2, "unknown message type 2"))
        await rig.peer.expect(Treq(2, (8, 7, 5), 1, b"x"))
        await rig.peer.send(Rreq(2, OK, b"y"))
        assert await call.result() == Response(b"y")

        for body in (b"1", b"2"):
            again = Call(group, rig.session, Request(body))
            await rig.peer.expect(Treq(2, None, None, body))
            await rig.peer.send(Rreq(2, OK, body))
            assert (await again.result()).body == body
        nacked = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(Rreq(2, NACK))
        assert (await nacked.result()).requeueable
        failed = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(Rerr(2, "broken"))
        error = await failed.result()
        assert type(error) is RemoteError
        assert error.message == "the server could not handle the request: broken"


async def test_all_requests_that_left_before_the_first_answer_fall_back() -> None:
    async with client_rig(accept=knows_no_handshake) as rig, anyio.create_task_group() as group:
        calls = [Call(group, rig.session, Request(b"%d" % n)) for n in range(4)]
        assert {type(m) for m in await rig.peer.receive_n(4)} == {Tdispatch}
        await rig.peer.send(*(Rerr(tag, "unknown message type 2") for tag in (2, 3, 4, 5)))
        again = await rig.peer.receive_n(4)
        assert {type(m) for m in again} == {Treq}
        await rig.peer.send(*(Rreq(m.tag, OK, m.body) for m in again))
        assert [(await call.result()).body for call in calls] == [b"0", b"1", b"2", b"3"]


async def test_a_server_that_has_answered_a_dispatch_means_its_rerr() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        first = Call(group, rig.session, Request())
        await rig.peer.receive()
        second = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.peer.send(ok(2), Rerr(3, "no"))
        assert type(await first.result()) is Response
        error = await second.result()
        assert type(error) is RemoteError
        assert error.message == "the server could not handle the request: no"
        third = Call(group, rig.session, Request(b"3"))
        await rig.peer.expect(Tdispatch(2, body=b"3"))
        await rig.peer.send(Rerr(2, "no"))
        assert type(await third.result()) is RemoteError


# --- negotiation ------------------------------------------------------------------------------------------------------


async def test_a_server_that_cannot_negotiate_is_spoken_to_all_the_same() -> None:
    async def accept(peer: RawPeer) -> None:
        await peer.receive()
        await peer.send(Rerr(1, "unexpected message"))

    async with client_rig(accept=accept) as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request(b"x" * 100_000))
        await rig.peer.expect(Tdispatch(2, body=b"x" * 100_000))
        await rig.peer.send(ok(2))
        assert type(await call.result()) is Response


async def test_messages_behind_the_handshake_are_not_lost() -> None:
    async def accept(peer: RawPeer) -> None:
        await peer.receive()
        await peer.send(PROBE)
        await peer.receive()
        await peer.send(Rinit(1, 1), Tping(9), Tlease(0, 0, 1000), Tdrain(1))

    async with client_rig(accept=accept) as rig:
        await rig.peer.expect(Rping(9), Rdrain(1))
        assert rig.counter("leased") == 1
        await rig.peer.ended()


REFUSALS = {
    "another version": ([Rinit(1, 2)], "the server speaks Mux version 2, we speak 1"),
    "an error": ([Rerr(1, "go away")], "the server refused the session: go away"),
    "TLS": ([Rinit(1, 1, ((b"tls", b"required"),))], "requires TLS inside the Mux session"),
    "rubbish": ([b"\0\0\0\x05\xbc\0\0\1\0"], "malformed RINIT"),
    "far too much": ([b"\x7f\xff\xff\xff"], "a frame of 2147483647 bytes"),
}


@pytest.mark.parametrize(("answer", "text"), REFUSALS.values(), ids=REFUSALS)
async def test_a_session_that_cannot_be_agreed_on_is_a_failed_connect(answer: list[Message], text: str) -> None:
    peers = []

    async def accept(peer: RawPeer) -> None:
        peers.append(peer)
        await peer.receive()
        await peer.send(PROBE)
        await peer.receive()
        await peer.send(*answer)
        await peer.ended()

    with pytest.raises(ExceptionGroup) as caught:
        async with client_rig(accept=accept):
            raise AssertionError("a session came of it")
    (error,) = caught.value.exceptions
    assert isinstance(error, ConnectError)
    assert text in error.message
    assert error.endpoint == "peer:1"
    assert isinstance(error.__cause__, MuxError)
    assert peers[0].stream.unread == 0


async def test_a_session_that_cannot_be_agreed_on_is_counted() -> None:
    here, there = duplex()
    registry = Registry()
    await there.send(PROBE + encode(Rinit(1, 2)))
    with pytest.raises(ConnectError):
        await open_session(here, "peer:1", Env(metrics=registry))
    assert here.closed
    assert registry.counter("mux/violations/negotiation").value == 1


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("how", ["close", "cut"])
async def test_a_server_that_goes_during_the_handshake_is_a_failed_connect(how: str, after: int) -> None:
    async def accept(peer: RawPeer) -> None:
        await peer.receive()
        if after:
            await peer.send(PROBE)
            await peer.receive()
        if how == "cut":
            peer.stream.cut()
        else:
            await peer.stream.aclose()

    with pytest.raises(ExceptionGroup) as caught:
        async with client_rig(accept=accept):
            raise AssertionError("a session came of it")
    (error,) = caught.value.exceptions
    assert isinstance(error, ConnectError)
    assert error.message == "the server closed the connection during the handshake"


# --- connections that end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "half closed", "cut"])
async def test_all_who_wait_are_told_when_the_connection_is_lost(how: str) -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        left = []
        rig.session.on_leave = lambda: left.append(1)
        calls = []
        for n in range(5):
            calls.append(Call(group, rig.session, Request(b"%d" % n)))
            await rig.peer.receive()
        await rig.peer.send(ok(4))
        await calls[2].result()
        if how == "cut":
            rig.stream.cut()
        elif how == "closed":
            await rig.stream.aclose()
        else:
            await rig.stream.send_eof()
        for n in (0, 1, 3, 4):
            error = await calls[n].result()
            assert isinstance(error, ConnectionLost)
            assert error.endpoint == "peer:1"
            assert error.processed is None
            assert error.message.startswith("the connection broke" if how == "cut" else "the server closed")
        with pytest.raises(Rejected, match="the session is closed: the "):
            await rig.session(Request())
        await settle()
        assert left == [1]
        assert rig.session.pending == 0
        assert rig.session.connection._stream.closed
        assert rig.env.supervisor.jobs == 0


async def test_requests_that_had_not_left_when_the_connection_broke_may_go_elsewhere() -> None:
    async with client_rig(capacity=1000) as rig, anyio.create_task_group() as group:
        half_sent = Call(group, rig.session, Request(bytes(3000)))
        await settle()
        waiting = [Call(group, rig.session, Request(b"%d" % n)) for n in range(3)]
        await settle()
        rig.stream.cut()
        error = await half_sent.result()
        assert isinstance(error, ConnectionLost)
        assert error.processed is None
        for call in waiting:
            error = await call.result()
            assert isinstance(error, Rejected)
            assert error.requeueable
            assert not error.by_peer
            assert isinstance(error.__cause__, ConnectionLost)


async def test_replies_that_came_before_the_server_went_are_read_although_nothing_can_be_sent() -> None:
    async with client_rig(capacity=1000) as rig, anyio.create_task_group() as group:
        first = Call(group, rig.session, Request(b"x"))
        await rig.peer.receive()
        large = Call(group, rig.session, Request(bytes(5000)))
        await settle()
        await rig.peer.send(ok(2, b"said before I left"))
        await rig.stream.aclose()
        assert (await first.result()).body == b"said before I left"
        assert isinstance(await large.result(), ConnectionLost)


async def test_a_server_that_breaks_the_protocol_is_named_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        calls = [Call(group, rig.session, Request()) for _ in range(2)]
        await rig.peer.receive_n(2)
        await rig.peer.send(b"\0\0\0\x05\xfe\0\0\2\x09")
        for call in calls:
            error = await call.result()
            assert isinstance(error, ConnectionLost)
            assert error.message.startswith("the server broke the protocol: malformed RDISPATCH")
        await rig.peer.ended()
        assert rig.counter("violations/malformed") == 1
    assert "closing the session with peer:1" in caplog.text


async def test_a_server_that_reports_a_fault_of_the_session_is_quoted(caplog: pytest.LogCaptureFixture) -> None:
    """What our own servers say before they hang up; it is no breach of the protocol on their side."""
    with caplog.at_level(logging.WARNING, "meshlib.mux"):
        async with client_rig() as rig, anyio.create_task_group() as group:
            call = Call(group, rig.session, Request())
            await rig.peer.receive()
            await rig.peer.send(Rerr(1, "more than 2 requests at once (Limits.max_in_flight)"), Rerr(2, "the same"))
            error = await call.result()
            assert isinstance(error, ConnectionLost)
            assert error.message == "the server ended the session: more than 2 requests at once (Limits.max_in_flight)"
            await rig.peer.ended()
            assert rig.counter("violations/malformed") == 0
    assert "the server ended the session: more than 2 requests at once" in caplog.text


async def test_closing_a_session_fails_its_requests_at_once() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        rig.session.close()
        rig.session.close()
        error = await call.result()
        assert isinstance(error, ConnectionLost)
        assert error.message == "the session was closed here"
        await rig.peer.ended()
        assert rig.session.status is Status.CLOSED
        rig.session.release()


async def test_closing_the_owner_closes_the_session() -> None:
    async with client_rig() as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request())
        await rig.peer.receive()
        await rig.env.supervisor.aclose()
        assert isinstance(await call.result(), ConnectionLost)
        await rig.peer.ended()


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_request_is_discarded_when_its_deadline_passes() -> None:
    async def play() -> None:
        async with client_rig() as rig, anyio.create_task_group() as group:
            with use(Context(deadline=anyio.current_time() + 2.0)):
                call = Call(group, rig.session, Request())
            asked = await rig.peer.receive()
            assert isinstance(asked, Tdispatch)
            ((key, value),) = asked.contexts
            assert key == b"com.twitter.finagle.Deadline"
            left = int.from_bytes(value[8:], "big") - int.from_bytes(value[:8], "big")
            assert left == pytest.approx(2e9)
            started = anyio.current_time()
            await rig.peer.expect(Tdiscarded(0, 2, "the deadline passed"))
            assert started + 2.0 <= anyio.current_time() <= started + 2.02
            assert isinstance(await call.result(), DeadlineExceeded)
            assert rig.session.pending == 1
            await rig.peer.send(Rdiscarded(2))
            await settle()
            assert rig.session.pending == 0

    run_virtual(play)


def test_a_request_that_waits_for_a_slow_server_gives_up_at_its_deadline() -> None:
    async def play() -> None:
        async with client_rig(capacity=1000) as rig, anyio.create_task_group() as group:
            Call(group, rig.session, Request(bytes(2 * HIGH_WATER)))
            await settle(3)
            while not rig.session.connection.congested:
                Call(group, rig.session, Request(bytes(2 * HIGH_WATER)))
                await settle(3)
            pending = rig.session.pending
            started = anyio.current_time()
            with use(Context(deadline=started + 1.0)):
                call = Call(group, rig.session, Request(b"late"))
            assert isinstance(await call.result(), DeadlineExceeded)
            assert anyio.current_time() == pytest.approx(started + 1)
            assert rig.session.pending == pending
            rig.session.close()

    run_virtual(play)


# --- back-pressure ----------------------------------------------------------------------------------------------------


async def test_requests_wait_while_a_slow_server_does_not_read() -> None:
    size = 100_000
    async with client_rig(capacity=1000) as rig, anyio.create_task_group() as group:
        calls = [Call(group, rig.session, Request(bytes(size))) for _ in range(50)]
        await settle(100)
        connection = rig.session.connection
        # What is being sent was taken from the queue, and may be as much again.
        assert connection.queued <= HIGH_WATER + size + 100
        assert rig.session.pending <= 2 * (HIGH_WATER // size + 2)
        seen = set()
        for _ in range(50):
            message = await rig.peer.receive()
            assert connection.queued <= HIGH_WATER + size + 100
            seen.add(message.body)
            await rig.peer.send(ok(message.tag))
        for call in calls:
            assert type(await call.result()) is Response
        assert seen == {bytes(size)}


async def test_those_who_wait_for_a_slow_server_are_told_when_it_goes() -> None:
    async with client_rig(capacity=1000) as rig, anyio.create_task_group() as group:
        calls = [Call(group, rig.session, Request(bytes(100_000))) for _ in range(50)]
        await settle(100)
        rig.stream.cut()
        outcomes = {type(await call.result()) for call in calls}
        assert outcomes <= {ConnectionLost, Rejected}
        assert rig.session.pending == 0


def test_limits_of_the_client_hold_for_its_server() -> None:
    async def play() -> None:
        limits = Limits(max_frame=100)
        async with client_rig(limits=limits) as rig, anyio.create_task_group() as group:
            call = Call(group, rig.session, Request())
            await rig.peer.receive()
            await rig.peer.send(encode(ok(2, bytes(200)))[:4])
            error = await call.result()
            assert isinstance(error, ConnectionLost)
            assert "a frame of 207 bytes; the limit here is 100 (Limits.max_frame)" in error.message
            assert rig.counter("violations/frame_too_large") == 1

    run_virtual(play)
