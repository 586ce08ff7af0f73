"""`meshlib.http.Middleware` by itself: what it does to one request, on every event loop."""

from __future__ import annotations

import json

import anyio
import anyio.lowlevel
import pytest

import meshlib
from meshlib.core.context import Context, TraceId
from meshlib.http import Middleware
from meshlib.http.headers import encode_headers

pytestmark = pytest.mark.anyio


class Client:
    """One request to an ASGI app, and what came back."""

    def __init__(self, app, method="GET", path="/", headers=(), body=(b"",), **scope):
        self.app, self.status, self.headers, self.body = app, 0, {}, b""
        self.left = anyio.Event()
        self._parts = list(body)
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": list(headers),
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
            **scope,
        }

    async def receive(self):
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            assert not self.status
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")

    async def run(self):
        await self.app(self.scope, self.receive, self.send)
        return self

    @property
    def problem(self):
        assert self.headers["content-type"] == "application/problem+json"
        return json.loads(self.body)


async def answer(send, status=200, body=b""):
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


def app_of(function):
    async def app(scope, receive, send):
        await function(scope)
        await answer(send)

    return app


def sent(**context):
    return encode_headers(Context(**context), meshlib.Clock())


async def test_the_app_and_what_it_calls_run_under_the_callers_context():
    seen = []

    async def look(scope):
        seen.append((meshlib.current(), meshlib.remaining()))

    trace = TraceId(7, 8, None, True)
    headers = encode_headers(Context(trace=trace, dtab=(("/s", "/t"),), client_id="me"), meshlib.Clock())
    headers.append((b"finagle-ctx-com.twitter.finagle.deadline", b"1000000000 6000000000"))
    assert (await Client(Middleware(app_of(look)), headers=headers).run()).status == 200
    ((context, left),) = seen
    assert context.trace.trace == 7
    assert context.dtab == (("/s", "/t"),)
    assert context.client_id == "me"
    assert 4.5 < left <= 5
    assert meshlib.current() == Context()


async def test_strangers_say_nothing_of_where_calls_go():
    seen = []

    async def look(scope):
        seen.append(meshlib.current().dtab)

    headers = sent(dtab=(("/s", "/t"),))
    await Client(Middleware(app_of(look), trust_context=False), headers=headers).run()
    assert seen == [()]


async def test_values_that_cannot_be_read_are_counted_and_ignored():
    app = Middleware(app_of(lambda scope: anyio.lowlevel.checkpoint()))
    reply = await Client(app, headers=[(b"traceparent", b"zz"), (b"dtab-local", b"\xff")]).run()
    assert reply.status == 200
    assert app.metrics()["undecodable_headers"] == 2


async def test_a_deadline_that_passes_cancels_the_app():
    cancelled = []

    async def slow(scope):
        try:
            await anyio.sleep(60)
        except BaseException:
            cancelled.append(True)
            raise

    app = Middleware(app_of(slow))
    headers = [(b"finagle-ctx-com.twitter.finagle.deadline", b"1000000000 1050000000")]
    reply = await Client(app, headers=headers).run()
    assert reply.status == 504
    assert reply.problem["title"] == "Gateway Timeout"
    assert cancelled == [True]
    numbers = app.metrics()
    assert numbers["failures/DeadlineExceeded"] == numbers["routes/GET -/failures"] == 1


async def test_a_deadline_that_has_passed_is_not_worked_for():
    called = []

    async def note(scope):
        called.append(True)

    headers = [(b"finagle-ctx-com.twitter.finagle.deadline", b"1000000000 1000000000")]
    assert (await Client(Middleware(app_of(note)), headers=headers).run()).status == 504
    assert not called


async def test_a_client_that_leaves_cancels_the_app():
    cancelled = anyio.Event()

    async def slow(scope):
        try:
            await anyio.sleep(60)
        finally:
            cancelled.set()

    app = Middleware(app_of(slow))
    client = Client(app)
    async with anyio.create_task_group() as group:
        group.start_soon(client.run)
        await anyio.sleep(0.05)
        client.left.set()
        with anyio.fail_after(5):
            await cancelled.wait()
    assert client.status == 499  # no server sends it, and middleware outside of ours misses no answer
    assert app.metrics()["disconnects"] == app.metrics()["cancelled"] == 1
    assert app.metrics()["requests"] == 0


async def test_a_body_that_breaks_off_is_no_crash_of_ours():
    class ClientDisconnect(Exception):
        """As Starlette's, and raised where that is."""

    async def read(scope, receive, send):
        if (await receive())["type"] == "http.disconnect":
            raise ClientDisconnect
        await answer(send)

    middleware = Middleware(read)
    client = Client(middleware, "POST", headers=[(b"content-length", b"4")], body=())
    client.left.set()
    assert (await client.run()).status == 499
    numbers = middleware.metrics()
    assert (numbers["disconnects"], numbers["requests"], numbers["failures"]) == (1, 0, 0)

    async def fail(scope, receive, send):
        raise ClientDisconnect

    with pytest.raises(ClientDisconnect):  # of whom it calls; our own client is there
        await Client(Middleware(fail)).run()


async def test_a_body_is_the_apps_to_read_however_late():
    async def app(scope, receive, send):
        await anyio.sleep(0.25)  # somebody watches the client by now
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        await anyio.sleep(0.25)
        await answer(send, body=body)

    middleware = Middleware(app)
    posted = Client(middleware, "POST", headers=[(b"content-length", b"4")], body=(b"ab", b"cd"))
    assert (await posted.run()).body == b"abcd"
    assert (await Client(middleware).run()).body == b""


async def test_the_app_hears_of_the_disconnect_too():
    heard = []

    async def app(scope, receive, send):
        await receive()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.3)
            heard.append((await receive())["type"])
            heard.append((await receive())["type"])

    client = Client(Middleware(app))
    client.left.set()
    await client.run()
    assert heard == ["http.disconnect"] * 2


async def test_a_server_that_is_full_says_where_else_to_go():
    inside, done = anyio.Event(), anyio.Event()

    async def hold(scope):
        if scope["path"] == "/":
            inside.set()
            await done.wait()

    app = Middleware(app_of(hold), meshlib.concurrency_limit(1))
    async with anyio.create_task_group() as group:
        group.start_soon(Client(app).run)
        await inside.wait()
        refused = await Client(app).run()
        assert refused.status == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["finagle-http-nack"] == "true"
        assert "at its limit of 1" in refused.problem["detail"]
        assert (await Client(app, path="/healthz").run()).status == 200  # a full server is alive
        done.set()
    assert (await Client(app).run()).status == 200


async def test_too_many_of_one_caller_is_429():
    app = Middleware(app_of(lambda scope: anyio.lowlevel.checkpoint()), meshlib.rate_limit(1, burst=1))
    assert (await Client(app).run()).status == 200
    refused = await Client(app).run()
    assert refused.status == 429
    assert refused.headers["retry-after"] == "1"
    assert "finagle-http-nack" not in refused.headers


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (meshlib.Rejected("not now"), 503, "finagle-http-nack"),
        (meshlib.Rejected("never", retryable=False), 503, "finagle-http-nonretryable-nack"),
        (meshlib.InvalidArgument("age: expected a number", path="age"), 400, "content-type"),
        (meshlib.UnknownMethod("no such thing"), 404, "content-type"),
        (meshlib.RemoteError("in our own words"), 500, "content-type"),
    ],
)
async def test_errors_of_ours_that_the_app_raises_are_answers(error, status, header):
    async def fail(scope):
        raise error

    reply = await Client(Middleware(app_of(fail))).run()
    assert reply.status == status
    assert reply.problem["detail"] == error.message
    assert header in reply.headers


async def test_other_errors_are_for_the_framework():
    async def fail(scope):
        raise ZeroDivisionError

    async def call_elsewhere(scope):
        error = meshlib.Rejected("by somebody else")
        error.label = "users"
        raise error

    app = Middleware(app_of(fail))
    with pytest.raises(ZeroDivisionError):
        await Client(app).run()
    assert app.metrics()["failures"] == 1
    with pytest.raises(meshlib.Rejected):  # "never processed" is true of that call, and not of this one
        await Client(Middleware(app_of(call_elsewhere))).run()


async def test_mounted_twice_it_works_once():
    inner = Middleware(app_of(lambda scope: anyio.lowlevel.checkpoint()))
    outer = Middleware(inner)
    assert (await Client(outer).run()).status == 200
    assert outer.metrics()["requests"] == 1
    assert inner.metrics()["requests"] == 0


async def test_routes_are_labels_and_there_are_only_so_many():
    class Route:
        path = "/users/{id}"

    async def routed(scope):
        if scope["path"].startswith("/users/"):
            scope["route"] = Route()
        elif scope["path"] != "/":
            scope["path_template"] = scope["path"]

    app = Middleware(app_of(routed))
    for path in ("/users/1", "/users/2", "/"):
        await Client(app, path=path).run()
    await Client(app, "WEIRD").run()
    numbers = app.metrics()
    assert numbers["routes/GET /users/{id}/requests"] == 2
    assert numbers["routes/GET -/success"] == 1
    assert numbers["routes/_OTHER -/success"] == 1
    for n in range(200):
        await Client(app, path=f"/made-up/{n}").run()
    assert numbers["requests"] == 4
    names = {name for name in app.metrics() if name.startswith("routes/") and name.endswith("/success")}
    assert len(names) == 101
    assert app.metrics()["routes/other/success"] == 103


async def test_responses_of_500_count_as_failures():
    async def app(scope, receive, send):
        await answer(send, 500)

    middleware = Middleware(app)
    assert (await Client(middleware).run()).status == 500
    assert middleware.metrics()["failures/reply"] == middleware.metrics()["routes/GET -/failures"] == 1


async def test_draining_it_is_not_ready_and_ends_connections():
    app = Middleware(app_of(lambda scope: anyio.lowlevel.checkpoint()))
    assert (await Client(app, path="/readyz").run()).status == 200
    assert "connection" not in (await Client(app).run()).headers
    app.drain()
    assert (await Client(app, path="/readyz").run()).status == 503
    assert (await Client(app, path="/livez").run()).status == 200
    assert (await Client(app).run()).headers["connection"] == "close"
    assert "connection" not in (await Client(app, http_version="2").run()).headers


async def test_what_outlasts_the_grace_period_is_cancelled():
    app = Middleware(app_of(lambda scope: anyio.sleep(60)))
    client = Client(app)
    async with anyio.create_task_group() as group:
        group.start_soon(client.run)
        await anyio.sleep(0.01)
        app.drain()
        await app.wait_idle(0.05)
    assert client.status == 503
    assert "finagle-http-nack" not in client.headers  # it was under way: somebody else doing it again may do harm


async def test_headers_beyond_reason_are_refused():
    app = Middleware(app_of(lambda scope: anyio.lowlevel.checkpoint()))
    assert (await Client(app, headers=[(b"x", b"y" * 70_000)]).run()).status == 431


async def test_layers_stand_around_the_app():
    seen = []

    @meshlib.filter
    async def noted(request, service):
        reply = await service(request)
        seen.append((request.method, request.path, reply.status))
        return reply

    await Client(Middleware(app_of(lambda scope: anyio.lowlevel.checkpoint()), noted), path="/x").run()
    assert seen == [("GET", "/x", 200)]


async def test_nothing_is_left_behind():
    app = Middleware(app_of(lambda scope: anyio.sleep(0.15)))
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(Client(app).run)
    assert "(0 requests)" in repr(app)
    await app.env.supervisor.stop()
    assert app.env.supervisor.jobs == 0


@pytest.mark.parametrize("options", [{"grace": -1}, {"linger": -1}, {"health": "/x"}])
async def test_options_that_make_no_sense_are_told(options):
    with pytest.raises(meshlib.ConfigurationError):
        Middleware(app_of(anyio.sleep), **options)


async def test_a_websocket_has_the_context_too():
    seen = []

    async def app(scope, receive, send):
        seen.append(meshlib.current().client_id)

    await Client(Middleware(app), headers=sent(client_id="me"), type="websocket").run()
    assert seen == ["me"]
