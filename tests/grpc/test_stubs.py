"""Stubs of other hands: betterproto2's, and grpclib's own examples; ``@rpc`` as bytes; spans."""

import importlib

import anyio
import grpclib.server
import pytest
from grpclib.const import Cardinality, Handler
from grpclib.const import Status as GrpcStatus
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

import meshlib
import meshlib.grpc
from meshlib.grpc.calling.rpc import rpc_client
from meshlib.mux import Request

from .scripted import HEAD, OK, answering, scripted
from .servers import aio_server


async def test_betterproto2(better):
    messages = importlib.import_module("meshprotos_better.meshlib.grpctest")
    async with aio_server(name="c-core") as (address, servicer), meshlib.grpc.Channel(address) as channel:
        stub = messages.InteropStub(channel)
        assert await stub.empty_call(messages.Empty()) == messages.Empty()
        reply = await stub.unary_call(messages.SimpleRequest(reply_size=3), timeout=5, metadata={"a": "b"})
        assert (reply.payload, reply.server) == (bytes(3), "c-core")
        assert servicer.metadata[-1]["a"] == "b"
        down = messages.StreamRequest(sizes=[1, 2, 3])
        assert [len(item.payload) async for item in stub.streaming_output(down)] == [1, 2, 3]
        up = [messages.SimpleRequest(payload=bytes(n)) for n in (1, 2, 3)]
        assert (await stub.streaming_input(up)).size == 6

        async def both():
            for n in (4, 5):
                yield messages.StreamRequest(sizes=[n])

        assert [len(item.payload) async for item in stub.full_duplex(both())] == [4, 5]
        with pytest.raises(GRPCError) as caught:
            await stub.unimplemented_call(messages.Empty())
        assert caught.value.status is GrpcStatus.UNIMPLEMENTED
        assert channel.endpoints[0].load == 0


async def test_grpclibs_examples_unchanged_but_for_the_channel():
    """The calls of its examples/helloworld/client.py and examples/streaming/client.py, against grpclib's own server."""
    pb = importlib.import_module("meshprotos.greeter_pb2")
    stubs = importlib.import_module("meshprotos.greeter_grpc")

    class Greeter(stubs.GreeterBase):
        async def SayHello(self, stream):
            request = await stream.recv_message()
            await stream.send_message(pb.HelloReply(message=f"Hello, {request.name}!"))

        async def SayHelloGoodbye(self, stream):
            request = await stream.recv_message()
            await stream.send_message(pb.HelloReply(message=f"Hello, {request.name}!"))
            await stream.send_message(pb.HelloReply(message=f"Goodbye, {request.name}!"))

        async def SayHelloToManyAtOnce(self, stream):
            names = [request.name async for request in stream]
            await stream.send_message(pb.HelloReply(message=f"Hello, {' and '.join(names)}!"))

        async def SayHelloToMany(self, stream):
            async for request in stream:
                await stream.send_message(pb.HelloReply(message=f"Hello, {request.name}!"))

    server = grpclib.server.Server([Greeter()])
    import socket

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    await server.start(sock=listener)
    try:
        async with meshlib.grpc.Channel("{}:{}".format(*listener.getsockname())) as channel:
            stub = stubs.GreeterStub(channel)

            reply = await stub.SayHello(pb.HelloRequest(name="World"))
            assert reply.message == "Hello, World!"

            async with stub.SayHello.open() as stream:
                await stream.send_message(pb.HelloRequest(name="World"), end=True)
                reply = await stream.recv_message()
                assert reply.message == "Hello, World!"

            replies = await stub.SayHelloGoodbye(pb.HelloRequest(name="World"))
            assert [reply.message for reply in replies] == ["Hello, World!", "Goodbye, World!"]

            messages = [pb.HelloRequest(name="Rick"), pb.HelloRequest(name="Morty")]
            reply = await stub.SayHelloToManyAtOnce(messages)
            assert reply.message == "Hello, Rick and Morty!"

            async with stub.SayHelloToManyAtOnce.open() as stream:
                for message in messages:
                    await stream.send_message(message)
                await stream.end()
                assert (await stream.recv_message()).message == "Hello, Rick and Morty!"

            async with stub.SayHelloToMany.open() as stream:
                for message in messages:
                    await stream.send_message(message)
                    assert (await stream.recv_message()).message == f"Hello, {message.name}!"
                await stream.send_message(pb.HelloRequest(name="Jerry"), end=True)
                replies = [reply.message async for reply in stream]
                assert replies == ["Hello, Jerry!"]
    finally:
        server.close()
        await server.wait_closed()


# --- @rpc -------------------------------------------------------------------------------------------------------------


class Raw(CodecBase):
    __content_subtype__ = "msgpack"

    def encode(self, message, message_type):
        return message

    def decode(self, data, message_type):
        return data


class Service:
    """What a server of ``@rpc`` services says, by grpclib's own means."""

    async def echo(self, stream):
        body = await stream.recv_message()
        if body == b"declared":
            raised = {"meshlib-raised": "NotThere", "meshlib-raised-bin": b"\x81"}
            await stream.send_trailing_metadata(status=GrpcStatus.UNKNOWN, status_message="NotThere", metadata=raised)
        elif body == b"undeclared":
            raise KeyError("secret")
        elif body == b"argument":
            raise GRPCError(GrpcStatus.INVALID_ARGUMENT, "n: expected a number")
        else:
            await stream.send_message(body)

    def __mapping__(self):
        return {"/Echo/echo": Handler(self.echo, Cardinality.UNARY_UNARY, bytes, bytes)}


async def test_rpc_as_bytes():
    server = grpclib.server.Server([Service()], codec=Raw())
    import socket

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    await server.start(sock=listener)
    address = "{}:{}".format(*listener.getsockname())
    try:
        async with rpc_client(address, label="echoes") as raw:
            assert raw.env.label == "echoes"
            assert raw.status is meshlib.Status.BUSY
            reply = await raw(Request(b"body", "/Echo/echo"))
            assert (reply.body, reply.contexts) == (b"body", ())
            assert raw.status is meshlib.Status.OPEN
            reply = await raw(Request(b"declared", "/Echo/echo"))
            assert (reply.body, reply.contexts) == (b"\x81", ((b"meshlib.raised", b"NotThere"),))
            with pytest.raises(meshlib.RemoteError, match="Internal Server Error") as caught:
                await raw(Request(b"undeclared", "/Echo/echo"))
            assert caught.value.label == "echoes"
            assert len(caught.value.attempts) == 1
            with pytest.raises(meshlib.InvalidArgument, match="expected a number"):
                await raw(Request(b"argument", "/Echo/echo"))
            with pytest.raises(meshlib.RemoteError, match="Internal Server Error") as caught:
                await raw(Request(b"undeclared", "/Echo/echo", (), True))
            assert len(caught.value.attempts) == 1  # a handler that failed would fail again, as over Mux
            with pytest.raises(meshlib.UnknownMethod):
                await raw(Request(b"", "/Echo/nothing"))
            numbers = raw.metrics()
            assert numbers["success"] == 4
            assert raw.endpoints[0].load == 0
    finally:
        server.close()
        await server.wait_closed()


async def test_rpc_says_what_its_messages_are():
    head = [(":status", "200"), ("content-type", "application/grpc+msgpack")]
    async with scripted(answering(lambda p, s: p.answer(s, b"well", head=head))) as (address, peers):
        raw = await rpc_client(address).__aenter__()
        try:
            with meshlib.deadline(5):
                assert (await raw(Request(b"x", "/Echo/echo"))).body == b"well"
        finally:
            await raw.aclose()
    head = peers[0].heads[1]
    assert (head["content-type"], head[":path"]) == ("application/grpc+msgpack", "/Echo/echo")
    assert {"grpc-timeout", "traceparent"} <= head.keys()


# --- spans ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spans(monkeypatch):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from meshlib.telemetry import tracing

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_get_provider", lambda: provider)
    return exporter.get_finished_spans


async def test_spans_have_grpcs_names_and_statuses_and_last_as_long_as_streams(spans):
    from grpclib.client import UnaryStreamMethod

    from .scripted import channel, message, unary

    def step(peer, stream):
        path = peer.heads[stream][":path"]
        if path == "/x.Y/Fails":
            peer.headers(stream, [*HEAD, ("grpc-status", "14"), ("grpc-message", "gone")], end=True)
        elif path == "/x.Y/Stream":
            peer.headers(stream, HEAD)
            peer.h2.send_data(stream, message(b"one"))
            peer.flush()
        else:
            peer.answer(stream, b"well")

    async with scripted(answering(step)) as (address, peers), channel(address) as each:
        await unary(each)(b"x")
        with pytest.raises(GRPCError):
            await unary(each, "/x.Y/Fails")(b"x")
        async with UnaryStreamMethod(each, "/x.Y/Stream", bytes, bytes).open() as stream:
            await stream.send_message(b"x", end=True)
            assert await stream.recv_message() == b"one"
            assert len(spans()) == 2
            peers[0].headers(5, OK, end=True)
            with anyio.fail_after(5):
                assert await stream.recv_message() is None
        assert len(spans()) == 3
    good, bad, long = spans()
    assert (good.name, good.kind.name) == ("x.Y/Z", "CLIENT")
    facts = {"rpc.system.name": "grpc", "rpc.method": "x.Y/Z", "rpc.status_code": "OK", "server.address": address}
    assert dict(good.attributes) == facts
    assert bad.attributes["rpc.status_code"] == "UNAVAILABLE"
    assert bad.attributes["error.type"] == "RemoteError"
    assert bad.status.status_code.name == "ERROR"
    assert long.name == "x.Y/Stream"
    assert long.attributes["rpc.status_code"] == "OK"
    assert peers[0].heads[1]["traceparent"].split("-")[1] == f"{good.context.trace_id:032x}"
