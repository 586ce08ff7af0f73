"""What a hostile or broken client may send: each costs it its call, or its connection, and nobody else anything."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hpack import Encoder
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, PingFrame, PriorityFrame, SettingsFrame

import meshlib
from meshlib.grpc.serving.limits import CONNECTION_WINDOW, MOST_HELD, Bucket, Limits, stream_window
from meshlib.grpc.serving.server import serve

from .raw import Peer, wait_until
from .server_worker import interop_handler

INTEROP = "/meshlib.grpctest.Interop"
UNARY = f"{INTEROP}/UnaryCall"
EMPTY = f"{INTEROP}/EmptyCall"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, ENHANCE_YOUR_CALM = 0, 1, 7, 11
INVALID, EXHAUSTED, UNIMPLEMENTED, INTERNAL = "3", "8", "12", "13"


async def good_call(peer: Peer) -> None:
    """The connection is as good as ever."""
    stream = peer.request(EMPTY)
    peer.message(stream, b"", end=True)
    answer = await peer.answer(stream)
    assert (answer.fields["grpc-status"], answer.messages) == ("0", [b""])


def no_crash(caplog: pytest.LogCaptureFixture) -> bool:
    return all(record.levelno < logging.ERROR and not record.exc_info for record in caplog.records)


def fields(without: str = "", **changed: str) -> list[tuple[str, str]]:
    found = {
        ":method": "POST",
        ":scheme": "http",
        ":path": EMPTY,
        "te": "trailers",
        "content-type": "application/grpc",
    } | {name.replace("_", "-"): value for name, value in changed.items()}
    found.pop(without, None)
    return list(found.items())


REQUESTS = {
    "GET": (fields(), {":method": "GET"}, "405", None),
    "no content-type": (fields("content-type"), {}, "415", "2"),
    "html": (fields(content_type="text/html"), {}, "415", "2"),
    "gRPC-Web": (fields(content_type="application/grpc-web"), {}, "415", "2"),
    "json": (fields(content_type="application/grpc+json"), {}, "415", "2"),
    "no te": (fields("te"), {}, "400", "2"),
    "other te": (fields(te="gzip"), {}, "400", "2"),
    "empty path": (fields(), {":path": ""}, "200", UNIMPLEMENTED),
    "root": (fields(), {":path": "/"}, "200", UNIMPLEMENTED),
    "no slash": (fields(), {":path": "nothing"}, "200", UNIMPLEMENTED),
    "too many slashes": (fields(), {":path": "/a/b/c/d"}, "200", UNIMPLEMENTED),
    "dots": (fields(), {":path": f"{INTEROP}/../EmptyCall"}, "200", UNIMPLEMENTED),
    "path of no UTF-8": (fields(), {":path": "/\xff\xfe/\x80"}, "200", UNIMPLEMENTED),
    "path with control characters": (fields(), {":path": "/a\n/b\0\x1b[31m"}, "200", UNIMPLEMENTED),
    "endless path": (fields(), {":path": "/" + "x" * 10_000}, "200", UNIMPLEMENTED),
    "empty timeout": (fields(grpc_timeout=""), {}, "200", INTERNAL),
    "timeout without unit": (fields(grpc_timeout="100"), {}, "200", INTERNAL),
    "timeout of another unit": (fields(grpc_timeout="1x"), {}, "200", INTERNAL),
    "negative timeout": (fields(grpc_timeout="-1S"), {}, "200", INTERNAL),
    "timeout of nine digits": (fields(grpc_timeout="123456789n"), {}, "200", INTERNAL),
    "two timeouts": ([*fields(grpc_timeout="1S"), ("grpc-timeout", "2S")], {}, "200", INTERNAL),
    "no base64": (fields(x_bin="!!!"), {}, "200", INTERNAL),
    "half base64": (fields(x_bin="A"), {}, "200", INTERNAL),
    "unknown encoding": (fields(grpc_encoding="snappy"), {}, "200", UNIMPLEMENTED),
    "much metadata": (fields(x_much="x" * 20_000), {}, "200", EXHAUSTED),
    "many fields": ([*fields(), *((f"x-{n}", "") for n in range(500))], {}, "200", EXHAUSTED),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_that_is_none_of_grpcs_is_answered_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    given, changed, http, status = REQUESTS[name]
    sent = [(field, changed.get(field, value)) for field, value in given]
    async with serve([interop_handler()]) as server, Peer.to(server.address) as peer:
        stream = peer.open(sent)
        answer = await peer.answer(stream)
        assert answer.fields[":status"] == http
        assert answer.fields.get("grpc-status") == status
        assert status is None or answer.fields["grpc-message"].isprintable()
        await good_call(peer)
        assert server.metrics()["connections"] == 1
        assert server.metrics()["requests"] == 1, "layers see nothing of it"
    assert no_crash(caplog)


MALFORMED = {
    "two paths": [*fields(), (":path", "/x")],
    "no path": fields(":path"),
    "no method": fields(":method"),
    "pseudo-header of its own": [(":extra", "x"), *fields()],
    "response's": [(":status", "200"), *fields()],
    "upper case": [*fields(), ("X-Upper", "x")],
    "space in a name": [*fields(), ("x y", "x")],
    "empty name": [*fields(), ("", "x")],
    "no pseudo-headers": [("x", "y")],
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_no_request_at_all_is_reset(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serve([interop_handler()]) as server, Peer.to(server.address) as peer:
        stream = peer.open(MALFORMED[name])
        assert (await peer.answer(stream)).reset == PROTOCOL_ERROR
        await good_call(peer)
        assert server.metrics()["malformed_requests"] == 1
    assert no_crash(caplog)


MESSAGES: dict[str, tuple[dict[str, Any], tuple[tuple[str, str], ...], str]] = {
    "longer than allowed": ({"body": b"", "size": 4 * 1024 * 1024 + 1}, (), EXHAUSTED),
    "4 GiB": ({"body": b"", "size": 0xFFFFFFFF}, (), EXHAUSTED),
    "compressed without a word": ({"body": b"", "flag": 1}, (), INTERNAL),
    "flag of 7": ({"body": b"", "flag": 7}, (), INTERNAL),
    "cut short": ({"body": b"abc", "size": 10}, (), INTERNAL),
    "no protobuf": ({"body": b"\xff\xff\xff"}, (), INTERNAL),
    "no gzip": ({"body": b"abc", "flag": 1}, (("grpc-encoding", "gzip"),), INTERNAL),
    "half of a gzip": ({"body": gzip.compress(bytes(100))[:-9], "flag": 1}, (("grpc-encoding", "gzip"),), INTERNAL),
    "gzip and more": ({"body": gzip.compress(b"") + b"x", "flag": 1}, (("grpc-encoding", "gzip"),), INTERNAL),
    "a bomb": ({"body": gzip.compress(bytes(64 << 20)), "flag": 1}, (("grpc-encoding", "gzip"),), EXHAUSTED),
}


@pytest.mark.parametrize("name", MESSAGES)
async def test_a_message_that_is_none_fails_its_call(name: str, caplog: pytest.LogCaptureFixture) -> None:
    options, more, status = MESSAGES[name]
    async with serve([interop_handler()]) as server, Peer.to(server.address) as peer:
        stream = peer.request(UNARY, *more)
        data = (
            bytes((options.get("flag", 0),)) + options.get("size", len(options["body"])).to_bytes(4) + options["body"]
        )
        for at in range(0, len(data), 16_384):
            peer.h2.send_data(stream, data[at : at + 16_384], end_stream=at + 16_384 >= len(data))
        peer.flush()
        answer = await peer.answer(stream)
        assert answer.fields["grpc-status"] == status
        await good_call(peer)
    assert no_crash(caplog)


async def test_a_request_without_its_message_is_unimplemented(caplog: pytest.LogCaptureFixture) -> None:
    async with serve([interop_handler()]) as server, Peer.to(server.address) as peer:
        stream = peer.request(UNARY, end=True)
        assert (await peer.answer(stream)).fields["grpc-status"] == UNIMPLEMENTED
        await good_call(peer)
    assert no_crash(caplog)


async def test_context_that_cannot_be_read_is_ignored_and_counted() -> None:
    seen: list[Any] = []
    handler = interop_handler()

    async def unary(stream: Any) -> None:
        from meshprotos import interop_pb2 as pb

        seen.append(meshlib.current())
        await stream.recv_message()
        await stream.send_message(pb.SimpleReply())

    handler.UnaryCall = unary
    bad = (("traceparent", "00-zz"), ("dtab-local", "=>"), ("meshlib-priority", "first"), ("baggage", "\xe9"))
    async with serve([handler]) as server, Peer.to(server.address) as peer:
        for more in (bad, (("grpc-previous-rpc-attempts", "3"),), (("grpc-timeout", "99999999H"),)):
            stream = peer.request(UNARY, *more)
            peer.message(stream, b"", end=True)
            assert (await peer.answer(stream)).fields["grpc-status"] == "0"
        assert server.metrics()["undecodable_metadata"] == 4
    first, second, third = seen
    assert (first.dtab, first.baggage, first.priority.name) == ((), "", "DEFAULT")
    assert second.attempt == 3
    assert third.deadline > 1e9


async def test_streams_beyond_the_limit_are_refused_one_by_one() -> None:
    handler = interop_handler()
    async with serve([handler], limits=Limits(max_streams=3)) as server, Peer.to(server.address) as peer:
        await good_call(peer)  # so that its SETTINGS have come
        assert peer.h2.remote_settings.max_concurrent_streams == 3
        peer.h2.remote_settings.update({3: 100})
        peer.h2.remote_settings.acknowledge()
        first = [peer.request(f"{INTEROP}/StreamingInput") for _ in range(3)]
        more = [peer.request(f"{INTEROP}/StreamingInput") for _ in range(2)]
        for stream in more:
            assert (await peer.answer(stream)).reset == REFUSED_STREAM
        for stream in first:
            peer.h2.end_stream(stream)
            peer.flush()
            assert (await peer.answer(stream)).fields["grpc-status"] == "0"
        assert handler.calls == 4
        await good_call(peer)
        assert server.metrics()["refused_streams"] == 2


# --- what costs the connection ----------------------------------------------------------------------------------------


def frames(*made: Any) -> bytes:
    return b"".join(frame.serialize() for frame in made)


BROKEN = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("160301010001000fc0"),
    "noise": bytes(range(256)),
    "a frame too large": PREFACE + SETTINGS + b"\x01\0\0\0\0\0\0\0\1",
    "no SETTINGS first": PREFACE + frames(DataFrame(1, data=b"x")),
    "DATA on stream 0": PREFACE + SETTINGS + b"\0\0\1\0\0\0\0\0\0x",
    "DATA on an idle stream": PREFACE + SETTINGS + frames(DataFrame(5, data=b"x")),
    "an even stream": PREFACE + SETTINGS + frames(HeadersFrame(2, data=b"\x82", flags={"END_HEADERS"})),
    "HPACK's index of nothing": PREFACE
    + SETTINGS
    + frames(HeadersFrame(1, data=b"\xff\xff\xff\x7f", flags={"END_HEADERS"})),
    "HPACK cut short": PREFACE + SETTINGS + frames(HeadersFrame(1, data=b"\x40\x7f\x01", flags={"END_HEADERS"})),
    "CONTINUATION of nothing": PREFACE + SETTINGS + frames(ContinuationFrame(1, data=b"x", flags={"END_HEADERS"})),
    "CONTINUATION for ever": PREFACE
    + SETTINGS
    + frames(HeadersFrame(1, data=b""), *(ContinuationFrame(1, data=b"\x82") for _ in range(100))),
    "another frame in between": PREFACE
    + SETTINGS
    + frames(HeadersFrame(1, data=b"\x82"), PingFrame(0, opaque_data=bytes(8))),
    "windows beyond 2 GiB": PREFACE + SETTINGS + b"\0\0\4\x08\0\0\0\0\0\x7f\xff\xff\xff" * 2,
    "a window of 4 GiB": PREFACE + b"\0\0\6\4\0\0\0\0\0\0\4\xff\xff\xff\xff",
    "SETTINGS of 5 bytes": PREFACE + b"\0\0\5\4\0\0\0\0\0\0\4\xff\xff\xff",
    "PUSH_PROMISE": PREFACE + SETTINGS + b"\0\0\4\5\4\0\0\0\1\0\0\0\2",
    "WINDOW_UPDATE of 0": PREFACE + SETTINGS + b"\0\0\4\x08\0\0\0\0\0\0\0\0\0",
    "padding longer than its frame": PREFACE + SETTINGS + b"\0\0\1\0\x08\0\0\0\1\xff",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_bytes_that_are_no_http2_cost_the_connection_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serve([interop_handler()]) as server, Peer.to(server.address) as good:
        await good_call(good)
        async with Peer.to(server.address, greet=False) as bad:
            bad.send(BROKEN[name])
            await bad.wait_closed()
        await wait_until(lambda: server.metrics()["connections"] == 1)
        assert server.metrics()["broken_connections"] == 1
        await good_call(good)
    assert no_crash(caplog)
    assert len(caplog.records) == 1
    assert "closing the connection with ('127.0.0.1'" in caplog.text


FLOODS = {
    "PING": lambda peer: frames(PingFrame(0, opaque_data=bytes(8))) * 3000,
    "SETTINGS": lambda peer: SETTINGS * 3000,
    "SETTINGS that say something": lambda peer: frames(SettingsFrame(0, settings={4: 70_000})) * 3000,
    "PRIORITY": lambda peer: frames(PriorityFrame(5, depends_on=3)) * 3000,
    "unknown frames": lambda peer: b"\0\0\0\x42\0\0\0\0\0" * 3000,
    "empty DATA": lambda peer: frames(DataFrame(peer.request(f"{INTEROP}/StreamingInput"), data=b"")) * 3000,
}


@pytest.mark.parametrize("name", FLOODS)
async def test_floods_of_nothing_are_told_to_calm_down(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serve([interop_handler()]) as server, Peer.to(server.address) as peer:
        await good_call(peer)
        peer.send(FLOODS[name](peer))
        await peer.wait_closed()
        assert [code for _, code in peer.goaways] == [ENHANCE_YOUR_CALM]
        await wait_until(lambda: server.metrics()["connections"] == server.metrics()["streams"] == 0)
    assert no_crash(caplog)
    assert "too many frames that carry nothing" in caplog.text


async def test_a_ping_with_each_answer_is_what_grpcs_clients_send() -> None:
    """grpc-go's, unless told otherwise, send one as soon as DATA has come and none is under way (gRFC A8)."""
    limits = Limits(control=20, control_rate=0.1)
    async with serve([interop_handler()], limits=limits) as server, Peer.to(server.address) as peer:
        for _ in range(2000):
            await good_call(peer)
            peer.h2.ping(bytes(8))
        await good_call(peer)
        stream = peer.request(f"{INTEROP}/FullDuplex")
        for _ in range(100):
            before = len(peer.answers[stream].data)
            peer.message(stream, b"\x0a\x01\x64")
            await wait_until(lambda before=before: len(peer.answers[stream].data) >= before + 107)
            peer.h2.ping(bytes(8))
            peer.flush()
        assert not peer.goaways
        assert server.metrics()["broken_connections"] == 0
        for _ in range(30):
            peer.h2.ping(bytes(8))
        peer.flush()
        await peer.wait_closed()
        assert [code for _, code in peer.goaways] == [ENHANCE_YOUR_CALM], "one answer forgives one PING"


async def test_streams_are_refused_without_reproach_until_the_client_can_know_the_limit() -> None:
    limits = Limits(max_streams=3, control=20, control_rate=0.1)
    async with serve([interop_handler()], limits=limits) as server, Peer.to(server.address) as peer:
        streams = [peer.request(EMPTY) for _ in range(60)]  # before anything of the server's is read
        for stream in streams[3:]:
            assert (await peer.answer(stream)).reset == REFUSED_STREAM
        for stream in streams[:3]:
            peer.message(stream, b"", end=True)
            assert (await peer.answer(stream)).fields["grpc-status"] == "0"
        await good_call(peer)
        assert not peer.goaways
        peer.h2.remote_settings.update({3: 100})
        peer.h2.remote_settings.acknowledge()
        for _ in range(40):
            peer.open(peer.fields(EMPTY), flush=False)
        peer.flush()
        await peer.wait_closed()
        assert [code for _, code in peer.goaways] == [ENHANCE_YOUR_CALM]


async def test_a_handler_that_has_answered_and_goes_on_keeps_no_other_call_out() -> None:
    from meshprotos import interop_pb2 as pb

    release = asyncio.Event()
    handler = interop_handler()

    async def unary(stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(pb.SimpleReply())
        await stream.send_trailing_metadata()
        await release.wait()

    handler.UnaryCall = unary
    limits = Limits(max_streams=3)
    async with serve([handler], limits=limits) as server, Peer.to(server.address) as peer:
        for _ in range(9):
            stream = peer.request(UNARY)
            peer.message(stream, b"", end=True)
            assert (await peer.answer(stream)).fields["grpc-status"] == "0"
        stream = peer.request(UNARY)
        assert (await peer.answer(stream)).reset == REFUSED_STREAM, "three times as many are enough"
        release.set()
        await wait_until(lambda: server.metrics()["streams"] == 0)
        await good_call(peer)


async def test_what_a_connection_makes_us_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpclib.config import Configuration

    most = 2 << 20
    monkeypatch.setattr("meshlib.grpc.serving.sending.MOST_HELD", most)
    release = asyncio.Event()
    handler = interop_handler()

    async def unread(stream: Any) -> None:
        await release.wait()
        await type(handler).StreamingInput(handler, stream)

    handler.StreamingInput = unread
    config = Configuration(http2_connection_window_size=1 << 20, http2_stream_window_size=1 << 20)
    message = b"\0" + (16_379).to_bytes(4) + b"\x0a\xf8\x7f" + bytes(16_376)  # fills a frame
    async with (
        serve([handler], config=config) as server,
        Peer.to(server.address) as peer,
        Peer.to(server.address) as good,
    ):
        await good_call(peer)
        connection = next(each for each in server.connections if each.peer.addr()[1] == own_port(peer))
        streams = [peer.request(f"{INTEROP}/StreamingInput") for _ in range(20)]

        async def upload() -> int:
            """Send all that the windows let through, until they have been closed for some turns."""
            sent = patience = 0
            while patience < 100:
                room = [stream for stream in streams if peer.h2.local_flow_control_window(stream) >= len(message)]
                for stream in room[:1]:
                    peer.h2.send_data(stream, message)
                    peer.flush()
                    sent += len(message)
                patience = 0 if room else patience + 1
                await anyio.sleep(0 if room else 0.001)
                assert connection.held <= most
            return sent

        sent = await upload()
        assert most - 2 * len(message) < sent <= most
        assert connection.held == sent
        await good_call(good)
        # Those that end unread give back what they held, once.
        for stream in streams[:2]:
            peer.h2.reset_stream(stream, 8)
        peer.flush()
        del streams[:2]
        await wait_until(lambda: connection.held < most)
        freed = sent - connection.held
        more = await upload()
        assert freed - 2 * len(message) < more <= freed + 2 * len(message)
        assert connection.held > most - 2 * len(message)
        release.set()
        for stream in streams:
            peer.h2.end_stream(stream)
        peer.flush()
        for stream in streams:
            assert (await peer.answer(stream)).fields["grpc-status"] == "0"
        assert connection.held == 0
        await good_call(peer)
        assert connection.h2.inbound_flow_control_window > config.http2_connection_window_size // 2
        assert server.metrics()["broken_connections"] == 0


def own_port(peer: Peer) -> int:
    return int(peer.writer.get_extra_info("sockname")[1])


@pytest.mark.parametrize("streams", [1, 100, 1000, 5000])
def test_unread_streams_cannot_fill_a_connection_that_nobody_configured(streams: int) -> None:
    window = stream_window(Limits(max_streams=streams))
    assert 65_535 <= window <= 4 << 20
    assert window * streams <= MOST_HELD or window == 65_535
    assert 4 * window <= CONNECTION_WINDOW


async def test_rapid_reset_is_told_to_calm_down(caplog: pytest.LogCaptureFixture) -> None:
    handler = interop_handler()
    async with serve([handler], limits=Limits(resets=50, reset_rate=1)) as server, Peer.to(server.address) as peer:
        await good_call(peer)
        for n in range(100):
            stream = peer.open(peer.fields(UNARY), flush=False)
            peer.h2.reset_stream(stream)
            if n == 40:
                peer.flush()
                await good_call(peer)  # so many are forgiven
        peer.flush()
        await peer.wait_closed()
        assert [code for _, code in peer.goaways] == [ENHANCE_YOUR_CALM]
        await wait_until(lambda: server.metrics()["streams"] == 0)
        assert handler.calls == 2, "what was reset before it began never ran"
        async with Peer.to(server.address) as another:
            await good_call(another)
    assert no_crash(caplog)


async def test_fields_that_never_end_cost_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with serve([interop_handler()]) as server, Peer.to(server.address) as peer:
        peer.open([*peer.fields(EMPTY), *((f"x-{n}", "x" * 1000) for n in range(100))])
        await peer.wait_closed()
        assert peer.goaways[0][1] == ENHANCE_YOUR_CALM
        assert server.metrics()["broken_connections"] == 1
    assert no_crash(caplog)


SLOW = {
    "nothing": b"",
    "half of the preface": PREFACE[:10],
    "the preface alone": PREFACE,
    "half a frame": PREFACE + SETTINGS + b"\0\0\x10\0\0\0",
    "half of the fields": PREFACE + SETTINGS + frames(HeadersFrame(1, data=b"\x82")),
}


@pytest.mark.parametrize("name", SLOW)
async def test_who_never_finishes_is_not_waited_for(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        serve([interop_handler()], limits=Limits(handshake=0.1)) as server,
        Peer.to(server.address, greet=False) as slow,
        Peer.to(server.address) as good,
    ):
        slow.send(SLOW[name])
        await slow.wait_closed()
        await good_call(good)
        assert server.metrics()["broken_connections"] == 1
    assert no_crash(caplog)


async def test_a_frame_that_comes_byte_by_byte_is_not_waited_for_either() -> None:
    async with serve([interop_handler()], limits=Limits(handshake=0.1)) as server:
        async with Peer.to(server.address, greet=False) as slow:
            slow.send(PREFACE + SETTINGS + b"\0\x10\0\0\0\0\0\0\1")
            with anyio.fail_after(10):
                while not slow.closed.is_set():
                    slow.send(b"x")
                    await anyio.sleep(0.01)
        await wait_until(lambda: not server.connections)


async def test_a_client_that_reads_nothing_is_not_read_either(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpclib.config import Configuration

    most = 128 * 1024  # an eighth of what it is, so that the kernel's buffers are most of what is to be filled
    monkeypatch.setattr("meshlib.grpc.serving.sending.MOST_UNSENT", most)
    config = Configuration(_keepalive_timeout=0.2)
    async with serve([interop_handler()], config=config) as server:
        host, _, port = server.address.rpartition(":")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        reader, writer = await asyncio.open_connection(sock=sock)
        peer = Peer(reader, writer)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        encoder = Encoder()
        try:
            stream = 1
            # Each is answered at once, without a handler that could be made to wait.
            with anyio.fail_after(30):
                while not (server.connections and server.connections[0].deaf_since):
                    for _ in range(200):
                        block = encoder.encode(peer.fields(f"/{'x' * 90}/y"))
                        flags = ["END_HEADERS", "END_STREAM"]
                        peer.send(HeadersFrame(stream, data=block, flags=flags).serialize())
                        stream += 2
                    await writer.drain()
                    await anyio.sleep(0.001)
            assert server.connections[0]._transport.get_write_buffer_size() < 4 * most
            await wait_until(lambda: not server.connections)
            assert server.metrics()["broken_connections"] == 1
        finally:
            writer.transport.abort()
            await anyio.lowlevel.checkpoint()


async def test_a_client_that_is_gone_takes_its_handlers_with_it() -> None:
    handler = interop_handler()
    async with serve([handler]) as server, Peer.to(server.address) as peer:
        streams = [peer.request(f"{INTEROP}/StreamingInput") for _ in range(3)]
        await wait_until(lambda: handler.under_way == 3)
        peer.h2.reset_stream(streams[0], 8)
        peer.flush()
        await wait_until(lambda: handler.under_way == 2)
        peer.writer.transport.abort()
        await wait_until(lambda: handler.under_way == 0)
        assert handler.cancelled == 3
        assert server.metrics()["cancelled"] == 3
        assert server.connections == ()


async def test_a_silent_client_is_pinged_and_a_dead_one_dropped() -> None:
    from grpclib.config import Configuration

    config = Configuration(_keepalive_time=0.05, _keepalive_timeout=0.1)
    async with serve([interop_handler()], config=config) as server, Peer.to(server.address) as peer:
        stream = peer.request(f"{INTEROP}/StreamingInput")
        await wait_until(lambda: peer.pings >= 3)  # and it answered them
        peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await wait_until(lambda: not server.connections)
        assert peer.answers[stream].reset is None


def test_a_bucket_gives_back_at_its_rate() -> None:
    bucket = Bucket(3, 2.0)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(11.0) for _ in range(2)] == [True, False]
    assert all(bucket.take(100.0 + n) for n in range(100))
