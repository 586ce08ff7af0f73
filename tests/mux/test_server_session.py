from __future__ import annotations

import logging
import re
from collections import defaultdict

import anyio
import pytest

from meshlib.core.context import VAR, TraceId, current
from meshlib.core.errors import DeadlineExceeded, InvalidArgument, Rejected, RemoteError
from meshlib.mux import Limits, Request, Response
from meshlib.mux.codec import encode
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
from meshlib.mux.server_session import FIRST_WORD, ServerSession
from meshlib.testing import run_virtual

from .peer import PROBE, echo, server_rig, settle

OK, ERROR, NACK = ReplyStatus


def ok(tag: int, body: bytes = b"", contexts: tuple[tuple[bytes, bytes], ...] = ()) -> Rdispatch:
    return Rdispatch(tag, OK, contexts, body)


class Gate:
    """A handler whose requests wait, each by its body, until they are let through."""

    def __init__(self) -> None:
        self._open: defaultdict[bytes, anyio.Event] = defaultdict(anyio.Event)
        self.handled: list[bytes] = []
        self.cancelled: list[bytes] = []

    async def __call__(self, request: Request) -> Response:
        self.handled.append(request.body)
        try:
            await self._open[request.body].wait()
        except BaseException:
            self.cancelled.append(request.body)
            raise
        return Response(request.body)

    def let(self, *bodies: bytes) -> None:
        for body in bodies:
            self._open[body].set()


# --- requests and replies ---------------------------------------------------------------------------------------------


async def test_replies_leave_in_the_order_in_which_handlers_finish() -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(*(Tdispatch(tag, body=b"%d" % tag) for tag in (2, 3, 4)))
        await settle()
        assert rig.session.in_flight == 3
        for tag in (3, 4, 2):
            gate.let(b"%d" % tag)
            await peer.expect(ok(tag, b"%d" % tag))
        assert rig.session.in_flight == 0


async def test_a_tag_may_be_used_again_once_it_is_answered() -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        for n in range(3):
            await peer.send(Tdispatch(2, body=b"%d" % n))
            await peer.expect(ok(2, b"%d" % n))


async def test_the_handler_gets_destination_and_body_and_may_send_contexts_back() -> None:
    async def handler(request: Request) -> Response:
        return Response(repr((request.dest, request.body)).encode(), ((b"k", b"v"), (b"k", b"")))

    async with server_rig(handler) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, (), "/users/get", (), b"42"))
        await peer.expect(ok(2, b"('/users/get', b'42')", ((b"k", b"v"), (b"k", b""))))


async def test_a_request_in_fragments_is_one_request() -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        payload = encode(Tdispatch(2, body=b"hello world"))[8:]
        for part in (payload[:3], b"", payload[3:9]):
            await peer.send((4 + len(part)).to_bytes(4, "big") + b"\x02\x80\x00\x02" + part)
        await peer.send(Tping(1))
        await peer.expect(Rping(1))
        await peer.send((4 + len(payload[9:])).to_bytes(4, "big") + b"\x02\x00\x00\x02" + payload[9:])
        await peer.expect(ok(2, b"hello world"))


async def test_a_reply_is_cut_as_the_client_asked() -> None:
    async with server_rig() as rig:
        peer = await rig.open(headers=((b"mux-framer", b"\0\0\0\x0a"),))
        await peer.send(Tdispatch(2, body=b"x" * 27))
        await peer.expect(ok(2, b"x" * 27))
        assert [len(frame) - 4 for frame in peer.frames if frame[0] == 0xFE] == [10, 10, 10]


async def test_a_client_that_is_fed_a_byte_at_a_time_is_served() -> None:
    async with server_rig() as rig:
        peer = await rig.open(negotiate=False)
        for byte in PROBE + encode(Tinit(1, 1)) + encode(Tdispatch(2, body=b"slow")):
            await peer.send(bytes([byte]))
        assert await peer.receive() == Rerr(1, "tinit check")
        assert isinstance(await peer.receive(), Rinit)
        await peer.expect(ok(2, b"slow"))


# --- how failures cross -----------------------------------------------------------------------------------------------

FAILURES = {
    "rejected": (Rejected("full"), NACK, 3, b"full"),
    "rejected for good": (Rejected("never", retryable=False), ERROR, 6, b"never"),
    "an argument": (InvalidArgument("not an int"), ERROR, None, b"not an int"),
    "too late": (DeadlineExceeded("late"), ERROR, None, b"late"),
    "a remote error": (RemoteError("said on purpose"), ERROR, None, b"said on purpose"),
    "anything else": (ValueError("a secret"), ERROR, None, b"internal error"),
}


@pytest.mark.parametrize(("error", "status", "flags", "text"), FAILURES.values(), ids=FAILURES)
async def test_a_failure_becomes_a_status_and_flags(
    error: Exception, status: ReplyStatus, flags: int | None, text: bytes
) -> None:
    async def handler(request: Request) -> Response:
        raise error

    async with server_rig(handler) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2), Treq(3))
        replies = await peer.receive_n(2)
        assert isinstance(replies[0], Rdispatch)
        assert replies[0].status == status
        # A caller that brought no trace is given one, which names the failure in the log.
        assert re.sub(rb" \(trace \w{32}\)", b"", replies[0].body) == text
        value = dict(replies[0].contexts).get(b"MuxFailure")
        assert value == (None if flags is None else flags.to_bytes(8, "big"))
        assert isinstance(replies[1], Rreq)
        assert (replies[1].status, re.sub(rb" \(trace \w{32}\)", b"", replies[1].body)) == (status, text)


WRONG = {
    "bytes": b"x",
    "nothing": None,
    "a text for a body": Response("x"),
    "a context that is too long": Response(b"", ((b"k", bytes(40_000)),)),
    "contexts that are texts": Response(b"", (("k", "v"),)),
}


@pytest.mark.parametrize("reply", WRONG.values(), ids=WRONG)
async def test_a_handler_that_returns_what_cannot_be_sent_has_failed(
    reply: object, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller must not be left waiting, and the log must say what happened."""

    async def handler(request: Request) -> Response:
        return reply if request.body == b"wrong" else Response(request.body)

    async with server_rig(handler) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"wrong"), Treq(3, body=b"wrong"))
        answers = await peer.receive_n(2)
        assert answers[0] == Rdispatch(2, ERROR, (), b"internal error: the reply cannot be sent")
        if not (isinstance(reply, Response) and isinstance(reply.body, bytes)):
            assert answers[1] == Rreq(3, ERROR, b"internal error: the reply cannot be sent")
        await peer.send(Tdispatch(2, body=b"right"))
        await peer.expect(ok(2, b"right"))
        assert rig.session.in_flight == 0
    assert [record for record in caplog.records if record.levelno == logging.ERROR]


async def test_a_failing_layer_above_the_error_mapping_is_opaque_too(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        place = "stats"

        def build(self, env: object, below: object) -> object:
            async def apply(request: Request) -> Response:
                raise LookupError("a secret")

            return apply

    async with server_rig(echo, Broken()) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, dest="/users"))
        await peer.expect(Rdispatch(2, ERROR, (), b"internal error: LookupError"))
    assert "a layer of the server failed on /users" in caplog.text


# --- discarding -------------------------------------------------------------------------------------------------------


async def test_a_discard_cancels_the_handler_and_is_answered_at_once_and_alone() -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"a"), Tdispatch(3, body=b"b"))
        await settle()
        await peer.send(Tdiscarded(0, 2, "enough"))
        await peer.expect(Rdiscarded(2))
        await settle()
        assert gate.cancelled == [b"a"]
        gate.let(b"a", b"b")
        await peer.expect(ok(3, b"b"))
        await peer.silent()
        assert rig.counter("orphaned_tdiscard") == 0


@pytest.mark.parametrize("code", [b"\x42", b"\xc2"])
async def test_both_codes_of_a_discard_are_heeded(code: bytes) -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"a"))
        await settle()
        await peer.send(b"\0\0\0\x07" + code + b"\0\0\0" + b"\0\0\2")
        await peer.expect(Rdiscarded(2))


async def test_a_discard_in_the_same_read_as_its_request_is_answered_once() -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"a"), Tdiscarded(0, 2))
        await peer.expect(Rdiscarded(2))
        await peer.silent()
        assert rig.session.in_flight == 0
        assert gate.handled == []


async def test_the_answer_to_a_discard_does_not_wait_for_a_handler_that_takes_its_time() -> None:
    finish = anyio.Event()

    async def handler(request: Request) -> Response:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.move_on_after(20, shield=True):
                await finish.wait()
        raise AssertionError

    async with server_rig(handler) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2))
        await settle()
        await peer.send(Tdiscarded(0, 2))
        await peer.expect(Rdiscarded(2))
        # The tag is free again although the first handler has not ended.
        await peer.send(Tdispatch(2), Tdiscarded(0, 2))
        await peer.expect(Rdiscarded(2))
        finish.set()
        await peer.silent()


async def test_the_outcome_of_a_handler_that_does_not_let_itself_be_cancelled_is_dropped() -> None:
    stubborn = anyio.Event()

    async def handler(request: Request) -> Response:
        with anyio.move_on_after(20, shield=True):
            await stubborn.wait()
        return Response(request.body)

    async with server_rig(handler) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"first"))
        await settle()
        await peer.send(Tdiscarded(0, 2), Tdispatch(2, body=b"second"))
        await peer.expect(Rdiscarded(2))
        stubborn.set()
        await peer.expect(ok(2, b"second"))
        await peer.silent()


@pytest.mark.parametrize("used", [False, True])
async def test_a_discard_of_nothing_is_counted_and_not_answered(*, used: bool) -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        if used:
            await peer.send(Tdispatch(2))
            await peer.expect(ok(2))
        await peer.send(Tdiscarded(0, 2, "too late"))
        await peer.silent()
        assert rig.counter("orphaned_tdiscard") == 1


async def test_a_reply_that_has_not_left_is_taken_back_and_the_discard_is_answered() -> None:
    async with server_rig(capacity=1000) as rig:
        peer = await rig.open()
        # The first reply stops the pipe; the second waits behind it.
        await peer.send(Tdispatch(2, body=bytes(900)), Tdispatch(3, body=bytes(900)))
        await settle()
        await peer.send(Tdispatch(4, body=b"unwanted"))
        await settle()
        assert rig.session.connection.queued > 0
        await peer.send(Tdiscarded(0, 4))
        await settle()
        arrived = await peer.receive_n(3)
        assert arrived == [ok(2, bytes(900)), ok(3, bytes(900)), Rdiscarded(4)]
        await peer.silent()
        assert rig.counter("orphaned_tdiscard") == 0


async def test_a_reply_of_which_half_has_left_is_cut_off_and_the_discard_is_answered() -> None:
    """The client holds the fragments that came, and keeps the tag until it is told that no more follow."""
    async with server_rig(capacity=200) as rig:
        peer = await rig.open(headers=((b"mux-framer", b"\0\0\0\x64"),))
        body = bytes(1000)
        await peer.send(encode(Tdispatch(2, body=body))[:100])
        await peer.send(encode(Tdispatch(2, body=body))[100:])
        await settle()
        assert 0 < rig.session.connection.queued < 1000
        await peer.send(Tdiscarded(0, 2))
        await settle()
        await peer.expect(Rdiscarded(2))
        assert len([frame for frame in peer.frames if frame[0] == 0xFE]) < 10
        await peer.silent()


async def test_a_request_of_which_half_has_come_is_dropped_and_the_discard_is_answered() -> None:
    """The client keeps the tag until it hears of it, although no handler ever saw the request."""
    async with server_rig() as rig:
        peer = await rig.open()
        payload = encode(Tdispatch(2, body=b"hello"))[8:]
        first = (4 + 6).to_bytes(4, "big") + b"\x02\x80\x00\x02" + payload[:6]
        await peer.send(first, Tdiscarded(0, 2))
        await peer.expect(Rdiscarded(2))
        assert rig.counter("orphaned_tdiscard") == 0
        await peer.send(Tdiscarded(0, 2))
        await peer.silent()
        assert rig.counter("orphaned_tdiscard") == 1
        await peer.send(Tdispatch(2, body=b"again"))
        await peer.expect(ok(2, b"again"))


# --- faults of the client ---------------------------------------------------------------------------------------------


async def test_a_tag_used_twice_ends_the_session_with_an_error_for_every_tag(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        other = await rig.open()
        peer = await rig.open()
        await peer.send(*(Tdispatch(tag, body=b"%d" % tag) for tag in (2, 3, 4)))
        await settle()
        await peer.send(Tdispatch(3, body=b"twice"))
        errors: list[Message] = await peer.receive_n(4)
        # First for the session as a whole, so that the client knows the reason; then for each request.
        assert errors == [Rerr(tag, "tag 3 is already in use") for tag in (1, 2, 3, 4)]
        await peer.ended()
        await settle()
        assert sorted(gate.cancelled) == [b"2", b"3", b"4"]
        assert rig.counter("duplicate_tag") == 1
        assert rig.counter("violations/duplicate_tag") == 1
        await other.silent()
        assert len(rig.server.connections) == 1
    assert "tag 3 is already in use" in caplog.text


async def test_handlers_of_a_session_at_fault_say_nothing_more() -> None:
    """They are cancelled before the errors leave, so no reply can follow the error for the same tag."""
    gate = Gate()
    # The pipe has no room for the errors until they are read.
    async with server_rig(gate, capacity=30) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"a"), Tdispatch(3, body=b"b"))
        await settle()
        await peer.send(Tdispatch(3))
        await settle()
        gate.let(b"a", b"b")
        await settle()
        assert await peer.receive_n(3) == [Rerr(tag, "tag 3 is already in use") for tag in (1, 2, 3)]
        await peer.ended()
        assert sorted(gate.cancelled) == [b"a", b"b"]


async def test_a_request_under_the_tag_of_markers_ends_the_session() -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(0))
        await peer.expect(Rerr(1, "a request under tag 0, which marks messages that nobody answers"))
        await peer.ended()
        assert rig.counter("violations/malformed") == 1


@pytest.mark.parametrize(("code", "number"), [(99, 99), (63, 63), (126, 126), (3, 3)])
async def test_an_unknown_question_is_answered_with_an_error_and_the_session_goes_on(code: int, number: int) -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        await peer.send(Unknown(7, code, b"?"))
        await peer.expect(Rerr(7, f"Unexpected mux message type {number}"))
        await peer.send(Tdispatch(2))
        await peer.expect(ok(2))
        assert rig.counter("unexpected_messages") == 1


@pytest.mark.parametrize(
    "message",
    [
        Unknown(7, -99),
        Unknown(7, 0),
        ok(7),
        Rreq(7, OK),
        Rping(1),
        Rdiscarded(7),
        Rerr(7, "?"),
        Rinit(1, 1),
        Tlease(0, 0, 1),
    ],
    ids=repr,
)
async def test_answers_that_nobody_asked_for_are_counted_and_passed_over(message: Message) -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        await peer.send(message)
        await peer.silent()
        assert rig.counter("unexpected_messages") == 1


async def test_an_offer_in_the_middle_of_a_session_is_unexpected() -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        await peer.send(Tinit(9, 1))
        await peer.expect(Rerr(9, "Unexpected mux message type 68"))


async def test_bytes_that_are_no_message_end_the_session_in_words() -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        await peer.send(b"\0\0\0\x04\x02\0\0\2")
        error = await peer.receive()
        assert isinstance(error, Rerr)
        assert error.why.startswith("malformed TDISPATCH")
        await peer.ended()
        assert rig.counter("violations/malformed") == 1


# --- pings and leases -------------------------------------------------------------------------------------------------


async def test_pings_are_answered_at_any_time_under_any_tag() -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tping(1))
        await peer.expect(Rping(1))
        await peer.send(Tdispatch(2, body=b"busy"), Tping(77))
        await peer.expect(Rping(77))
        rig.server.env.supervisor.start(rig.session.drain)
        await peer.expect(Tdrain(1))
        await peer.send(Tping(1))
        await peer.expect(Rping(1))


async def test_a_lease_is_told_in_milliseconds() -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        rig.session.lease(1.5)
        await peer.expect(Tlease(0, 0, 1500))


# --- negotiation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probed", [False, True])
async def test_a_client_that_does_not_negotiate_is_served_from_its_first_request(*, probed: bool) -> None:
    async with server_rig() as rig:
        peer = await rig.open(negotiate=False)
        if probed:
            await peer.send(PROBE)
            await peer.expect(Rerr(1, "tinit check"))
        await peer.send(Tdispatch(2, body=b"a"), Tdispatch(3, body=b"b"))
        assert await peer.receive_n(2) == [ok(2, b"a"), ok(3, b"b")]


async def test_an_old_client_speaks_treq_and_hears_rreq() -> None:
    seen = []

    async def handler(request: Request) -> Response:
        seen.append(current().trace)
        return Response(request.body, ((b"lost", b"on the way"),))

    async with server_rig(handler) as rig:
        peer = await rig.open(negotiate=False)
        await peer.send(Treq(2, body=b"plain"))
        await peer.expect(Rreq(2, OK, b"plain"))
        await peer.send(Treq(2, (8, 7, 5), 1, b"traced"))
        await peer.expect(Rreq(2, OK, b"traced"))
        await peer.send(Treq(2, (0, 0, 0), None, b"zeros"))
        await peer.expect(Rreq(2, OK, b"zeros"))
        await peer.send(Treq(2, (5, 5, 5), None, b"root"))
        await peer.expect(Rreq(2, OK, b"root"))
        assert seen[1::2] == [TraceId(5, 8, 7, None, debug=True), TraceId(5, 5)]
        assert all(trace.parent is trace.sampled is None for trace in seen[::2])  # those that had none are given a root


async def test_an_offer_without_a_probe_is_not_negotiated() -> None:
    async with server_rig() as rig:
        peer = await rig.open(negotiate=False)
        await peer.send(Tinit(1, 1))
        await peer.expect(Rerr(1, "Unexpected mux message type 68"))
        await peer.send(Tdispatch(2))
        await peer.expect(ok(2))


async def test_requests_may_come_along_with_the_handshake() -> None:
    async with server_rig() as rig:
        peer = await rig.open(negotiate=False)
        await peer.send(PROBE, Tinit(1, 1), Tdispatch(2, body=b"a"))
        await peer.expect(Rerr(1, "tinit check"))
        assert isinstance(await peer.receive(), Rinit)
        await peer.expect(ok(2, b"a"))


@pytest.mark.parametrize(
    ("offer", "why"),
    [
        (Tinit(1, 2), "unsupported Mux version 2, this server speaks 1"),
        (Tinit(1, 1, ((b"tls", b"required"),)), "the peer requires TLS inside the Mux session, which is off here"),
    ],
    ids=["version", "TLS"],
)
def test_a_client_with_which_nothing_can_be_agreed_on_is_told_why_and_let_go(offer: Tinit, why: str) -> None:
    async def play() -> None:
        async with server_rig() as rig:
            peer = await rig.open(negotiate=False)
            await peer.send(PROBE)
            await peer.expect(Rerr(1, "tinit check"))
            started = anyio.current_time()
            await peer.send(offer)
            await peer.expect(Rerr(1, why))
            await peer.ended()
            await settle()
            assert anyio.current_time() == started, "there is nothing to linger for"
            assert rig.counter("violations/negotiation") == 1
            assert not rig.server.connections

    run_virtual(play)


async def test_tls_that_is_only_desired_is_done_without() -> None:
    async with server_rig() as rig:
        peer = await rig.open(headers=((b"tls", b"desired"),))
        await peer.send(Tdispatch(2))
        await peer.expect(ok(2))


@pytest.mark.parametrize("said", [b"", PROBE[:7], PROBE])
def test_a_connection_whose_client_does_not_come_to_the_point_is_closed(said: bytes) -> None:
    async def play() -> None:
        async with server_rig() as rig:
            peer = await rig.open(negotiate=False)
            started = anyio.current_time()
            if said:
                await peer.send(said)
            if said == PROBE:
                await peer.expect(Rerr(1, "tinit check"))
            await peer.ended()
            assert anyio.current_time() == started + FIRST_WORD
            await settle()
            assert not rig.server.connections

    run_virtual(play)


async def test_rubbish_before_the_handshake_is_refused() -> None:
    async with server_rig() as rig:
        peer = await rig.open(negotiate=False)
        await peer.send(b"GET / HTTP/1.1\r\n\r\n")
        error = await peer.receive()
        assert isinstance(error, Rerr)
        assert error.why.startswith("a frame of 1195725856 bytes; the limit here is")
        await peer.ended()
        assert rig.counter("violations/frame_too_large") == 1


# --- draining ---------------------------------------------------------------------------------------------------------


def test_draining_serves_until_the_client_has_agreed_then_nacks_then_closes() -> None:
    async def play() -> None:
        gate = Gate()
        async with server_rig(gate) as rig:
            peer = await rig.open()
            await peer.send(Tdispatch(2, body=b"before"))
            await settle()
            rig.server.env.supervisor.start(rig.session.drain)
            await peer.expect(Tdrain(1))
            await anyio.sleep(5)
            await peer.send(Tdispatch(3, body=b"crossing"))
            await settle()
            assert gate.handled == [b"before", b"crossing"], "the client had not seen the Tdrain"

            await peer.send(Rdrain(1), Tdispatch(4, body=b"after"), Treq(5, body=b"after"))
            nack, old_nack = await peer.receive_n(2)
            assert isinstance(nack, Rdispatch)
            assert (nack.tag, nack.status, nack.body) == (4, NACK, b"the server is draining")
            assert dict(nack.contexts) == {b"MuxFailure": (3).to_bytes(8, "big")}
            assert old_nack == Rreq(5, NACK, b"the server is draining")

            await anyio.sleep(3)
            gate.let(b"before")
            await peer.expect(ok(2, b"before"))
            await peer.silent()
            gate.let(b"crossing")
            await peer.expect(ok(3, b"crossing"))
            await peer.ended()
            assert gate.handled == [b"before", b"crossing"]
            assert (rig.counter("draining"), rig.counter("drained")) == (1, 1)

    run_virtual(play)


def test_an_idle_session_drains_at_once() -> None:
    async def play() -> None:
        async with server_rig() as rig:
            peer = await rig.open()
            async with anyio.create_task_group() as group:
                group.start_soon(rig.session.drain)
                await peer.expect(Tdrain(1))
                await peer.send(Rdrain(1))
                await peer.ended()
                await peer.stream.aclose()
            assert not rig.server.connections

    run_virtual(play)


def test_a_client_that_stays_after_the_end_is_left_after_a_moment() -> None:
    async def play() -> None:
        async with server_rig() as rig:
            peer = await rig.open()
            started = anyio.current_time()
            async with anyio.create_task_group() as group:
                group.start_soon(rig.session.drain)
                await peer.expect(Tdrain(1))
                await peer.send(Rdrain(1))
                await peer.ended()
                # It may say what it likes now: nothing can be answered any more.
                await peer.send(Tping(1), Tdispatch(2), Unknown(3, 99))
            assert anyio.current_time() == started + 1.0
            await settle()
            assert not rig.server.connections

    run_virtual(play)


def test_a_discard_may_be_what_ends_a_drain() -> None:
    async def play() -> None:
        gate = Gate()
        async with server_rig(gate) as rig:
            peer = await rig.open()
            await peer.send(Tdispatch(2, body=b"a"))
            await settle()
            rig.server.env.supervisor.start(rig.session.drain)
            await peer.expect(Tdrain(1))
            await peer.send(Rdrain(1), Tdiscarded(0, 2))
            await peer.expect(Rdiscarded(2))
            await peer.ended()

    run_virtual(play)


def test_closing_the_server_waits_no_longer_than_its_grace() -> None:
    async def play() -> None:
        gate = Gate()
        async with server_rig(gate, grace=7) as rig:
            peer = await rig.open()
            silent = await rig.open()
            half = await rig.open(negotiate=False)
            await peer.send(Tdispatch(2, body=b"a"))
            await settle()
            started = anyio.current_time()
            async with anyio.create_task_group() as group:
                group.start_soon(rig.server.aclose)
                await half.ended()
                assert anyio.current_time() == started
                for client in (peer, silent):
                    await client.expect(Tdrain(1))
                await peer.send(Rdrain(1))
            assert anyio.current_time() == started + 7
            assert gate.cancelled == [b"a"]
            await peer.ended()
            await silent.ended()

    run_virtual(play)


async def test_agreeing_to_a_drain_that_nobody_asked_for_changes_nothing() -> None:
    async with server_rig() as rig:
        peer = await rig.open()
        await peer.send(Rdrain(1), Tdispatch(2))
        await peer.expect(ok(2))


async def test_a_client_that_drains_is_agreed_with() -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"a"), Tdrain(1))
        await peer.expect(Rdrain(1))
        gate.let(b"a")
        await peer.expect(ok(2, b"a"))


async def test_a_client_that_goes_while_it_is_drained_ends_the_drain() -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"a"))
        await settle()
        async with anyio.create_task_group() as group:
            group.start_soon(rig.session.drain)
            await peer.expect(Tdrain(1))
            await peer.stream.aclose()
        assert gate.cancelled == [b"a"]


# --- connections that end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "half closed", "cut"])
async def test_handlers_are_cancelled_when_their_client_goes(how: str) -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"a"), Tdispatch(3, body=b"b"))
        await settle()
        if how == "closed":
            await peer.stream.aclose()
        elif how == "half closed":
            await peer.stream.send_eof()
        else:
            peer.stream.cut()
        await settle()
        assert sorted(gate.cancelled) == [b"a", b"b"]
        assert not rig.server.connections
        assert rig.server.env.supervisor.jobs == 0


@pytest.mark.parametrize("at", [0, 10, 19, 30])
async def test_a_client_that_goes_during_the_handshake_leaves_nothing(at: int) -> None:
    async with server_rig() as rig:
        peer = await rig.open(negotiate=False)
        await peer.send((PROBE + encode(Tinit(1, 1)))[:at] or b"\0")
        await settle()
        await peer.stream.aclose()
        await settle()
        assert not rig.server.connections
        assert rig.server.env.supervisor.jobs == 0


async def test_aborting_closes_at_once_and_cancels_handlers() -> None:
    gate = Gate()
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, body=b"a"))
        await settle()
        session: ServerSession = rig.session
        session.abort()
        await peer.ended()
        await settle()
        assert gate.cancelled == [b"a"]
        assert repr(session)


# --- back-pressure ----------------------------------------------------------------------------------------------------


async def test_requests_of_a_client_that_does_not_read_are_left_unread() -> None:
    size = 50_000
    limits = Limits(max_in_flight=100_000)
    async with server_rig(limits=limits, capacity=600_000) as rig:
        peer = await rig.open()
        sent = 0
        request = encode(Tdispatch(2, body=bytes(size)))

        async def flood() -> None:
            nonlocal sent
            for tag in range(2, 2002):
                await peer.stream.send(request[:5] + tag.to_bytes(3, "big") + request[8:])
                sent += 1

        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(flood)
                await settle(3000)
                held = rig.session.connection.queued
                stuck = sent
                await settle(300)
                assert sent == stuck, "the server has stopped reading"
                assert stuck < 100
                # One read's worth of requests may be answered after the mark was passed.
                assert HIGH_WATER < held < HIGH_WATER + 256 * 1024 + 2 * size
                assert rig.session.in_flight == 0
                # It goes on as soon as its replies are read.
                for _ in range(stuck):
                    await peer.receive()
                await settle(300)
                assert sent > stuck
                scope.cancel()


# --- contexts ---------------------------------------------------------------------------------------------------------


async def test_each_handler_runs_under_its_own_callers_context() -> None:
    async def handler(request: Request) -> Response:
        await settle(3)
        context = VAR.get()
        return Response(f"{context.client_id} {context.dtab} {context.opaque}".encode())

    def request(tag: int, name: bytes) -> Tdispatch:
        return Tdispatch(
            tag,
            ((b"com.twitter.finagle.thrift.ClientIdContext", name), (b"x", name)),
            "",
            (("/s", f"/{name.decode()}"),),
        )

    async with server_rig(handler) as rig:
        peer = await rig.open()
        await peer.send(request(2, b"a"), request(3, b"b"), Tdispatch(4))
        assert [reply.body for reply in await peer.receive_n(3)] == [
            b"a (('/s', '/a'),) ((b'x', b'a'),)",
            b"b (('/s', '/b'),) ((b'x', b'b'),)",
            b" () ()",
        ]
    assert VAR.get().client_id == ""


@pytest.mark.parametrize("trust", [True, False])
async def test_a_server_that_faces_strangers_drops_their_dtab(*, trust: bool) -> None:
    async def handler(request: Request) -> Response:
        return Response(repr(current().dtab).encode())

    async with server_rig(handler, trust_context=trust) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, (), "", (("/s", "/evil"),)))
        await peer.expect(ok(2, b"(('/s', '/evil'),)" if trust else b"()"))


async def test_contexts_that_make_no_sense_are_counted_over_all_connections() -> None:
    nonsense = ((b"com.twitter.finagle.Deadline", b"?"), (b"traceparent", b"?"))
    async with server_rig() as rig:
        for n in range(1, 4):
            peer = await rig.open()
            await peer.send(Tdispatch(2, nonsense))
            await peer.expect(ok(2))
            assert rig.counter("undecodable_contexts") == 2 * n
            await peer.stream.aclose()
            await settle()
            assert rig.counter("undecodable_contexts") == 2 * n


@pytest.mark.parametrize("left", [2**63 - 1, 2**62, 10**9 * 10**6])
async def test_a_deadline_beyond_all_measure_is_harmless(left: int) -> None:
    """It becomes a timer of the event loop, and each loop has its own idea of what is too far off."""
    value = (0).to_bytes(8, "big") + left.to_bytes(8, "big")
    async with server_rig() as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, ((b"com.twitter.finagle.Deadline", value),)))
        await peer.expect(ok(2))


async def test_a_request_whose_deadline_has_passed_is_not_handled() -> None:
    gate = Gate()
    value = (5).to_bytes(8, "big") + (4).to_bytes(8, "big")
    async with server_rig(gate) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, ((b"com.twitter.finagle.Deadline", value),)))
        reply = await peer.receive()
        assert isinstance(reply, Rdispatch)
        assert reply.status is ERROR
        assert gate.handled == []


def test_a_handler_is_cancelled_when_its_callers_deadline_passes() -> None:
    async def play() -> None:
        gate = Gate()
        value = (0).to_bytes(8, "big") + (2 * 10**9).to_bytes(8, "big")
        async with server_rig(gate) as rig:
            peer = await rig.open()
            started = anyio.current_time()
            await peer.send(Tdispatch(2, ((b"com.twitter.finagle.Deadline", value),), body=b"a"))
            reply = await peer.receive()
            assert anyio.current_time() == pytest.approx(started + 2)
            assert isinstance(reply, Rdispatch)
            assert reply.status is ERROR
            assert gate.cancelled == [b"a"]

    run_virtual(play)
