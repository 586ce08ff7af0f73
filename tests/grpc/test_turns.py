"""A message is sent as a whole: several tasks take turns on a stream, and one cut short takes the stream with it."""

import asyncio
import contextlib
import logging
import sys
from typing import Any

import anyio
import pytest
from grpclib.client import StreamStreamMethod, StreamUnaryMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.settings import SettingCodes

import meshlib.grpc

from .scripted import Bytes, answering, channel, message, scripted

SIZE = 300_000
"""Bytes of a message that needs many frames, and more than one window."""


class Handlers:
    """Methods of bytes, each a function of its stream."""

    def __init__(self, **functions: Any) -> None:
        self.functions = functions

    def __mapping__(self) -> Any:
        kinds = {"down": Cardinality.UNARY_STREAM, "up": Cardinality.STREAM_UNARY, "one": Cardinality.UNARY_UNARY}
        return {f"/x.Y/{name}": Handler(f, kinds[name], bytes, bytes) for name, f in self.functions.items()}


def serve(**functions: Any) -> Any:
    return meshlib.grpc.serve([Handlers(**functions)], "127.0.0.1:0", codec=Bytes())


def whole(data: bytes) -> bool:
    return len(data) == SIZE and len(set(data)) == 1


@contextlib.asynccontextmanager
async def left_open(method: Any) -> Any:
    """A call whose end is nobody's business."""
    with contextlib.suppress(GRPCError):
        async with method.open() as stream:
            yield stream


async def broadcast(stream: Any) -> None:
    """Two tasks send on one stream."""

    async def one(letter: bytes) -> None:
        for _ in range(4):
            await stream.send_message(letter * SIZE)

    await asyncio.gather(one(b"A"), one(b"B"))


async def test_tasks_of_a_handler_that_send_on_one_stream_take_turns():
    async def down(stream):
        await stream.recv_message()
        await broadcast(stream)

    async with serve(down=down) as server, channel(server.address) as each:
        with anyio.fail_after(30):
            messages = await UnaryStreamMethod(each, "/x.Y/down", bytes, bytes)(b"q")
    assert [whole(each) for each in messages] == [True] * 8
    assert sum(each[:1] == b"A" for each in messages) == 4


async def test_tasks_of_a_caller_that_send_on_one_stream_take_turns():
    async def up(stream):
        await stream.send_message(repr([whole(each) async for each in stream]).encode())

    async with serve(up=up) as server, channel(server.address) as each:
        async with StreamUnaryMethod(each, "/x.Y/up", bytes, bytes).open() as stream:
            with anyio.fail_after(30):
                await broadcast(stream)  # whose first ones open it as well, once
                await stream.end()
                assert await stream.recv_message() == repr([True] * 8).encode()
        assert len(server.connections) == 1


async def test_a_message_that_waits_for_its_turn_may_be_given_up_and_nothing_else_is():
    got: list[bytes] = []

    async def up(stream):
        await go.wait()
        got.extend([data async for data in stream])
        await stream.send_message(b"done")

    go = asyncio.Event()
    async with (
        serve(up=up) as server,
        channel(server.address) as each,
        StreamUnaryMethod(each, "/x.Y/up", bytes, bytes).open() as stream,
    ):
        await stream.send_message(b"first")
        big = asyncio.create_task(stream.send_message(b"A" * 3_000_000))
        small = asyncio.create_task(stream.send_message(b"never"))
        await asyncio.sleep(0.05)
        assert not big.done()
        small.cancel()
        await asyncio.wait([small])
        go.set()
        with anyio.fail_after(30):
            await big
            await stream.send_message(b"last", end=True)
            assert await stream.recv_message() == b"done"
    assert [(len(data), data[:1]) for data in got] == [(5, b"f"), (3_000_000, b"A"), (4, b"l")]


async def test_a_handlers_message_that_is_cut_short_ends_its_stream(caplog):
    told: list[str] = []

    async def down(stream):
        await stream.recv_message()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await stream.send_message(b"A" * 8_000_000)
        with pytest.raises(StreamTerminatedError) as caught:
            await stream.send_message(b"B" * 8_000_000)
        told.append(str(caught.value))

    caplog.set_level(logging.ERROR)
    options = {"codec": Bytes(), "max_message": 10_000_000}
    async with (
        serve(down=down) as server,
        meshlib.grpc.Channel(server.address, **options) as each,
        left_open(UnaryStreamMethod(each, "/x.Y/down", bytes, bytes)) as stream,
    ):
        await stream.send_message(b"q", end=True)
        await stream.recv_initial_metadata()
        with anyio.fail_after(10):
            while not told:  # noqa: ASYNC110 - what comes is not read
                await anyio.sleep(0.01)
            with pytest.raises(GRPCError) as caught:
                await stream.recv_message()
    assert caught.value.status is Status.INTERNAL
    assert "reset the stream" in str(caught.value)
    assert told == ["the sending of a message was cut short"]
    assert not caplog.records


async def test_a_callers_message_that_is_cut_short_ends_its_stream():
    got: list[Any] = []

    async def up(stream):
        await go.wait()
        try:
            got.extend([data async for data in stream])
        except BaseException:
            got.append("broken off")
            raise

    go = asyncio.Event()
    async with serve(up=up) as server, channel(server.address) as each:
        async with left_open(StreamUnaryMethod(each, "/x.Y/up", bytes, bytes)) as stream:
            await stream.send_message(b"first")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await stream.send_message(b"A" * 3_000_000)
            go.set()
            with pytest.raises(GRPCError) as caught:
                await stream.send_message(b"B" * 3_000_000)
        assert caught.value.status is Status.CANCELLED
        assert "one of its messages was cut short" in str(caught.value)
        assert [node.load for node in each.endpoints] == [0]
    assert not any(isinstance(data, bytes) and b"B" in data for data in got)


async def test_a_handler_that_is_done_waits_for_no_sender():
    ended: list[str] = []

    async def down(stream):
        await stream.recv_message()

        async def send():
            try:
                await stream.send_message(b"A" * 8_000_000)
            except StreamTerminatedError:
                ended.append("told")

        tasks.add(asyncio.create_task(send()))
        await asyncio.sleep(0.05)
        raise GRPCError(Status.ABORTED, "enough")

    tasks: set[Any] = set()
    async with (
        serve(down=down) as server,
        channel(server.address) as each,
        UnaryStreamMethod(each, "/x.Y/down", bytes, bytes).open() as stream,
    ):
        await stream.send_message(b"q", end=True)
        await stream.recv_initial_metadata()
        with anyio.fail_after(10):
            while not ended:  # noqa: ASYNC110 - nobody reads, and the sender is told all the same
                await anyio.sleep(0.01)
        await stream.cancel()


async def test_a_first_message_that_was_given_up_is_sent_by_no_replay():
    seen: list[bytes] = []

    async def script(peer):
        most = {SettingCodes.MAX_CONCURRENT_STREAMS: 5}
        if peer is peers[0]:
            await given_up.wait()
            peer.h2.update_settings(most)
            peer.flush()
            stream = await peer.request()
            await peer.until(lambda: peer.data.get(stream))
            seen.append(peer.data[stream])
            peer.goaway(0)
            return
        peer.h2.update_settings(most)
        peer.flush()
        stream = await peer.request()
        await peer.until(lambda: stream in peer.ended)
        peer.answer(stream, peer.data[stream])

    peers: list[Any] = []
    given_up = asyncio.Event()
    none = {SettingCodes.MAX_CONCURRENT_STREAMS: 0}
    async with (
        scripted(script, settings=none, peers=peers) as (address, _),
        channel(address, meshlib.grpc.connections(most=1)) as each,
        StreamUnaryMethod(each, "/x.Y/Z", bytes, bytes).open() as stream,
    ):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await stream.send_message(b"first")
        given_up.set()
        with anyio.fail_after(10):
            await stream.send_message(b"second", end=True)
            assert await stream.recv_message() == message(b"second")
    assert seen == [message(b"second")]


async def test_a_message_that_a_dying_stream_did_not_take_is_sent_on_the_next_once():
    """The stream is opened again by whoever reads; the message that was on its way goes out after what was kept."""

    async def script(peer):
        stream = await peer.request()
        if peer is peers[0]:
            await peer.until(lambda: len(peer.data.get(stream, b"")) > 60_000)
            peer.goaway(0)
            return
        await peer.until(lambda: stream in peer.ended)
        seen.append(peer.data[stream])
        peer.answer(stream, b"seen")

    peers: list[Any] = []
    seen: list[bytes] = []
    async with (
        scripted(script, peers=peers) as (address, _),
        channel(address) as each,
        StreamStreamMethod(each, "/x.Y/Z", bytes, bytes).open() as stream,
    ):
        await stream.send_message(b"one")
        reader = asyncio.create_task(stream.recv_message())
        with anyio.fail_after(10):
            await stream.send_message(b"B" * 1_000_000, end=True)
            assert await reader == b"seen"
            assert await stream.recv_message() is None
    assert seen == [message(b"one") + message(b"B" * 1_000_000)]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio has no eager tasks")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_calls_that_are_over_before_their_task_waits_leave_nothing(anyio_backend):
    async def one(stream):
        raise GRPCError(Status.NOT_FOUND, "here is nothing")

    asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - from 3.12
    async with serve(one=one) as server, channel(server.address) as each:
        for _ in range(310):  # more than a connection may have open
            with pytest.raises(GRPCError) as caught:
                await UnaryUnaryMethod(each, "/x.Y/one", bytes, bytes)(b"q", timeout=5)
            assert caught.value.status is Status.NOT_FOUND
        assert [(len(connection.calls), connection.busy) for connection in server.connections] == [(0, 0)]


async def test_a_call_is_in_the_books_before_its_task_runs(monkeypatch):
    """As with eager tasks, on any Python: the task runs to its end while it is being made."""
    from meshlib.core.supervisor import Supervisor

    async def one(stream):
        raise GRPCError(Status.NOT_FOUND, "here is nothing")

    def launch(self, job, function, args, context):
        if type(job).__name__ != "ServerCall":
            launched(self, job, function, args, context)
            return
        with pytest.raises(StopIteration):
            context.run(function(*args).send, None)

    launched = Supervisor.launch
    async with serve(one=one) as server, channel(server.address) as each:
        monkeypatch.setattr(Supervisor, "launch", launch)
        for _ in range(3):
            with pytest.raises(GRPCError) as caught:
                await UnaryUnaryMethod(each, "/x.Y/one", bytes, bytes)(b"q", timeout=5)
            assert caught.value.status is Status.NOT_FOUND
        assert [(len(connection.calls), connection.busy) for connection in server.connections] == [(0, 0)]


async def test_a_field_without_a_name_is_no_metadata_and_hurts_nobody():
    def step(peer, stream):
        if peer.heads[stream][":path"] == "/x.Y/odd":
            peer.raw_headers(stream, [(":status", "200"), ("content-type", "application/grpc"), ("", "x")])
            peer.raw_data(stream, message(b"m"))
            trailers = [("grpc-status", "5"), ("", "x"), ("name", "value")]
            peer.raw_headers(stream, trailers, "END_HEADERS", "END_STREAM")
        else:
            peer.answer(stream, b"well")

    async with scripted(answering(step)) as (address, peers), channel(address) as each:
        for kind in (UnaryStreamMethod, UnaryUnaryMethod):
            with pytest.raises(GRPCError) as caught:
                await kind(each, "/x.Y/odd", bytes, bytes)(b"q", timeout=5)
            assert caught.value.status is Status.NOT_FOUND
            assert dict(caught.value.trailing_metadata) == {"name": "value"}
        assert await UnaryUnaryMethod(each, "/x.Y/Z", bytes, bytes)(b"q", timeout=5) == b"well"
        assert [node.load for node in each.endpoints] == [0]
    assert len(peers) == 1


async def test_what_watches_the_end_of_a_stream_and_fails_costs_nobody_anything(caplog, monkeypatch):
    from meshlib.grpc.calling import exchange

    def to_mesh(*args, **kwargs):
        if args[0] is Status.NOT_FOUND:
            raise RuntimeError("cannot be read")
        return made(*args, **kwargs)

    made = exchange.to_mesh
    monkeypatch.setattr(exchange, "to_mesh", to_mesh)

    def step(peer, stream):
        peer.answer(stream, b"m", [("grpc-status", "5" if peer.heads[stream][":path"] == "/x.Y/odd" else "0")])

    def watcher(error):
        raise KeyError("a watcher of the user's")

    async with scripted(answering(step)) as (address, peers), channel(address) as each:
        with pytest.raises(GRPCError) as caught:
            await UnaryStreamMethod(each, "/x.Y/odd", bytes, bytes)(b"q", timeout=5)
        assert caught.value.status is Status.INTERNAL
        assert "RuntimeError: cannot be read" in str(caught.value)
        async with UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes).open() as stream:
            await stream.send_message(b"q", end=True)
            await stream.recv_initial_metadata()
            stream._exchange._watchers.insert(0, watcher)
            stream._exchange.over or await stream.recv_message()
        assert [node.load for node in each.endpoints] == [0]
        assert await UnaryUnaryMethod(each, "/x.Y/Z", bytes, bytes)(b"q", timeout=5) == b"m"
    assert len(peers) == 1
