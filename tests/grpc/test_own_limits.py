"""What this side will not take or cannot send: the call fails, and neither its server nor anybody else's call pays."""

from typing import NamedTuple

import anyio
import anyio.lowlevel
import pytest
from grpclib.client import UnaryStreamMethod
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from h2.settings import SettingCodes
from hyperframe.frame import PingFrame, SettingsFrame

import meshlib
import meshlib.grpc
from meshlib import timeout
from meshlib.core.clock import Clock
from meshlib.core.context import VAR, use
from meshlib.grpc.calling import wire
from meshlib.grpc.calling.heads import CONNECTION_WINDOW, Options
from meshlib.grpc.calling.keepalive import Keepalive, Policy
from meshlib.grpc.calling.rpc import rpc_client
from meshlib.grpc.calling.session import GrpcSession
from meshlib.telemetry.metrics import Registry

from .scripted import HEAD, OK, answering, channel, message, scripted, unary
from .servers import aio_server

MANY = 12
"""More than it takes for the breaker to eject an endpoint, and for the throttle to refuse calls."""


@pytest.fixture
def stub_of():
    from meshprotos.interop_grpc import InteropStub

    return InteropStub


@pytest.fixture
def pb():
    from meshprotos import interop_pb2

    return interop_pb2


# --- what comes -------------------------------------------------------------------------------------------------------


async def test_replies_that_are_too_large_for_one_caller_do_not_cost_the_others_their_server():
    def step(peer, stream):
        large = peer.heads[stream][":path"] != "/x.Y/Z"
        peer.answer(stream, b"x" * (101 if large else 100))

    async with scripted(answering(step)) as (address, peers), channel(address, max_message=100) as each:
        for _ in range(MANY):
            with pytest.raises(meshlib.RemoteError, match="101 bytes, more than the 100") as caught:
                await unary(each, "/x.Y/Large")(b"x")
            assert caught.value.status is Status.RESOURCE_EXHAUSTED
            assert not isinstance(caught.value, meshlib.Rejected)
            with pytest.raises(GRPCError, match="101 bytes, more than the 100"):
                await UnaryStreamMethod(each, "/x.Y/Stream", bytes, bytes)(b"x")
        assert each.endpoints[0].status is meshlib.Status.OPEN
        metrics = each.metrics()
        assert not [name for name, value in metrics.items() if value and ("removals" in name or "throttled" in name)]
        assert await unary(each)(b"x") == b"x" * 100
    assert len(peers) == 1


async def test_a_message_that_is_no_message_is_still_the_servers_fault():
    def step(peer, stream):
        peer.h2.send_headers(stream, HEAD)
        peer.h2.send_data(stream, message(b"x", flag=7))
        peer.h2.send_headers(stream, OK, end_stream=True)
        peer.flush()

    layer = meshlib.failure_accrual(failures=1)
    async with scripted(answering(step)) as (address, _), channel(address, layer) as each:
        with pytest.raises(GRPCError) as caught:
            await unary(each)(b"x")
        assert caught.value.status is Status.INTERNAL
        assert each.endpoints[0].status is meshlib.Status.BUSY


# --- what is sent -----------------------------------------------------------------------------------------------------


async def test_what_only_travels_along_fails_no_request(pb, stub_of):
    async with aio_server() as (address, servicer), meshlib.grpc.Channel(address) as each:
        with use(VAR.get().evolve(baggage="k=" + "v" * 8000, client_id="c" * 8000)):
            for _ in range(MANY):
                await stub_of(each).UnaryCall(pb.SimpleRequest(reply_size=1))
        assert each.endpoints[0].status is meshlib.Status.OPEN
    assert not {"baggage", "meshlib-client-id"} & set(servicer.metadata[0])


async def test_a_dtab_that_is_too_long_fails_its_call_alone():
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers),
        channel(address) as each,
    ):
        for _ in range(MANY):
            with (
                use(VAR.get().evolve(dtab=(("/s", "/t" * 4000),))),
                pytest.raises(meshlib.InvalidArgument, match="request would go elsewhere") as caught,
            ):
                await unary(each)(b"x")
        assert caught.value.status is Status.INVALID_ARGUMENT
        assert await unary(each)(b"x") == b"well"
        assert each.endpoints[0].status is meshlib.Status.OPEN
    assert len(peers[0].requests) == 1


async def test_metadata_beyond_what_the_server_has_said_it_takes_is_not_sent():
    settings = {SettingCodes.MAX_HEADER_LIST_SIZE: 1000}
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well")), settings=settings) as (address, peers),
        channel(address) as each,
    ):
        await unary(each)(b"x", metadata={"x-a": "a"})
        spare = 1000 - sum(len(name) + len(value) + 32 for name, value in peers[0].heads[1].items()) - len("x-b") - 32
        assert await unary(each)(b"x", timeout=20, metadata={"x-a": "a", "x-b": "b" * (spare - 10)}) == b"well"
        for _ in range(MANY):
            with pytest.raises(meshlib.InvalidArgument, match="the server takes no more than 1000"):
                await unary(each)(b"x", timeout=20, metadata={"x-a": "a", "x-b": "b" * (spare + 10)})
        assert each.endpoints[0].status is meshlib.Status.OPEN
        assert await unary(each)(b"x") == b"well"
        sizes = [sum(len(n) + len(v) + 32 for n, v in head.items()) for head in peers[0].heads.values()]
    assert len(sizes) == 3
    assert 980 < max(sizes) <= 1000


async def test_a_header_that_cannot_be_encoded_leaves_the_connection_as_it_was():
    bad = False

    @meshlib.filter
    async def adds(request, service):
        if bad:
            request.metadata = [("x-user", "Zoë")]
        return await service(request)

    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers),
        channel(address, adds) as each,
    ):
        assert await unary(each, "/x.Y/One")(b"x") == b"well"
        bad = True
        with pytest.raises(meshlib.InvalidArgument, match=r"/x\.Y/Two: the metadata 'x-user' is not ASCII") as caught:
            await unary(each, "/x.Y/Two")(b"x")
        assert caught.value.status is Status.INVALID_ARGUMENT
        bad = False
        for name in ("Two", "One", "Three", "Two"):
            assert await unary(each, f"/x.Y/{name}")(b"x") == b"well"
        paths = [head[":path"] for head in peers[0].heads.values()]
    assert paths == ["/x.Y/One", "/x.Y/Two", "/x.Y/One", "/x.Y/Three", "/x.Y/Two"]
    assert len(peers) == 1


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "said", "least", "most"),
    [
        ((), None, 29, 30),
        ((), 60, 59, 60),
        ((timeout(45),), 60, 44, 45),
        ((timeout(45),), 20, 19, 20),
        ((timeout(None),), 60, 59, 60),
    ],
)
async def test_a_timeout_of_the_calls_own_may_be_longer_than_the_default(layers, said, least, most):
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers),
        channel(address, *layers) as each,
    ):
        await unary(each)(b"x", timeout=said)
    value = peers[0].heads[1]["grpc-timeout"]
    assert value.endswith("m")
    assert least < int(value[:-1]) / 1000 <= most


class Call(NamedTuple):
    dest: str
    body: bytes
    idempotent: bool


# --- windows and pings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "window"),
    [(None, CONNECTION_WINDOW), (Configuration(), 4 << 20), (Configuration(http2_connection_window_size=65535), 65535)],
)
async def test_a_connection_has_room_for_many_streams_unless_the_user_says_otherwise(config, window):
    async with (
        scripted(answering(lambda p, s: p.answer(s, b"well"))) as (address, peers),
        channel(address, config=config) as each,
        rpc_client(address, config=config) as typed,
    ):
        await unary(each)(b"x")
        with pytest.raises(meshlib.MeshError):  # it answers as a server of another codec
            await typed(Call("A/b", b"x", False))
        for peer in peers:
            assert peer.h2.outbound_flow_control_window + len(message(b"well")) == window
    assert len(peers) == 2


class Deaf:
    """A transport to a server that reads nothing until it is told to."""

    def __init__(self, protocol):
        self.protocol, self.written, self.reading = protocol, 0, True
        protocol.connection_made(self)

    def write(self, data):
        before, self.written = self.written, self.written + len(data)
        if before <= 65536 < self.written:
            self.protocol.pause_writing()

    def read_all(self):
        self.written = 0
        self.protocol.resume_writing()

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def get_write_buffer_size(self):
        return self.written

    def is_closing(self):
        return False

    def get_extra_info(self, name, default=None):
        return default


async def test_a_server_that_pings_for_ever_and_reads_nothing_is_not_read_any_more(monkeypatch):
    most = 1 << 17  # 1 MiB of pings takes a second to read
    monkeypatch.setattr(wire, "MOST_OWED", most)
    options = Options(
        scheme="http",
        connection_window=1 << 20,
        stream_window=65535,
        max_headers=16384,
        compression="",
        propagate=True,
        user_agent="x",
    )
    clock = Clock(lambda: 100.0)
    session = GrpcSession(options, "h:1", "h:1", clock, Registry(), Keepalive(Policy(5, 4), 100.0))
    transport = Deaf(session)
    session.data_received(SettingsFrame(0).serialize())
    pings = PingFrame(0, b"12345678").serialize() * 2000
    for _ in range(3):
        sent = 0
        while transport.reading and sent < 3 * most:
            session.data_received(pings)
            await anyio.lowlevel.checkpoint()
            sent += len(pings)
        assert not transport.reading
        assert most < transport.written < most + 4 * 65536
        transport.read_all()
        assert transport.reading
    for _ in range(12):  # one that does read may ping as it likes
        session.data_received(pings)
        await anyio.lowlevel.checkpoint()
        transport.read_all()
        assert transport.reading
