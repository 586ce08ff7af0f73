"""What a server may send, and what becomes of it: a stream's trouble is that stream's, a connection's that one's."""

import gzip
import random

import anyio
import pytest
from grpclib.client import UnaryStreamMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

import meshlib
from meshlib import failfast, retry
from meshlib.client import Transport

from .scripted import HEAD, OK, answering, channel, message, scripted, unary


async def fails(address, *layers, timeout=None, **options):
    async with channel(address, *layers, **options) as each:
        with pytest.raises(GRPCError) as caught:
            await unary(each)(b"hello", timeout=timeout)
        assert not any(node.load for node in each.endpoints)
        return caught.value


def headers(*pairs):
    return lambda peer, stream: peer.headers(stream, list(pairs), end=True)


# --- statuses and trailers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("http", "status"),
    [
        ("400", Status.INTERNAL),
        ("401", Status.UNAUTHENTICATED),
        ("403", Status.PERMISSION_DENIED),
        ("404", Status.UNIMPLEMENTED),
        ("429", Status.UNAVAILABLE),
        ("502", Status.UNAVAILABLE),
        ("503", Status.UNAVAILABLE),
        ("504", Status.UNAVAILABLE),
        ("500", Status.UNKNOWN),
        ("302", Status.UNKNOWN),
    ],
)
async def test_an_http_status_is_a_grpc_status(http, status):
    async with scripted(answering(headers((":status", http), ("content-type", "text/html")))) as (address, _):
        error = await fails(address)
    assert error.status is status
    assert http in error.message


async def test_a_grpc_status_counts_more_than_an_http_status():
    step = headers((":status", "503"), ("content-type", "application/grpc"), ("grpc-status", "7"))
    async with scripted(answering(step)) as (address, _):
        assert (await fails(address)).status is Status.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ([(":status", "200")], "Missing content-type"),
        ([(":status", "200"), ("content-type", "text/html")], "Invalid content-type"),
        ([(":status", "200"), ("content-type", "application/grpc+json")], "Invalid content-type"),
        ([("content-type", "application/grpc")], "HTTP status None"),
    ],
)
async def test_what_is_no_grpc_is_said_to_be_none(head, text):
    async with scripted(answering(lambda p, s: p.raw_headers(s, head, "END_HEADERS", "END_STREAM"))) as (address, _):
        error = await fails(address)
    assert error.status is Status.UNKNOWN
    assert text in error.message


@pytest.mark.parametrize("content_type", ["application/grpc+proto", "application/grpc;charset=utf-8"])
async def test_a_content_type_may_say_more(content_type):
    head = [(":status", "200"), ("content-type", content_type)]
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well", head=head))) as (address, _),
        channel(address) as each,
    ):
        assert await unary(each)(b"x") == b"well"


@pytest.mark.parametrize(
    ("trailers", "status", "text"),
    [
        ([("x", "y")], Status.UNKNOWN, "without a status"),
        ([("grpc-status", "99")], Status.UNKNOWN, "99"),
        ([("grpc-status", "-1")], Status.UNKNOWN, "-1"),
        ([("grpc-status", "five")], Status.UNKNOWN, "five"),
        ([("grpc-status", "5"), ("grpc-message", "%zz%e2%98")], Status.NOT_FOUND, "%zz"),
        ([("grpc-status", "5"), ("grpc-status-details-bin", "!!!")], Status.NOT_FOUND, "NOT_FOUND"),
        ([("grpc-status", "5"), ("grpc-status-details-bin", "AAAA")], Status.NOT_FOUND, "NOT_FOUND"),
        ([("grpc-status", "14"), ("grpc-retry-pushback-ms", "soon")], Status.UNAVAILABLE, "UNAVAILABLE"),
        ([("grpc-status", "5"), ("bad-bin", "???"), ("good-bin", "aGk,aGk")], Status.NOT_FOUND, "NOT_FOUND"),
    ],
)
async def test_odd_trailers(trailers, status, text):
    async with scripted(answering(lambda p, s: p.answer(s, b"", trailers))) as (address, _):
        error = await fails(address)
    assert error.status is status
    assert text in str(error)


async def test_trailers_only():
    step = headers(*HEAD, ("grpc-status", "9"), ("grpc-message", "not%20now"), ("x-why", "because"))
    async with scripted(answering(step)) as (address, _), channel(address) as each, unary(each).open() as stream:
        await stream.send_message(b"x", end=True)
        with pytest.raises(GRPCError) as caught:
            await stream.recv_message()
        assert stream.trailing_metadata["x-why"] == "because"
    assert (caught.value.status, caught.value.message) == (Status.FAILED_PRECONDITION, "not now")
    assert caught.value.trailing_metadata["x-why"] == "because"


# --- messages ---------------------------------------------------------------------------------------------------------


def with_body(*chunks, trailers=OK, more=()):
    def step(peer, stream):
        peer.headers(stream, [*HEAD, *more])
        for chunk in chunks:
            peer.h2.send_data(stream, chunk)
        peer.headers(stream, trailers, end=True)

    return step


GZIP = (("grpc-encoding", "gzip"),)


@pytest.mark.parametrize(
    ("chunks", "more", "text"),
    [
        ([], (), "sent no message"),
        ([b"\0\0\0"], (), "middle of a message"),
        ([b"\0\0\0\0\x09hello"], (), "middle of a message"),
        ([message(b"one"), message(b"two")], (), "more than one"),
        ([b"\7\0\0\0\1x"], (), "flag"),
        ([message(gzip.compress(b"x"), 1)], (), "grpc-encoding"),
        ([message(b"not gzip", 1)], GZIP, "gzip"),
        ([message(gzip.compress(b"x")[:-3], 1)], GZIP, "gzip"),
        ([message(b"x", 1)], (("grpc-encoding", "snappy"),), "grpc-encoding"),
        ([message(b"bad")], (), "no message at all"),
    ],
)
async def test_malformed_messages(chunks, more, text):
    async with scripted(answering(with_body(*chunks, more=more))) as (address, _):
        error = await fails(address)
        assert error.status is Status.INTERNAL
        assert text in error.message
        async with channel(address) as each:
            with pytest.raises(GRPCError) as caught:  # noqa: PT012 - the call as a stub makes it
                replies = await UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes)(b"x")
                assert replies == [b"one", b"two"] or not chunks  # of a stream, no messages or two are as good as one
                raise GRPCError(Status.INTERNAL)
            assert caught.value.status is Status.INTERNAL
            assert not any(node.load for node in each.endpoints)


async def test_a_message_may_come_byte_by_byte():
    body = message(b"slowly")
    async with (
        scripted(answering(with_body(*(body[i : i + 1] for i in range(len(body)))))) as (address, _),
        channel(address) as each,
    ):
        assert await unary(each)(b"x") == b"slowly"


async def test_a_huge_length_is_refused_before_its_bytes_come():
    def step(peer, stream):
        peer.headers(stream, HEAD)
        peer.h2.send_data(stream, b"\0\xff\xff\xff\xff" + b"x" * 100)
        peer.flush()

    async with scripted(answering(step)) as (address, peers), channel(address) as each:
        with pytest.raises(GRPCError) as caught:
            await unary(each)(b"x")
        with anyio.fail_after(5):
            while not peers[0].resets:  # noqa: ASYNC110 - the other side tells nobody
                await anyio.sleep(0.001)
    assert caught.value.status is Status.RESOURCE_EXHAUSTED
    assert "4294967295" in caught.value.message
    assert "4194304" in caught.value.message
    assert peers[0].resets == [(1, ErrorCodes.CANCEL)]


async def test_a_small_limit_of_ones_own():
    async with scripted(answering(with_body(message(b"x" * 101)))) as (address, _):
        error = await fails(address, max_message=100)
    assert error.status is Status.RESOURCE_EXHAUSTED
    assert "101 bytes" in error.message


async def test_a_bomb_is_not_unpacked():
    bomb = message(gzip.compress(bytes(20_000_000)), 1)
    chunks = [bomb[i : i + 16000] for i in range(0, len(bomb), 16000)]
    async with scripted(answering(with_body(*chunks, more=GZIP))) as (address, _):
        error = await fails(address)
    assert error.status is Status.RESOURCE_EXHAUSTED
    assert "uncompressed" in error.message


async def test_a_message_larger_than_both_windows():
    size = 6_000_000

    async def script(peer):
        stream = await peer.request()
        peer.headers(stream, HEAD)
        body = message(bytes(size))
        while body:
            room = min(peer.h2.local_flow_control_window(stream), 16384)
            if not room:
                await peer.pump()
                continue
            peer.h2.send_data(stream, body[:room])
            peer.flush()
            body = body[room:]
        peer.headers(stream, OK, end=True)

    async with scripted(script) as (address, _), channel(address, max_message=size) as each:
        assert await unary(each)(b"x") == bytes(size)


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ErrorCodes.NO_ERROR, Status.INTERNAL),
        (ErrorCodes.INTERNAL_ERROR, Status.INTERNAL),
        (ErrorCodes.CANCEL, Status.CANCELLED),
        (ErrorCodes.ENHANCE_YOUR_CALM, Status.RESOURCE_EXHAUSTED),
        (ErrorCodes.INADEQUATE_SECURITY, Status.PERMISSION_DENIED),
        (0xDEAD, Status.INTERNAL),
    ],
)
async def test_a_reset_stream(code, status):
    async with scripted(answering(lambda p, s: p.reset(s, code))) as (address, _):
        error = await fails(address)
    assert error.status is status
    assert "reset" in error.message


async def test_a_refused_stream_goes_again():
    async def script(peer):
        peer.reset(await peer.request(1), ErrorCodes.REFUSED_STREAM)
        peer.answer(await peer.request(2), b"now")

    async with scripted(script) as (address, peers), channel(address) as each:
        assert await unary(each)(b"x") == b"now"
    assert peers[0].heads[3]["grpc-previous-rpc-attempts"] == "1"


async def test_a_server_that_refuses_all_is_given_up_in_the_end():
    async with scripted(answering(lambda p, s: p.reset(s, ErrorCodes.REFUSED_STREAM))) as (address, _):
        error = await fails(address, meshlib.retry_budget(0, min_per_second=0.5), timeout=5)
    assert isinstance(error, meshlib.Rejected)
    assert error.status is Status.UNAVAILABLE
    assert "refused it" in error.verdict


async def test_a_reset_after_the_end_changes_nothing():
    def step(peer, stream):
        peer.answer(stream, b"done")
        peer.reset(stream, ErrorCodes.NO_ERROR)

    async with scripted(answering(step)) as (address, _), channel(address) as each:
        for _ in range(3):
            assert await unary(each)(b"x") == b"done"


async def test_an_answer_before_the_request_was_sent_ends_it():
    async def script(peer):
        stream = await peer.request()
        peer.headers(stream, [*HEAD, ("grpc-status", "8")], end=True)
        await peer.until(lambda: peer.resets)

    # The window is smaller than the message, so that most of it is still here.
    async with (
        scripted(script, settings={SettingCodes.INITIAL_WINDOW_SIZE: 1000}) as (address, peers),
        channel(address) as each,
    ):
        with pytest.raises(GRPCError) as caught:
            await unary(each)(bytes(500_000))
    assert caught.value.status is Status.RESOURCE_EXHAUSTED
    assert peers[0].resets


# --- connections ------------------------------------------------------------------------------------------------------


async def test_goaway_lets_those_finish_that_the_server_will_finish_and_sends_the_others_elsewhere():
    async def script(peer):
        if len(peers) == 1:
            await peer.request(3)
            peer.goaway(3)
            await anyio.sleep(0.05)
            for stream in (1, 3):
                peer.answer(stream, b"old")
        else:
            n = 0
            while True:
                n += 1
                peer.answer(await peer.request(n), b"new")

    async with scripted(script) as (address, peers), channel(address) as each:
        replies = {}

        async def call(name):
            replies[name] = await unary(each)(name)

        async with anyio.create_task_group() as group:
            for name in (b"1", b"2", b"3"):
                group.start_soon(call, name)
        assert replies == {b"1": b"old", b"2": b"old", b"3": b"new"}
        assert await unary(each)(b"4") == b"new"
        assert each.metrics()["grpc/drained"] == 1
    assert len(peers) == 2


async def test_a_clients_stream_that_nobody_has_looked_at_is_opened_elsewhere():
    async def script(peer):
        stream = await peer.request()
        if len(peers) == 1:
            peer.goaway(0)
        else:
            await peer.until(lambda: stream in peer.ended)
            peer.answer(stream, peer.data[stream])

    from grpclib.client import StreamUnaryMethod

    async with scripted(script) as (address, peers), channel(address) as each:
        reply = await StreamUnaryMethod(each, "/x.Y/Z", bytes, bytes)([b"one", b"two"])
    assert reply == message(b"one") + message(b"two")
    assert len(peers) == 2


async def test_two_goaways_as_graceful_servers_send_them():
    async def script(peer):
        if len(peers) == 1:
            first = await peer.request(1)
            peer.goaway(2**31 - 1)
            await anyio.sleep(0.02)
            peer.goaway(first)
            peer.answer(first, b"old")
        else:
            peer.answer(await peer.request(1), b"new")

    async with scripted(script) as (address, peers), channel(address) as each:
        assert await unary(each)(b"x") == b"old"
        assert await unary(each)(b"x") == b"new"
    assert len(peers) == 2


async def test_a_connection_that_ends_under_a_call():
    async def script(peer):
        await peer.request()
        peer.writer.transport.abort()

    async with scripted(script) as (address, _):
        error = await fails(address)
    assert isinstance(error, meshlib.ConnectionLost)
    assert error.status is Status.UNAVAILABLE
    assert address in str(error)


async def test_a_connection_that_ends_under_a_stream():
    async def script(peer):
        stream = await peer.request()
        peer.headers(stream, HEAD)
        peer.h2.send_data(stream, message(b"one"))
        peer.flush()
        await anyio.sleep(0.02)
        peer.writer.transport.abort()

    async with scripted(script) as (address, _), channel(address) as each:
        got = []
        with pytest.raises(meshlib.ConnectionLost) as caught:  # noqa: PT012 - the call as a stub makes it
            async with UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes).open() as stream:
                await stream.send_message(b"x", end=True)
                async for item in stream:
                    got.append(item)
        assert got == [b"one"]
        assert caught.value.status is Status.UNAVAILABLE
        assert address in str(caught.value)
        assert not any(node.load for node in each.endpoints)


async def test_an_endpoint_whose_streams_break_off_is_left_alone():
    async def script(peer):
        stream = await peer.request()
        peer.headers(stream, HEAD)
        await anyio.sleep(0.005)
        peer.reset(stream, ErrorCodes.INTERNAL_ERROR)

    async with scripted(script) as (address, _), channel(address, meshlib.failure_accrual(failures=1)) as each:
        with pytest.raises(GRPCError):
            await UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes)(b"x")
        assert each.endpoints[0].status is meshlib.Status.BUSY
        assert "reset" in each.endpoints[0].health.reason


def noise(seed):
    rng = random.Random(seed)
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 300))
    if kind == 1:  # a frame of any kind, with anything in it
        body = rng.randbytes(rng.randrange(64))
        head = bytes((rng.randrange(12), rng.randrange(256))) + rng.randrange(8).to_bytes(4)
        return len(body).to_bytes(3) + head + body
    if kind == 2:  # a frame that is too large
        return b"\xff\xff\xff\0\0\0\0\0\1"
    if kind == 3:  # a push promise
        return b"\0\0\4\5\4\0\0\0\1\0\0\0\2"
    if kind == 4:  # a window that overflows
        return b"\0\0\4\x08\0\0\0\0\0\x7f\xff\xff\xff" * 2
    return b"HTTP/1.1 400 Bad Request\r\n\r\n"


@pytest.mark.parametrize("seed", range(12))
async def test_noise_ends_that_connection_with_a_clear_error(seed):
    async def script(peer):
        stream = await peer.request()
        if len(peers) == 1:
            peer.raw(noise(seed))
            await anyio.sleep(0.02)
            peer.writer.close()
        else:
            peer.answer(stream, b"fine")

    async with scripted(script) as (address, peers), channel(address, retry(attempts=1)) as each:
        with pytest.raises(GRPCError) as caught:
            await unary(each)(b"x", timeout=5)
        assert caught.value.status in (Status.UNAVAILABLE, Status.INTERNAL, Status.UNKNOWN, Status.CANCELLED)
        assert await unary(each)(b"x", timeout=5) == b"fine"


@pytest.mark.parametrize(
    "hello", [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", b"\x15\x03\x01\0\2\2\x46", b""]
)
async def test_a_server_of_another_kind_is_told_from_a_grpc_server(hello):
    async def script(peer):
        if hello:
            peer.raw(hello)
            await anyio.sleep(0.02)
        peer.writer.close()

    async with scripted(script, hello=False) as (address, _):
        error = await fails(address, timeout=0.3)
    assert "is it a gRPC server" in str(error)


async def test_a_server_that_says_nothing_is_no_server():
    async with scripted(lambda peer: anyio.sleep(30), hello=False) as (address, _):
        error = await fails(address, failfast(alone=(5, 5)), Transport(0.05), timeout=0.3)
    assert "no HTTP/2 SETTINGS came within 0.05 s" in str(error)


@pytest.mark.parametrize("where", ["headers", "trailers"])
async def test_metadata_of_many_kilobytes_fails_its_call_alone(where):
    long = [("x", "y" * 20_000)]

    def step(peer, stream):
        if peer.heads[stream][":path"] == "/x.Y/Z":
            peer.answer(stream, b"fine")
        elif where == "headers":
            peer.headers(stream, [*HEAD, *long])
        else:
            peer.answer(stream, b"fine", [*OK, *long])

    async with scripted(answering(step)) as (address, peers), channel(address) as each:
        for _ in range(9):  # a limit of ours: breakers and throttle have nothing against the server
            with pytest.raises(meshlib.RemoteError, match="more than the 16384 that are allowed") as caught:
                await unary(each, "/x.Y/Long")(b"x", timeout=5)
        assert caught.value.status is Status.RESOURCE_EXHAUSTED
        assert each.endpoints[0].status is meshlib.Status.OPEN
        assert await unary(each)(b"x", timeout=5) == b"fine"
    assert len(peers) == 1


async def test_metadata_beyond_all_bounds_ends_the_connection():
    async def script(peer):
        stream = await peer.request()
        if len(peers) == 1:
            peer.headers(stream, [*HEAD, ("x", "y" * 70_000)])
        else:
            peer.answer(stream, b"fine")

    async with scripted(script) as (address, peers), channel(address, retry(attempts=1)) as each:
        with pytest.raises(meshlib.ConnectionLost, match="protocol"):
            await unary(each)(b"x", timeout=5)
        assert await unary(each)(b"x", timeout=5) == b"fine"
