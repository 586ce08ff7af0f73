"""Clients: how they begin and end, what they show, and that their endpoints may come and go while calls are made."""

import errno
import os
import socket
from typing import Any, ClassVar

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.client import PLACES, Client, Liveness, Transport, default_layers, describe
from meshlib.core.deadlines import kept
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError, ConnectError, DeadlineExceeded, NoEndpoints, ServiceClosed
from meshlib.core.service import Status
from meshlib.filters.timeout import ServerDeadline
from meshlib.names import file
from meshlib.names.addr import Address
from meshlib.testing import run_virtual


async def echo(request: mux.Request) -> mux.Response:
    return mux.Response(request.body)


# --- beginning and ending ---------------------------------------------------------------------------------------------


async def test_a_bare_client_starts_with_its_first_call():
    async with mux.serve(echo) as server:
        client = mux.client(server.address)
        assert (client.endpoints, client.status) == ((), Status.BUSY)
        assert server.metrics()["connects"] == 0
        assert (await client(mux.Request(b"x"))).body == b"x"
        assert client.status is Status.OPEN
        await client.aclose()
        assert client.status is Status.CLOSED


async def test_it_can_be_entered_or_awaited():
    async with mux.serve(echo) as server:
        async with mux.client(server.address) as client:
            assert (await client(mux.Request(b"x"))).body == b"x"
        client = await mux.client(server.address)
        assert (await client(mux.Request(b"y"))).body == b"y"
        await client.aclose()


async def test_no_connection_is_made_before_the_first_call():
    async with mux.serve(echo) as server, mux.client(server.address) as client:
        await anyio.wait_all_tasks_blocked()
        assert [str(node) for node in client.endpoints] == [server.address]
        assert server.metrics()["connects"] == 0
        await client(mux.Request())
        await client(mux.Request())
        assert server.metrics()["connects"] == 1


async def test_it_may_be_opened_in_one_task_and_closed_in_another():
    clients = []

    async def open_them():
        for _ in range(4):
            client = mux.client(server.address)
            await client.__aenter__()
            await client(mux.Request())
            clients.append(client)

    async with mux.serve(echo) as server:
        async with anyio.create_task_group() as group:
            group.start_soon(open_them)
        assert [(await client(mux.Request(b"x"))).body for client in clients] == [b"x"] * 4
        async with anyio.create_task_group() as group:
            for client in (clients[2], clients[0], clients[3], clients[1]):
                group.start_soon(client.__aexit__, None, None, None)


async def test_one_client_serves_many_tasks():
    replies = []

    async def call(i):
        replies.append((await client(mux.Request(str(i).encode()))).body)

    async with mux.serve(echo) as server, mux.client(server.address) as client:
        async with anyio.create_task_group() as group:
            for i in range(50):
                group.start_soon(call, i)
        assert sorted(map(int, replies)) == list(range(50))
        assert server.metrics()["connects"] == 1


async def test_closing_twice_is_the_same_as_once_and_calls_after_it_are_refused():
    async with mux.serve(echo) as server:
        client = mux.client(server.address, label="shop")
        await client(mux.Request())
        await client.aclose()
        async with anyio.create_task_group() as group:
            group.start_soon(client.aclose)
            group.start_soon(client.aclose)
        with pytest.raises(ServiceClosed, match="client 'shop' is closed"):
            await client(mux.Request())


async def test_a_client_that_was_never_used_can_be_closed():
    client = mux.client("127.0.0.1:1")
    await client.aclose()
    with pytest.raises(ServiceClosed):
        await client(mux.Request())
    client.start()
    assert client.env.supervisor.jobs == 0


async def test_calls_under_way_fail_when_the_client_is_closed():
    entered, errors = [], []

    async def hang(request):
        entered.append(request)
        await anyio.sleep_forever()

    async def call(idempotent):
        with pytest.raises(meshlib.MeshError) as caught:
            await client(mux.Request(idempotent=idempotent))
        errors.append(caught.value)

    async with mux.serve(hang, grace=0) as server:
        client = mux.client(server.address)
        async with anyio.create_task_group() as group:
            for i in range(6):
                group.start_soon(call, i % 2 == 0)
            while len(entered) < 6:
                await anyio.lowlevel.checkpoint()
            await client.aclose()
    assert len(errors) == 6
    assert {type(error) for error in errors} <= {ServiceClosed, meshlib.ConnectionLost}


def test_a_call_that_waits_for_an_endpoint_is_told_that_the_client_was_closed():
    async def main():
        client = mux.client("file:///no/such/file")

        async def call():
            with pytest.raises(ServiceClosed):
                await client(mux.Request())

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await anyio.sleep(1)
            await client.aclose()

    run_virtual(main)


async def test_leaving_the_block_by_a_cancellation_closes_it():
    async with mux.serve(echo) as server:
        with anyio.CancelScope() as scope:
            async with mux.client(server.address) as client:
                await client(mux.Request())
                scope.cancel()
                await anyio.sleep_forever()
        assert client.status is Status.CLOSED
        assert client.env.supervisor.jobs == 0


def test_outside_of_an_event_loop_nothing_is_started_and_nothing_is_spoilt():
    client = mux.client("127.0.0.1:1")
    with pytest.raises(RuntimeError):
        client.start()
    client.metrics()
    repr(client)

    async def main():
        client.start()
        await anyio.sleep(1)
        assert [str(node) for node in client.endpoints] == ["127.0.0.1:1"]
        await client.aclose()

    run_virtual(main)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_on_another_event_loop_it_says_so_at_once_and_can_be_closed(backend):
    async def serve_and_call():
        async with mux.serve(echo) as server:
            client = mux.client(server.address, label="shop")
            await client(mux.Request())
            await client.aclose()
            client = mux.client(server.address, label="shop")
            await client(mux.Request())
        return client

    async def again(client):
        with pytest.raises(ConfigurationError, match="client 'shop' was used on another event loop before"):
            await client(mux.Request())
        await client.aclose()
        assert client.status is Status.CLOSED

    client = anyio.run(serve_and_call, backend=backend)
    anyio.run(again, client, backend="asyncio")


# --- what it is made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([5], "5 is not a layer"),
        ([echo], "becomes a layer with @meshlib.filter"),
        ([Transport], r"is a class; give a value, such as Transport\(…\)"),
        ([ServerDeadline()], "there is no place 'deadline' in this stack; its places are trace, stats"),
    ],
)
def test_what_is_no_layer_of_a_client_is_told_when_it_is_made(layers, says):
    with pytest.raises(ConfigurationError, match=says):
        mux.client("h:1", *layers)


@pytest.mark.parametrize("place", ["bind", "balance", "pool", "transport"])
def test_what_a_client_cannot_do_without_is_told_when_it_is_taken_away(place):
    with pytest.raises(ConfigurationError, match=f"cannot do without a layer at '{place}'"):
        mux.client("h:1", stack=lambda stack: stack.remove(place))


def test_the_default_layers_are_written_in_the_order_of_their_places():
    places = [layer.place for layer in default_layers()]
    assert places == [place for place in PLACES if place in places]


async def test_given_layers_replace_the_defaults_and_filters_are_added_in_their_order():
    order = []

    def noting(name):
        @meshlib.filter
        async def note(request, service):
            order.append(name)
            return await service(request)

        return note

    async with (
        mux.serve(echo) as server,
        mux.client(server.address, noting("a"), meshlib.timeout(7.0), noting("b")) as client,
    ):
        await client(mux.Request())
        assert client.stack.find("timeout").seconds == 7.0
    assert order == ["a", "b"]


async def test_a_stack_can_be_changed_where_a_layer_alone_cannot_say_it():
    tries = []

    @meshlib.filter
    async def each_try(request, service):
        tries.append(request)
        if len(tries) < 3:
            raise ConnectError("not this time")
        return await service(request)

    async with mux.serve(echo) as server:
        change = {"stack": lambda stack: stack.insert_after("requeue", each_try)}
        async with mux.client(server.address, **change) as client:
            await client(mux.Request())
    assert len(tries) == 3


def test_its_label_is_its_target_unless_it_is_given_one():
    assert mux.client("h:1").env.label == "h:1"
    assert mux.client("h:1", label="shop").env.label == "shop"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Liveness(interval=0), r"liveness\(interval=0, timeout=4.0\): give seconds above 0"),
        (lambda: Liveness(timeout=-1), "give seconds above 0"),
        (lambda: Transport(connect_timeout=0), r"transport\(connect_timeout=0\): give seconds, above 0"),
    ],
)
def test_wrong_parameters_of_layers_are_told(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()


# --- what it shows ----------------------------------------------------------------------------------------------------


async def test_its_endpoints_show_their_status_and_their_load():
    gate = anyio.Event()

    async def wait(request):
        await gate.wait()
        return mux.Response()

    async with mux.serve(wait) as server, mux.client(server.address) as client, anyio.create_task_group() as group:
        group.start_soon(client, mux.Request())
        while server.metrics()["pending"] < 1:
            await anyio.lowlevel.checkpoint()
        (node,) = client.endpoints
        assert (node.status, node.load, repr(node)) == (Status.OPEN, 1, f"<{server.address} open, load 1>")
        gate.set()


async def test_its_numbers_have_finagles_names():
    async def fail(request):
        if request.body:
            raise ValueError("x")
        return mux.Response()

    async with mux.serve(fail) as server, mux.client(server.address) as client:
        await client(mux.Request())
        with pytest.raises(meshlib.RemoteError):
            await client(mux.Request(b"x"))
        numbers = client.metrics()
        endpoint = f"endpoints/{server.address}"
        expected = {
            "requests": 2,
            "success": 1,
            "failures": 1,
            "failures/RemoteError": 1,
            "cancelled": 0,
            "pending": 0,
            "request_latency_ms.count": 2,
            f"{endpoint}/requests": 2,
            f"{endpoint}/success": 1,
            "loadbalancer/size": 1,
            "loadbalancer/available": 1,
            "loadbalancer/adds": 1,
            "loadbalancer/removes": 0,
            "pool/connects": 1,
            "pool/connects/fail": 0,
            "name/endpoints": 1,
            "name/failures": 0,
            "retries/retries": 0,
            "retries/requeues": 0,
        }
        assert {name: numbers.get(name) for name in expected} == expected
        assert 0 < numbers["request_latency_ms.p50"] < 60_000
        assert numbers["retries/budget"] == 100
        assert "name/age_s" in numbers


# --- connecting -------------------------------------------------------------------------------------------------------


class Sessions:
    """A connector without a network: sessions that wait for ever, or do what they are told."""

    protocol: ClassVar[str] = "none"

    def __init__(self, connect=None, serve=None, keeps_deadline=False):
        self.keeps_deadline = keeps_deadline
        self.script, self.serve = connect, serve
        self.connects = []

    async def connect(self, address, env, liveness):
        self.connects.append((str(address), liveness, meshlib.current()))
        if self.script is not None:
            await self.script()
        return Wire(self.serve)


class Wire:
    on_leave: Any = None
    on_lease: Any = None

    def __init__(self, serve):
        self.serve = serve

    async def __call__(self, request):
        return await self.serve(request)

    def release(self):
        pass

    def retire(self):
        pass


def raising(error):
    async def connect():
        raise error

    return connect


async def error_of(connector, *layers, calls=1):
    """The error of the last call, and when it came."""
    error = None
    async with Client("h:1", connector, *layers, label="shop") as client:
        for _ in range(calls):
            with pytest.raises(meshlib.MeshError) as caught:
                await client("x")
            error = caught.value
        return error, anyio.current_time()


def test_a_connect_that_takes_too_long_is_given_up():
    connector = Sessions(anyio.sleep_forever)
    error, _ = run_virtual(error_of, connector, Transport(connect_timeout=0.5))
    assert "h:1: ConnectError: no session within 1 s of connecting" in str(error)


def test_when_no_endpoint_can_be_connected_the_error_says_so_within_seconds():
    error, when = run_virtual(error_of, Sessions(raising(OSError(errno.ECONNREFUSED, "Connection refused"))))
    assert type(error) is NoEndpoints
    assert error.label == "shop"
    assert "no endpoint of h:1 is ready: h:1 (connect: connect failed: Connection refused; next try within" in str(
        error
    )
    assert "1 attempt (h:1: ConnectError: connect failed: Connection refused)" in str(error)
    assert when == pytest.approx(3.0)


def test_once_that_is_known_calls_fail_at_once():
    error, when = run_virtual(lambda: error_of(Sessions(raising(ConnectError("no"))), calls=50))
    assert type(error) is NoEndpoints
    assert when == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (meshlib.ProtocolError("nonsense"), "nonsense"),
        (OSError(errno.ENETUNREACH, "x"), f"connect failed: {os.strerror(errno.ENETUNREACH)}"),
        (UnicodeError("label too long"), "label too long"),
    ],
)
def test_whatever_goes_wrong_in_connecting_is_a_connect_error(raised, says):
    async def main():
        transport = Transport(1.0).build(Env(address=Address("h", 1)), Sessions(raising(raised)))
        if isinstance(raised, OSError | meshlib.MeshError):
            with pytest.raises(ConnectError, match=says) as caught:
                await transport.acquire()
            assert caught.value.endpoint == "h:1"
            assert caught.value.__cause__ is raised
        error, _ = await error_of(Sessions(raising(raised)))
        assert says in str(error)

    run_virtual(main)


def test_an_operating_systems_error_is_told_in_a_few_words():
    inner = OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)")
    outer = OSError("All connection attempts failed")
    outer.__cause__ = ExceptionGroup("several", [inner, OSError("x")])
    assert describe(outer) == describe(inner) == f"connect failed: {os.strerror(errno.ECONNREFUSED)}"
    assert describe(OSError("odd")) == "connect failed: odd"
    assert describe(socket.gaierror(-2, "Name or service not known")) == "connect failed: Name or service not known"


def test_a_connector_is_told_the_address_and_how_to_ping_and_nothing_of_the_call():
    async def main():
        async def answer(request):
            return "y"

        connector, liveness = Sessions(serve=answer), Liveness(1.0, 2.0)
        async with Client("h:1,i:2", connector, liveness) as client:
            with meshlib.deadline(5):
                for _ in range(20):
                    assert await client("x") == "y"
        assert sorted(connector.connects) == sorted(
            [("h:1", liveness, meshlib.Context()), ("i:2", liveness, meshlib.Context())]
        )

    run_virtual(main)


async def test_a_refused_connection_is_told_with_its_reason(free_tcp_port):
    async with mux.client(f"127.0.0.1:{free_tcp_port}", meshlib.timeout(0.2)) as client:
        with pytest.raises(meshlib.MeshError) as caught:
            await client(mux.Request())
    assert os.strerror(errno.ECONNREFUSED) in str(caught.value)
    assert f"127.0.0.1:{free_tcp_port}" in str(caught.value)


# --- time -------------------------------------------------------------------------------------------------------------


async def never(request):
    await anyio.sleep_forever()


async def keeps(request):
    await anyio.sleep(meshlib.remaining())
    raise kept()


@meshlib.filter
async def mine(request, service):
    return await service(request)


@pytest.mark.parametrize(
    ("connector", "layers"),
    [
        (Sessions(serve=never), ()),
        (Sessions(serve=keeps, keeps_deadline=True), ()),
        (Sessions(serve=never, keeps_deadline=True), (mine,)),
        (Sessions(serve=keeps, keeps_deadline=True), (mine,)),
    ],
    ids=["by a scope", "by the session", "by a scope because of a filter", "by both"],
)
def test_the_timeout_holds_whoever_keeps_it(connector, layers):
    async def main():
        error, when = await error_of(connector, meshlib.timeout(2), *layers)
        assert type(error) is DeadlineExceeded
        assert error.message == "no reply within the timeout of 2 s"
        assert (error.label, error.name, error.endpoint) == ("shop", "h:1", "h:1")
        assert error.elapsed == pytest.approx(2)
        assert len(error.attempts) == 1
        assert when == pytest.approx(2)

    run_virtual(main)


# --- endpoints that come and go ---------------------------------------------------------------------------------------


async def test_endpoints_of_a_file_come_and_go_while_calls_are_made_and_none_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "POLL", 0.005)
    path = tmp_path / "shops"
    served, failures, stop = {}, [], anyio.Event()

    def handler_of(name):
        async def handler(request):
            served[name] = served.get(name, 0) + 1
            await anyio.lowlevel.checkpoint()
            return mux.Response(name.encode())

        return handler

    async def caller():
        while not stop.is_set():
            try:
                await client(mux.Request(b"x" * 100))
            except meshlib.MeshError as error:
                failures.append(error)

    async def publish(*servers):
        new = tmp_path / "new"
        new.write_text("\n".join(server.address for server in servers))
        new.replace(path)
        wanted = {server.address for server in servers}
        while {str(node) for node in client.endpoints} != wanted:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.002)

    async def until_served(*names):
        before = dict(served)
        while any(served.get(name, 0) < before.get(name, 0) + 30 for name in names):  # noqa: ASYNC110
            await anyio.sleep(0.002)

    servers = {name: await mux.serve(handler_of(name), label=name) for name in ("a", "b", "c")}
    a, b, c = servers.values()
    path.write_text(f"{a.address}\n{b.address}\n")
    async with mux.client(f"file://{path}", label="shop") as client:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(caller)
            await until_served("a", "b")
            await publish(a, b, c)
            await until_served("a", "b", "c")
            await publish(b, c)
            await a.aclose()
            last_of_a = served["a"]
            await until_served("b", "c")
            path.write_text("half a l")
            while not client.metrics()["name/failures"]:  # noqa: ASYNC110
                await anyio.sleep(0.002)
            await until_served("b", "c")
            await publish(c)
            await b.aclose()
            await until_served("c")
            stop.set()
        numbers = client.metrics()
    await c.aclose()
    assert failures == []
    assert served["a"] == last_of_a
    assert (numbers["loadbalancer/adds"], numbers["loadbalancer/removes"]) == (3, 2)
    assert {name.split("/")[1] for name in numbers if name.startswith("endpoints/")} == {c.address}
    assert numbers["failures"] == 0
    assert numbers["success"] == sum(served.values())
