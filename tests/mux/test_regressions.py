"""Behaviours that were once wrong: what a peer that is slow, gone, hostile or merely busy must not be able to do."""

from __future__ import annotations

import contextlib
import logging
import math
import struct
from collections import Counter
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream

import meshlib
from meshlib import mux
from meshlib.client import Client, Liveness, Transport
from meshlib.core.context import Context, current, use
from meshlib.core.errors import ConnectError, ConnectionLost, InvalidArgument, Rejected, RemoteError
from meshlib.core.service import Status
from meshlib.mux import Limits, Request, Response
from meshlib.mux.client import MuxConnector
from meshlib.mux.codec import encode
from meshlib.mux.messages import (
    Rdiscarded,
    Rdispatch,
    ReplyStatus,
    Rerr,
    Rping,
    Tdiscarded,
    Tdispatch,
    Tdrain,
    Tlease,
    Tping,
)
from meshlib.names.addr import Address
from meshlib.server import Server
from meshlib.testing import duplex, run_virtual
from tests.balancing.fakes import make_env

from .peer import PROBE, Call, RawPeer, client_rig, echo, server_rig, settle

OK = ReplyStatus.OK
LINE = "\n2026-01-01 CRITICAL root: all is lost\r"
MIB = 1024 * 1024


class Network(MuxConnector):
    """Connects to servers in this process. The first connections go to ``peers``, which are played by hand."""

    def __init__(self, server: Server | None = None, *peers: Any, capacity: int = 65536) -> None:
        super().__init__()
        self.server = server
        self.peers = list(peers)
        self.capacity = capacity

    async def open(self, address: Address) -> ByteStream:
        ours, theirs = duplex(self.capacity)
        if self.peers:
            self.group.start_soon(self.peers.pop(0), RawPeer(theirs))
        else:
            assert self.server is not None
            self.server.env.supervisor.start(self.server.serve_stream, theirs)
        return ours

    group: anyio.abc.TaskGroup
    """Where the peers run."""


async def received(peer: RawPeer, n: int) -> list[Tdispatch]:
    """The next ``n`` requests."""
    messages = [await peer.receive() for _ in range(n)]
    assert all(isinstance(message, Tdispatch) for message in messages)
    return messages  # type: ignore[return-value]


def one_line(text: str) -> bool:
    return len(text) < 4000 and "\n" not in text and "\r" not in text


# --- connections that break -------------------------------------------------------------------------------------------


async def test_replies_that_came_before_a_write_failed_are_all_delivered():
    outcomes: Counter[str] = Counter()

    async def call() -> None:
        try:
            outcomes[(await rig.session(Request(b"first"))).body.decode()] += 1
        except meshlib.MeshError as error:
            outcomes[type(error).__name__] += 1
            return
        with pytest.raises(meshlib.MeshError):
            await rig.session(Request(b"this cannot be written"))

    async with client_rig(capacity=MIB) as rig:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                for _ in range(2000):
                    group.start_soon(call)
                requests = await received(rig.peer, 2000)
                await rig.peer.send(*[Rdispatch(request.tag, OK, (), b"there") for request in requests])
                await rig.stream.aclose()
    assert outcomes == {"there": 2000}


def test_replies_that_come_after_a_write_failed_are_delivered_for_a_second():
    async def main():
        async with client_rig(capacity=MIB) as rig, anyio.create_task_group() as group:
            calls = [Call(group, rig.session, Request(b"%d" % i)) for i in range(3)]
            tags = [request.tag for request in sorted(await received(rig.peer, 3), key=lambda request: request.body)]
            rig.stream._incoming.deaf = True
            refused = Call(group, rig.session, Request(b"breaks it"))
            await anyio.sleep(0.5)
            await rig.peer.send(Rdispatch(tags[0], OK, (), b"a"), Rdispatch(tags[1], OK, (), b"b"))
            assert [(await call.result()).body for call in calls[:2]] == [b"a", b"b"]
            start = anyio.current_time()
            assert isinstance(await calls[2].result(), ConnectionLost)
            assert anyio.current_time() - start == pytest.approx(0.5, abs=0.01)
            assert isinstance(await refused.result(), ConnectionLost)
            assert rig.session.status is Status.CLOSED

    run_virtual(main)


async def test_requests_that_had_not_begun_to_leave_when_the_connection_broke_were_provably_not_processed():
    async with client_rig(capacity=1000) as rig, anyio.create_task_group() as group:
        under_way = Call(group, rig.session, Request(b"x" * 5000))
        await settle()
        waiting = [Call(group, rig.session, Request(b"y")) for _ in range(5)]
        await settle()
        rig.stream.cut()
        lost = await under_way.result()
        assert isinstance(lost, ConnectionLost)
        assert not lost.requeueable
        for call in waiting:
            error = await call.result()
            assert isinstance(error, Rejected)
            assert error.requeueable
            assert not error.by_peer


async def test_of_large_requests_only_those_whose_first_fragment_left_may_have_been_processed():
    headers = ((b"mux-framer", struct.pack(">i", 1000)),)
    async with client_rig(capacity=500, headers=headers) as rig, anyio.create_task_group() as group:
        begun = Call(group, rig.session, Request(b"x" * 5000))
        await settle()
        waiting = Call(group, rig.session, Request(b"y" * 5000))
        await settle()
        rig.stream.cut()
        assert isinstance(await begun.result(), ConnectionLost)
        assert isinstance(await waiting.result(), Rejected)


def test_a_client_sends_what_was_never_written_elsewhere_although_it_may_be_processed_only_once():
    async def main():
        seen: Counter[bytes] = Counter()

        async def handler(request: Request) -> Response:
            seen[request.body[:3]] += 1
            return Response(b"done")

        async def breaks(peer: RawPeer) -> None:
            await peer.accept()
            await anyio.sleep(0.5)
            peer.stream.cut()

        network = Network(mux.serve(handler, "10.0.0.1:80"), breaks, capacity=1000)
        client: Client[Request, Response] = Client("10.0.0.1:80", network)
        async with client, anyio.create_task_group() as network.group:
            first = Call(network.group, client, Request(b"one" * 1000))
            await anyio.sleep(0.1)
            others = [Call(network.group, client, Request(b"%03d" % i)) for i in range(20)]
            assert isinstance(await first.result(), ConnectionLost)
            assert [(await call.result()).body for call in others] == [b"done"] * 20
        await network.server.aclose()
        assert seen == {b"%03d" % i: 1 for i in range(20)}

    run_virtual(main)


# --- one large message harms only its own call ------------------------------------------------------------------------


async def test_a_request_over_the_limit_is_refused_alone_and_before_it_is_sent():
    async with client_rig(limits=Limits(max_frame=10_000, max_contexts=500)) as rig:
        async with anyio.create_task_group() as group:
            other = Call(group, rig.session, Request(b"x"))
            (request,) = await received(rig.peer, 1)
            with pytest.raises(InvalidArgument, match=r"over Limits\.max_frame"), anyio.fail_after(30):
                await rig.session(Request(b"x" * 10_000))
            with pytest.raises(InvalidArgument, match=r"over Limits\.max_contexts"), anyio.fail_after(30):
                await rig.session(Request(contexts=((b"key", b"x" * 500),)))
            await rig.peer.silent()
            await rig.peer.send(Rdispatch(request.tag, OK, (), b"y"))
            assert (await other.result()).body == b"y"
        assert (rig.session.status, rig.session.pending) == (Status.OPEN, 0)


@pytest.mark.parametrize(
    "reply", [Response(b"x" * 10_000), Response(b"", ((b"key", b"x" * 500),))], ids=["body", "contexts"]
)
async def test_a_reply_over_the_limit_is_an_error_of_its_own_call_alone(reply, caplog):
    go = anyio.Event()

    async def handler(request: Request) -> Response:
        if request.body == b"slow":
            await go.wait()
            return Response(b"fine")
        return reply

    async with server_rig(handler, limits=Limits(max_frame=10_000, max_contexts=500)) as rig:
        peer = await rig.open()
        await peer.send(Tdispatch(2, (), "", (), b"slow"), Tdispatch(3, (), "/get", (), b""))
        refused = await peer.receive()
        assert isinstance(refused, Rdispatch)
        assert (refused.tag, refused.status) == (3, ReplyStatus.ERROR)
        assert refused.body == b"internal error: the reply cannot be sent"
        go.set()
        await peer.expect(Rdispatch(2, OK, (), b"fine"))
        assert rig.session.in_flight == 0
    assert "the reply to /get cannot be sent" in caplog.text


def test_hostile_contexts_that_travel_through_a_handler_do_not_end_the_session_behind_it():
    async def main():
        passed_on: list[list[bytes]] = []

        async def back(request: Request) -> Response:
            passed_on.append([key for key, _ in current().opaque])
            await anyio.sleep(0.5)
            return Response(request.body)

        network = Network(mux.serve(back, "10.0.0.1:80"))
        down: Client[Request, Response] = Client("10.0.0.1:80", network)

        async def front(request: Request) -> Response:
            return Response((await down(Request(request.body))).body)

        big = 32_000
        hostile = ((b"c0", b"v" * big), (b"c1", b"v" * big), (b"c2", b"v" * 1500), (b"c3", b""))
        assert 65_000 < sum(4 + len(k) + len(v) for k, v in hostile) <= Limits().max_contexts
        async with down, server_rig(front) as rig, anyio.create_task_group() as group:
            innocent = Call(group, down, Request(b"innocent"))
            await anyio.sleep(0.1)
            peer = await rig.open()
            await peer.send(Tdispatch(2, hostile, "", (), b"hostile"))
            reply = await peer.receive()
            assert isinstance(reply, Rdispatch)
            assert (reply.status, reply.body) == (OK, b"hostile")
            assert (await innocent.result()).body == b"innocent"
            assert down.metrics()["pool/connects"] == 1
        await network.server.aclose()
        assert passed_on == [[], [b"c0", b"c1", b"c3"]]  # the one that does not fit stays; a smaller one after it goes

    run_virtual(main)


async def test_both_ends_ask_for_small_fragments():
    offers = []

    async def accept(peer: RawPeer) -> None:
        offers.append((await peer.accept()).headers)

    async with client_rig(accept=accept), server_rig() as rig:
        peer = await rig.open(negotiate=False)
        offers.append((await peer.connect()).headers)
    assert [struct.unpack(">i", dict(headers)[b"mux-framer"]) for headers in offers] == [(256 * 1024,)] * 2


async def test_a_small_reply_overtakes_a_large_one():
    order = []

    async def handler(request: Request) -> Response:
        return Response(b"x" * (5 * MIB if request.body == b"large" else 1))

    async def call(body: bytes) -> None:
        order.append((body, len((await client(Request(body))).body)))

    network = Network(mux.serve(handler, "10.0.0.1:80"))
    client: Client[Request, Response] = Client("10.0.0.1:80", network)
    async with client, anyio.create_task_group() as group:
        await client(Request())
        group.start_soon(call, b"large")
        await settle()
        group.start_soon(call, b"small")
    await network.server.aclose()
    assert order == [(b"small", 1), (b"large", 5 * MIB)]


# --- pings ------------------------------------------------------------------------------------------------------------


def test_a_session_is_kept_while_bytes_keep_coming_although_the_answer_to_its_ping_is_late():
    async def main():
        async with client_rig(liveness=Liveness(), capacity=MIB) as rig, anyio.create_task_group() as group:
            call = Call(group, rig.session, Request(b"x"))
            first = await rig.peer.receive_n(2)
            (ping,) = (message for message in first if isinstance(message, Tping))
            (request,) = (message for message in first if isinstance(message, Tdispatch))
            frame = encode(Rdispatch(request.tag, OK, (), b"y" * 10_000))
            for at in range(0, len(frame), 1000):  # 11 pieces, 3 s apart: half a minute
                await anyio.sleep(3)
                await rig.peer.send(frame[at : at + 1000])
            assert len((await call.result()).body) == 10_000
            assert rig.session.status is Status.OPEN
            assert rig.counter("ping_failures") == 0
            await rig.peer.send(Rping(ping.tag))
            await anyio.sleep(1)
            assert isinstance(await rig.peer.receive(), Tping)  # the next one, now that this is answered

    run_virtual(main)


def test_a_session_that_hears_nothing_for_four_seconds_is_given_up():
    async def main():
        async with client_rig(liveness=Liveness()) as rig, anyio.create_task_group() as group:
            start = anyio.current_time()
            call = Call(group, rig.session, Request(b"x"))
            error = await call.result()
            assert isinstance(error, ConnectionLost)
            assert error.message == "no answer to a ping within 4 s"
            assert anyio.current_time() - start == pytest.approx(4, abs=0.01)
            assert rig.counter("ping_failures") == 1

    run_virtual(main)


# --- deadlines and leases ---------------------------------------------------------------------------------------------


async def test_a_flood_of_leases_is_one_deadline_of_the_latest():
    async with client_rig(capacity=MIB) as rig:
        for start in range(0, 20_000, 1000):
            await rig.peer.send(*[Tlease(0, 0, 10**9 + (start + i) * 20) for i in range(1000)])
        await rig.peer.send(Tlease(0, 0, 2**64 - 1))
        await rig.peer.silent()
        assert rig.counter("leased") == 20_001
        assert len(rig.session._deadlines) == 1
        assert len(rig.session._deadlines._buckets) < 3000
        assert rig.session.status is Status.OPEN


async def test_a_call_whose_deadline_is_infinite_waits_for_its_reply():
    async with client_rig() as rig, anyio.create_task_group() as group:
        with use(Context(deadline=math.inf)):
            call = Call(group, rig.session, Request(b"x"))
            (request,) = await received(rig.peer, 1)
        await rig.peer.send(Rdispatch(request.tag, OK, (), b"y"))
        assert (await call.result()).body == b"y"
        assert rig.session.pending == 0


# --- what peers say, and who has to read it ---------------------------------------------------------------------------


async def test_a_destination_with_line_breaks_makes_no_line_of_its_own_in_the_log(caplog):
    async def handler(request: Request) -> Response:
        if request.body == b"raise":
            raise ValueError("no")
        return None  # type: ignore[return-value]

    async with server_rig(handler) as rig:
        peer = await rig.open()
        for tag, body in ((2, b"raise"), (3, b"")):
            await peer.send(Tdispatch(tag, (), "/shop" + LINE, (), body))
            reply = await peer.receive()
            assert isinstance(reply, Rdispatch)
            assert reply.status is ReplyStatus.ERROR
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 2
    assert all("/shop" in message and one_line(message) for message in messages)


async def test_the_error_of_an_unknown_method_is_one_short_line():
    class Shop:
        @meshlib.rpc
        async def buy(self) -> None: ...

    async with meshlib.serve(Shop()) as server, mux.client(server.address) as client:
        for dest in ("/Shop/", "/"):
            with pytest.raises(LookupError) as caught:
                await client(Request(dest=dest + LINE + "x" * 30_000))
            assert one_line(str(caught.value))


@pytest.mark.parametrize("own", [True, False], ids=["of the call", "of the session"])
async def test_an_error_of_megabytes_is_one_short_line_in_the_clients_error_and_log(own, caplog):
    async with client_rig(capacity=64 * MIB) as rig, anyio.create_task_group() as group:
        call = Call(group, rig.session, Request(b"x"))
        (request,) = await received(rig.peer, 1)
        await rig.peer.send(Rerr(request.tag if own else 1, "boo" + LINE + "x" * (8 * MIB)))
        error = await call.result()
        assert type(error) is (RemoteError if own else ConnectionLost)
        assert "boo" in error.message
        assert one_line(str(error))
    assert all(one_line(record.getMessage()) for record in caplog.records)
    assert own or any("boo" in record.getMessage() for record in caplog.records)


async def test_the_refusal_of_a_session_in_megabytes_is_one_short_line_wherever_it_shows(caplog):
    caplog.set_level(logging.DEBUG)

    async def refuses(peer: RawPeer) -> None:
        await peer.receive()
        await peer.send(PROBE)
        await peer.receive()
        await peer.send(Rerr(1, "boo" + LINE + "x" * (8 * MIB)))

    network = Network(None, refuses, capacity=64 * MIB)
    client: Client[Request, Response] = Client("10.0.0.1:80", network, meshlib.timeout(None))
    async with client, anyio.create_task_group() as network.group:
        call = Call(network.group, client, Request(b"x"))
        with anyio.fail_after(30):
            while not (client.endpoints and "boo" in repr(client.endpoints)):
                await anyio.lowlevel.checkpoint()
        shows = [repr(client.endpoints), client.endpoints[0].health.reason, repr(client)[:4000].splitlines()[0]]
        assert all(one_line(text) for text in shows)
        call.cancel()
    assert all(one_line(record.getMessage()) for record in caplog.records)


# --- draining and closing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drained_first", [True, False])
def test_a_drained_session_does_not_wait_forever_for_the_answers_to_discarded_requests(drained_first):
    async def main():
        async with client_rig() as rig, anyio.create_task_group() as group:
            calls = [Call(group, rig.session, Request(b"x")) for _ in range(3)]
            await received(rig.peer, 3)
            if drained_first:
                await rig.peer.send(Tdrain(9))
                await settle()
            for call in calls:
                call.cancel()
            await settle()
            if not drained_first:
                await rig.peer.send(Tdrain(9))
            start = anyio.current_time()
            assert len([await rig.peer.receive() for _ in range(4)]) == 4  # three discards and an Rdrain
            assert rig.session.pending == 3
            await rig.peer.ended()
            assert anyio.current_time() - start == pytest.approx(5, abs=0.1)
            assert rig.counter("drained") == 1

    run_virtual(main)


def test_a_drained_session_does_wait_for_calls_that_somebody_waits_for():
    async def main():
        async with client_rig() as rig, anyio.create_task_group() as group:
            discarded, waited_for = (Call(group, rig.session, Request(body)) for body in (b"1", b"2"))
            tags = {request.body: request.tag for request in await received(rig.peer, 2)}
            discarded.cancel()
            rig.session.retire()
            await anyio.sleep(20)
            await rig.peer.send(Rdispatch(tags[b"2"], OK, (), b"late"))
            assert (await waited_for.result()).body == b"late"

    run_virtual(main)


@pytest.mark.parametrize("said", [b"", PROBE, b"\0\0"], ids=["nothing", "the probe", "half a size"])
def test_a_connection_that_never_says_a_whole_first_word_is_closed_after_ten_seconds(said):
    async def main():
        async with server_rig() as rig:
            start = anyio.current_time()
            peer = await rig.open(negotiate=False)
            if said:
                await peer.send(said)
            if said == PROBE:
                await peer.expect(Rerr(1, "tinit check"))
            try:
                while True:
                    await peer.receive()
            except anyio.EndOfStream:
                pass
            assert anyio.current_time() - start == pytest.approx(10, abs=2)
            await settle()
            assert rig.server.connections == ()

    run_virtual(main)


def test_a_connection_that_has_begun_may_be_silent_for_as_long_as_it_likes():
    async def main():
        async with server_rig() as rig:
            peer = await rig.open()
            await anyio.sleep(100)
            await peer.send(Tdispatch(2, (), "", (), b"x"))
            await peer.expect(Rdispatch(2, OK, (), b"x"))

    run_virtual(main)


def test_closing_a_server_does_not_wait_for_connections_that_never_said_a_word():
    async def main():
        async with server_rig() as rig:
            peers = [await rig.open(negotiate=False) for _ in range(3)]
            await settle()
            assert len(rig.server.connections) == 3
            start = anyio.current_time()
            await rig.server.aclose()
            assert anyio.current_time() == pytest.approx(start, abs=0.01)
            for peer in peers:
                await peer.ended()

    run_virtual(main)


# --- connecting -------------------------------------------------------------------------------------------------------


class Slow(MuxConnector):
    """A network where connecting and the handshake take as long as they are told to."""

    def __init__(self, connecting: float, handshake: float) -> None:
        super().__init__()
        self.connecting, self.handshake = connecting, handshake

    async def open(self, address: Address) -> ByteStream:
        await anyio.sleep(self.connecting)
        ours, theirs = duplex()
        self.group.start_soon(self._serve, RawPeer(theirs))
        return ours

    async def _serve(self, peer: RawPeer) -> None:
        await anyio.sleep(self.handshake)
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            await peer.accept()
            await peer.receive()

    group: anyio.abc.TaskGroup


@pytest.mark.parametrize(
    ("connecting", "handshake", "message", "after"),
    [
        (math.inf, 0, "no connection within 1 s", 1.0),
        (1.5, 0, "no connection within 1 s", 1.0),
        (0.9, 1.5, "no session within 2 s of connecting", 2.0),
        (0.9, 0.9, None, 1.8),
        (0.1, 1.7, None, 1.8),
    ],
)
def test_the_connect_timeout_bounds_the_connect_alone(connecting, handshake, message, after):
    async def main():
        env, connector = make_env(), Slow(connecting, handshake)
        async with anyio.create_task_group() as connector.group:
            start = anyio.current_time()
            if message is None:
                session = await Transport().build(env, connector).acquire()
                session.close()
            else:
                with pytest.raises(ConnectError) as caught:
                    await Transport().build(env, connector).acquire()
                assert (caught.value.message, caught.value.endpoint) == (message, "h:1")
            assert anyio.current_time() - start == pytest.approx(after, abs=0.01)
            await env.supervisor.aclose()

    run_virtual(main)


# --- requests that nobody wants any more ------------------------------------------------------------------------------


async def test_requests_that_are_discarded_in_the_read_they_came_with_never_start_their_handlers():
    started = []

    async def handler(request: Request) -> Response:
        started.append(request.body)
        return await echo(request)

    async with server_rig(handler, capacity=MIB) as rig:
        peer = await rig.open()
        # Fewer than after which a session lets others run while it takes in a large read.
        await peer.send(*[m for tag in range(2, 9) for m in (Tdispatch(tag, (), "", (), b"x"), Tdiscarded(0, tag))])
        await peer.expect(*[Rdiscarded(tag) for tag in range(2, 9)])
        await peer.send(Tdispatch(2, (), "", (), b"wanted"))
        await peer.expect(Rdispatch(2, OK, (), b"wanted"))
        assert started == [b"wanted"]
        assert rig.session.in_flight == 0
