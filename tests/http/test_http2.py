"""One HTTP/2 connection for many: what requests do to each other, which is nothing, and what servers may do to all."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import h2.config
import h2.connection
import h2.errors
import h2.events
import httpcore
import httpx
import pytest

from meshlib import retry, timeout
from meshlib.client import Liveness
from meshlib.core.env import Env
from meshlib.core.supervisor import Supervisor
from meshlib.http import http2, streams
from meshlib.http.core import core_of
from meshlib.testing import run_virtual

from .peers import OK, Peer, Server, answering, asked, client_of, listening, only, until

# httpx leaves the generators of bodies unclosed, stock or not, of which trio warns.
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


async def test_whoever_comes_first_connects_for_all():
    async with asked(answering) as (server, client), anyio.create_task_group() as group:

        async def one() -> None:
            reply = await client.get("/")
            assert (reply.http_version, reply.text) == ("HTTP/2", "ok")

        for _ in range(64):
            group.start_soon(one)
        await until(lambda: server.peers and len(server.peers[0].seen) >= 64)
        assert len(server.peers) == only(client).metrics()["pool/connects"] == 1


async def test_no_more_connections_than_streams_need():
    waiting: list[tuple[Peer, int]] = []

    async def collect(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            waiting.append((peer, event.stream_id))

    async with asked(collect, settings={"max_concurrent_streams": 5}) as (server, client):
        async with anyio.create_task_group() as group:
            for _ in range(12):
                group.start_soon(client.get, "/")
            await until(lambda: len(waiting) == 12)
            assert len(server.peers) == 3
            for peer, number in waiting:
                await peer.answer(number)
        [node] = only(client).endpoints
        assert node.load == 0


async def test_those_who_wait_for_a_connect_that_fails_fail_with_it():
    async def hang_up(peer: Peer, event: Any) -> None:
        await peer.stream.aclose()

    async with asked(hang_up, timeout(total=0.5), retry(attempts=1)) as (_, client):
        failed = 0

        async def one() -> None:
            nonlocal failed
            with pytest.raises(httpx.TransportError):
                await client.get("/")
            failed += 1

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(one)
        assert failed == 20


async def test_a_caller_that_is_cancelled_while_it_connects_leaves_that_to_the_next():
    server = Server(answering)
    gate = anyio.Event()

    async def late(stream: anyio.abc.ByteStream) -> None:
        await gate.wait()
        await server.serve(stream)

    async with listening(late) as target, client_of(target) as client, anyio.create_task_group() as group:
        scope = anyio.CancelScope()

        async def first() -> None:
            with scope:
                await client.get("/")

        replies: list[str] = []

        async def other() -> None:
            replies.append((await client.get("/")).text)

        group.start_soon(first)
        await anyio.sleep(0.05)
        for _ in range(3):
            group.start_soon(other)
        await anyio.sleep(0.05)
        scope.cancel()
        gate.set()
        await until(lambda: replies == ["ok"] * 3)


async def test_a_request_that_is_cancelled_is_reset_and_harms_nobody():
    async def answer_some(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived) and dict(event.headers)[b":path"] == b"/now":
            await peer.answer(event.stream_id)

    async with asked(answer_some) as (server, client):
        with anyio.move_on_after(0.1):
            await client.get("/never")
        assert (await client.get("/now")).text == "ok"
        [peer] = server.peers
        resets = [event for event in peer.seen if isinstance(event, h2.events.StreamReset)]
        assert [(event.stream_id, event.error_code) for event in resets] == [(1, h2.errors.ErrorCodes.CANCEL)]


async def test_a_read_timeout_is_its_own_requests_alone():
    numbers: list[int] = []

    async def hold(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            numbers.append(event.stream_id)
            if len(numbers) == 3:
                await peer.answer(numbers[0])

    async with asked(hold) as (server, client), anyio.create_task_group() as group:
        replies: list[str] = []

        async def patient() -> None:
            replies.append((await client.get("/", timeout=30)).text)

        group.start_soon(patient)
        await until(lambda: len(numbers) == 1)
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/", timeout=0.1)
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/", timeout=0.1)
        await until(lambda: replies == ["ok"])
        assert len(server.peers) == 1


async def test_bodies_left_half_read_give_their_window_back(monkeypatch):
    for module in (http2, streams):
        monkeypatch.setattr(module, "WINDOW", 1 << 17)

    async def as_much_as_may_be(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            peer.h2.send_headers(event.stream_id, OK)
            while (room := peer.h2.local_flow_control_window(event.stream_id)) > 0:
                peer.h2.send_data(event.stream_id, b"x" * min(room, 16_384))
            await peer.flush()

    async with asked(as_much_as_may_be) as (server, client):
        with anyio.fail_after(30):
            for _ in range(130):  # each leaves a window half read; that of the connection is of 100 of them
                async with client.stream("GET", "/") as reply:
                    async for _part in reply.stream:
                        break
        assert len(server.peers) == 1


async def test_goaway_lets_what_is_under_way_finish_and_sends_the_rest_elsewhere():
    numbers: list[tuple[Peer, int]] = []

    async def leave(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            numbers.append((peer, event.stream_id))
            if len(numbers) == 2:
                peer.h2.close_connection(last_stream_id=1)
                await peer.flush()
                peer.h2.state_machine.state = h2.connection.ConnectionState.SERVER_OPEN  # h2 thinks that this is all
                await anyio.sleep(0.05)
                await peer.answer(1)
            if len(numbers) == 3:
                await peer.answer(event.stream_id)

    async with asked(leave) as (server, client):
        replies: list[str] = []

        async def one() -> None:
            replies.append((await client.post("/")).text)

        async with anyio.create_task_group() as group:
            group.start_soon(one)
            await until(lambda: len(numbers) == 1)
            group.start_soon(one)
        assert replies == ["ok", "ok"]
        assert len(server.peers) == 2
        assert only(client).metrics()["retries/requeues"] == 1


async def test_a_stream_that_is_refused_goes_elsewhere_whatever_it_is():
    refused: list[int] = []

    async def refuse(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            if not refused:
                refused.append(event.stream_id)
                peer.h2.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
            else:
                await peer.answer(event.stream_id)

    async with asked(refuse) as (_, client):
        assert (await client.post("/")).text == "ok"


@pytest.mark.parametrize("code", [h2.errors.ErrorCodes.INTERNAL_ERROR, 999])
async def test_a_stream_that_is_reset_is_an_error_of_its_own(code):
    async def break_off(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            await peer.answer(event.stream_id, b"half", end=False)
            peer.h2.reset_stream(event.stream_id, code)

    async with asked(break_off) as (server, client):
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError, match="reset the stream"):
                await client.post("/")
        assert len(server.peers) == 1


async def test_an_answer_before_the_body_was_sent_is_an_answer():
    async def hasty(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            await peer.answer(event.stream_id)
            peer.h2.reset_stream(event.stream_id, h2.errors.ErrorCodes.NO_ERROR)

    async with asked(hasty) as (_, client):
        assert (await client.post("/", content=b"x" * 1_000_000)).text == "ok"
        assert (await client.post("/", content=b"x" * 1_000_000)).text == "ok"


async def test_a_body_waits_for_the_window():
    received = 0

    async def slowly(peer: Peer, event: Any) -> None:
        nonlocal received
        if isinstance(event, h2.events.DataReceived):
            received += len(event.data)
            peer.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            await peer.answer(event.stream_id, b"%d" % received)

    async with asked(slowly) as (_, client):
        assert (await client.post("/", content=b"x" * 300_000)).text == "300000"

    async def never(peer: Peer, event: Any) -> None:
        pass

    async with asked(never) as (_, client):
        with pytest.raises(httpx.WriteTimeout):
            await client.post("/", content=b"x" * 300_000, timeout=httpx.Timeout(5, write=0.1))


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 100, b"\xff" * 100, b""])
async def test_a_server_that_speaks_something_else_is_no_endpoint(data):
    async def serve(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            await stream.receive()
            if data:
                await stream.send(data)

    async with listening(serve) as target, client_of(target, timeout(total=0.3)) as client:
        with pytest.raises((httpx.ConnectError, httpx.ConnectTimeout), match="no HTTP/2"):
            await client.get("/")


async def test_nonsense_later_on_ends_all_that_is_under_way_and_nothing_else():
    async def nonsense(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            await peer.stream.send(b"\0\0\x04\x08\0\0\0\0\x07\0\0\0\0")  # a window update of 0 on a stream nobody has

    async with asked(nonsense, retry(attempts=1)) as (_, client):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/")
        [node] = only(client).endpoints
        assert node.load == 0


async def test_a_status_that_is_none_is_an_error():
    async def odd(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            peer.h2.send_headers(event.stream_id, [(b":status", b"fine")], end_stream=True)

    async with asked(odd, retry(attempts=1)) as (_, client):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/")


class Talker:
    """A stream on which pings come, and nothing goes."""

    def __init__(self) -> None:
        self.peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.peer.initiate_connection()
        self.closed = False

    async def read(self, most: int, timeout: float | None) -> bytes:
        await anyio.lowlevel.checkpoint()
        for _ in range(1_000):
            self.peer.ping(b"and more")
        return self.peer.data_to_send()

    async def write(self, data: bytes, timeout: float | None) -> None:
        await anyio.sleep_forever()

    async def aclose(self) -> None:
        self.closed = True


async def test_a_server_that_talks_and_does_not_listen_is_left(monkeypatch):
    monkeypatch.setattr(http2, "DEAF", 100_000)
    stream, supervisor = Talker(), Supervisor()
    connection = http2.Http2Connection(core_of("httpx"), stream, Env(supervisor=supervisor), None)
    await connection.open(10.0)
    request = httpcore.Request("GET", "http://users/", headers=[("host", "users")])
    with anyio.fail_after(30), pytest.raises(httpcore.RemoteProtocolError, match="does not listen"):
        await connection.handle_async_request(request)
    await connection.aclose()
    assert stream.closed
    assert supervisor.jobs == 0


async def test_a_server_that_is_gone_without_a_word_is_found_out():
    async def silent(peer: Peer, event: Any) -> None:
        if isinstance(event, h2.events.PingReceived):
            await anyio.sleep_forever()

    async with asked(silent, Liveness(0.05, 0.05)) as (_, client):
        with pytest.raises(httpx.ReadError, match="ping"):
            await client.post("/", timeout=30)


class Faller(Talker):
    """A stream on which a server greets, says something a moment later, and nothing more."""

    def __init__(self, last_word: float) -> None:
        super().__init__()
        self.said = [(0.0, self.peer.data_to_send())]
        self.peer.ping(b"and more")
        self.said.append((last_word, self.peer.data_to_send()))

    async def read(self, most: int, timeout: float | None) -> bytes:
        if not self.said:
            await anyio.sleep_forever()
        wait, data = self.said.pop(0)
        await anyio.sleep(wait)
        return data

    async def write(self, data: bytes, timeout: float | None) -> None:
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("last_word", [0.1, 0.9, 4.9])
def test_it_is_found_out_within_ten_seconds(last_word):
    async def main() -> None:
        supervisor = Supervisor()
        liveness = Liveness(5.0, 4.0)
        connection = http2.Http2Connection(core_of("httpx"), Faller(last_word), Env(supervisor=supervisor), liveness)
        await connection.open(10.0)
        request = httpcore.Request("GET", "http://users/", headers=[("host", "users")])
        with pytest.raises(httpcore.ReadError, match="no answer to a ping"):
            await connection.handle_async_request(request)
        assert 9 <= anyio.current_time() - last_word <= 10
        await connection.aclose()

    run_virtual(main)
