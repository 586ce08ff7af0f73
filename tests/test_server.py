"""Servers: where they listen, how they end, and that nothing that happens to one connection ends the listening."""

import contextvars
import errno
import os
import socket

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.client import Client
from meshlib.core.errors import ConfigurationError, ServiceClosed
from meshlib.mux.client import MuxConnector
from meshlib.mux.codec import encode
from meshlib.mux.messages import Rping, Tping
from meshlib.names.bind import Bind
from meshlib.server import PLACES, default_layers
from meshlib.serving import GRACE
from meshlib.testing import duplex, run_virtual

MINE = contextvars.ContextVar("mine", default="nobody's")


async def echo(request: mux.Request) -> mux.Response:
    return mux.Response(request.body)


async def called(address, body=b"x"):
    async with mux.client(address) as client:
        return (await client(mux.Request(body))).body


def ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# --- where it listens -------------------------------------------------------------------------------------------------


async def test_port_0_takes_a_free_port_and_the_address_says_which():
    async with mux.serve(echo, "127.0.0.1:0") as one, mux.serve(echo, "127.0.0.1:0") as other:
        assert one.address.startswith("127.0.0.1:")
        assert one.address != other.address
        assert await called(one.address) == await called(other.address) == b"x"


async def test_a_given_port_is_taken(free_tcp_port):
    async with mux.serve(echo, f"127.0.0.1:{free_tcp_port}") as server:
        assert server.address == f"127.0.0.1:{free_tcp_port}"
        assert await called(server.address) == b"x"


async def test_without_a_host_it_listens_everywhere():
    async with mux.serve(echo, ":0") as server:
        port = server.address.rpartition(":")[2]
        assert await called(f"127.0.0.1:{port}") == b"x"


@pytest.mark.skipif(not ipv6(), reason="this machine has no IPv6")
async def test_an_ipv6_address_is_told_in_brackets():
    async with mux.serve(echo, "[::1]:0") as server:
        assert server.address.startswith("[::1]:")
        assert await called(server.address) == b"x"


async def test_a_unix_socket_is_there_for_as_long_as_the_server_is(tmp_path):
    path = tmp_path / "shop.sock"
    async with mux.serve(echo, f"unix://{path}") as server:
        assert server.address == f"unix://{path}"
        assert path.is_socket()
        assert await called(server.address) == b"x"
    assert not path.exists()


async def test_a_server_that_never_listened_takes_no_socket_of_another_away(tmp_path):
    path = tmp_path / "shop.sock"
    async with mux.serve(echo, f"unix://{path}"):
        await mux.serve(echo, f"unix://{path}").aclose()
        assert path.is_socket()


async def test_a_successor_on_the_same_socket_keeps_it_when_the_first_is_closed(tmp_path):
    path = tmp_path / "shop.sock"
    first = await mux.serve(echo, f"unix://{path}")
    async with mux.serve(echo, f"unix://{path}") as successor:
        await first.aclose()
        assert await called(successor.address) == b"x"
    assert not path.exists()


async def test_the_address_is_unknown_before_it_listens_and_stays_known_after():
    server = mux.serve(echo, "127.0.0.1:0")
    with pytest.raises(ServiceClosed, match="has not been started; use `async with` or `await` it"):
        _ = server.address
    assert repr(server).startswith("server '127.0.0.1:0' on 127.0.0.1:0 (mux, 0 connections)\n")
    async with server:
        address = server.address
    assert server.address == address
    assert repr(server).startswith(f"server '127.0.0.1:0' on {address} (mux, closed)\n")


@pytest.mark.parametrize("wrong", ["host", "127.0.0.1:x", "127.0.0.1:70000", "::1:80", "unix://"])
def test_what_is_no_address_is_told_when_it_is_made(wrong):
    with pytest.raises(ConfigurationError):
        mux.serve(echo, wrong)


async def test_an_address_that_is_taken_is_told_and_can_be_tried_again():
    async with mux.serve(echo) as first:
        second = mux.serve(echo, first.address)
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
                await second.start()
    await second.start()
    assert await called(second.address) == b"x"
    await second.aclose()


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_what_is_no_service_or_no_layer_of_a_server_is_told_when_it_is_made():
    with pytest.raises(TypeError, match="is not a service"):
        mux.serve(5)
    with pytest.raises(ConfigurationError, match="no place 'bind' in this stack; its places are trace, stats"):
        mux.serve(echo, "127.0.0.1:0", Bind())
    with pytest.raises(ConfigurationError, match=r"becomes a layer with @meshlib\.filter"):
        mux.serve(echo, "127.0.0.1:0", echo)


@pytest.mark.parametrize("grace", [-1, float("nan")])
def test_a_grace_that_is_no_time_is_told(grace):
    with pytest.raises(ConfigurationError, match=r"serve\(grace=.*give seconds, 0 or more"):
        mux.serve(echo, grace=grace)


def test_the_default_layers_are_written_in_the_order_of_their_places():
    places = [layer.place for layer in default_layers()]
    assert places == [place for place in PLACES if place in places]


async def test_filters_stand_above_the_handler_and_the_stack_can_be_changed():
    order = []

    def noting(name):
        @meshlib.filter
        async def note(request, service):
            order.append(name)
            return await service(request)

        return note

    change = {"stack": lambda stack: stack.insert_before("stats", noting("first")).remove("limit")}
    async with mux.serve(echo, "127.0.0.1:0", noting("second"), noting("third"), **change) as server:
        assert await called(server.address) == b"x"
        assert server.stack.find("limit") is None
    assert order == ["first", "second", "third"]


async def test_handlers_see_the_variables_of_whoever_started_the_server_each_its_own_copy():
    seen = []

    async def handler(request):
        seen.append(MINE.get())
        MINE.set("changed")
        return mux.Response()

    token = MINE.set("the starter's")
    async with mux.serve(handler) as server:
        MINE.reset(token)
        async with mux.client(server.address) as client:
            for _ in range(3):
                await client(mux.Request())
    assert seen == ["the starter's"] * 3


async def test_its_numbers_have_finagles_names():
    async with mux.serve(echo) as server, mux.client(server.address) as client:
        for _ in range(3):
            await client(mux.Request())
        numbers = server.metrics()
        (connection,) = server.connections
        assert connection.in_flight == 0
    expected = {
        "requests": 3,
        "success": 3,
        "failures": 0,
        "pending": 0,
        "connects": 1,
        "connections": 1,
        "limit/rejected": 0,
        "limit/concurrency": 0,
        "deadline/expired": 0,
        "request_latency_ms.count": 3,
    }
    assert {name: numbers[name] for name in expected} == expected
    assert server.metrics()["connections"] == 0


@pytest.mark.parametrize(
    "error", [ValueError("secret"), KeyError("secret"), ExceptionGroup("secret", [OSError()])], ids=repr
)
async def test_a_handler_that_fails_fails_its_own_request_alone(error):
    async def handler(request):
        if request.body == b"fail":
            raise error
        return mux.Response(request.body)

    async with mux.serve(handler) as server, mux.client(server.address) as client:
        for _ in range(3):
            with pytest.raises(meshlib.RemoteError, match="internal error") as caught:
                await client(mux.Request(b"fail"))
            assert "secret" not in str(caught.value)
            assert (await client(mux.Request(b"x"))).body == b"x"
        assert server.metrics()["connects"] == 1


@pytest.mark.parametrize("reply", [None, "text", b"bytes"])
async def test_a_handler_that_returns_no_response_is_a_failure_and_no_silence(reply):
    async def handler(request):
        return reply

    async with mux.serve(handler) as server, mux.client(server.address) as client:
        with pytest.raises(meshlib.RemoteError, match="internal error"):
            await client(mux.Request())


# --- ending -----------------------------------------------------------------------------------------------------------


async def test_starting_twice_is_the_same_as_once_and_after_closing_it_cannot_be_started():
    server = mux.serve(echo, label="shop")
    await server.start()
    address = server.address
    await server.start()
    assert server.address == address
    await server.aclose()
    with pytest.raises(ServiceClosed, match="server 'shop' has been closed"):
        await server.start()


async def test_a_server_that_is_closed_while_it_starts_does_not_listen():
    server, binding, gate = mux.serve(echo), anyio.Event(), anyio.Event()
    bind = server._bind

    async def slow_bind():
        binding.set()
        await gate.wait()
        return await bind()

    async def start():
        with pytest.raises(ServiceClosed):
            await server.start()

    server._bind = slow_bind
    async with anyio.create_task_group() as group:
        group.start_soon(start)
        await binding.wait()
        await server.aclose()
        gate.set()
    host, _, port = server.address.rpartition(":")
    with pytest.raises(OSError):  # noqa: PT011 - refused, in whichever words
        await anyio.connect_tcp(host, int(port))


async def test_after_closing_connections_are_refused():
    server = await mux.serve(echo)
    await server.aclose()
    host, _, port = server.address.rpartition(":")
    with pytest.raises(OSError):  # noqa: PT011 - refused, in whichever words
        await anyio.connect_tcp(host, int(port))


async def test_a_server_that_was_never_started_can_be_closed():
    server = mux.serve(echo)
    await server.aclose()
    await server.aclose()
    await server.wait_closed()


async def test_it_may_be_closed_in_another_task_and_by_several_at_once():
    servers = []

    async def open_it():
        servers.append(await mux.serve(echo))

    closed = []

    async def close(server):
        await server.aclose()
        closed.append(server.metrics()["connections"])

    async with anyio.create_task_group() as group:
        group.start_soon(open_it)
    (server,) = servers
    assert await called(server.address) == b"x"
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(close, server)
        group.start_soon(server.wait_closed)
    assert closed == [0, 0, 0]


async def test_waiting_until_it_is_closed_starts_it():
    server = mux.serve(echo)
    async with anyio.create_task_group() as group:
        group.start_soon(server.wait_closed)
        while not server.metrics()["connects"]:
            await anyio.lowlevel.checkpoint()
            if "127.0.0.1:0" not in repr(server).splitlines()[0].partition(" on ")[2]:
                assert await called(server.address) == b"x"
        await server.aclose()


async def test_requests_under_way_are_finished_before_it_is_closed():
    gate, replies = anyio.Event(), []

    async def wait(request):
        await gate.wait()
        return mux.Response(b"done")

    async def call(client):
        replies.append((await client(mux.Request())).body)

    server = await mux.serve(wait)
    async with mux.client(server.address) as client, anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(call, client)
        while server.metrics()["pending"] < 5:
            await anyio.lowlevel.checkpoint()
        group.start_soon(server.aclose)
        await anyio.wait_all_tasks_blocked()
        assert replies == []
        gate.set()
    assert replies == [b"done"] * 5


async def test_with_no_grace_handlers_are_cancelled_at_once():
    entered, ended = anyio.Event(), []

    async def hang(request):
        entered.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    errors = []

    async def call(client):
        with pytest.raises(meshlib.MeshError) as caught:
            await client(mux.Request())
        errors.append(caught.value)

    server = await mux.serve(hang, grace=60)
    async with mux.client(server.address, meshlib.timeout(20)) as client, anyio.create_task_group() as group:
        group.start_soon(call, client)
        await entered.wait()
        await server.aclose(grace=0)
        assert ended == ["cancelled"]
    assert type(errors[0]) in (meshlib.ConnectionLost, meshlib.RemoteError)
    assert not errors[0].requeueable


async def test_leaving_the_block_by_a_cancellation_closes_it():
    with anyio.CancelScope() as scope:
        async with mux.serve(echo) as server:
            assert await called(server.address) == b"x"
            scope.cancel()
            await anyio.sleep_forever()
    assert server.env.supervisor.jobs == 0
    assert server.connections == ()


async def test_closing_can_be_cancelled_and_ends_all_the_same():
    entered = anyio.Event()

    async def hang(request):
        entered.set()
        await anyio.sleep_forever()

    async def call(client):
        with pytest.raises(meshlib.MeshError):
            await client(mux.Request())

    server = await mux.serve(hang, grace=60)
    async with mux.client(server.address) as client, anyio.create_task_group() as group:
        group.start_soon(call, client)
        await entered.wait()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await server.aclose()
        await server.wait_closed()
        assert server.env.supervisor.jobs == 0


class Wire(MuxConnector):
    """Connects to one server without a network, once."""

    def __init__(self, server):
        super().__init__()
        self.server = server
        self.connected = False

    async def open(self, address):
        if self.connected:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        self.connected = True
        ours, theirs = duplex()
        self.server.env.supervisor.start(self.server.serve_stream, theirs)
        return ours


@pytest.mark.parametrize(("grace", "given"), [(None, None), (3, None), (60, 2)])
def test_after_the_grace_period_the_rest_is_cancelled(grace, given, caplog):
    async def main():
        ended, outcomes = [], []

        async def work(request):
            try:
                await anyio.sleep(int(request.body))
            finally:
                ended.append(anyio.current_time())
            return mux.Response(b"done")

        async def call(seconds):
            try:
                outcomes.append((await client(mux.Request(str(seconds).encode()))).body)
            except meshlib.MeshError as error:
                outcomes.append(type(error))

        server = mux.serve(work, label="shop", **({} if grace is None else {"grace": grace}))
        limit = given or grace or GRACE
        async with Client("h:1", Wire(server)) as client, anyio.create_task_group() as group:
            group.start_soon(call, 1)
            group.start_soon(call, 10_000)
            await anyio.sleep(0.1)
            before = anyio.current_time()
            await server.aclose(given)
            assert anyio.current_time() - before == pytest.approx(limit, abs=0.1)
        assert outcomes[0] == b"done"
        assert outcomes[1] in (meshlib.ConnectionLost, meshlib.RemoteError)
        assert ended == [pytest.approx(1, abs=0.1), pytest.approx(limit + 0.1, abs=0.1)]

    run_virtual(main)
    assert [record.getMessage() for record in caplog.records] == [
        "shop: 1 connections still busy after the grace period"
    ]


def test_a_client_that_does_not_heed_the_end_is_cut_off_after_the_grace_period():
    async def main():
        server = mux.serve(echo)
        ours, theirs = duplex()
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve_stream, theirs)
            await ours.send(encode(Tping(1)))
            assert await ours.receive() == encode(Rping(1))
            assert len(server.connections) == 1
            before = anyio.current_time()
            await server.aclose(grace=3)
            assert anyio.current_time() - before == pytest.approx(3)
        assert server.connections == ()

    run_virtual(main)


def test_a_connection_that_comes_after_closing_is_closed_unserved():
    async def main():
        server = mux.serve(echo)
        await server.aclose()
        ours, theirs = duplex()
        await server.serve_stream(theirs)
        with pytest.raises(anyio.EndOfStream):
            await ours.receive()

    run_virtual(main)


def test_without_requests_under_way_closing_waits_for_nothing():
    async def main():
        server = mux.serve(echo, grace=60)
        async with Client("h:1", Wire(server)) as client:
            await client(mux.Request())
            before = anyio.current_time()
            await server.aclose()
            assert anyio.current_time() - before < 2

    run_virtual(main)


# --- accepting --------------------------------------------------------------------------------------------------------


class Listener:
    """Accepts what it is given: streams, and errors to raise; then nothing until it is closed."""

    def __init__(self, *script):
        self.script = list(script)
        self.times = []
        self.closed = False

    async def accept(self):
        self.times.append(anyio.current_time())
        if not self.script:
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step

    async def aclose(self):
        self.closed = True


def listening(listener, then=None):
    """Let a server listen there for a minute."""

    async def main():
        server = mux.serve(echo, label="shop")

        async def bind():
            server._address = "127.0.0.1:1"
            return [listener]

        server._bind = bind
        async with server:
            if then is not None:
                await then(server)
            await anyio.sleep(60)
        assert listener.closed
        return server.metrics()

    return run_virtual(main)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_what_the_system_is_short_of_is_waited_for_and_logged(number, caplog):
    _, stream = duplex()
    listener = Listener(OSError(number, os.strerror(number)), OSError(number, os.strerror(number)), stream)
    assert listening(listener)["connects"] == 1
    assert listener.times == [pytest.approx(t, abs=1e-3) for t in (0, 0.1, 0.2, 0.2)]
    assert [record.getMessage() for record in caplog.records if record.name == "meshlib.server"] == [
        f"shop: cannot accept a connection: [Errno {number}] {os.strerror(number)}; waiting"
    ] * 2


def test_a_connection_that_breaks_while_it_is_accepted_keeps_nobody_from_the_next(caplog):
    _, stream = duplex()
    listener = Listener(ConnectionAbortedError(errno.ECONNABORTED, "aborted"), stream)
    assert listening(listener)["connects"] == 1
    assert not [record for record in caplog.records if record.name == "meshlib.server"]


def test_a_listener_that_was_closed_elsewhere_is_listened_to_no_more():
    listener = Listener(anyio.ClosedResourceError(), duplex()[1])
    assert listening(listener)["connects"] == 0


def test_a_connection_that_says_nothing_or_nonsense_disturbs_no_other():
    silent, quiet_end = duplex()
    nonsense, their_end = duplex()
    good_client_end, good = duplex()

    class Given(MuxConnector):
        async def open(self, address):
            return good_client_end

    async def then(server):
        await nonsense.send(b"GET / HTTP/1.1\r\n\r\n" * 100)
        async with Client("h:1", Given()) as client:
            assert (await client(mux.Request(b"x"))).body == b"x"
        await silent.aclose()

    assert listening(Listener(quiet_end, their_end, good), then)["requests"] == 1
