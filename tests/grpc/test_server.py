"""The gRPC server: grpclib's handlers and users' programs unchanged, under the whole server stack."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import grpc
import pytest
from grpclib.const import Status
from grpclib.events import RecvMessage, RecvRequest, SendInitialMetadata, SendMessage, SendTrailingMetadata, listen
from grpclib.exceptions import GRPCError, ProtocolError
from grpclib.metadata import encode_grpc_message
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import meshlib
from meshlib.core.errors import ConfigurationError, InvalidArgument, Rejected, ServiceClosed
from meshlib.core.priority import Priority
from meshlib.filters.limit import concurrency_limit
from meshlib.filters.rate_limit import rate_limit
from meshlib.grpc.serving.limits import Limits
from meshlib.grpc.serving.rpc import serve_rpc
from meshlib.grpc.serving.server import Server, serve

from .raw import wait_until
from .server_worker import interop_handler

UNARY = "/meshlib.grpctest.Interop/UnaryCall"


def with_unary(unary: Callable[[Any], Any]) -> Any:
    """A handler whose UnaryCall is ``unary(stream)``."""
    handler = interop_handler()
    handler.UnaryCall = unary
    return handler


@asynccontextmanager
async def stub_of(server: Any) -> AsyncIterator[Any]:
    from meshprotos import interop_pb2_grpc

    options = [("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        yield interop_pb2_grpc.InteropStub(channel)


async def failing(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# --- in the place of grpclib's own ------------------------------------------------------------------------------------


async def test_it_starts_and_closes_as_grpclibs_server_does() -> None:
    from meshprotos import interop_pb2 as pb

    server = Server([interop_handler()])
    with pytest.raises(RuntimeError, match="not started"):
        server.close()
    with pytest.raises(RuntimeError, match="not started"):
        await server.wait_closed()
    await server.start("127.0.0.1", 0)
    with pytest.raises(RuntimeError, match="already started"):
        await server.start("127.0.0.1", 0)
    async with stub_of(server) as stub:
        assert await stub.EmptyCall(pb.Empty()) == pb.Empty()
        server.close()
        server.close()
        await server.wait_closed()
    with pytest.raises(ServiceClosed):
        await server.start("127.0.0.1", 0)


async def test_async_with_a_server_without_an_address_leaves_the_start_to_the_user() -> None:
    async with Server([interop_handler()]) as server:
        with pytest.raises(RuntimeError, match="no address"):
            await Server([interop_handler()]).start()
        await server.start("127.0.0.1", 0)
        assert server.address.startswith("127.0.0.1:")


async def test_grpclibs_events_are_heard_and_may_change_what_passes() -> None:
    from meshprotos import interop_pb2 as pb

    heard: list[str] = []
    server = Server([interop_handler()])

    async def on_request(event: RecvRequest) -> None:
        heard.append(f"{event.method_name} {event.content_type} {event.user_agent is not None} {event.peer.addr()[0]}")
        assert event.deadline is not None
        assert 0 < event.deadline.time_remaining() <= 11  # C core rounds up
        event.metadata["x-trailing-bin"] = b"\0\1"
        inner = event.method_func

        async def wrapped(stream: Any) -> None:
            heard.append("wrapped")
            await inner(stream)

        event.method_func = wrapped

    async def on_message(event: RecvMessage) -> None:
        event.message.reply_size += 1

    async def on_reply(event: SendMessage) -> None:
        event.message.server = "another"

    async def on_initial(event: SendInitialMetadata) -> None:
        event.metadata["x-first"] = "1"

    async def on_trailing(event: SendTrailingMetadata) -> None:
        heard.append(event.status.name)
        event.metadata["x-last"] = "2"

    listen(server, RecvRequest, on_request)
    listen(server, RecvMessage, on_message)
    listen(server, SendMessage, on_reply)
    listen(server, SendInitialMetadata, on_initial)
    listen(server, SendTrailingMetadata, on_trailing)
    await server.start("127.0.0.1", 0)
    async with server, stub_of(server) as stub:
        call = stub.UnaryCall(pb.SimpleRequest(reply_size=3), timeout=10)
        reply = await call
        assert (len(reply.payload), reply.server) == (4, "another")
        assert ("x-first", "1") in tuple(await call.initial_metadata())
        trailing = tuple(await call.trailing_metadata())
        assert ("x-last", "2") in trailing
        assert ("x-trailing-bin", b"\0\1") in trailing
    assert heard == [f"{UNARY} application/grpc True 127.0.0.1", "wrapped", "OK"]


async def test_a_listener_that_refuses_is_an_answer() -> None:
    from meshprotos import interop_pb2 as pb

    server = Server([interop_handler()], address="127.0.0.1:0")

    async def refuse(event: RecvRequest) -> None:
        raise GRPCError(Status.UNAUTHENTICATED, "who are you?")

    listen(server, RecvRequest, refuse)
    async with server, stub_of(server) as stub:
        error = await failing(stub.UnaryCall(pb.SimpleRequest()))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, "who are you?")


async def test_a_stream_is_grpclibs_and_holds_its_rules() -> None:
    from grpclib.server import Stream
    from meshprotos import interop_pb2 as pb

    broken: list[str] = []

    async def unary(stream: Any) -> None:
        assert isinstance(stream, Stream)
        assert stream.peer.addr()[0] == "127.0.0.1"
        assert stream.peer.cert() is None
        await stream.recv_message()
        for again in (
            lambda: stream.send_trailing_metadata(),
            stream.send_initial_metadata,
            stream.send_initial_metadata,
            lambda: stream.send_message(pb.SimpleReply(server="first")),
            lambda: stream.send_message(pb.SimpleReply(server="second")),
            lambda: stream.send_trailing_metadata(metadata={"x-a": "b"}),
            stream.send_trailing_metadata,
            lambda: stream.send_message(pb.SimpleReply()),
        ):
            try:
                await again()
            except ProtocolError as error:
                broken.append(str(error))
        assert await stream.recv_message() is None

    async with serve([with_unary(unary)]) as server, stub_of(server) as stub:
        assert (await stub.UnaryCall(pb.SimpleRequest())).server == "first"
    assert broken == [
        "Unary response with OK status requires a single message to be sent",
        "Initial metadata was already sent",
        "Message was already sent",
        "Trailing metadata was already sent",
        "Trailing metadata was already sent",
    ]


async def test_what_cannot_be_is_said_at_once() -> None:
    with pytest.raises(ConfigurationError, match="no handler"):
        Server([object()])
    with pytest.raises(ConfigurationError, match="no handler"):
        Server([type(interop_handler())])
    with pytest.raises(ConfigurationError, match="compression"):
        Server([], compression="snappy")
    with pytest.raises(ConfigurationError, match="certificate file"):
        Server([], ssl="cert.pem")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"give meshlib\.grpc\.Limits"):
        Server([], limits=meshlib.mux.Limits())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="max_streams"):
        Limits(max_streams=0)
    with pytest.raises(ConfigurationError, match="max_headers"):
        Limits(max_headers=1 << 20)


async def test_an_address_may_say_its_protocol() -> None:
    async with serve([interop_handler()], "grpc://127.0.0.1:0") as server:
        assert server.address.startswith("127.0.0.1:")


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_statuses_travel_and_the_rest_is_opaque_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from google.protobuf.wrappers_pb2 import StringValue
    from grpc_status import rpc_status
    from meshprotos import interop_pb2 as pb

    raised: Exception = RuntimeError()

    async def unary(stream: Any) -> None:
        raise raised

    async with serve([with_unary(unary)]) as server, stub_of(server) as stub:

        async def answer(error: Exception) -> Any:
            nonlocal raised
            raised = error
            caplog.clear()
            return await failing(stub.UnaryCall(pb.SimpleRequest()))

        error = await answer(GRPCError(Status.NOT_FOUND, "no such thing", [StringValue(value="of that name")]))
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
        details = await rpc_status_of(error)
        assert details.value == "of that name"
        assert not caplog.records
        error = await answer(InvalidArgument("that is no number"))
        assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "that is no number")
        assert not caplog.records
        error = await answer(KeyError("secret"))
        assert error.code() is grpc.StatusCode.UNKNOWN
        assert "secret" not in error.details()
        assert error.details().startswith("internal error")
        assert [record.exc_info is not None for record in caplog.records] == [True]
        assert server.metrics()["failures"] == 1
        assert server.metrics()["success"] == 2
        assert server.metrics()[f"methods{UNARY}/status/NOT_FOUND"] == 1
        assert server.metrics()[f"methods{UNARY}/status/UNKNOWN"] == 1
    assert rpc_status is not None


async def rpc_status_of(error: Any) -> Any:
    from google.protobuf.wrappers_pb2 import StringValue
    from google.rpc import status_pb2

    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(packed)
    value = StringValue()
    assert status.details[0].Unpack(value)
    return value


async def test_a_status_survives_whatever_is_said_with_it(caplog: pytest.LogCaptureFixture) -> None:
    from google.protobuf.wrappers_pb2 import StringValue
    from meshprotos import interop_pb2 as pb

    error: Any = None
    trailing: Any = None

    async def unary(stream: Any) -> None:
        if trailing is not None:
            await stream.send_trailing_metadata(
                status=error.status, status_message=error.message, status_details=error.details, metadata=trailing
            )
        else:
            raise error

    async with serve([with_unary(unary)]) as server, stub_of(server) as stub:

        async def answers(times: int = 10) -> Any:
            """The last of so many: grpcio drops what is between its limits by chance."""
            for _ in range(times):
                found = await failing(stub.UnaryCall(pb.SimpleRequest()))
                assert found.code() is grpc.StatusCode.NOT_FOUND, found.details()
            return found

        for letter in ("漢", "ü", "😈", "%", "x"):
            error = GRPCError(Status.NOT_FOUND, letter * 5000)
            text = (await answers()).details()
            assert set(text) == {letter}
            assert 4096 - 12 <= len(encode_grpc_message(text)) <= 4096
        error = GRPCError(Status.NOT_FOUND, "\ud800 is half a letter")
        assert (await answers(1)).details() == "? is half a letter"
        assert not caplog.records
        error = GRPCError(Status.NOT_FOUND, "漢" * 5000, [StringValue(value="x" * 1000)])
        assert (await rpc_status_of(await answers())).value == "x" * 1000
        assert not caplog.records
        error = GRPCError(Status.NOT_FOUND, "no", [StringValue(value="x" * 9000)])
        found = await answers()
        assert found.details() == "no"
        assert "grpc-status-details-bin" not in dict(found.trailing_metadata())
        trailing = {"x-long": "x" * 20_000, "x-short": "x"}
        found = await answers()
        assert "x-long" not in dict(found.trailing_metadata())
        trailing = {"x-short": "x"}
        assert dict((await answers()).trailing_metadata())["x-short"] == "x"
    assert [record.getMessage().partition(": ")[2][:60] for record in caplog.records] == [
        f"{UNARY}: left out the status details"[:60],
    ]


async def test_an_error_of_a_call_that_the_handler_made_is_its_own_affair(caplog: pytest.LogCaptureFixture) -> None:
    from meshprotos import interop_pb2 as pb

    from meshlib.grpc.status import raised, to_mesh

    below: Any = None

    async def unary(stream: Any) -> None:
        raise below

    async with serve([with_unary(unary)]) as server, stub_of(server) as stub:
        below = raised(to_mesh(Status.UNAVAILABLE, "10.1.2.3 is down", endpoint="10.1.2.3:50051"))
        error = await failing(stub.UnaryCall(pb.SimpleRequest()))
        assert error.code() is grpc.StatusCode.UNKNOWN
        assert "10.1.2.3" not in error.details()
        below = raised(to_mesh(Status.NOT_FOUND, "no such thing", endpoint="10.1.2.3:50051"))
        error = await failing(stub.UnaryCall(pb.SimpleRequest()))
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
    assert len(caplog.records) == 1


async def test_a_handler_that_answers_nothing_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    from meshprotos import interop_pb2 as pb

    async def unary(stream: Any) -> None:
        await stream.recv_message()

    async with serve([with_unary(unary)]) as server, stub_of(server) as stub:
        assert (await failing(stub.UnaryCall(pb.SimpleRequest()))).code() is grpc.StatusCode.UNKNOWN
    assert "requires a single message" in caplog.text


# --- layers -----------------------------------------------------------------------------------------------------------


async def test_filters_see_each_call_and_may_refuse_time_and_wrap_it() -> None:
    from meshprotos import interop_pb2 as pb

    seen: list[Any] = []

    @meshlib.filter
    async def watch(request: Any, service: Any) -> Any:
        if request.metadata.get("x-user") == "nobody":
            raise GRPCError(Status.PERMISSION_DENIED, "not you")
        seen.append((request.dest, request.cardinality.name, request.client[0], request.peer.addr()[0]))
        reply = await service(request)
        seen.append((reply.status, reply is request))
        return reply

    async with serve([interop_handler()], "127.0.0.1:0", watch) as server, stub_of(server) as stub:
        await stub.UnaryCall(pb.SimpleRequest())
        error = await failing(stub.UnaryCall(pb.SimpleRequest(), metadata=(("x-user", "nobody"),)))
        assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, "not you")
        assert [reply.server async for reply in stub.StreamingOutput(pb.StreamRequest(sizes=[1]))] == ["server"]
    output = "/meshlib.grpctest.Interop/StreamingOutput"
    assert seen == [
        (UNARY, "UNARY_UNARY", "127.0.0.1", "127.0.0.1"),
        (Status.OK, True),
        (output, "UNARY_STREAM", "127.0.0.1", "127.0.0.1"),
        (Status.OK, True),
    ]


async def test_a_filter_may_answer_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    from meshprotos import interop_pb2 as pb

    handler = interop_handler()

    @meshlib.filter
    async def cache(request: Any, service: Any) -> Any:
        asked = await request.stream.recv_message()
        if asked.reply_size:
            await request.stream.send_trailing_metadata(status=Status.NOT_FOUND, status_message="not kept")
        else:
            await request.stream.send_message(pb.SimpleReply(server="cache"))
        return request

    async with serve([handler], "127.0.0.1:0", cache) as server, stub_of(server) as stub:
        assert (await stub.UnaryCall(pb.SimpleRequest())).server == "cache"
        error = await failing(stub.UnaryCall(pb.SimpleRequest(reply_size=1)))
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "not kept")
        numbers = server.metrics()
        assert numbers[f"methods{UNARY}/status/OK"] == numbers[f"methods{UNARY}/status/NOT_FOUND"] == 1
        assert numbers["success"] == 2
    assert handler.calls == 0
    assert not caplog.records


async def test_full_is_a_nack_and_over_a_rate_is_exhausted_with_pushback() -> None:
    from meshprotos import interop_pb2 as pb

    handler = interop_handler()
    async with serve([handler], "127.0.0.1:0", concurrency_limit(1)) as server, stub_of(server) as stub:
        first = asyncio.ensure_future(stub.UnaryCall(pb.SimpleRequest(delay=5)))
        await wait_until(lambda: handler.under_way == 1)
        error = await failing(stub.UnaryCall(pb.SimpleRequest()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        trailing = dict(error.trailing_metadata())
        assert (trailing["grpc-retry-pushback-ms"], trailing["meshlib-nack"]) == ("0", "true")
        assert handler.calls == 1
        first.cancel()
        await asyncio.wait([first])
    async with serve([handler], "127.0.0.1:0", rate_limit(1, burst=1)) as server, stub_of(server) as stub:
        await stub.UnaryCall(pb.SimpleRequest())
        error = await failing(stub.UnaryCall(pb.SimpleRequest()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0


async def test_a_refusal_that_is_final_says_never() -> None:
    from meshprotos import interop_pb2 as pb

    async def unary(stream: Any) -> None:
        raise Rejected("no more today", retryable=False)

    async with serve([with_unary(unary)]) as server, stub_of(server) as stub:
        error = await failing(stub.UnaryCall(pb.SimpleRequest()))
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
        assert dict(error.trailing_metadata())["meshlib-nack"] == "final"


async def test_spans_have_the_callers_trace_and_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshprotos import interop_pb2 as pb

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr("meshlib.telemetry.tracing._get_provider", lambda: provider)
    inside: list[int] = []

    async def unary(stream: Any) -> None:
        request = await stream.recv_message()
        inside.append(otel.get_current_span().get_span_context().span_id)
        if request.status.code:
            raise GRPCError(Status(request.status.code), "so")
        await stream.send_message(pb.SimpleReply())

    parent = (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),)
    async with serve([with_unary(unary)]) as server, stub_of(server) as stub:
        await stub.UnaryCall(pb.SimpleRequest(), metadata=parent)
        await failing(stub.UnaryCall(pb.SimpleRequest(status=pb.EchoStatus(code=5)), metadata=parent))
        await failing(stub.UnaryCall(pb.SimpleRequest(status=pb.EchoStatus(code=13)), metadata=parent))
    ok, missing, internal = spans.get_finished_spans()
    assert ok.name == UNARY[1:]
    assert ok.kind is SpanKind.SERVER
    assert ok.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert ok.parent.span_id == 0xB7AD6B7169203331
    assert inside[0] == ok.context.span_id
    facts = dict(ok.attributes)
    assert (facts["rpc.system.name"], facts["rpc.method"]) == ("grpc", UNARY[1:])
    assert facts["rpc.status_code"] == "OK"
    assert facts["network.peer.address"] == "127.0.0.1"
    assert missing.attributes["rpc.status_code"] == "NOT_FOUND"
    assert missing.status.status_code is StatusCode.UNSET
    assert internal.attributes["error.type"] == "INTERNAL"
    assert internal.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("trust", [True, False])
async def test_the_handler_runs_under_the_callers_context(trust: bool) -> None:
    from meshprotos import interop_pb2 as pb

    seen: list[Any] = []

    async def unary(stream: Any) -> None:
        seen.append((meshlib.current(), meshlib.remaining()))
        await stream.recv_message()
        await stream.send_message(pb.SimpleReply())

    metadata = (
        ("dtab-local", "/s/a => /s/b"),
        ("baggage", "k=v"),
        ("meshlib-client-id", "me"),
        ("meshlib-priority", "critical"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("grpc-previous-rpc-attempts", "2"),
    )
    async with serve([with_unary(unary)], trust_context=trust) as server, stub_of(server) as stub:
        # C core keeps grpc-… for itself, so the attempt is told by a raw client in test_hostile_server.py.
        await stub.UnaryCall(pb.SimpleRequest(), timeout=5, metadata=metadata[:-1])
        await stub.UnaryCall(pb.SimpleRequest())
    (context, left), (empty, never) = seen
    assert 0 < left <= 6  # C core rounds up
    assert never is None
    assert (context.baggage, context.client_id) == (("k=v", "me") if trust else ("", ""))
    assert f"{context.trace.trace:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert context.dtab == ((("/s/a", "/s/b"),) if trust else ())
    assert context.priority is (Priority.CRITICAL if trust else Priority.DEFAULT)
    assert empty.evolve(trace=None) == type(context)()


# --- time -------------------------------------------------------------------------------------------------------------


async def test_a_handler_is_cancelled_at_its_deadline_and_others_are_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from meshprotos import interop_pb2 as pb

    ends: list[Any] = []
    helpers: list[Any] = []

    async def helper() -> None:
        await asyncio.sleep(0.3)

    async def unary(stream: Any) -> None:
        request = await stream.recv_message()
        task = asyncio.create_task(helper())
        helpers.append(task)
        try:
            await asyncio.sleep(request.delay)
        finally:
            await asyncio.sleep(0.01)  # cleaning up may wait: the cancellation comes once
            ends.append(asyncio.current_task().cancelling())  # type: ignore[union-attr]
        await stream.send_message(pb.SimpleReply())

    async with serve([with_unary(unary)]) as server:
        # grpclib's client, without a deadline of its own, hears what the server says of the one in the metadata
        reply = await raw_unary(server, timeout="50m", delay=10)
        assert reply["grpc-status"] == "4"
        assert reply["grpc-message"] == "the deadline passed while the request was handled"
        assert ends == [1]
        await helpers[0]
        assert helpers[0].cancelling() == 0
        metrics = server.metrics()
        assert metrics["failures/DeadlineExceeded"] == 1
        assert metrics[f"methods{UNARY}/status/DEADLINE_EXCEEDED"] == 1
        assert metrics["cancelled"] == 0
    assert not caplog.records


async def test_work_whose_caller_has_given_up_is_refused() -> None:
    handler = interop_handler()
    async with serve([handler]) as server:
        reply = await raw_unary(server, timeout="1n", delay=0)
        assert reply["grpc-status"] == "4"
        assert handler.calls == 0
        assert server.metrics()["deadline/expired"] == 1


async def test_a_handler_that_will_not_stop_still_answers_for_its_deadline() -> None:
    from meshprotos import interop_pb2 as pb

    async def unary(stream: Any) -> None:
        await stream.recv_message()
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            await stream.send_message(pb.SimpleReply())

    async with serve([with_unary(unary)]) as server:
        assert (await raw_unary(server, timeout="20m", delay=0))["grpc-status"] == "4"


async def test_timeouts_of_the_handlers_own_still_work_inside() -> None:
    from meshprotos import interop_pb2 as pb

    caught: list[str] = []

    async def unary(stream: Any) -> None:
        await stream.recv_message()
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)
        except TimeoutError:
            caught.append("asyncio")
        with anyio.move_on_after(0.01):
            await anyio.sleep(10)
        caught.append("anyio")
        await stream.send_message(pb.SimpleReply())

    async with serve([with_unary(unary)]) as server, stub_of(server) as stub:
        await stub.UnaryCall(pb.SimpleRequest(), timeout=5)
    assert caught == ["asyncio", "anyio"]


async def raw_unary(server: Any, *, timeout: str, delay: float) -> dict[str, str]:
    """A unary call whose deadline only the server keeps; gives what the trailers say."""
    from meshprotos import interop_pb2 as pb

    from .raw import Peer

    async with Peer.to(server.address) as peer:
        stream = peer.request(UNARY, ("grpc-timeout", timeout))
        peer.message(stream, pb.SimpleRequest(delay=delay).SerializeToString(), end=True)
        return (await peer.answer(stream)).fields


# --- paths and bytes --------------------------------------------------------------------------------------------------


class _Answer:
    def __init__(self, body: bytes, contexts: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.body, self.contexts = body, contexts


async def test_services_of_bytes_are_served_as_msgpack() -> None:
    async def service(request: Any) -> Any:
        assert meshlib.remaining() is not None
        if request.body == b"raise":
            return _Answer(b"\x81\xa1a\x01", ((b"meshlib.raised", b"TooMuch"),))
        if request.body == b"too large":
            return _Answer(bytes(10_000), ((b"meshlib.raised", b"TooMuch"),))
        if request.body == b"bad":
            raise InvalidArgument("no such thing", path="x")
        return _Answer(request.dest.encode() + request.body)

    async with serve_rpc(service, {"Echo": ["echo"]}, "127.0.0.1:0") as server:
        # grpcio cannot say another content type than application/grpc, so that it is turned away is all it can show.
        async with grpc.aio.insecure_channel(server.address) as channel:
            error = await failing(channel.unary_unary("/Echo/echo")(b"x", timeout=5))
            assert error.code() is grpc.StatusCode.UNKNOWN

        from .raw import Peer

        async with Peer.to(server.address) as peer:

            async def call(body: bytes, path: str = "/Echo/echo") -> Any:
                stream = peer.request(path, ("grpc-timeout", "5S"), content_type="application/grpc+msgpack")
                peer.message(stream, body, end=True)
                return await peer.answer(stream)

            answer = await call(b"!")
            assert answer.fields["content-type"] == "application/grpc+msgpack"
            assert answer.messages == [b"/Echo/echo!"]
            assert answer.fields["grpc-status"] == "0"
            answer = await call(b"raise")
            assert (answer.fields["grpc-status"], answer.fields["meshlib-raised"]) == ("2", "TooMuch")
            assert answer.fields["meshlib-raised-bin"] == "gaFhAQ"
            assert server.metrics()["failures"] == 0, "a declared exception is an answer"
            assert (await call(b"too large")).fields["grpc-status"] == "2"
            assert (await call(b"bad")).fields["grpc-status"] == "3"
            assert (await call(b"!", "/Echo/other")).fields["grpc-status"] == "12"


async def test_nothing_of_a_server_is_logged_as_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    from meshprotos import interop_pb2 as pb

    handler = interop_handler()
    with caplog.at_level(logging.WARNING):
        async with serve([handler]) as server, stub_of(server) as stub:
            call = stub.UnaryCall(pb.SimpleRequest(delay=10))
            await wait_until(lambda: handler.under_way == 1)
            call.cancel()
            await wait_until(lambda: handler.under_way == 0)
            assert server.metrics()["cancelled"] == 1
    assert not caplog.records
