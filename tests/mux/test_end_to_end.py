"""Our client against our server: over sockets of the operating system, and cancelled at every step over memory."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import anyio
import pytest

from meshlib import mux
from meshlib.core.clock import Clock
from meshlib.core.context import Context, TraceId, current, use
from meshlib.core.env import Env
from meshlib.core.errors import ConnectionLost, NoEndpoints, Rejected, RemoteError
from meshlib.core.supervisor import Supervisor
from meshlib.mux import Limits, Request, Response
from meshlib.mux.client import open_session
from meshlib.mux.client_session import ClientSession
from meshlib.mux.messages import Rdispatch, Rdrain, ReplyStatus, Rerr, Rping, Tdispatch, Tdrain, Tping
from meshlib.mux.server import MuxAcceptor
from meshlib.mux.server_session import ServerSession
from meshlib.server import Server
from meshlib.telemetry.metrics import Registry
from meshlib.testing import duplex, run_virtual

from .peer import Call, RawPeer, echo, server_rig, settle
from .test_server_session import Gate

OK = ReplyStatus.OK


# --- sockets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tcp", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "127.0.0.1:0" if request.param == "tcp" else f"unix://{tmp_path}/socket"


async def until(condition: Callable[[], object]) -> None:
    """Wait for what comes over a socket."""
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - nobody here is told of it
            await anyio.sleep(0.001)


async def raw(address: str) -> RawPeer:
    if address.startswith("unix://"):
        return RawPeer(await anyio.connect_unix(address.removeprefix("unix://")))
    host, port = address.split(":")
    return RawPeer(await anyio.connect_tcp(host, int(port)))


@pytest.mark.parametrize("size", [0, 1, 100, 1_000_000])
async def test_bodies_of_any_size_come_back(address: str, size: int) -> None:
    body = bytes(n % 251 for n in range(size))
    async with mux.serve(echo, address) as server, mux.client(server.address) as client:
        assert await client(Request(body, "/echo")) == Response(body)


async def test_many_requests_share_one_connection(address: str) -> None:
    async def handler(request: Request) -> Response:
        await settle(int(request.body) % 7)
        return Response(request.body)

    async with (
        mux.serve(handler, address) as server,
        mux.client(server.address) as client,
        anyio.create_task_group() as group,
    ):
        calls = [Call(group, client, Request(b"%d" % n)) for n in range(200)]
        assert [(await call.result()).body for call in calls] == [b"%d" % n for n in range(200)]
        assert server.metrics()["connects"] == 1


async def test_a_peer_on_a_socket_hears_replies_out_of_order_and_pings_in_between(address: str) -> None:
    gate = Gate()
    async with mux.serve(gate, address) as server:
        peer = await raw(server.address)
        await peer.connect()
        await peer.send(Tdispatch(2, body=b"a"), Tdispatch(3, body=b"b"), Tping(1))
        await peer.expect(Rping(1))
        gate.let(b"b")
        await peer.expect(Rdispatch(3, OK, (), b"b"))
        gate.let(b"a")
        await peer.expect(Rdispatch(2, OK, (), b"a"))
        await peer.stream.aclose()


async def test_a_client_that_speaks_on_after_the_end_does_no_harm(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A drained server has closed its half, and sockets do not take kindly to writing after that."""
    async with mux.serve(echo, address) as server:
        peer = await raw(server.address)
        await peer.connect()
        async with anyio.create_task_group() as group:
            group.start_soon(server.aclose)
            await peer.expect(Tdrain(1))
            await peer.send(Rdrain(1))
            await peer.ended()
            await peer.send(Tping(1), Tdispatch(2))
            await peer.stream.aclose()
    assert not caplog.records


async def test_a_client_that_resets_its_connection_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    async with mux.serve(gate, "127.0.0.1:0") as server:
        peer = await raw(server.address)
        await peer.connect()
        await peer.send(Tdispatch(2, body=b"a"))
        await until(lambda: gate.handled)
        handle = peer.stream.extra(anyio.abc.SocketAttribute.raw_socket)
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await peer.stream.aclose()
        await until(lambda: not server.connections)
        assert gate.cancelled == [b"a"]
    assert not caplog.records


async def test_closing_the_server_lets_requests_finish_and_clients_reconnect(address: str) -> None:
    gate = Gate()
    server = await mux.serve(gate, address)
    where = server.address
    async with mux.client(where) as client, anyio.create_task_group() as group:
        call = Call(group, client, Request(b"slow"))
        await until(lambda: gate.handled)
        async with anyio.create_task_group() as closing:
            closing.start_soon(server.aclose)
            await settle()
            gate.let(b"slow")
        assert (await call.result()).body == b"slow"
        metrics = server.metrics()
        assert (metrics["mux/draining"], metrics["mux/drained"]) == (1, 1)

        async with mux.serve(echo, where):
            assert (await client(Request(b"back"))).body == b"back"


# Not over a Unix socket: there anyio leaves a callback behind when a read is cancelled in the moment in which it could
# have been done, and asyncio reports it (the sequel of agronholm/anyio#1267).
@pytest.mark.parametrize("address", ["127.0.0.1:0"])
@pytest.mark.parametrize("who", ["client", "server"])
async def test_what_is_under_way_is_told_when_the_other_side_is_gone_at_once(address: str, who: str) -> None:
    gate = Gate()
    server = await mux.serve(gate, address)
    client = await mux.client(server.address)
    async with anyio.create_task_group() as group:
        call = Call(group, client, Request(b"never"))
        await until(lambda: gate.handled)
        if who == "client":
            await client.aclose()
            await until(lambda: not server.connections)
            await server.aclose()
        else:
            await server.aclose(grace=0)
        error = await call.result()
        assert isinstance(error, ConnectionLost)
        assert gate.cancelled == [b"never"]
        await client.aclose()


async def test_a_unix_socket_is_removed_when_its_server_closes(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with mux.serve(echo, f"unix://{path}") as server:
        assert server.address == f"unix://{path}"
        assert path.is_socket()
    assert not path.exists()


def test_an_address_where_nobody_listens_is_said_to_be_so(tmp_path: Path) -> None:
    async def play() -> None:
        async with mux.client(f"unix://{tmp_path}/nobody") as client:
            with pytest.raises(NoEndpoints, match="No such file or directory"):
                await client(Request())

    run_virtual(play)


async def test_a_unix_server_tells_its_peer_apart_in_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with mux.serve(echo, f"unix://{tmp_path}/socket") as server:
        peer = await raw(server.address)
        await peer.send(b"\x7f\xff\xff\xff")
        assert isinstance(await peer.receive(), Rerr)
        await peer.ended()
        await peer.stream.aclose()
    assert "closing the session with a Unix socket: a frame of 2147483647 bytes" in caplog.text


# --- what a chain of calls carries ------------------------------------------------------------------------------------


async def test_a_handlers_own_calls_carry_what_came_with_the_request() -> None:
    seen: list[Context] = []

    async def last(request: Request) -> Response:
        seen.append(current())
        return Response(request.body)

    async with mux.serve(last) as backend, mux.client(backend.address) as inner:

        async def middle(request: Request) -> Response:
            return await inner(Request(request.body))

        async with mux.serve(middle) as frontend, mux.client(frontend.address) as outer:
            context = Context(
                trace=TraceId(7 << 64 | 5, 8, sampled=True, state="v=1"),
                dtab=(("/s", "/t"),),
                client_id="shop",
                baggage="a=1",
                opaque=((b"com.example.Unknown", b"\0\xff"), (b"com.example.Unknown", b"twice")),
            )
            with use(context):
                await outer(Request(b"x"))
    (arrived,) = seen
    assert arrived.opaque == context.opaque
    assert arrived.dtab == context.dtab
    assert (arrived.client_id, arrived.baggage) == ("shop", "a=1")
    assert arrived.trace is not None
    assert (arrived.trace.trace, arrived.trace.state, arrived.trace.sampled) == (7 << 64 | 5, "v=1", True)
    assert arrived.trace.parent not in (None, 8), "a span for each of the two calls"
    assert arrived.deadline is not None


async def test_a_server_that_does_not_trust_its_callers_passes_no_dtab_on() -> None:
    async def handler(request: Request) -> Response:
        return Response(repr(current().dtab).encode())

    async with mux.serve(handler, trust_context=False) as server, mux.client(server.address) as client:
        with use(Context(dtab=(("/s", "/evil"),))):
            assert (await client(Request())).body == b"()"


async def test_response_contexts_of_a_failure_reach_the_caller() -> None:
    async def handler(request: Request) -> Response:
        raise Rejected("not here", retryable=False)

    async with mux.serve(handler) as server, mux.client(server.address, label="c") as client:
        with pytest.raises(Rejected, match="not here") as caught:
            await client(Request(idempotent=True))
        assert not caught.value.retryable
        assert caught.value.label == "c"


async def test_a_failed_handler_is_opaque_to_its_caller(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Request) -> Response:
        raise KeyError("a secret")

    async with mux.serve(handler) as server, mux.client(server.address) as client:
        with pytest.raises(RemoteError, match="internal error") as caught:
            await client(Request())
    assert "secret" not in str(caught.value)
    assert "a secret" in caplog.text


# --- every checkpoint -------------------------------------------------------------------------------------------------


class Pair:
    """Our client session and our server over memory, with every table where leftovers would show."""

    def __init__(self, service: Any, capacity: int, limits: Limits) -> None:
        self.here, self.there = duplex(capacity)
        self.server = Server(service, "127.0.0.1:0", MuxAcceptor(limits), clock=Clock())
        self.env = Env(metrics=Registry(), supervisor=Supervisor("client"), clock=Clock())
        self.session: ClientSession

    async def __aenter__(self) -> Self:
        self.server.env.supervisor.start(self.server.serve_stream, self.there)
        self.session = await open_session(self.here, "server", self.env)
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.env.supervisor.aclose()
            await self.server.aclose(grace=0)

    def check_empty(self) -> None:
        (server,) = self.server.connections
        assert isinstance(server, ServerSession)
        client = self.session
        assert client.pending == client._tags.in_use == 0
        assert len(client._deadlines) == 0
        assert (server.in_flight, server._running) == (0, 0)
        for connection in (client.connection, server.connection):
            assert connection.queued == 0
            assert not connection._large
            assert connection._reassembler.held == 0
            assert not connection._reassembler._partial
            assert not connection._reassembler._forgotten


@pytest.mark.parametrize(
    ("size", "limits", "capacity"),
    [(10, Limits(), 65536), (3000, Limits(max_frame=10_000), 500), (3000, Limits(max_frame=204), 500)],
    ids=["small", "slow", "fragments"],
)
async def test_a_call_cancelled_at_any_step_leaves_nothing_on_either_side(
    size: int, limits: Limits, capacity: int
) -> None:
    if limits.max_frame == 204:  # fragments of 200 bytes, of messages that may be as long as they like
        limits = Limits()
        headers = 200
    else:
        headers = None

    async def handler(request: Request) -> Response:
        await settle(3)
        return Response(request.body)

    completed = 0
    async with Pair(handler, capacity, limits) as pair:
        pair.session.connection.fragment_at(headers)
        (server,) = pair.server.connections
        server.connection.fragment_at(headers)
        steps = 0
        while completed < 5:
            with use(Context(deadline=pair.env.clock.now() + 60)):
                async with anyio.create_task_group() as group:
                    call = Call(group, pair.session, Request(bytes(size)))
                    await settle(steps)
                    call.cancel()
            if call.outcome is not None:
                assert call.outcome.body == bytes(size)
                completed += 1
            await settle(600 if size > 10 else 60)
            pair.check_empty()
            steps += 1
        assert steps > 10
        assert (await pair.session(Request(b"and it still works"))).body == b"and it still works"
        discards = pair.server.metrics().get("mux/orphaned_tdiscard", 0)
        unexpected = pair.env.metrics.counter("mux/unexpected_replies").value
        assert unexpected == 0
        assert discards < steps


async def test_calls_cancelled_in_a_crowd_leave_nothing() -> None:
    """Many at once, of which every other is cancelled, at different steps; the rest are not disturbed."""

    async def handler(request: Request) -> Response:
        await settle(int(request.body) % 5)
        return Response(request.body)

    async with Pair(handler, 2000, Limits()) as pair:
        for turn in range(10):
            async with anyio.create_task_group() as group:
                calls = [Call(group, pair.session, Request(b"%d" % n)) for n in range(40)]
                for n in range(0, 40, 2):
                    if n % 8 == 0:
                        await settle(turn % 4)
                    calls[n].cancel()
                for n in range(1, 40, 2):
                    assert (await calls[n].result()).body == b"%d" % n
            await settle(100)
            pair.check_empty()


async def test_a_connect_cancelled_at_any_step_closes_its_stream() -> None:
    steps = 0
    connected = False
    while not connected:
        here, there = duplex()
        server = Server(echo, "127.0.0.1:0", MuxAcceptor(), clock=Clock())
        server.env.supervisor.start(server.serve_stream, there)
        env = Env(supervisor=Supervisor("client"), clock=Clock())
        sessions: list[ClientSession] = []

        async def connect(stream: Any = here, env: Env = env, sessions: list[ClientSession] = sessions) -> None:
            sessions.append(await open_session(stream, "server", env))

        async with anyio.create_task_group() as group:
            group.start_soon(connect)
            await settle(steps)
            group.cancel_scope.cancel()
        connected = bool(sessions)
        if not connected:
            assert here.closed or not env.supervisor.jobs
            if steps:
                assert here.closed
            await here.aclose()
            await settle()
            assert not server.connections
        await env.supervisor.aclose()
        await server.aclose(grace=0)
        steps += 1
    assert steps > 3


async def test_two_servers_do_not_see_each_others_violations() -> None:
    async with server_rig() as one, server_rig() as two:
        peer = await one.open()
        await two.open()
        await peer.send(b"\x7f\xff\xff\xff")
        await peer.receive()
        await peer.ended()
        assert one.counter("violations/frame_too_large") == 1
        assert two.counter("violations/frame_too_large") == 0
