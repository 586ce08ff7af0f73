"""gRPC's published interop cases (grpc/doc/interop-test-descriptions.md), our channel against a grpcio server."""

import ssl

import anyio
import grpc
import pytest
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError

import meshlib
import meshlib.grpc

from .servers import aio_server

LARGE_REQUEST, LARGE_REPLY = 271_828, 314_159
SIZES_UP, SIZES_DOWN = [27182, 8, 1828, 45904], [31415, 9, 2653, 58979]


@pytest.fixture(params=["plain", "tls"])
async def peer(request, certificate):
    """A stub on our channel, and the servicer on the other side."""
    from meshprotos.interop_grpc import InteropStub

    tls = certificate if request.param == "tls" else None
    context = ssl.create_default_context(cafile=certificate[0]) if tls else None
    if context is not None:
        context.set_alpn_protocols(["h2"])
    config = Configuration(ssl_target_name_override="greeter.test")
    async with (
        aio_server(tls=tls) as (address, servicer),
        meshlib.grpc.Channel(address, ssl=context, config=config) as channel,
    ):
        stub = InteropStub(channel)
        stub.channel = channel
        yield stub, servicer


@pytest.fixture
def pb():
    from meshprotos import interop_pb2

    return interop_pb2


async def until(condition):
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - the other side tells nobody
            await anyio.sleep(0.005)


async def test_empty_unary(peer, pb):
    stub, _ = peer
    assert await stub.EmptyCall(pb.Empty()) == pb.Empty()


async def test_large_unary(peer, pb):
    stub, _ = peer
    reply = await stub.UnaryCall(pb.SimpleRequest(payload=bytes(LARGE_REQUEST), reply_size=LARGE_REPLY))
    assert reply.payload == bytes(LARGE_REPLY)


async def test_client_streaming(peer, pb):
    stub, _ = peer
    total = await stub.StreamingInput([pb.SimpleRequest(payload=bytes(size)) for size in SIZES_UP])
    assert (total.size, total.count) == (sum(SIZES_UP), len(SIZES_UP))


async def test_client_streaming_of_nothing(peer, pb):
    stub, _ = peer
    assert await stub.StreamingInput([]) == pb.Summary()


async def test_server_streaming(peer, pb):
    stub, _ = peer
    replies = await stub.StreamingOutput(pb.StreamRequest(sizes=SIZES_DOWN))
    assert [len(reply.payload) for reply in replies] == SIZES_DOWN


async def test_ping_pong(peer, pb):
    stub, _ = peer
    async with stub.FullDuplex.open() as stream:
        for size in SIZES_DOWN:
            await stream.send_message(pb.StreamRequest(sizes=[size]))
            assert len((await stream.recv_message()).payload) == size
        await stream.end()
        assert await stream.recv_message() is None


async def test_empty_stream(peer, pb):
    stub, _ = peer
    assert await stub.FullDuplex([]) == []


async def test_compressed_messages_both_ways(peer, pb):
    stub, _servicer = peer
    async with (
        aio_server(options=(("grpc.default_compression_algorithm", grpc.Compression.Gzip),)) as (address, _),
        meshlib.grpc.Channel(address, compression="gzip") as channel,
    ):
        zipped = type(stub)(channel)
        reply = await zipped.UnaryCall(pb.SimpleRequest(payload=bytes(LARGE_REQUEST), reply_size=LARGE_REPLY))
        assert reply.payload == bytes(LARGE_REPLY)
        replies = await zipped.StreamingOutput(pb.StreamRequest(sizes=SIZES_DOWN))
        assert [len(reply.payload) for reply in replies] == SIZES_DOWN
        assert (await zipped.StreamingInput([pb.SimpleRequest(payload=bytes(9000))])).size == 9000


async def test_cancel_after_begin(peer, pb):
    stub, _servicer = peer
    async with stub.StreamingInput.open() as stream:
        await stream.send_request()
        await stream.cancel()
        with pytest.raises(GRPCError) as caught:
            await stream.recv_message()
    assert caught.value.status is Status.CANCELLED
    assert stub.channel.endpoints[0].load == 0


async def test_cancel_after_first_response(peer, pb):
    stub, servicer = peer
    async with stub.FullDuplex.open() as stream:
        await stream.send_message(pb.StreamRequest(sizes=[31415]))
        assert len((await stream.recv_message()).payload) == 31415
        assert servicer.under_way == 1
        await stream.cancel()
        with pytest.raises(GRPCError) as caught:
            await stream.recv_message()
    assert caught.value.status is Status.CANCELLED
    await until(lambda: servicer.under_way == 0)


async def test_timeout_on_sleeping_server(peer, pb):
    stub, servicer = peer
    with pytest.raises(GRPCError) as caught:  # noqa: PT012 - the call as a stub makes it
        async with stub.FullDuplex.open(timeout=0.05) as stream:
            await stream.send_message(pb.StreamRequest(sizes=[1], interval=30))
            await stream.recv_message()
    assert caught.value.status is Status.DEADLINE_EXCEEDED
    assert isinstance(caught.value, TimeoutError)
    await until(lambda: servicer.under_way == 0)


async def test_timeout_of_a_unary_call_on_a_sleeping_server(peer, pb):
    stub, servicer = peer
    with pytest.raises(GRPCError, match=r"no reply within the timeout of 0\.05 s") as caught:
        await stub.UnaryCall(pb.SimpleRequest(delay=30), timeout=0.05)
    assert caught.value.status is Status.DEADLINE_EXCEEDED
    assert isinstance(caught.value, meshlib.DeadlineExceeded)
    await until(lambda: servicer.under_way == 0)


@pytest.mark.parametrize("way", ["unary", "duplex"])
async def test_status_code_and_message(peer, pb, way):
    stub, _ = peer
    status = pb.EchoStatus(code=2, message="test status message")
    with pytest.raises(GRPCError) as caught:  # noqa: PT012 - the call as a stub makes it
        if way == "unary":
            await stub.UnaryCall(pb.SimpleRequest(status=status))
        else:
            await stub.FullDuplex([pb.StreamRequest(status=status)])
    assert (caught.value.status, caught.value.message) == (Status.UNKNOWN, "test status message")
    assert stub.channel.endpoints[0].address.port
    assert f"127.0.0.1:{stub.channel.endpoints[0].address.port}" in str(caught.value)


async def test_special_status_message(peer, pb):
    stub, _ = peer
    text = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
    with pytest.raises(GRPCError) as caught:
        await stub.UnaryCall(pb.SimpleRequest(status=pb.EchoStatus(code=2, message=text)))
    assert (caught.value.status, caught.value.message) == (Status.UNKNOWN, text)


async def test_unimplemented_method(peer, pb):
    stub, _ = peer
    with pytest.raises(meshlib.UnknownMethod) as caught:
        await stub.UnimplementedCall(pb.Empty())
    assert caught.value.status is Status.UNIMPLEMENTED


async def test_unimplemented_service(peer, pb):
    from meshprotos.interop_grpc import AbsentStub

    stub, _ = peer
    with pytest.raises(GRPCError) as caught:
        await AbsentStub(stub.channel).UnimplementedCall(pb.Empty())
    assert caught.value.status is Status.UNIMPLEMENTED


@pytest.mark.parametrize("way", ["unary", "duplex"])
async def test_custom_metadata(peer, pb, way):
    stub, _ = peer
    metadata = {"x-initial": "test_initial_metadata_value", "x-trailing-bin": b"\xab\xab\xab"}
    method = stub.UnaryCall if way == "unary" else stub.FullDuplex
    message = pb.SimpleRequest(reply_size=LARGE_REPLY) if way == "unary" else pb.StreamRequest(sizes=[LARGE_REPLY])
    async with method.open(metadata=metadata) as stream:
        await stream.send_message(message, end=True)
        await stream.recv_initial_metadata()
        assert stream.initial_metadata["x-initial"] == "test_initial_metadata_value"
        assert len((await stream.recv_message()).payload) == LARGE_REPLY
        await stream.recv_trailing_metadata()
        assert stream.trailing_metadata["x-trailing-bin"] == b"\xab\xab\xab"
    assert stream.peer.addr()[1] == stub.channel.endpoints[0].address.port


async def test_a_light_soak_leaves_nothing(peer, pb):
    stub, servicer = peer

    async def worker():
        for _ in range(20):
            reply = await stub.UnaryCall(pb.SimpleRequest(payload=bytes(1000), reply_size=1000))
            assert len(reply.payload) == 1000

    async with anyio.create_task_group() as group:
        for _ in range(16):
            group.start_soon(worker)
    assert servicer.calls == 320
    assert stub.channel.endpoints[0].load == 0
    numbers = stub.channel.metrics()
    assert (numbers["requests"], numbers["success"], numbers["pool/connects"]) == (320, 320, 1)


async def test_a_soak_with_a_channel_for_each_call(certificate, pb):
    from meshprotos.interop_grpc import InteropStub

    async with aio_server() as (address, servicer):
        for _ in range(20):
            async with meshlib.grpc.Channel(address) as channel:
                assert await InteropStub(channel).EmptyCall(pb.Empty()) == pb.Empty()
        assert servicer.calls == 20
