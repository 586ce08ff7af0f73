"""What an HTTP/2 server may say and do at any time: other limits, streams that it refuses, frames that mean nothing."""

from __future__ import annotations

import io
from typing import Any

import anyio
import h2.errors
import h2.events
import h2.settings
import httpx
import pytest

from meshlib import retry
from meshlib.http import streams
from meshlib.http.pool import WatermarkPool

from .peers import OK, Peer, answering, asked, only, until

# httpx leaves the generators of bodies unclosed, stock or not, of which trio warns.
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
MOST = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS


def pool_of(client: Any) -> WatermarkPool:
    [node] = only(client).endpoints
    return next(each.__self__ for each in node._env.closers if isinstance(each.__self__, WatermarkPool))


def connection_of(client: Any) -> Any:
    [session] = pool_of(client)._all
    return session._connection


def seen(peer: Peer, kind: Any) -> list[Any]:
    return [event for event in peer.seen if isinstance(event, kind)]


async def allow(peer: Peer, most: int) -> None:
    """Say so, and wait until the client has heard it."""
    before = len(seen(peer, h2.events.SettingsAcknowledged))
    peer.h2.update_settings({MOST: most})
    await peer.flush()
    await until(lambda: len(seen(peer, h2.events.SettingsAcknowledged)) > before)


# --- how many at once -------------------------------------------------------------------------------------------------


async def test_a_server_may_allow_fewer_requests_than_it_did_and_more_again():
    waiting: list[tuple[Peer, int]] = []

    async def collect(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            waiting.append((peer, event.stream_id))

    async with asked(collect, settings={"max_concurrent_streams": 100}) as (server, client):
        replies: list[int] = []

        async def one() -> None:
            replies.append((await client.post("/")).status_code)

        async def several(count: int) -> list[int]:
            asked_of: list[int] = []
            async with anyio.create_task_group() as group:
                for _ in range(count):
                    group.start_soon(one)
                await until(lambda: len(waiting) == count)
                asked_of = sorted(sum(peer is each for peer, _ in waiting) for each in server.peers)
                for peer, number in waiting:
                    await peer.answer(number)
            waiting.clear()
            return asked_of

        assert await several(1) == [1]
        await until(lambda: len(seen(server.peers[0], h2.events.SettingsAcknowledged)) == 1)
        await allow(server.peers[0], 2)
        assert await several(5) == [2, 3]
        await allow(server.peers[1], 0)
        await allow(server.peers[0], 100)
        assert await several(9) == [0, 9]
        assert replies == [200] * 15
        assert len(server.peers) == 2
        assert only(client).metrics()["retries/requeues"] == 0


async def test_nothing_allowed_yet_is_waited_for_on_that_connection():
    async with asked(answering, settings={"max_concurrent_streams": 0}) as (server, client):
        replies: list[int] = []

        async def one() -> None:
            replies.append((await client.post("/")).status_code)

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(one)
            await until(lambda: server.peers and seen(server.peers[0], h2.events.SettingsAcknowledged))
            assert not seen(server.peers[0], h2.events.RequestReceived)
            with pytest.raises(httpx.PoolTimeout):
                await client.post("/", timeout=httpx.Timeout(5, pool=0.05))
            await allow(server.peers[0], 100)
        assert replies == [200] * 20
        assert len(server.peers) == 1


async def test_a_connection_that_allows_nothing_for_too_long_makes_room_for_another():
    async def first_never(peer: Peer, event: Any) -> None:
        if len(server.peers) == 2 and isinstance(event, h2.events.RemoteSettingsChanged):
            peer.h2.update_settings({MOST: 100})
        await answering(peer, event)

    async with asked(first_never, settings={"max_concurrent_streams": 0}) as (server, client):
        async with anyio.create_task_group() as group:
            group.start_soon(client.post, "/")
            await until(lambda: server.peers and seen(server.peers[0], h2.events.SettingsAcknowledged))
            [session] = pool_of(client)._all
            session.idle_since -= 60
            pool_of(client)._awake.set()
        assert len(server.peers) == 2


# --- what is refused, or makes no sense -------------------------------------------------------------------------------


async def refusing_once(peer: Peer, event: Any) -> None:
    """The first request is refused once it is there as a whole; the others are told how long theirs were."""
    if isinstance(event, h2.events.DataReceived):
        peer.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
    elif isinstance(event, h2.events.StreamEnded):
        if len(seen(peer, h2.events.StreamEnded)) == 1:
            peer.h2.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
        else:
            mine = [each for each in seen(peer, h2.events.DataReceived) if each.stream_id == event.stream_id]
            await peer.answer(event.stream_id, b"%d" % sum(len(each.data) for each in mine))


async def test_a_stream_that_was_read_is_not_sent_again_as_nothing():
    async def parts():
        yield b"one"
        yield b"two"

    async with asked(refusing_once) as (server, client):
        with pytest.raises(httpx.ReadError, match="has been read"):
            await client.post("/", content=parts())
        assert len(seen(server.peers[0], h2.events.RequestReceived)) == 1


async def test_a_form_whose_files_can_be_read_again_is_sent_again_as_a_whole():
    async with asked(refusing_once) as (server, client):
        reply = await client.post("/", files={"file": ("name", io.BytesIO(b"x" * 20_000))})
        first = [each for each in seen(server.peers[0], h2.events.DataReceived) if each.stream_id == 1]
        assert int(reply.text) == sum(len(each.data) for each in first) > 20_000


async def test_a_stream_whose_status_makes_no_sense_is_reset():
    async def odd(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            peer.h2.send_headers(event.stream_id, [(b":status", b"2x0")])
            peer.h2.send_data(event.stream_id, b"x" * 1_000)

    async with asked(odd, retry(attempts=1)) as (server, client):
        with pytest.raises(httpx.RemoteProtocolError, match="2x0"):
            await client.post("/")
        [peer] = server.peers
        await until(lambda: seen(peer, h2.events.StreamReset))
        [reset] = seen(peer, h2.events.StreamReset)
        assert reset.error_code == h2.errors.ErrorCodes.PROTOCOL_ERROR
        assert connection_of(client)._h2.open_outbound_streams == 0


async def test_a_small_body_that_is_given_up_is_reset():
    async def half(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            peer.h2.send_headers(event.stream_id, [*OK, (b"content-length", b"10")])
            peer.h2.send_data(event.stream_id, b"half")

    async with asked(half) as (server, client):
        with anyio.move_on_after(0.1):
            await client.get("/")
        await until(lambda: seen(server.peers[0], h2.events.StreamReset))
        assert not connection_of(client)._streams


async def test_an_answer_that_has_no_body_and_sends_one_is_not_read_for_ever():
    async def endless(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            peer.h2.send_headers(event.stream_id, [(b":status", b"204")])
            for _ in range(7):
                peer.h2.send_data(event.stream_id, b"x" * 10_000)

    async with asked(endless, retry(attempts=1)) as (_, client):
        with pytest.raises(httpx.RemoteProtocolError, match="longer than its head says"):
            await client.post("/")


# --- frames that mean little ------------------------------------------------------------------------------------------


async def test_what_neighbours_do_does_not_lengthen_a_write_timeout():
    async def some(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived) and dict(event.headers)[b":path"] == b"/now":
            await peer.answer(event.stream_id)

    async with asked(some) as (_, client), anyio.create_task_group() as group:

        async def neighbour() -> None:
            while True:
                await client.get("/now")
                await anyio.sleep(0.02)

        group.start_soon(neighbour)
        with anyio.fail_after(20), pytest.raises(httpx.WriteTimeout):
            await client.post("/", content=b"x" * 300_000, timeout=httpx.Timeout(60, write=0.2))
        group.cancel_scope.cancel()


async def flooded(peer: Peer, event: Any) -> None:
    """As many empty frames as the path says."""
    if isinstance(event, h2.events.RequestReceived):
        peer.h2.send_headers(event.stream_id, OK)
        for _ in range(int(dict(event.headers)[b":path"][1:])):
            peer.h2.send_data(event.stream_id, b"", pad_length=200)
        await peer.flush()
        if peer.h2.local_flow_control_window(event.stream_id) > 0:
            peer.h2.send_data(event.stream_id, b"done", end_stream=True)


async def test_frames_without_data_are_counted_and_not_kept():
    async with asked(flooded, retry(attempts=1)) as (server, client):
        async with client.stream("POST", f"/{streams.EMPTY}") as reply:
            connection = connection_of(client)
            [stream] = connection._streams.values()
            await until(lambda: stream.ended)
            assert [bytes(data) for data, _ in stream.chunks] == [b"done"]
            assert stream.unread == 4
            assert await reply.aread() == b"done"
        with pytest.raises(httpx.RemoteProtocolError, match="empty DATA frames"):
            async with client.stream("POST", f"/{streams.EMPTY + 1}") as reply:
                await reply.aread()
        assert len(server.peers) == 1
        assert (await client.post("/0")).text == "done"
        assert len(server.peers) == 2


async def test_small_parts_that_nobody_reads_yet_are_put_together():
    async def crumbs(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            peer.h2.send_headers(event.stream_id, OK)
            for number in range(20_000):
                peer.h2.send_data(event.stream_id, b"%d" % (number % 10))
            peer.h2.send_data(event.stream_id, b"x" * 9_000, end_stream=True)

    async with asked(crumbs) as (_, client), client.stream("GET", "/") as reply:
        [stream] = connection_of(client)._streams.values()
        await until(lambda: stream.ended)
        assert len(stream.chunks) <= 20_000 // streams.SMALL + 2
        assert await reply.aread() == b"0123456789" * 2_000 + b"x" * 9_000
