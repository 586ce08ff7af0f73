"""Edges of calls: what metadata may say, whose timeout it was, answers of the wrong number, handlers that go astray."""

import asyncio
import contextlib
import logging
import ssl
import sys
from typing import Any

import anyio
import grpclib.client
import grpclib.events
import pytest
from grpclib.client import StreamUnaryMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError

import meshlib
import meshlib.grpc
from meshlib.grpc.serving.stream import status_text

from .scripted import HEAD, OK, Bytes, answering, channel, message, scripted, unary


class Handlers:
    """Methods of bytes, each a function of its stream."""

    def __init__(self, **functions: Any) -> None:
        self.functions = functions

    def __mapping__(self) -> Any:
        kinds = {"down": Cardinality.UNARY_STREAM, "up": Cardinality.STREAM_UNARY}
        return {
            f"/x.Y/{name}": Handler(f, kinds.get(name, Cardinality.UNARY_UNARY), bytes, bytes)
            for name, f in self.functions.items()
        }


def serve(**functions: Any) -> Any:
    return meshlib.grpc.serve([Handlers(**functions)], "127.0.0.1:0", codec=Bytes())


# --- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata", [{"x": "ü"}, {"X": "1"}, {"x": 1}, {"x-bin": "text"}, {"grpc-x": "1"}, [("x", "a\nb")]]
)
async def test_metadata_that_cannot_be_sent_is_an_invalid_argument(metadata):
    async with scripted(answering(lambda p, s: p.answer(s))) as (address, peers), channel(address) as each:
        for method in (unary(each), UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes)):
            with pytest.raises(meshlib.InvalidArgument, match=r"/x\.Y/Z") as caught:
                await method(b"q", metadata=metadata)
            assert isinstance(caught.value, GRPCError)
            assert caught.value.status is Status.INVALID_ARGUMENT
        assert not peers


@pytest.mark.parametrize(
    "pair", [("X-Up", "1"), ("x", "a\r\nb: c"), ("grpc-timeout", "1n"), (":path", "/evil"), ("x-bin", "!"), ("x", 3)]
)
async def test_what_a_filter_sets_is_looked_at_too(pair):
    bad = False

    @meshlib.filter
    async def adds(request, service):
        request.metadata = [*(request.metadata or ()), pair] if bad else {"x": " v ", "y-bin": b"\0"}
        return await service(request)

    async with scripted(answering(lambda p, s: p.answer(s))) as (address, peers), channel(address, adds) as each:
        await unary(each)(b"q")
        assert (peers[0].heads[1]["x"], peers[0].heads[1]["y-bin"]) == ("v", "AA")
        bad = True
        with pytest.raises(meshlib.InvalidArgument):
            await unary(each)(b"q")
        bad = False
        await unary(each)(b"q")
        assert (len(peers), peers[0].requests) == (1, [1, 3])


async def test_the_users_own_metadata_stands_for_ours_of_the_same_name():
    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    seen: list[Any] = []

    async def one(stream):
        seen.append([stream.metadata.getall(name) for name in ("traceparent", "dtab-local")])
        await stream.send_message(b"")

    async with serve(one=one) as server, channel(server.address) as each:
        with meshlib.dtab("/s => /ours"):
            await unary(each, "/x.Y/one")(b"q")
            await unary(each, "/x.Y/one")(b"q", metadata={"traceparent": trace, "dtab-local": "/s=>/theirs"})
    ours, theirs = seen
    assert [len(values) for values in ours] == [1, 1]
    assert theirs == [[trace], ["/s=>/theirs"]]


def test_a_space_at_either_end_of_a_status_message_is_encoded():
    assert status_text(" no such user: ")[0] == "%20no such user:%20"
    assert status_text(" ")[0] == "%20"
    assert status_text("a b")[0] == "a b"
    assert status_text("")[0] == ""


async def test_grpclibs_client_reads_messages_and_metadata_with_spaces_at_their_ends():
    async def one(stream):
        await stream.recv_message()
        await stream.send_initial_metadata(metadata={"x": " v "})
        raise GRPCError(Status.NOT_FOUND, " no such user: ")

    async with serve(one=one) as server:
        host, port = server.address.split(":")
        each = grpclib.client.Channel(host, int(port), codec=Bytes())
        with pytest.raises(GRPCError) as caught:
            await UnaryUnaryMethod(each, "/x.Y/one", bytes, bytes)(b"q")
        each.close()
    assert (caught.value.status, caught.value.message) == (Status.NOT_FOUND, " no such user: ")


async def test_a_call_that_fails_keeps_the_initial_metadata_and_listeners_hear_of_them():
    def step(peer, stream):
        if peer.heads[stream][":path"] == "/x.Y/Only":
            peer.headers(stream, [*HEAD, ("grpc-status", "5"), ("late", "there")], end=True)
        else:
            peer.headers(stream, [*HEAD, ("early", "here")])
            peer.headers(stream, [("grpc-status", "5"), ("late", "there")], end=True)

    heard: list[Any] = []

    async def initial(event):
        heard.append(dict(event.metadata))

    async def trailing(event):
        heard.append(dict(event.metadata))

    async with scripted(answering(step)) as (address, _), channel(address) as each:
        grpclib.events.listen(each, grpclib.events.RecvInitialMetadata, initial)
        grpclib.events.listen(each, grpclib.events.RecvTrailingMetadata, trailing)
        for path, early in (("/x.Y/Z", {"early": "here"}), ("/x.Y/Only", {})):
            heard.clear()
            stream = unary(each, path).open()
            async with stream:
                await stream.send_message(b"q", end=True)
                with pytest.raises(GRPCError):
                    await stream.recv_message()
                await stream.cancel()
            assert heard == [early, {"late": "there"}]
            assert (dict(stream.initial_metadata), dict(stream.trailing_metadata)) == (early, {"late": "there"})


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StreamUnaryMethod, UnaryStreamMethod, UnaryUnaryMethod])
@pytest.mark.parametrize("nearer", ["layer", "deadline", "call"])
async def test_the_error_of_a_late_call_blames_no_other_timeout(kind, nearer):
    async def script(peer):
        await peer.until(lambda: False)

    layers = [meshlib.timeout(0.1)] if nearer == "layer" else []
    async with scripted(script) as (address, _), channel(address, *layers) as each:
        body = [b"q"] if kind is StreamUnaryMethod else b"q"
        method = kind(each, "/x.Y/Z", bytes, bytes)
        above = meshlib.deadline(0.1) if nearer == "deadline" else contextlib.nullcontext()
        with above, pytest.raises(meshlib.DeadlineExceeded) as caught:
            await method(body, timeout=0.1 if nearer == "call" else 50)
    assert ("timeout of 50" in str(caught.value), caught.value.status) == (False, Status.DEADLINE_EXCEEDED)
    assert ("timeout of 0.1 s" in str(caught.value)) or nearer != "call"


async def test_a_timeout_that_is_no_number_is_refused():
    async with channel("127.0.0.1:1") as each:
        with pytest.raises(meshlib.InvalidArgument, match="timeout=nan"):
            await unary(each)(b"q", timeout=float("nan"))


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_second_message_to_a_call_that_takes_one_fails_it_at_once(at_once):
    async def script(peer):
        stream = await peer.request()
        peer.headers(stream, HEAD)
        peer.h2.send_data(stream, message(b"one") + (message(b"two") if at_once else b""))
        peer.flush()
        if not at_once:
            await asyncio.sleep(0.02)
            peer.h2.send_data(stream, message(b"two"))
            peer.flush()
        await peer.until(lambda: peer.resets)

    async with scripted(script) as (address, peers), channel(address) as each:
        with anyio.fail_after(10), pytest.raises(GRPCError, match="more than one message") as caught:
            await unary(each)(b"q", timeout=60)
        assert caught.value.status is Status.INTERNAL
        with anyio.fail_after(10):
            while not peers[0].resets:  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def test_a_clients_limit_bounds_its_streams_until_they_end():
    def begin(peer, stream):
        peer.headers(stream, HEAD)
        peer.h2.send_data(stream, message(b"one"))
        peer.flush()

    async with (
        scripted(answering(begin)) as (address, peers),
        channel(address, meshlib.concurrency_limit(2), meshlib.retry(attempts=1)) as each,
    ):
        down = UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes)
        async with down.open() as one, down.open() as two:
            for stream in (one, two):
                await stream.send_message(b"q", end=True)
                assert await stream.recv_message() == b"one"
            with pytest.raises(meshlib.Rejected, match="limit of 2"):
                await down(b"q", timeout=5)
            peers[0].headers(1, OK, end=True)
            assert await one.recv_message() is None
            async with down.open() as three:
                await three.send_message(b"q", end=True)
                assert await three.recv_message() == b"one"
                await three.cancel()
            await two.cancel()


# --- handlers ---------------------------------------------------------------------------------------------------------


async def test_a_status_alone_in_a_group_is_the_status(caplog):
    async def one(stream):
        async def check():
            raise GRPCError(Status.PERMISSION_DENIED, "not yours")

        async with asyncio.TaskGroup() as group:
            group.create_task(check())

    async def two(stream):
        raise ExceptionGroup("both", [GRPCError(Status.NOT_FOUND, "secret"), ValueError("secret")])

    async with serve(one=one, two=two) as server, channel(server.address) as each:
        with pytest.raises(GRPCError) as caught:
            await unary(each, "/x.Y/one")(b"q")
        assert (caught.value.status, caught.value.message) == (Status.PERMISSION_DENIED, "not yours")
        assert not caplog.records
        with pytest.raises(GRPCError) as caught:
            await unary(each, "/x.Y/two")(b"q")
        assert caught.value.status is Status.UNKNOWN
        assert "secret" not in str(caught.value)
        assert caplog.records


async def test_a_handler_that_raises_ok_without_its_answer_has_failed(caplog):
    async def one(stream):
        await stream.recv_message()
        raise GRPCError(Status.OK)

    async def two(stream):
        await stream.send_message(b"well")
        raise GRPCError(Status.OK)

    async with serve(one=one, two=two) as server, channel(server.address) as each:
        assert await unary(each, "/x.Y/two")(b"q") == b"well"
        assert not caplog.records
        with pytest.raises(GRPCError, match="raised OK without an answer") as caught:
            await unary(each, "/x.Y/one")(b"q")
        assert caught.value.status is Status.UNKNOWN
        assert "raised OK" in caplog.text


async def test_a_handler_that_goes_on_after_the_grace_period_is_no_crash(caplog):
    begun, ended = asyncio.Event(), asyncio.Event()

    async def one(stream):
        await stream.recv_message()
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_soon(ended.set)
        await stream.send_message(b"late")

    server = serve(one=one)
    server.grace = 0.05
    await server.start()
    async with channel(server.address) as each:
        call = asyncio.create_task(unary(each, "/x.Y/one")(b"q"))
        with anyio.fail_after(10):
            await begun.wait()
            await server.aclose()
            await ended.wait()
            with pytest.raises(GRPCError):
                await call
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


HEALTHS = """
import logging
from grpclib.health.check import ServiceStatus
from grpclib.health.service import OVERALL, Health
import meshlib.grpc

logging.basicConfig(format="%(message)s")
for health in (Health(), Health({OVERALL: [ServiceStatus()]})):
    server = meshlib.grpc.Server([health])
    print(server._serving._methods[b"/grpc.health.v1.Health/Check"].function.__self__ is server.health)
"""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_grpclibs_health_without_checks_leaves_ours_in_its_place(anyio_backend):
    # In a process of its own: grpclib's health brings messages of the same name as grpcio's, and older.
    done = await anyio.run_process([sys.executable, "-c", HEALTHS], check=True)
    assert done.stdout.decode() == "True\nFalse\n"
    assert done.stderr.decode().count("does not hear when the server drains") == 1


# --- connecting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_server_that_wants_a_certificate_and_gets_none_is_asked_whether_it_does(version, certificate):
    async def one(stream):
        await stream.send_message(b"")

    wants = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificate[0])
    wants.load_cert_chain(*certificate)
    wants.verify_mode = ssl.CERT_REQUIRED
    wants.maximum_version = version
    wants.set_alpn_protocols(["h2"])
    has_none = ssl.create_default_context(cafile=certificate[0])
    has_none.check_hostname = False
    has_none.set_alpn_protocols(["h2"])
    async with (
        meshlib.grpc.serve([Handlers(one=one)], "127.0.0.1:0", codec=Bytes(), ssl=wants) as server,
        channel(server.address, ssl=has_none) as each,
    ):
        with pytest.raises(GRPCError, match="want a client certificate"):
            await unary(each, "/x.Y/one")(b"q", timeout=1)
