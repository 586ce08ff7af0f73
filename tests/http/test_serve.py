"""`meshlib.serve("http://…")`: an ASGI app behind a listener that begins and ends as every server of the house does."""

from __future__ import annotations

import ssl
import sys
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import httpx
import pytest

import meshlib
from meshlib.http import HttpServer, Middleware, Transport
from meshlib.http.engines import Seen
from meshlib.http.listening import bind


class App:
    """Answers; ``/wait`` waits until it is let go. Notes what happens to it."""

    def __init__(self):
        self.lived, self.cancelled = [], 0
        self.go, self.entered = anyio.Event(), anyio.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                self.lived.append(kind)
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        if scope["path"] == "/wait":
            self.entered.set()
            try:
                await self.go.wait()
            except BaseException:
                self.cancelled += 1
                raise
        body = f"{scope['http_version']} {scope['path']}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def app():
    return App()


@asynccontextmanager
async def calling(server, **options):
    async with httpx.AsyncClient(base_url=f"http://{server.address}", **options) as client:
        yield client


async def test_it_serves_an_app(app):
    async with meshlib.serve(app, "http://127.0.0.1:0", label="shop") as server:
        assert isinstance(server, HttpServer)
        async with calling(server) as client:
            assert (await client.get("/a")).text == "1.1 /a"
            assert (await client.get("/b")).text == "1.1 /b"
        while server.metrics()["requests"] < 2:  # noqa: ASYNC110 - counted once the app returns, after the answer left
            await anyio.sleep(0.001)
        assert server.metrics()["success"] == 2
        assert repr(server).startswith(f"server 'shop' on {server.address} (http, ")
        assert app.lived == ["lifespan.startup"]
    assert app.lived == ["lifespan.startup", "lifespan.shutdown"]
    with pytest.raises(meshlib.ServiceClosed):
        await server.start()
    with pytest.raises(OSError):  # noqa: PT011 - whichever way the system says that nobody listens
        await anyio.connect_tcp(*split(server.address))


def split(address):
    host, _, port = address.rpartition(":")
    return host, int(port)


async def test_bare_it_is_awaited_and_closed_from_elsewhere(app):
    server = await meshlib.http.serve(app)
    async with calling(server) as client:
        assert (await client.get("/a")).status_code == 200
    async with anyio.create_task_group() as group:
        group.start_soon(server.wait_closed)
        group.start_soon(server.aclose)
        group.start_soon(server.aclose)
    assert app.lived == ["lifespan.startup", "lifespan.shutdown"]


async def test_closing_waits_for_what_is_under_way_and_says_that_it_is_the_last(app):
    replies = []

    async def call(client):
        replies.append(await client.get("/wait"))

    async with calling(server := await meshlib.http.serve(app)) as client, anyio.create_task_group() as group:
        group.start_soon(call, client)
        await app.entered.wait()
        group.start_soon(server.aclose)
        while not server.middleware.draining:  # noqa: ASYNC110 - it does not tell
            await anyio.sleep(0.005)
        assert (await client.get("/readyz")).status_code == 503
        app.go.set()
    (reply,) = replies
    assert (reply.status_code, reply.text, reply.headers["connection"]) == (200, "1.1 /wait", "close")
    assert app.cancelled == 0


async def test_what_outlasts_the_grace_period_is_cancelled_and_answered(app):
    replies = []

    async def call(client):
        replies.append(await client.get("/wait"))

    async with calling(server := await meshlib.http.serve(app)) as client, anyio.create_task_group() as group:
        group.start_soon(call, client)
        await app.entered.wait()
        await server.aclose(grace=0.05)
    (reply,) = replies
    assert reply.status_code == 503
    assert app.cancelled == 1


async def test_a_close_that_is_cancelled_still_ends_it(app):
    server = await meshlib.http.serve(app)
    async with calling(server) as client, anyio.create_task_group() as group:

        async def call():
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, AssertionError)):
                assert (await client.get("/wait")).status_code == 200

        group.start_soon(call)
        await app.entered.wait()
        with anyio.move_on_after(0.05):
            await server.aclose()
    assert app.cancelled == 1
    await server.wait_closed()


async def test_an_app_that_cannot_start_is_told_and_leaves_nothing(caplog):
    async def broken(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "no database"})

    with pytest.raises(meshlib.ConfigurationError, match="shop: the app could not start: no database"):
        await meshlib.http.serve(broken, label="shop")


class Dead:
    """An engine that never accepts."""

    connections = 0

    def __init__(self, error):
        self.started, self.error = anyio.Event(), error

    async def run(self):
        if self.error is not None:
            raise self.error

    def end(self):
        pass

    hurry = end


@pytest.mark.parametrize(
    ("error", "words"), [(OSError("no more files"), "no more files"), (None, "it has ended at once")]
)
async def test_an_engine_that_dies_has_not_started(app, monkeypatch, tmp_path, error, words):
    path = tmp_path / "shop.sock"
    server = meshlib.http.serve(app, f"unix://{path}", label="shop")
    with monkeypatch.context() as patch:
        patch.setattr("meshlib.http.server.engine_for", lambda *args, **options: Dead(error))
        with pytest.raises(meshlib.ConfigurationError, match=f"shop: the server could not start: {words}") as told:
            await server.start()
    assert told.value.__cause__ is error
    assert not path.exists()
    await server.start()  # another attempt is as good as the first
    async with server, httpx.AsyncClient(transport=Transport(server.address), base_url="http://shop") as client:
        assert (await client.get("/a")).text == "1.1 /a"


@pytest.mark.parametrize("where", ["tcp", "unix"])
async def test_a_server_that_is_not_installed_leaves_no_door_open(app, monkeypatch, tmp_path, where):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "hypercorn.trio", None)
    bound = []

    async def noting(*args):
        sockets, address = await bind(*args)
        bound.extend(sockets)
        return sockets, address

    monkeypatch.setattr("meshlib.http.server.bind", noting)
    path = tmp_path / "shop.sock"
    with pytest.raises(meshlib.ConfigurationError, match="which is not installed"):
        await meshlib.http.serve(app, f"unix://{path}" if where == "unix" else "http://127.0.0.1:0")
    assert [each.fileno() for each in bound] == [-1]
    assert not path.exists()


async def test_a_successor_s_socket_is_not_taken_away(app, monkeypatch, tmp_path):
    path = tmp_path / "shop.sock"

    def replaced(*args, **options):
        path.unlink()
        path.touch()
        return Dead(None)

    monkeypatch.setattr("meshlib.http.server.engine_for", replaced)
    with pytest.raises(meshlib.ConfigurationError):
        await meshlib.http.serve(app, f"unix://{path}")
    assert path.exists()


async def test_connections_of_hypercorn_are_those_that_may_be_open(app):
    now = 0.0
    seen = Seen(app, 5.0, lambda: now)

    async def receive():
        raise AssertionError("nobody reads")

    async def ask(client, *headers, path="/a"):
        async def send(message):
            counts.append(seen.count)

        async def closing(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": list(headers)})

        seen._app = closing if headers else app
        await seen({"type": "http", "http_version": "1.1", "path": path, "client": client}, receive, send)

    counts = []
    await ask(("10.0.0.1", 1000))
    await ask(("10.0.0.1", 1000))
    await ask(("10.0.0.1", 1001))
    assert (counts, seen.count) == ([1, 1, 1, 1, 2, 2], 2)
    now = 4.0
    await ask(("10.0.0.1", 1000))
    now = 5.5  # the other was idle for too long
    assert seen.count == 1
    await ask(("10.0.0.1", 1000), (b"connection", b"close"))
    assert seen.count == 0
    async with anyio.create_task_group() as group:  # two at once, as in HTTP/2
        for _ in range(2):
            group.start_soon(lambda: ask(("10.0.0.1", 1002), path="/wait"))
        await app.entered.wait()
        await anyio.lowlevel.checkpoint()
        now = 100.0
        assert seen.count == 1
        app.go.set()
    assert seen.count == 1
    await ask(None, (b"connection", b"close"))  # who has no address may have other connections
    assert seen.count == 2
    now = 200.0
    assert seen.count == 0


async def test_an_address_that_is_taken_is_told(app):
    async with meshlib.http.serve(app) as server:
        with pytest.raises(OSError, match="in use"):
            await meshlib.http.serve(app, f"http://{server.address}")


async def test_starting_may_be_cancelled():
    async def slow(scope, receive, send):
        assert scope["type"] == "lifespan"
        await anyio.sleep_forever()

    with anyio.move_on_after(0.05) as scope:
        await meshlib.http.serve(slow)
    assert scope.cancelled_caught


async def test_a_unix_socket(app, tmp_path):
    path = f"{tmp_path}/shop.sock"
    async with meshlib.http.serve(app, f"unix://{path}") as server:
        assert server.address == f"unix://{path}"
        async with httpx.AsyncClient(transport=Transport(server.address), base_url="http://shop") as client:
            assert (await client.get("/a")).text == "1.1 /a"
    assert not anyio.Path(path)._path.exists()


async def test_it_is_announced_until_it_closes(app, tmp_path):
    async with meshlib.http.serve(app, announce=f"file://{tmp_path}/") as server:
        async with httpx.AsyncClient(transport=Transport(f"file://{tmp_path}/"), base_url="http://shop") as client:
            assert (await client.get("/a")).text == "1.1 /a"
        assert [each.announced for each in server.announcements] == [True]
    assert list(tmp_path.glob("*")) == []


async def test_https(app, certificate):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    trust = ssl.create_default_context(cafile=certificate[0])
    async with meshlib.http.serve(app, "https://127.0.0.1:0", ssl=context) as server:
        transport = Transport(server.address, verify=trust)
        async with httpx.AsyncClient(transport=transport, base_url="https://users.test") as client:
            assert (await client.get("/a")).text == "1.1 /a"


async def test_http2_is_hypercorns(app, certificate):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    trust = ssl.create_default_context(cafile=certificate[0])
    async with meshlib.http.serve(app, "https://127.0.0.1:0", ssl=context, http2=True) as server:
        transport = Transport(server.address, verify=trust, http2=True)
        async with httpx.AsyncClient(transport=transport, base_url="https://users.test") as client:
            assert (await client.get("/a")).text == "2 /a"


async def test_typed_calls_over_https(certificate):
    class Greeter:
        @meshlib.rpc
        async def hello(self, name: str) -> str:
            return f"hello, {name}"

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    trust = ssl.create_default_context(cafile=certificate[0])
    async with meshlib.serve(Greeter(), "https://127.0.0.1:0", ssl=context) as server:
        for http2 in (False, True):
            options = {"ssl": trust, "server_name": "users.test", "http2": http2}
            async with meshlib.client(Greeter, f"https://{server.address}", **options) as greeter:
                assert await greeter.hello("you") == "hello, you"
        async with meshlib.client(Greeter, f"https://{server.address}", meshlib.timeout(2.0), ssl=trust) as greeter:
            with pytest.raises(meshlib.MeshError, match=r"TLS failed: .*127\.0\.0\.1"):
                await greeter.hello("you")


async def test_layers_stand_where_they_belong(app):
    seen = []

    class Greeter:
        @meshlib.rpc
        async def hello(self, name: str) -> str:
            return f"hello, {name}"

    @meshlib.filter
    async def noted(request, service):
        reply = await service(request)
        seen.append((request.dest, bytes(request.body), bytes(reply.body)))
        return reply

    async with (
        meshlib.serve(Greeter(), "http://127.0.0.1:0", noted, meshlib.rate_limit(1, burst=1)) as server,
        meshlib.client(Greeter, f"http://{server.address}") as greeter,
    ):
        assert await greeter.hello("you") == "hello, you"
        with pytest.raises(meshlib.Rejected):
            await greeter.hello("you")
    assert seen == [("/Greeter/hello", b'{"name":"you"}', b'"hello, you"')]


async def test_a_server_that_refuses_is_gone_around():
    """A nack is one over HTTP as well: the call goes elsewhere at once, idempotent or not."""

    class Greeter:
        def __init__(self, name):
            self.name = name

        @meshlib.rpc
        async def whose(self) -> str:
            return self.name

    full = meshlib.concurrency_limit(1)
    gate, entered = anyio.Event(), anyio.Event()

    @meshlib.filter
    async def holding(request, service):
        entered.set()
        await gate.wait()
        return await service(request)

    async with (
        meshlib.serve(Greeter("full"), "http://127.0.0.1:0", full, holding) as one,
        meshlib.serve(Greeter("free"), "http://127.0.0.1:0") as other,
        meshlib.client(Greeter, f"http://{one.address}") as blocker,
        meshlib.client(Greeter, f"{one.address},{other.address}", protocol="http") as greeter,
        anyio.create_task_group() as group,
    ):
        group.start_soon(blocker.whose)
        await entered.wait()
        assert {await greeter.whose() for _ in range(20)} == {"free"}
        gate.set()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: meshlib.http.serve(App, "ftp://x:1"), "expected http://host:port"),
        (lambda: meshlib.http.serve(App, "https://127.0.0.1:0"), "https:// needs ssl="),
        (lambda: meshlib.http.serve(App, "http://127.0.0.1:0", ssl=ssl.create_default_context()), "say https://"),
        (lambda: meshlib.http.serve(Middleware(App), "http://127.0.0.1:0", meshlib.timeout(1)), "to the Middleware"),
        (lambda: meshlib.http.serve(7), "give an ASGI app first"),
        (lambda: meshlib.http.serve(App(), title="Shop"), "title=…\\): an ASGI app takes clock, health"),
        (lambda: meshlib.serve(7, "http://127.0.0.1:0"), "no @rpc methods"),
        (lambda: meshlib.serve(App(), "http://127.0.0.1:0", grace=-1), "seconds, 0 or more"),
        (lambda: meshlib.client(App, "http://x:1"), "no @rpc methods"),
    ],
)
def test_what_makes_no_sense_is_told_at_once(make, words):
    with pytest.raises(meshlib.ConfigurationError, match=words):
        make()
