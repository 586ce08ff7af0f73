"""A client's streams: opened again once, whoever finds out; left without an end; and nobody's reader stops another."""

import asyncio
from typing import Any

import anyio
import pytest
from grpclib.client import StreamStreamMethod, StreamUnaryMethod, UnaryStreamMethod
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

import meshlib
import meshlib.grpc

from .scripted import HEAD, answering, channel, message, scripted, unary
from .servers import aio_server


async def until(condition):
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - the other side tells nobody
            await anyio.sleep(0.002)


def duplex(each: Any) -> Any:
    return StreamStreamMethod(each, "/x.Y/Z", bytes, bytes).open()


async def over(stream: Any) -> None:
    """Wait until the stream has been refused, and nobody has been told."""
    exchange = stream._exchange
    while not exchange.over:  # noqa: ASYNC110 - whoever is told would open it again
        await asyncio.sleep(0)


async def refuses_first(peer, peers):
    """The first connection drains, and has seen nothing; the second one answers with all that has come."""
    stream = await peer.request()
    if peer is peers[0]:
        await peer.until(lambda: peer.data.get(stream))
        peer.goaway(0)
        return
    await peer.until(lambda: stream in peer.ended)
    peer.answer(stream, peer.data[stream])


# --- opened again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["sender", "receiver"])
async def test_whoever_finds_out_that_a_stream_was_refused_it_is_opened_again_once(first):
    peers = []
    async with (
        scripted(lambda peer: refuses_first(peer, peers), peers=peers) as (address, _),
        channel(address) as each,
        duplex(each) as stream,
    ):
        await stream.send_message(b"one")

        async def send():
            await over(stream)
            await stream.send_message(b"two", end=True)

        async def receive():
            if first == "sender":
                await over(stream)
            return await stream.recv_message()

        steps = [send(), receive()] if first == "sender" else [receive(), send()]
        with anyio.fail_after(10):
            replies = await asyncio.gather(*steps)
        assert message(b"one") + message(b"two") in replies
        assert [peer.requests for peer in peers] == [[1], [1]]
        assert await stream.recv_message() is None
    assert [node.load for node in each.endpoints] == [0]


@pytest.mark.parametrize("way", ["cancelled", "left"])
async def test_a_stream_that_is_given_up_while_it_is_opened_again_stays_given_up(way):
    peers: list[Any] = []
    waiter: Any = None
    stream: Any = None
    async with (
        scripted(lambda peer: refuses_first(peer, peers), peers=peers) as (address, _),
        channel(address) as each,
    ):
        try:
            async with duplex(each) as stream:
                await stream.send_message(b"one")
                waiter = asyncio.create_task(stream.recv_message())
                await over(stream)
                await asyncio.sleep(0)
                if way == "left":
                    raise KeyError
                await stream.cancel()
        except KeyError:
            pass
        with anyio.fail_after(10), pytest.raises(GRPCError) as caught:
            await waiter
        assert caught.value.status is Status.CANCELLED
        with pytest.raises(GRPCError):
            await stream.send_message(b"two")
        assert await unary_of(each, peers) == [[1], [1]]
        assert [node.load for node in each.endpoints] == [0]


async def unary_of(each, peers):
    """Make another call, which finds the connection that there is; gives the streams that were ever opened."""
    with anyio.fail_after(10):
        assert await unary(each)(b"x") == message(b"x")
    return [peer.requests for peer in peers]


async def test_a_stream_that_stops_being_waited_for_is_still_opened_again():
    peers = []
    async with (
        scripted(lambda peer: refuses_first(peer, peers), peers=peers) as (address, _),
        channel(address) as each,
        duplex(each) as stream,
    ):
        await stream.send_message(b"one")
        waiter = asyncio.create_task(stream.recv_message())
        await over(stream)
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        with anyio.fail_after(10):
            await stream.send_message(b"two", end=True)
            assert await stream.recv_message() == message(b"one") + message(b"two")
        assert [peer.requests for peer in peers] == [[1], [1]]


async def test_a_stream_that_all_refuse_fails_for_all_who_wait():
    step = answering(lambda p, s: p.reset(s, ErrorCodes.REFUSED_STREAM))
    async with scripted(step) as (address, peers), channel(address) as each:
        async with duplex(each) as stream:
            await stream.send_message(b"one")
            with anyio.fail_after(10), pytest.raises(meshlib.Rejected):
                await stream.recv_message()
            with pytest.raises(meshlib.Rejected):
                await stream.send_message(b"two")
            await stream.cancel()
        assert peers[0].requests == [1, 3, 5, 7]
        assert [node.load for node in each.endpoints] == [0]


async def test_a_stream_of_which_too_much_was_sent_is_not_opened_again():
    async def script(peer):
        stream = await peer.request()
        await peer.until(lambda: len(peer.data.get(stream, b"")) > 65536)
        peer.goaway(0)

    async with scripted(script) as (address, peers), channel(address) as each:
        with pytest.raises(meshlib.Rejected):
            await StreamUnaryMethod(each, "/x.Y/Z", bytes, bytes)([bytes(1000)] * 70)
        assert [peer.requests for peer in peers] in ([[1]], [[1], []])


# --- left without an end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [True, False])
async def test_a_stream_that_is_left_and_was_not_ended_is_a_mistake_and_not_waited_for(answered):
    def step(peer, stream):
        if answered:
            peer.headers(stream, HEAD)
            peer.h2.send_data(stream, message(b"hello"))
            peer.flush()

    async with scripted(answering(step)) as (address, peers), channel(address) as each:
        with anyio.fail_after(10), pytest.raises(ProtocolError, match="was not ended"):  # noqa: PT012 - as it is written
            async with duplex(each) as stream:
                await stream.send_message(b"one")
                await until(lambda: peers[0].requests)
                if answered:
                    assert await stream.recv_message() == b"hello"
        await until(lambda: peers[0].resets == [(1, ErrorCodes.CANCEL)])
        assert [node.load for node in each.endpoints] == [0]


async def test_what_the_server_said_of_a_stream_that_was_not_ended_counts_more():
    def step(peer, stream):
        peer.headers(stream, [*HEAD, ("grpc-status", "7"), ("grpc-message", "not you")], end=True)

    async with scripted(answering(step)) as (address, _), channel(address) as each:
        with anyio.fail_after(10), pytest.raises(GRPCError, match="not you") as caught:  # noqa: PT012 - as it is written
            async with duplex(each) as stream:
                await stream.send_message(b"one")
                await over(stream)
        assert caught.value.status is Status.PERMISSION_DENIED


# --- windows ----------------------------------------------------------------------------------------------------------


async def test_the_end_of_a_stream_waits_for_a_window_that_is_negative():
    credit = anyio.Event()

    async def script(peer):
        stream = await peer.request()
        with anyio.fail_after(10):
            while peer.h2.streams[stream].inbound_flow_control_window > 64_600:
                await peer.pump()
        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        peer.flush()
        reading = asyncio.create_task(peer.until(lambda: stream in peer.ended))
        await credit.wait()
        peer.h2.increment_flow_control_window(2000, stream)
        peer.flush()
        await reading
        peer.answer(stream, b"well")

    async with scripted(script) as (address, peers), channel(address) as each:
        method: Any = StreamUnaryMethod(each, "/x.Y/Z", bytes, bytes)
        async with method.open() as stream:
            await stream.send_message(bytes(1000))
            h2, number = stream._exchange.session._h2, stream._exchange.stream_id
            await until(lambda: h2.room(number) < 0)
            ending = asyncio.create_task(stream.end())
            await anyio.sleep(0.05)
            assert not ending.done()
            credit.set()
            with anyio.fail_after(10):
                await ending
                assert await stream.recv_message() == b"well"
        assert not peers[0].terminated


async def test_a_stream_that_nobody_reads_stops_no_other_call():
    from meshprotos import interop_pb2 as pb
    from meshprotos.interop_grpc import InteropStub

    # With a connection's window that is no larger than a stream's.
    async with aio_server() as (address, _), meshlib.grpc.Channel(address, config=Configuration()) as each:
        stub = InteropStub(each)
        async with stub.StreamingOutput.open() as stream:
            await stream.send_message(pb.StreamRequest(sizes=[1_000_000] * 20), end=True)
            assert len((await stream.recv_message()).payload) == 1_000_000
            await until(lambda: stream._exchange.inbound.held > 2_000_000)  # most of its window
            for _ in range(10):
                reply = await stub.UnaryCall(pb.SimpleRequest(reply_size=500_000), timeout=10)
                assert len(reply.payload) == 500_000
            assert [len(reply.payload) async for reply in stream] == [1_000_000] * 19
        assert each.metrics()["pool/connects"] == 1


async def test_what_a_connection_holds_unread_is_bounded_and_is_given_back_once(monkeypatch):
    monkeypatch.setattr("meshlib.grpc.calling.incoming.UNREAD", 60_000)
    peers, first = [], 40_000

    def step(peer, stream):
        peer.h2.send_headers(stream, HEAD)
        for part in range(0, first, 10_000):
            peer.h2.send_data(stream, message(bytes(first))[part : part + 10_000 + 5 * (part + 10_000 == first)])
        peer.flush()

    async with (
        scripted(answering(step), peers=peers) as (address, _),
        channel(address, config=Configuration(http2_connection_window_size=100_000)) as each,
    ):

        def window():
            return peers[0].h2.outbound_flow_control_window

        # The server's whole window, whatever the channel makes of what it is configured to be.
        opened: list[Any] = [UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes).open() for _ in range(3)]
        async with opened[0], opened[1], opened[2]:
            session: Any = None
            for n, stream in enumerate(opened):
                await stream.send_message(b"x")
                await stream.recv_initial_metadata()
                await until(lambda stream=stream: stream._exchange.inbound.held == first + 5)
                session = stream._exchange.session
                # The frames that came when it was more than is allowed have not been given back.
                assert bool(session._withheld) is (n > 0)
            assert session._unread == 3 * (first + 5)
            assert await opened[0].recv_message() == bytes(first)
            assert session._withheld
            assert await opened[1].recv_message() == bytes(first)
            assert (session._withheld, session._unread) == (0, first + 5)
            for stream in opened:
                await stream.cancel()
            assert session._unread == 0
        manager = session._h2._inbound_flow_control_window_manager
        # All is either in the window again, or waits until there is half a window of it to be told of.
        assert manager.current_window_size + manager._bytes_processed == manager.max_window_size
        await until(lambda: len(peers[0].resets) == 3)
        assert window() == manager.current_window_size


async def test_answers_that_were_begun_are_not_asked_for_again():
    """A server that has begun to answer has seen the call, whatever it says."""

    async def script(peer, ending):
        stream = await peer.request()
        peer.headers(stream, HEAD)
        peer.raw_data(stream, message(b"done"))
        await anyio.sleep(0.01)
        ending(peer, stream)

    for ending, kind in (
        (lambda p, s: p.reset(s, ErrorCodes.REFUSED_STREAM), meshlib.RemoteError),
        (lambda p, s: p.goaway(0), meshlib.ConnectionLost),
    ):
        async with (
            scripted(lambda peer, ending=ending: script(peer, ending)) as (address, peers),
            channel(address) as each,
        ):
            with anyio.fail_after(10), pytest.raises(GRPCError) as caught:
                await unary(each)(b"charge the card")
            assert caught.value.status is Status.UNAVAILABLE
            assert isinstance(caught.value, kind)
            assert caught.value.processed is None
            assert sum(len(peer.requests) for peer in peers) == 1


# --- room -------------------------------------------------------------------------------------------------------------


async def test_all_go_on_for_whom_the_server_makes_room_with_one_word():
    async def script(peer):
        await anyio.sleep(0.05)  # all wait
        peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 30})
        peer.flush()
        await peer.request(30)
        for stream in list(peer.requests):
            peer.answer(stream, b"well")

    async with (
        scripted(script, settings={SettingCodes.MAX_CONCURRENT_STREAMS: 0}) as (address, _),
        channel(address, meshlib.grpc.connections(most=1)) as each,
    ):
        with anyio.fail_after(10):
            assert await asyncio.gather(*(unary(each)(b"x") for _ in range(30))) == [b"well"] * 30


async def test_calls_that_wait_for_a_full_transport_count_against_the_limit():
    most = 0

    async def script(peer):
        nonlocal most
        answered = set()
        while await peer.pump():
            most = max(most, len(peer.requests) - len(answered))
            for stream in peer.ended - answered:
                peer.answer(stream, b"well")
            answered |= peer.ended

    async with (
        scripted(script, settings={SettingCodes.MAX_CONCURRENT_STREAMS: 10}) as (address, _),
        channel(address, meshlib.grpc.connections(most=1)) as each,
        duplex(each) as stream,
    ):
        await stream.send_message(b"x")
        session = stream._exchange.session
        session.pause_writing()  # as when the system's buffers are full
        calls = [asyncio.create_task(unary(each)(b"x")) for _ in range(40)]
        await until(lambda: each.metrics()["pool/waited"] == 31)
        assert session.load == 10
        # One that waits in the session gives up, and another that waits for the session takes its place.
        given_up = calls.pop(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        await until(lambda: session.load == 10)
        session.resume_writing()
        with anyio.fail_after(10):
            assert await asyncio.gather(*calls) == [b"well"] * 39
        assert (most, session.load) == (10, 1)
        await stream.cancel()
    assert [node.load for node in each.endpoints] == [0]


async def test_a_limit_that_is_lowered_while_calls_wait_sends_them_back_in_line():
    async def script(peer):
        peer.answer(await peer.request(), b"well")
        n = 1
        while True:
            n += 1
            peer.answer(await peer.request(n), b"well")

    async with (
        scripted(script, settings={SettingCodes.MAX_CONCURRENT_STREAMS: 10}) as (address, peers),
        channel(address, meshlib.grpc.connections(most=1)) as each,
    ):
        method: Any = UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes)
        async with method.open() as stream:
            await stream.send_message(b"x")
            assert await stream.recv_message() == b"well"
            session = stream._exchange.session
            session.pause_writing()
            calls = [asyncio.create_task(unary(each)(b"x")) for _ in range(8)]
            await until(lambda: session.load == 8)
            peers[0].h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 2})
            peers[0].flush()
            await until(lambda: session.limit == 2)
            session.resume_writing()
            with anyio.fail_after(10):
                assert await asyncio.gather(*calls) == [b"well"] * 8
        assert session.load == 0
