"""The end of a gRPC server: nobody who was being answered notices, and it never takes longer than it says."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import grpc
import pytest

from meshlib.grpc.h2 import LAST_STREAM
from meshlib.grpc.serving.limits import Limits
from meshlib.grpc.serving.server import Server, serve

from .raw import Peer, wait_until
from .server_worker import Worker, interop_handler

INTEROP = "/meshlib.grpctest.Interop"
REFUSED_STREAM = 7


@pytest.fixture(autouse=True)
def lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for peers that never answer, waits a fifth as long."""
    monkeypatch.setattr("meshlib.grpc.serving.connection.LINGER", 0.2)


def quick(seconds: float = 5.0) -> Any:
    """What must not hang: far more than it takes, far less than any grace period or timeout that it is told of."""
    return asyncio.timeout(seconds)


def messages(*requests: Any) -> list[bytes]:
    return [request.SerializeToString() for request in requests]


async def test_streams_under_way_finish_and_new_calls_go_elsewhere() -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    old, new = interop_handler("old"), interop_handler("new")
    first = await serve([old], grace=30)
    async with serve([new]) as second, quick(20):
        target = f"ipv4:{first.address},{second.address}"
        # Weighted choice comes with time; the first of a list is taken while it is there.
        options = [("grpc.lb_policy_name", "pick_first"), ("grpc.initial_reconnect_backoff_ms", 50)]
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            stub = interop_pb2_grpc.InteropStub(channel)
            assert (await stub.UnaryCall(pb.SimpleRequest())).server == "old"
            stream = stub.StreamingOutput(pb.StreamRequest(sizes=[1] * 20, interval=0.02))
            unary = stub.UnaryCall(pb.SimpleRequest(delay=0.2))
            await wait_until(lambda: old.under_way == 2)
            closing = asyncio.create_task(first.aclose())
            await wait_until(lambda: first.connections[0]._last is not None)
            served = [(await stub.UnaryCall(pb.SimpleRequest(), wait_for_ready=True)).server for _ in range(5)]
            assert served == ["new"] * 5
            assert [reply.server async for reply in stream] == ["old"] * 20
            assert (await unary).server == "old"
            await closing
    assert old.cancelled == 0


async def test_goaway_comes_twice_and_then_streams_are_refused() -> None:
    from meshprotos import interop_pb2 as pb

    server = await serve([interop_handler()], grace=30)
    async with quick(), Peer.to(server.address) as peer:
        first = peer.request(f"{INTEROP}/FullDuplex")
        (ask,) = messages(pb.StreamRequest(sizes=[1]))
        peer.message(first, ask)
        await wait_until(lambda: bool(peer.answers[first].messages))
        closing = asyncio.create_task(server.aclose())
        await wait_until(lambda: len(peer.goaways) == 2)
        assert peer.goaways == [(LAST_STREAM, 0), (first, 0)]
        late = peer.request(f"{INTEROP}/EmptyCall", end=True)
        assert (await peer.answer(late)).reset == REFUSED_STREAM
        peer.message(first, ask, end=True)
        answer = await peer.answer(first)
        assert (len(answer.messages), answer.fields["grpc-status"]) == (2, "0")
        await peer.wait_closed()
        await closing


async def test_a_stream_that_was_on_its_way_is_still_handled() -> None:
    server = await serve([interop_handler()], grace=30)
    async with quick(), Peer.to(server.address) as peer:
        first = peer.request(f"{INTEROP}/FullDuplex")
        await wait_until(lambda: server.metrics()["streams"] == 1)
        connection = server.connections[0]
        connection.drain()
        # In the very same turn, before the client can have heard of it.
        second = peer.request(f"{INTEROP}/EmptyCall", end=True)
        answer = await peer.answer(second)
        assert answer.fields["grpc-status"] in ("0", "12")  # the request has no message
        assert answer.reset is None
        peer.h2.end_stream(first)
        peer.flush()
        await peer.wait_closed()
        assert peer.goaways[-1] == (second, 0)
        await server.aclose()


async def test_after_the_grace_period_the_rest_is_unavailable_and_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    handler = interop_handler()
    server = await serve([handler], grace=0.1)
    async with quick(), grpc.aio.insecure_channel(server.address) as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        calls = [stub.UnaryCall(pb.SimpleRequest(delay=60)), stub.StreamingInput()]
        await wait_until(lambda: handler.under_way == 2)
        await server.aclose()
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert (caught.value.code(), caught.value.details()) == (
                grpc.StatusCode.UNAVAILABLE,
                "the server is closing",
            )
    assert handler.cancelled == 2
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{server.env.label}: 2 calls still busy after the grace period"
    ]


async def test_idle_clients_hold_nobody_up() -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    server = await serve([interop_handler()], grace=30)
    async with quick(), grpc.aio.insecure_channel(server.address) as channel:
        await interop_pb2_grpc.InteropStub(channel).EmptyCall(pb.Empty())
        assert len(server.connections) == 1
        await server.aclose()
        assert server.connections == ()


@pytest.mark.parametrize("greets", [True, False])
async def test_peers_that_never_answer_hold_nobody_up(greets: bool) -> None:
    server = await serve([interop_handler()], grace=30)
    host, _, port = server.address.rpartition(":")
    async with quick():
        sock = socket.create_connection((host, int(port)))
        try:
            if greets:  # preface and SETTINGS, and then nothing: no answer to the PING, no end of its own
                sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            await wait_until(lambda: len(server.connections) == 1)
            if greets:
                await wait_until(lambda: server.connections[0]._established)
            await server.aclose()
            assert server.connections == ()
        finally:
            sock.close()


async def test_a_client_that_reads_nothing_holds_nobody_up() -> None:
    from meshprotos import interop_pb2 as pb

    handler = interop_handler()
    server = await serve([handler], grace=0.1)
    async with quick():
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        peer = Peer(reader, writer)  # which nobody reads for
        peer.h2.update_settings({4: 1 << 30})
        peer.h2.increment_flow_control_window(1 << 30)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        stream = peer.request(f"{INTEROP}/StreamingOutput")
        (ask,) = messages(pb.StreamRequest(sizes=[1 << 20] * 100))
        peer.message(stream, ask, end=True)
        await wait_until(lambda: handler.under_way == 1)
        await server.aclose()
        assert server.connections == ()
        assert handler.under_way == 0
        writer.transport.abort()
        await asyncio.sleep(0)


async def test_a_handler_that_will_not_hear_is_told_again() -> None:
    heard: list[int] = []
    handler = interop_handler()

    async def stubborn(stream: Any) -> None:
        while len(heard) < 4:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard.append(len(heard))

    handler.StreamingInput = stubborn
    server = await serve([handler], grace=0.05)
    async with quick(), Peer.to(server.address) as peer:
        stream = peer.request(f"{INTEROP}/StreamingInput")
        await wait_until(lambda: server.metrics()["streams"] == 1)
        await server.aclose()
        assert (await peer.answer(stream)).fields["grpc-status"] == "14"
    assert heard == [0, 1, 2, 3]


async def test_it_may_be_closed_in_a_handler_and_twice() -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    server: Any = None
    handler = interop_handler()

    async def empty(stream: Any) -> None:
        await stream.recv_message()
        server.close()
        await stream.send_message(pb.Empty())

    async def unary(stream: Any) -> None:
        await server.aclose(grace=0.05)

    handler.EmptyCall, handler.UnaryCall = empty, unary
    server = await serve([handler])
    async with quick(), grpc.aio.insecure_channel(server.address) as channel:
        assert await interop_pb2_grpc.InteropStub(channel).EmptyCall(pb.Empty()) == pb.Empty()
        await asyncio.gather(server.aclose(), server.aclose(), server.wait_closed())
    server = await serve([handler])
    async with quick(), grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await interop_pb2_grpc.InteropStub(channel).UnaryCall(pb.SimpleRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await server.wait_closed()
        assert server.connections == ()


async def test_a_tls_client_is_drained_too(certificate: tuple[str, str]) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    server = await serve([interop_handler()], ssl=certificate, grace=30)
    credentials = grpc.ssl_channel_credentials(await anyio.Path(certificate[0]).read_bytes())
    options = [("grpc.ssl_target_name_override", "greeter.test")]
    async with quick(), grpc.aio.secure_channel(server.address, credentials, options=options) as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        stream = stub.StreamingOutput(pb.StreamRequest(sizes=[1] * 10, interval=0.02))
        replies = aiter(stream)
        await anext(replies)
        closing = asyncio.create_task(server.aclose())
        assert len([reply async for reply in replies]) == 9
        await closing


async def test_an_old_connection_is_drained_and_an_idle_one_too() -> None:
    limits = Limits(max_age=0.2, max_age_grace=0.2)
    handler = interop_handler()
    async with serve([handler], limits=limits) as server, quick(), Peer.to(server.address) as peer:
        stream = peer.request(f"{INTEROP}/FullDuplex")
        await wait_until(lambda: len(peer.goaways) == 2)
        assert peer.goaways == [(LAST_STREAM, 0), (stream, 0)]
        answer = await peer.answer(stream)  # its grace is over
        assert answer.fields["grpc-status"] == "14"
        await peer.wait_closed()
    async with serve([handler], limits=Limits(max_idle=0.1)) as server, quick(), Peer.to(server.address) as peer:
        await peer.wait_closed()
        assert peer.goaways == [(LAST_STREAM, 0), (0, 0)]


async def test_a_process_ends_on_sigterm_after_its_last_answer(protos: Path) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    worker = await anyio.to_thread.run_sync(lambda: Worker(protos))
    try:
        async with quick(30), grpc.aio.insecure_channel(worker.address) as channel:
            stub = interop_pb2_grpc.InteropStub(channel)
            stream = stub.StreamingOutput(pb.StreamRequest(sizes=[1] * 10, interval=0.05))
            replies = aiter(stream)
            await anext(replies)
            worker.terminate()
            assert len([reply async for reply in replies]) == 9
            assert await anyio.to_thread.run_sync(worker.wait) == (0, "")
    finally:
        worker.kill()
        worker.process.wait()


async def test_what_was_announced_is_withdrawn_before_the_door_closes() -> None:
    order: list[str] = []
    server = Server([interop_handler()], address="127.0.0.1:0")
    stop, withdraw, drain = server._stop_accepting, server._announcements.withdraw, server.health.drain

    async def stopped() -> None:
        order.append("listener")
        await stop()

    async def withdrawn() -> None:
        order.append("announcement")
        await withdraw()

    server._stop_accepting = stopped  # type: ignore[method-assign]
    server._announcements.withdraw = withdrawn  # type: ignore[method-assign]
    server.health.drain = lambda: (order.append("health"), drain())[1]  # type: ignore[method-assign]
    async with server:
        assert server.announcements == ()
    assert order == ["health", "announcement", "listener"]


async def test_what_asyncios_servers_wait_for_from_python_3_12_on_is_not_waited_for() -> None:
    async with quick():
        server = await serve([interop_handler()])
        async with Peer.to(server.address):
            await wait_until(lambda: len(server.connections) == 1)
            await server.aclose()
