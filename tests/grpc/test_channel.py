"""The channel: made anywhere, closed anyhow, and everything that a stub's call can ask of it."""

import asyncio
import ssl

import anyio
import anyio.lowlevel
import grpclib._registry
import grpclib.client
import grpclib.events
import pytest
from google.rpc import error_details_pb2
from grpclib.client import StreamStreamMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError
from grpclib.metadata import Deadline
from h2.settings import SettingCodes

import meshlib
import meshlib.grpc
from meshlib import retry, timeout
from meshlib.core.context import Context, TraceId, use
from meshlib.core.priority import Priority
from meshlib.names.addr import Address

from .scripted import HEAD, OK, Bytes, answering, channel, message, scripted, unary
from .servers import aio_server


@pytest.fixture
def pb():
    from meshprotos import interop_pb2

    return interop_pb2


def stub_of(each):
    from meshprotos.interop_grpc import InteropStub

    return InteropStub(each)


async def until(condition):
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - the other side tells nobody
            await anyio.sleep(0.002)


# --- its life ---------------------------------------------------------------------------------------------------------


def test_it_is_made_without_an_event_loop_and_starts_with_its_first_call():
    each = meshlib.grpc.Channel("127.0.0.1:1", codec=Bytes())
    each.close()
    assert "127.0.0.1:1" in repr(each)

    async def main():
        async with scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, _):
            late = made_earlier(address)
            assert await unary(late)(b"x") == b"well"
            late.close()
            late.close()
            await late.aclose()
            with pytest.raises(GRPCError) as caught:
                await unary(late)(b"x")
            assert isinstance(caught.value, meshlib.ServiceClosed)
            assert caught.value.status is Status.CANCELLED
            assert late.status is meshlib.Status.CLOSED

    def made_earlier(address):
        return channel(address)

    asyncio.run(main())


async def test_close_ends_calls_under_way_and_leaves_nothing(pb):
    async with aio_server() as (address, servicer):
        each = meshlib.grpc.Channel(address)
        async with anyio.create_task_group() as group:

            async def call():
                with pytest.raises(GRPCError):
                    await stub_of(each).UnaryCall(pb.SimpleRequest(delay=30))

            group.start_soon(call)
            await until(lambda: servicer.under_way)
            each.close()
        await until(lambda: not servicer.under_way)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"max_message": 0},
        {"max_message": None},
        {"max_request": -1},
        {"ssl": "yes"},
        {"idempotent": 5},
        {"idempotent": ["Get"]},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(meshlib.ConfigurationError):
        meshlib.grpc.Channel("127.0.0.1:1", **options)


def test_targets_and_layers_that_make_no_sense_are_refused():
    with pytest.raises(meshlib.ConfigurationError):
        meshlib.grpc.Channel("")
    with pytest.raises(meshlib.ConfigurationError):
        meshlib.grpc.Channel("h:1", object())
    with pytest.raises(meshlib.ConfigurationError, match=r"give one target, '127\.0\.0\.1:50051'"):
        meshlib.grpc.Channel("127.0.0.1", 50051)
    for options in ({"most": 0}, {"age": 0}, {"idle": -1}, {"most": True}):
        with pytest.raises(meshlib.ConfigurationError):
            meshlib.grpc.connections(**options)


async def test_over_a_unix_socket(pb, tmp_path):
    async with (
        aio_server(address=f"unix:{tmp_path}/s") as (_, _servicer),
        meshlib.grpc.Channel(f"unix://{tmp_path}/s") as each,
    ):
        assert await stub_of(each).EmptyCall(pb.Empty()) == pb.Empty()


# --- TLS --------------------------------------------------------------------------------------------------------------


async def test_a_certificate_for_somebody_else_is_refused(certificate, pb):
    async with aio_server(tls=certificate) as (address, _):
        context = ssl.create_default_context(cafile=certificate[0])
        context.set_alpn_protocols(["h2"])
        async with meshlib.grpc.Channel(address, ssl=context) as each:
            with pytest.raises(GRPCError, match=r"TLS failed.*127\.0\.0\.1; .*ssl_target_name_override") as caught:
                await stub_of(each).EmptyCall(pb.Empty(), timeout=0.3)
        assert caught.value.status in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED)
        async with meshlib.grpc.Channel(address, ssl=True) as each:
            with pytest.raises(GRPCError, match="TLS failed"):
                await stub_of(each).EmptyCall(pb.Empty(), timeout=0.3)


async def test_the_certificate_must_be_for_the_host_that_a_dns_target_names(certificate):
    context = ssl.create_default_context(cafile=certificate[0])
    context.set_alpn_protocols(["h2"])
    async with aio_server(tls=certificate) as (address, _):
        async with meshlib.grpc.Channel(f"dns://greeter.test:{address.rpartition(':')[2]}", ssl=context) as each:
            # No name server is asked: the address is put where the resolver would put it.
            session = await each.connector.connect(Address.parse(address), each.client.env, None)
            assert session.peer.cert()["subject"] == ((("commonName", "greeter.test"),),)
            session.retire()
        async with meshlib.grpc.Channel(f"dns://other.test:{address.rpartition(':')[2]}", ssl=context) as each:
            with pytest.raises(meshlib.ConnectError, match=r"TLS failed.*other\.test"):
                await each.connector.connect(Address.parse(address), each.client.env, None)


async def test_a_server_that_does_not_offer_h2_is_refused(certificate):
    async def talk(reader, writer):
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=context)
    try:
        ours = ssl.create_default_context(cafile=certificate[0])
        ours.set_alpn_protocols(["h2"])
        address = "{}:{}".format(*server.sockets[0].getsockname())
        config = Configuration(ssl_target_name_override="greeter.test")
        async with channel(address, ssl=ours, config=config) as each:
            with pytest.raises(GRPCError, match="by ALPN the server speaks nothing, not h2"):
                await unary(each)(b"x", timeout=0.3)
    finally:
        server.close()


# --- what a call says -------------------------------------------------------------------------------------------------


async def test_a_request_carries_its_context(pb):
    async with scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers):
        async with channel(address) as each:
            context = Context(
                trace=TraceId(1, 2, sampled=True, state="a=b"),
                dtab=(("/s/a", "/s/b"),),
                baggage="user=1",
                client_id="me",
                priority=Priority.CRITICAL,
            )
            with use(context):
                await unary(each)(b"x", timeout=5, metadata={"own": "value", "own-bin": b"\0\1"})
        async with channel(address, propagate=False) as each:
            with use(context):
                await unary(each)(b"x")
    head = peers[0].heads[1]
    assert head["traceparent"].startswith("00-00000000000000000000000000000001-")
    assert head["tracestate"] == "a=b"
    assert head["dtab-local"] == "/s/a => /s/b"
    assert (head["baggage"], head["meshlib-client-id"], head["meshlib-priority"]) == ("user=1", "me", "critical")
    assert 4_000_000 < int(head["grpc-timeout"].removesuffix("u")) <= 5_000_000
    assert (head["own"], head["own-bin"]) == ("value", "AAE")
    assert head[":path"] == "/x.Y/Z"
    assert (head[":method"], head[":scheme"], head["te"], head[":authority"]) == ("POST", "http", "trailers", address)
    assert head["content-type"] == "application/grpc"
    bare = peers[1].heads[1]
    assert not {"traceparent", "dtab-local", "baggage", "meshlib-client-id", "meshlib-priority"} & bare.keys()
    assert "grpc-timeout" in bare


async def test_headers_are_right_however_often_they_are_sent():
    """The block of what is always the same is encoded once, and the peer's table must agree."""
    async with scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers), channel(address) as each:
        for n in range(300):
            path = f"/x.Y/Method{n % 67}"
            assert await unary(each, path)(b"x", metadata={"n": str(n)}) == b"well"
    peer = peers[0]
    assert [(head[":path"], head["n"]) for head in peer.heads.values()] == [
        (f"/x.Y/Method{n % 67}", str(n)) for n in range(300)
    ]


@pytest.mark.parametrize(
    "metadata", [{"grpc-x": "a"}, {"te": "a"}, {"a b": "c"}, {"a": "\n"}, {"a-bin": "text"}, {"a": b""}]
)
async def test_metadata_that_may_not_be_sent(metadata):
    async with channel("127.0.0.1:1") as each:
        with pytest.raises((ValueError, TypeError)):
            await unary(each)(b"x", metadata=metadata)


async def test_the_nearer_of_timeout_deadline_and_what_was_inherited_counts():
    async with scripted(answering(lambda p, s: None)) as (address, peers):
        async with channel(address) as each:
            for seconds in ((0.03, 30), (30, 0.03)):
                options = {"timeout": seconds[0], "deadline": Deadline.from_timeout(seconds[1])}
                call = each.request("/x.Y/Z", unary(each)._cardinality, bytes, bytes, **options)
                with pytest.raises(meshlib.DeadlineExceeded):  # noqa: PT012 - the call as a stub makes it
                    async with call as stream:
                        await stream.send_message(b"x")
                        await stream.recv_message()
            with pytest.raises(meshlib.DeadlineExceeded), meshlib.deadline(0.03):
                await unary(each)(b"x", timeout=30)
            with pytest.raises(TimeoutError, match="had passed before"):
                await unary(each)(b"x", timeout=0)
            assert not any(node.load for node in each.endpoints)
        assert len(peers[0].requests) == 3


async def test_the_default_limit_is_for_unary_calls_alone():
    async with scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers):
        async with channel(address) as each:
            await unary(each)(b"x")
            assert await StreamStreamMethod(each, "/x.Y/S", bytes, bytes)([b"x"]) == [b"well"]
        async with channel(address, timeout(7)) as each:
            assert await StreamStreamMethod(each, "/x.Y/S", bytes, bytes)([b"x"]) == [b"well"]
    assert "grpc-timeout" in peers[0].heads[1]
    assert "grpc-timeout" not in peers[0].heads[3]
    assert peers[1].heads[1]["grpc-timeout"].startswith("6")


# --- grpclib's events, and its misuse ---------------------------------------------------------------------------------


async def test_events_are_told_and_may_change_what_they_tell_of(pb):
    seen = []

    async def sent(event):
        seen.append((event.method_name, event.deadline is not None, event.content_type))
        event.metadata["x-initial"] = "by event"

    async def message(event):
        seen.append("message out")
        if isinstance(event.message, pb.SimpleRequest):
            event.message = pb.SimpleRequest(reply_size=3)

    async def initial(event):
        seen.append(event.metadata.get("x-initial", "no initial"))

    async def received(event):
        seen.append(len(event.message.payload))

    async def trailing(event):
        seen.append((event.status, event.status_message))

    async with aio_server() as (address, _), meshlib.grpc.Channel(address) as each:
        events = grpclib.events
        grpclib.events.listen(each, events.SendRequest, sent)
        grpclib.events.listen(each, events.SendMessage, message)
        grpclib.events.listen(each, events.RecvInitialMetadata, initial)
        grpclib.events.listen(each, events.RecvMessage, received)
        grpclib.events.listen(each, events.RecvTrailingMetadata, trailing)
        await stub_of(each).UnaryCall(pb.SimpleRequest(), timeout=5)
        name = "/meshlib.grpctest.Interop/UnaryCall"
        expected = [(name, True, "application/grpc"), "message out", "by event", 3, (Status.OK, None)]
        assert seen == expected
        seen.clear()
        with pytest.raises(GRPCError):
            await stub_of(each).UnimplementedCall(pb.Empty())
        assert seen[-1][0] is Status.UNIMPLEMENTED
    assert meshlib.grpc


async def test_a_stream_is_told_of_when_it_is_misused(pb):
    async with aio_server() as (address, _), meshlib.grpc.Channel(address) as each:
        stub = stub_of(each)
        async with stub.UnaryCall.open() as stream:
            with pytest.raises(ProtocolError, match="not sent"):
                await stream.recv_initial_metadata()
            with pytest.raises(ProtocolError, match="not sent"):
                await stream.recv_message()
            with pytest.raises(ProtocolError, match="not sent"):
                await stream.end()
            with pytest.raises(ProtocolError, match="not sent"):
                await stream.cancel()
            with pytest.raises(ProtocolError, match="requires a message"):
                await stream.send_request(end=True)
            await stream.send_request()
            with pytest.raises(ProtocolError, match="already sent"):
                await stream.send_request()
            with pytest.raises(ProtocolError, match="requires a single message"):
                await stream.end()
            await stream.send_message(pb.SimpleRequest(reply_size=2))
            with pytest.raises(ProtocolError, match="already sent"):
                await stream.send_message(pb.SimpleRequest())
            await stream.end()
            with pytest.raises(ProtocolError, match="already ended"):
                await stream.end()
            with pytest.raises(ProtocolError, match="Initial metadata was not received"):
                await stream.recv_trailing_metadata()
            await stream.recv_initial_metadata()
            with pytest.raises(ProtocolError, match="already received"):
                await stream.recv_initial_metadata()
            assert len((await stream.recv_message()).payload) == 2
            assert await stream.recv_message() is None
            await stream.recv_trailing_metadata()
            with pytest.raises(ProtocolError, match="already received"):
                await stream.recv_trailing_metadata()
        async with stub.FullDuplex.open() as stream:
            await stream.send_message(pb.StreamRequest(), end=True)
            with pytest.raises(ProtocolError, match="ended"):
                await stream.send_message(pb.StreamRequest())
        async with stub.FullDuplex.open() as stream:
            await stream.send_request()
            with pytest.raises(ProtocolError, match="was not ended"):
                await stream.recv_trailing_metadata()
            await stream.cancel()
            with pytest.raises(ProtocolError, match="already cancelled"):
                await stream.cancel()
        async with stub.FullDuplex.open():
            pass  # nothing was asked, and nothing is waited for
        with pytest.raises(TypeError):
            await stub.UnaryCall(pb.Empty())
        assert not any(node.load for node in each.endpoints)


async def test_a_unary_call_that_nobody_waits_for_is_made_all_the_same(pb):
    async with aio_server() as (address, servicer), meshlib.grpc.Channel(address) as each:
        async with stub_of(each).UnaryCall.open() as stream:
            await stream.send_message(pb.SimpleRequest())
        assert servicer.calls == 1
        with pytest.raises(GRPCError):
            async with stub_of(each).UnimplementedCall.open() as stream:
                await stream.send_message(pb.Empty())


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_a_refused_connect_says_where_and_why():
    async with channel("127.0.0.1:1", label="shop") as each:
        with pytest.raises(GRPCError) as caught:
            await unary(each)(b"x", timeout=0.2)
    error = caught.value
    assert isinstance(error, meshlib.MeshError)
    for part in ("shop", "127.0.0.1:1", "Connection refused"):
        assert part in str(error)
        assert part in error.message


async def test_rich_details_and_trailing_metadata_pass():
    from google.rpc import status_pb2

    from meshlib.grpc.calling.channel import Channel

    rich = status_pb2.Status(code=9, message="no")
    rich.details.add().Pack(error_details_pb2.ErrorInfo(reason="BROKE", domain="shop"))
    import base64

    trailers = [
        ("grpc-status", "9"),
        ("grpc-message", "no"),
        ("grpc-status-details-bin", base64.b64encode(rich.SerializeToString()).decode().rstrip("=")),
        ("x-more", "yes"),
    ]
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"", trailers))) as (address, _),
        Channel(address) as each,
    ):
        from google.protobuf.empty_pb2 import Empty

        with pytest.raises(GRPCError) as caught:
            await UnaryUnaryMethod(each, "/x.Y/Z", Empty, Empty)(Empty())
    error = caught.value
    assert (error.status, error.message) == (Status.FAILED_PRECONDITION, "no")
    assert error.details[0].reason == "BROKE"
    assert error.trailing_metadata["x-more"] == "yes"
    assert error.processed is True


async def test_a_message_that_is_too_large_to_send():
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers),
        channel(address, max_request=10) as each,
    ):
        assert await unary(each)(bytes(10)) == b"well"
        with pytest.raises(GRPCError, match="11 bytes") as caught:
            await unary(each)(bytes(11))
    assert caught.value.status is Status.RESOURCE_EXHAUSTED
    assert len(peers[0].requests) == 1


# --- retries ----------------------------------------------------------------------------------------------------------


def failing_at_first(*failures, answer=b"well"):
    """Fails as told, once each, then answers."""

    async def script(peer):
        for n, failure in enumerate(failures):
            failure(peer, await peer.request(n + 1))
        n = len(failures)
        while True:
            n += 1
            peer.answer(await peer.request(n), answer)

    return script


def status(code, *more):
    head = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", str(code)), *more]
    return lambda p, s: p.headers(s, head, end=True)


@pytest.mark.parametrize("code", [1, 2, 13, 14])
async def test_an_idempotent_call_is_made_again(code):
    async with (
        scripted(failing_at_first(status(code), status(code))) as (address, peers),
        channel(address, retry(wait=0), idempotent="x.Y/*") as each,
    ):
        assert await unary(each)(b"x") == b"well"
    assert [head.get("grpc-previous-rpc-attempts") for head in peers[0].heads.values()] == [None, "1", "2"]


@pytest.mark.parametrize("code", [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16])
async def test_what_may_not_help_is_not_made_again(code):
    async with (
        scripted(failing_at_first(status(code))) as (address, peers),
        channel(address, retry(wait=0), idempotent=True) as each,
    ):
        with pytest.raises(GRPCError) as caught:
            await unary(each)(b"x")
        assert caught.value.status is Status(code)
        assert len(peers[0].requests) == 1


async def test_a_call_of_which_nobody_knows_that_it_is_idempotent_is_not_made_again():
    async with scripted(failing_at_first(status(14))) as (address, peers), channel(address) as each:
        with pytest.raises(GRPCError, match="not idempotent"):
            await unary(each)(b"x")
    assert len(peers[0].requests) == 1


async def test_what_protobuf_declares_is_known(pb):
    async with aio_server(fail="UNAVAILABLE") as (address, servicer):
        async with meshlib.grpc.Channel(address, retry(wait=0)) as each:
            with pytest.raises(GRPCError, match="3 attempts were made"):
                await stub_of(each).Read(pb.SimpleRequest())
            assert servicer.calls == 3
            with pytest.raises(GRPCError, match="not idempotent"):
                await stub_of(each).UnaryCall(pb.SimpleRequest())
            assert servicer.calls == 4
        async with meshlib.grpc.Channel(address, retry(wait=0), idempotent=lambda path: False) as each:
            with pytest.raises(GRPCError, match="not idempotent"):
                await stub_of(each).Read(pb.SimpleRequest())


async def test_pushback_is_obeyed():
    wait = status(8, ("grpc-retry-pushback-ms", "30"))
    never = status(14, ("grpc-retry-pushback-ms", "-1"))
    async with (
        scripted(failing_at_first(wait)) as (address, peers),
        channel(address, retry(wait=0), idempotent=True) as each,
    ):
        before = anyio.current_time()
        assert await unary(each)(b"x") == b"well"
        assert anyio.current_time() - before >= 0.03
    async with (
        scripted(failing_at_first(never)) as (address, peers),
        channel(address, retry(wait=0), idempotent=True) as each,
    ):
        with pytest.raises(GRPCError, match="asked not to be tried again"):
            await unary(each)(b"x")
    assert len(peers[0].requests) == 1


async def test_a_nack_goes_again_though_the_call_is_not_idempotent():
    nack = status(14, ("grpc-retry-pushback-ms", "0"), ("meshlib-nack", "true"))
    final = status(14, ("grpc-retry-pushback-ms", "0"), ("meshlib-nack", "final"))
    async with scripted(failing_at_first(nack, nack)) as (address, peers), channel(address) as each:
        assert await unary(each)(b"x") == b"well"
        assert each.metrics()["retries/requeues"] == 2
    async with scripted(failing_at_first(final)) as (address, peers), channel(address) as each:
        with pytest.raises(meshlib.Rejected):
            await unary(each)(b"x")
    assert len(peers[0].requests) == 1


async def test_an_answer_that_is_the_applications_is_no_failure_of_the_server():
    async with scripted(answering(status(5))) as (address, _), channel(address) as each:
        for _ in range(20):
            with pytest.raises(GRPCError):
                await unary(each)(b"x")
        numbers = each.metrics()
        assert (numbers["success"], numbers["failures"]) == (20, 0)
        assert each.endpoints[0].status is meshlib.Status.OPEN


# --- cancellation -----------------------------------------------------------------------------------------------------


def silent_but_for_warm(peer, stream):
    if peer.heads[stream][":path"] == "/x.Y/Warm":
        peer.answer(stream, b"well")


async def test_cancelling_a_caller_resets_its_stream_and_leaves_its_task_as_it_was():
    async with scripted(answering(silent_but_for_warm)) as (address, peers), channel(address) as each:
        await unary(each, "/x.Y/Warm")(b"x")  # so that the others are sent at once
        task = asyncio.current_task()
        with anyio.move_on_after(0.2) as scope:
            await unary(each)(b"x")
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await unary(each)(b"x")
        with pytest.raises(meshlib.DeadlineExceeded):
            await unary(each)(b"x", timeout=0.2)
        assert task.cancelling() == 0
        await until(lambda: len(peers[0].resets) == 3)
        assert [code for _, code in peers[0].resets] == [8, 8, 8]
        assert not any(node.load for node in each.endpoints)
        # What encloses a call that failed still works.
        with pytest.raises(TimeoutError):  # noqa: PT012 - the call as a stub makes it
            async with asyncio.timeout(0.3):
                with pytest.raises(meshlib.DeadlineExceeded):
                    await unary(each)(b"x", timeout=0.01)
                await asyncio.sleep(30)


async def test_a_unary_call_is_cancelled_from_another_task():
    async with scripted(answering(lambda p, s: None)) as (address, peers), channel(address) as each:
        outcome = []

        async def call(stream):
            async with stream:
                await stream.send_message(b"x")
                try:
                    await stream.recv_message()
                except GRPCError as error:
                    outcome.append((error.status, asyncio.current_task().cancelling()))
                await anyio.lowlevel.checkpoint()  # the task is as good as new

        stream = unary(each).open()
        async with anyio.create_task_group() as group:
            group.start_soon(call, stream)
            await until(lambda: peers and peers[0].requests)
            await stream.cancel()
        assert outcome == [(Status.CANCELLED, 0)]
        await until(lambda: peers[0].resets)
        assert not any(node.load for node in each.endpoints)


async def test_a_stream_that_is_left_is_reset():
    async with (
        scripted(answering(lambda p, s: p.headers(s, [(":status", "200"), ("content-type", "application/grpc")]))) as (
            address,
            peers,
        ),
        channel(address) as each,
    ):
        with pytest.raises(KeyError):  # noqa: PT012 - the call as a stub makes it
            async with StreamStreamMethod(each, "/x.Y/Z", bytes, bytes).open() as stream:
                await stream.send_message(b"x")
                await stream.recv_initial_metadata()
                assert each.endpoints[0].load == 1
                raise KeyError
        assert each.endpoints[0].load == 0
        await until(lambda: peers[0].resets == [(1, 8)])


# --- connections ------------------------------------------------------------------------------------------------------


async def test_callers_that_come_together_share_one_connect():
    async with scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers), channel(address) as each:
        async with anyio.create_task_group() as group:
            for _ in range(64):
                group.start_soon(unary(each), b"x")
        assert len(peers) == 1
        assert each.metrics()["pool/connects"] == 1


def answering_at_once(peers, calls):
    """A script that answers nobody before so many calls have come, and then all of them."""
    told = []

    async def script(peer):
        n = 0
        while True:
            n += 1
            await peer.request(n)
            if not told and sum(len(other.requests) for other in peers) == calls:
                told.append(True)
                for other in peers:
                    for stream in other.requests:
                        other.answer(stream, b"well")

    return script


async def test_a_further_connection_is_there_before_the_servers_limit_makes_calls_wait():
    seen = []
    async with (
        scripted(answering_at_once(seen, 25), settings={SettingCodes.MAX_CONCURRENT_STREAMS: 10}, peers=seen) as (
            address,
            peers,
        ),
        channel(address) as each,
    ):
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                for _ in range(25):
                    group.start_soon(unary(each), b"x")
        assert 3 <= len(peers) <= 4
        assert max(len(peer.requests) for peer in peers) <= 10
        assert each.endpoints[0].load == 0


async def test_beyond_the_most_connections_calls_wait_in_line_until_their_deadline():
    async with (
        scripted(answering(lambda p, s: None), settings={SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as (
            address,
            peers,
        ),
        channel(address, meshlib.grpc.connections(most=1)) as each,
    ):
        async with anyio.create_task_group() as group:

            async def first():
                with pytest.raises(GRPCError):
                    await unary(each)(b"1", timeout=1)

            group.start_soon(first)
            await until(lambda: peers and peers[0].requests)
            with pytest.raises(meshlib.DeadlineExceeded, match="room in a connection"):
                await unary(each)(b"2", timeout=0.2)
            await until(lambda: peers[0].resets)
            peers[0].resets.clear()
        numbers = each.metrics()
        assert (numbers["pool/connects"], numbers["pool/waited"]) == (1, 1)
    assert len(peers[0].requests) == 1


async def test_whoever_waits_for_room_gets_it_in_turn():
    async def script(peer):
        n = 0
        while True:
            n += 1
            stream = await peer.request(n)
            await peer.until(lambda s=stream: s in peer.ended)
            peer.answer(stream, peer.data[stream][5:])

    async with (
        scripted(script, settings={SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as (address, peers),
        channel(address, meshlib.grpc.connections(most=1)) as each,
    ):
        order = []

        async def call(n):
            order.append(await unary(each)(b"%d" % n))

        async with anyio.create_task_group() as group:
            for n in range(6):
                group.start_soon(call, n)
                await anyio.lowlevel.checkpoint()
        assert sorted(order) == [b"%d" % n for n in range(6)]
    assert len(peers) == 1


async def test_a_connection_is_replaced_when_it_is_old_and_no_call_notices():
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers),
        channel(address, meshlib.grpc.connections(age=0.05)) as each,
    ):
        assert await unary(each)(b"x") == b"well"
        with anyio.fail_after(10):
            while each.metrics()["pool/replaced"] < 3:
                assert await unary(each)(b"x") == b"well"
                await anyio.sleep(0.002)
        numbers = each.metrics()
        assert len(peers) >= 4
        assert (numbers["failures"], numbers.get("retries/requeues", 0)) == (0, 0)


async def test_idle_connections_beyond_the_first_end():
    seen = []
    async with (
        scripted(answering_at_once(seen, 4), settings={SettingCodes.MAX_CONCURRENT_STREAMS: 2}, peers=seen) as (
            address,
            peers,
        ),
        channel(address, meshlib.grpc.connections(idle=0.02)) as each,
    ):
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(unary(each), b"x")
        await until(lambda: sum(bool(peer.terminated) for peer in peers) == len(peers) - 1 >= 1)
        assert not peers[0].terminated


# --- keepalive --------------------------------------------------------------------------------------------------------


async def test_a_connection_that_answers_no_ping_is_given_up():
    async def script(peer):
        stream = await peer.request()
        if len(peers) == 1:
            await anyio.sleep(30)  # deaf from now on
        peer.answer(stream, b"well")

    async with scripted(script) as (address, peers):
        config = Configuration(_keepalive_time=0.1, _keepalive_timeout=0.3)
        async with channel(address, config=config, idempotent=True) as each:
            with anyio.fail_after(10):
                assert await unary(each)(b"x") == b"well"
    assert len(peers) == 2


async def test_pings_are_few_while_a_call_waits_and_none_come_when_idle():
    async def script(peer):
        stream = await peer.request()
        with anyio.move_on_after(0.2):
            await peer.until(lambda: False)
        peer.answer(stream, b"well")

    async with scripted(script) as (address, peers):
        from meshlib.client import Liveness

        async with channel(address, Liveness(0.02, 0.5)) as each:
            assert await unary(each)(b"x", timeout=5) == b"well"
            assert peers[0].pings == 2
            await anyio.sleep(0.1)
            assert peers[0].pings == 2


async def test_trailers_that_are_ok_are_told_of():
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well", [*OK, ("x-end", "yes")]))) as (address, _),
        channel(address) as each,
    ):
        async with unary(each).open() as stream:
            await stream.send_message(b"x")
            assert [item async for item in stream] == [b"well"]
            await stream.recv_trailing_metadata()
        assert stream.trailing_metadata["x-end"] == "yes"
        assert dict(stream.initial_metadata) == {}


# --- hedges -----------------------------------------------------------------------------------------------------------


async def test_hedged_calls_and_streams_leave_no_stream_behind():
    """Quick ones teach it what slow is; then the first copy hangs, and the second is answered."""
    slow = []

    def step(peer, stream):
        if peer.heads[stream][":path"] == "/x.Y/Slow" and not slow:
            slow.append(stream)
        else:
            peer.answer(stream, b"well")

    async with (
        scripted(answering(step)) as (address, peers),
        channel(address, meshlib.hedge(extra_load=0.2), idempotent=True) as each,
    ):
        with anyio.fail_after(20):
            for kind in (unary, lambda *given: UnaryStreamMethod(*given, bytes, bytes)):
                while not each.metrics()["hedges/after_ms"]:
                    await unary(each)(b"x")
                slow.clear()
                assert await kind(each, "/x.Y/Slow")(b"x") in (b"well", [b"well"])
                await until(lambda: len(peers[0].resets) == 1)
                assert peers[0].resets.pop() == (slow[0], 8)
                assert each.endpoints[0].load == 0
        assert each.metrics()["hedges/won"] >= 2


def test_type_checkers_and_isinstance_take_it_for_grpclibs():
    each = meshlib.grpc.Channel("127.0.0.1:1")
    assert isinstance(each, grpclib.client.Channel)
    assert each not in grpclib._registry.channels
    del each


# --- waiting, and waiting again ---------------------------------------------------------------------------------------


async def test_whoever_waits_for_a_stream_may_stop_waiting_and_wait_again():
    async with scripted(answering(lambda p, s: None)) as (address, peers), channel(address) as each:
        async with UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes).open() as stream:
            await stream.send_message(b"x")
            await until(lambda: peers and peers[0].requests)  # it has been sent before anybody waits for an answer
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(stream.recv_message(), 0.005)
            peers[0].headers(1, HEAD)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.recv_message(), 0.005)
            peers[0].h2.send_data(1, message(b"one"))
            peers[0].headers(1, OK, end=True)
            assert await stream.recv_message() == b"one"
            assert await stream.recv_message() is None
        assert peers[0].requests == [1]
        assert each.endpoints[0].load == 0


async def test_whoever_stops_waiting_for_a_unary_call_has_given_it_up():
    async with scripted(answering(lambda p, s: None)) as (address, peers), channel(address) as each:
        async with unary(each).open() as stream:
            await stream.send_message(b"x")
            receiving = asyncio.ensure_future(stream.recv_message())
            await until(lambda: peers and peers[0].requests)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            for _ in range(2):
                with pytest.raises(GRPCError) as caught:
                    await stream.recv_message()
                assert caught.value.status is Status.CANCELLED
            await stream.cancel()
        assert peers[0].requests == [1]
        await until(lambda: peers[0].resets)


@pytest.mark.parametrize("way", ["left", "cancelled", "raises"])
async def test_a_stream_that_is_still_being_opened_when_it_is_left_is_reset(way):
    async with scripted(answering(lambda p, s: None)) as (address, peers), channel(address) as each:
        try:
            async with UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes).open() as stream:
                await stream.send_message(b"x")
                await until(lambda: peers and peers[0].requests)
                if way == "raises":
                    raise KeyError
                await stream.cancel()
                if way == "cancelled":
                    with pytest.raises(GRPCError) as caught:
                        await stream.recv_message()
                    assert caught.value.status is Status.CANCELLED
        except KeyError:
            assert way == "raises"
        await until(lambda: peers[0].resets == [(1, 8)])
        assert each.endpoints[0].load == 0


# --- much to send -----------------------------------------------------------------------------------------------------


async def test_messages_larger_than_any_window_go_up_whole(pb):
    async with aio_server() as (address, _), meshlib.grpc.Channel(address) as each:
        sizes = [3_000_000, 5, 1_000_000, 0]
        total = await stub_of(each).StreamingInput([pb.SimpleRequest(payload=bytes(size)) for size in sizes])
        assert (total.size, total.count) == (sum(sizes), 4)
        assert (
            len((await stub_of(each).UnaryCall(pb.SimpleRequest(payload=bytes(3_000_000), reply_size=7))).payload) == 7
        )


@pytest.mark.parametrize("how", ["deadline", "cancelled", "lost"])
async def test_a_server_that_does_not_read_holds_no_caller(how):
    """Its windows are as wide as can be, so that what is full in the end is the system's own buffer."""

    async def script(peer):
        peer.h2.increment_flow_control_window(2**30)
        peer.flush()
        await peer.request()
        await anyio.sleep(0.2)
        if how == "lost":
            peer.writer.transport.abort()
        else:
            await anyio.sleep(30)

    settings = {SettingCodes.INITIAL_WINDOW_SIZE: 2**30, SettingCodes.MAX_FRAME_SIZE: 2**24 - 1}
    async with scripted(script, settings=settings) as (address, _), channel(address) as each:
        with anyio.fail_after(10):
            if how == "deadline":
                with pytest.raises(meshlib.DeadlineExceeded):
                    await unary(each)(bytes(60_000_000), timeout=0.1)
            elif how == "cancelled":
                with anyio.move_on_after(0.1) as scope:
                    await unary(each)(bytes(60_000_000))
                assert scope.cancelled_caught
            else:
                with pytest.raises(meshlib.ConnectionLost):
                    await unary(each)(bytes(60_000_000))
            # And nobody else, who finds the connection as full.
            with pytest.raises(GRPCError):
                await unary(each)(b"x", timeout=0.1)
        assert each.endpoints[0].load == 0


async def test_what_a_server_said_before_it_failed_is_heard(pb):
    """Headers, messages and a failure in one packet: the messages are delivered, and nothing is made again."""

    def step(peer, stream):
        peer.h2.send_headers(stream, [*HEAD, ("x-first", "yes")])
        if peer.heads[stream][":path"] == "/x.Y/Z":
            peer.h2.send_data(stream, message(b"one"))
            peer.headers(stream, [("grpc-status", "14")], end=True)
        else:
            peer.headers(stream, [("grpc-status", "5"), ("x-last", "yes")], end=True)

    async with scripted(answering(step)) as (address, peers), channel(address, idempotent=True) as each:
        got = []
        with pytest.raises(GRPCError) as caught:  # noqa: PT012 - the call as a stub makes it
            async with UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes).open() as stream:
                await stream.send_message(b"x")
                got.extend([item async for item in stream])
        assert (got, caught.value.status) == ([b"one"], Status.UNAVAILABLE)
        with pytest.raises(GRPCError) as caught:  # noqa: PT012 - the call as a stub makes it
            async with UnaryStreamMethod(each, "/x.Y/Other", bytes, bytes).open() as stream:
                await stream.send_message(b"x")
                await stream.recv_initial_metadata()
                assert stream.initial_metadata["x-first"] == "yes"
                await stream.recv_message()
        assert caught.value.trailing_metadata["x-last"] == "yes"
        assert len(peers[0].requests) == 2


@pytest.mark.parametrize("answers", [True, False])
async def test_a_stream_that_runs_out_of_time_tells_against_a_server_only_if_it_did_not_answer(answers):
    def step(peer, stream):
        if answers:
            peer.headers(stream, HEAD)

    async with (
        scripted(answering(step)) as (address, _),
        channel(address, meshlib.failure_accrual(failures=1)) as each,
    ):
        with pytest.raises(meshlib.DeadlineExceeded):
            await UnaryStreamMethod(each, "/x.Y/Z", bytes, bytes)(b"x", timeout=0.4)
        assert each.endpoints[0].status is (meshlib.Status.OPEN if answers else meshlib.Status.BUSY)
