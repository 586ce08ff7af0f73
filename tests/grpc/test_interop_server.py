"""grpcio's clients, C core's sync one and grpc.aio's, against our server: gRPC's published interop cases, and TLS.

Source of the cases: grpc/doc/interop-test-descriptions.md.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import grpc
import pytest

from meshlib.grpc.serving.limits import Limits
from meshlib.grpc.serving.server import serve

from .raw import wait_until
from .server_worker import interop_handler

LARGE = 314_159
REPLY = 271_828


@pytest.fixture(params=["plain", "tls", "unix"])
async def served(request: pytest.FixtureRequest, certificate: tuple[str, str], tmp_path: Path) -> AsyncIterator[Any]:
    """A server, and how to reach it: ``(handler, channel(aio) -> channel)``."""
    handler = interop_handler()
    address = f"unix://{tmp_path}/grpc.sock" if request.param == "unix" else "127.0.0.1:0"
    tls = request.param == "tls"
    async with serve([handler], address, ssl=certificate if tls else None) as server:
        target = server.address.replace("unix://", "unix:")
        options = [("grpc.max_receive_message_length", 8 << 20), ("grpc.enable_retries", 0)]

        def channel(kind: Any = grpc.aio) -> Any:
            if not tls:
                return kind.insecure_channel(target, options=options)
            credentials = grpc.ssl_channel_credentials(Path(certificate[0]).read_bytes())
            named = [*options, ("grpc.ssl_target_name_override", "greeter.test")]
            return kind.secure_channel(target, credentials, options=named)

        yield handler, channel, server
    assert server.metrics()["streams"] == server.metrics()["connections"] == server.metrics()["pending"] == 0


async def in_thread(served: Any, work: Callable[[Any], Any]) -> Any:
    """Run ``work(stub)`` with C core's sync client in a thread."""
    from meshprotos import interop_pb2_grpc

    def run() -> Any:
        with served[1](grpc) as channel:
            return work(interop_pb2_grpc.InteropStub(channel))

    return await anyio.to_thread.run_sync(run)


async def test_empty_and_large_unary(served: Any) -> None:
    from meshprotos import interop_pb2 as pb

    def work(stub: Any) -> None:
        assert stub.EmptyCall(pb.Empty(), timeout=10) == pb.Empty()
        reply = stub.UnaryCall(pb.SimpleRequest(payload=bytes(REPLY), reply_size=LARGE), timeout=10)
        assert len(reply.payload) == LARGE
        reply = stub.UnaryCall(pb.SimpleRequest(payload=bytes(4_000_000), reply_size=4_100_000), timeout=20)
        assert len(reply.payload) == 4_100_000

    await in_thread(served, work)


async def test_client_and_server_streaming(served: Any) -> None:
    from meshprotos import interop_pb2 as pb

    def work(stub: Any) -> None:
        sizes = (27_182, 8, 1828, 45_904)
        summary = stub.StreamingInput((pb.SimpleRequest(payload=bytes(size)) for size in sizes), timeout=10)
        assert (summary.size, summary.count) == (sum(sizes), 4)
        replies = stub.StreamingOutput(pb.StreamRequest(sizes=[31_415, 9, 2653, 58_979]), timeout=10)
        assert [len(reply.payload) for reply in replies] == [31_415, 9, 2653, 58_979]
        summary = stub.StreamingInput(iter(()), timeout=10)
        assert summary.count == 0
        assert list(stub.StreamingOutput(pb.StreamRequest(), timeout=10)) == []

    await in_thread(served, work)


async def test_megabytes_flow_both_ways_through_windows(served: Any) -> None:
    from meshprotos import interop_pb2 as pb

    def work(stub: Any) -> None:
        count = 40
        summary = stub.StreamingInput((pb.SimpleRequest(payload=bytes(500_000)) for _ in range(count)), timeout=30)
        assert summary.size == count * 500_000
        replies = stub.StreamingOutput(pb.StreamRequest(sizes=[500_000] * count), timeout=30)
        assert sum(len(reply.payload) for reply in replies) == count * 500_000

    await in_thread(served, work)


async def test_ping_pong_and_empty_stream(served: Any) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    async with served[1]() as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        call = stub.FullDuplex(timeout=10)
        for size in (31_415, 9, 2653, 58_979):
            await call.write(pb.StreamRequest(sizes=[size]))
            assert len((await call.read()).payload) == size
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        call = stub.FullDuplex(timeout=10)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_cancel_after_begin(served: Any) -> None:
    from meshprotos import interop_pb2_grpc

    handler = served[0]
    async with served[1]() as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        call = stub.StreamingInput(timeout=10)
        await wait_until(lambda: handler.under_way == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await call.code() is grpc.StatusCode.CANCELLED
        await wait_until(lambda: handler.under_way == 0)
        assert handler.cancelled == 1


async def test_cancel_after_first_response(served: Any) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    handler = served[0]
    async with served[1]() as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        call = stub.FullDuplex(timeout=10)
        await call.write(pb.StreamRequest(sizes=[31_415]))
        assert len((await call.read()).payload) == 31_415
        call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED
        await wait_until(lambda: handler.under_way == 0)
        assert handler.cancelled == 1


async def test_timeout_on_a_sleeping_server(served: Any) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    handler, _, server = served
    async with served[1]() as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.UnaryCall(pb.SimpleRequest(delay=30), timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await wait_until(lambda: handler.under_way == 0)
        assert handler.cancelled == 1
    await wait_until(lambda: server.metrics()["streams"] == 0)


async def test_status_code_and_message(served: Any) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    status = pb.EchoStatus(code=2, message="test status message")
    async with served[1]() as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.UnaryCall(pb.SimpleRequest(status=status), timeout=10)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNKNOWN, "test status message")
        call = stub.FullDuplex(timeout=10)
        await call.write(pb.StreamRequest(sizes=[1], status=status))
        await call.read()
        await call.done_writing()
        assert (await call.code(), await call.details()) == (grpc.StatusCode.UNKNOWN, "test status message")


async def test_special_status_message(served: Any) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    text = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
    async with served[1]() as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.UnaryCall(pb.SimpleRequest(status=pb.EchoStatus(code=2, message=text)), timeout=10)
        assert caught.value.details() == text


async def test_unimplemented_method_and_service(served: Any) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    async with served[1]() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await interop_pb2_grpc.InteropStub(channel).UnimplementedCall(pb.Empty(), timeout=10)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNIMPLEMENTED, "not yet")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await interop_pb2_grpc.AbsentStub(channel).UnimplementedCall(pb.Empty(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert caught.value.details() == "unknown service meshlib.grpctest.Absent"
        nothing = channel.unary_unary(
            "/meshlib.grpctest.Interop/Nothing", pb.Empty.SerializeToString, pb.Empty.FromString
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await nothing(pb.Empty(), timeout=10)
        assert caught.value.details() == "unknown method Nothing for service meshlib.grpctest.Interop"


async def test_custom_metadata(served: Any) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    given = (("x-initial", "test_initial_metadata_value"), ("x-trailing-bin", b"\xab\xab\xab"))
    async with served[1]() as channel:
        stub = interop_pb2_grpc.InteropStub(channel)
        call = stub.UnaryCall(pb.SimpleRequest(reply_size=3), metadata=given, timeout=10)
        assert len((await call).payload) == 3
        assert given[0] in tuple(await call.initial_metadata())
        assert given[1] in tuple(await call.trailing_metadata())
        call = stub.FullDuplex(metadata=given, timeout=10)
        await call.write(pb.StreamRequest(sizes=[1]))
        assert len((await call.read()).payload) == 1
        assert given[0] in tuple(await call.initial_metadata())
        assert given[1] in tuple(await call.trailing_metadata())


@pytest.mark.parametrize("compression", [None, "gzip"])
async def test_compressed_messages_both_ways(compression: str | None) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    async with (
        serve([interop_handler()], compression=compression) as server,
        grpc.aio.insecure_channel(server.address, compression=grpc.Compression.Gzip) as channel,
    ):
        stub = interop_pb2_grpc.InteropStub(channel)
        reply = await stub.UnaryCall(pb.SimpleRequest(payload=bytes(100_000), reply_size=200_000), timeout=10)
        assert reply.payload == bytes(200_000)
        summary = await stub.StreamingInput(iter([pb.SimpleRequest(payload=bytes(9))] * 3), timeout=10)
        assert (summary.size, summary.count) == (27, 3)


async def test_an_encoding_that_nobody_reads_is_unimplemented() -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    async with (
        serve([interop_handler()]) as server,
        grpc.aio.insecure_channel(server.address, compression=grpc.Compression.Deflate) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await interop_pb2_grpc.InteropStub(channel).UnaryCall(pb.SimpleRequest(payload=bytes(9000)), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_messages_over_the_limit_are_refused_by_name(served: Any) -> None:
    from meshprotos import interop_pb2 as pb

    def work(stub: Any) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            stub.UnaryCall(pb.SimpleRequest(payload=bytes(5 << 20)), timeout=10)
        return caught.value

    error = await in_thread(served, work)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(Limits().max_message) in error.details()
    await in_thread(served, lambda stub: stub.EmptyCall(pb.Empty(), timeout=10))


async def test_a_handler_that_does_not_read_holds_up_its_own_call_alone() -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    handler = interop_handler()
    release = asyncio.Event()

    async def unread(stream: Any) -> None:
        await release.wait()
        await type(handler).StreamingInput(handler, stream)

    handler.StreamingInput = unread
    async with serve([handler]) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = interop_pb2_grpc.InteropStub(channel)

        async def upload() -> Any:
            call = stub.StreamingInput()
            for _ in range(12):
                await call.write(pb.SimpleRequest(payload=bytes(1_000_000)))
            await call.done_writing()
            return await call

        uploads = [asyncio.ensure_future(upload()) for _ in range(4)]
        await wait_until(lambda: server.connections and server.connections[0].held >= 4 * 600_000)
        for _ in range(20):
            reply = await stub.UnaryCall(pb.SimpleRequest(payload=bytes(300_000), reply_size=9), timeout=10)
            assert len(reply.payload) == 9
        assert len(server.connections) == 1
        assert not any(each.done() for each in uploads)
        release.set()
        assert [(each.size, each.count) for each in await asyncio.gather(*uploads)] == [(12_000_000, 12)] * 4
        assert server.connections[0].held == 0


async def test_a_client_of_the_wrong_kind_is_turned_away(certificate: tuple[str, str]) -> None:
    from meshprotos import interop_pb2 as pb
    from meshprotos import interop_pb2_grpc

    async with serve([interop_handler()], ssl=certificate) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await interop_pb2_grpc.InteropStub(channel).EmptyCall(pb.Empty(), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        context = ssl.create_default_context(cafile=certificate[0])
        context.check_hostname = False
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP/1.1" not in await asyncio.wait_for(reader.read(), 5)
        writer.close()
