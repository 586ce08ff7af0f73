"""Answers that come too late, that a better one replaces, or that never come: what the caller and the numbers say."""

from __future__ import annotations

import asyncio
import time

import anyio
import anyio.lowlevel
import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route

import meshlib
from meshlib.http import Middleware

from .servers import read_body
from .test_completion import BEGUN, SOON
from .test_middleware import Client, answer

pytestmark = pytest.mark.anyio

LATER = [(b"finagle-ctx-com.twitter.finagle.deadline", b"1000000000 61000000000")]
"""A deadline a minute away."""


def numbers(middleware, *names):
    found = middleware.metrics()
    return tuple(found[name] for name in names or ("requests", "success", "failures", "disconnects"))


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2", "3"])
async def test_a_body_that_nobody_announced_is_the_apps_to_the_last_part(version):
    async def app(scope, receive, send):
        await anyio.sleep(0.25)  # somebody watches the client by now, and has met the first part
        first = await receive()
        await anyio.sleep(0.25)
        await answer(send, body=first["body"] + await read_body(receive))

    client = Client(Middleware(app), "POST", body=(b"ab", b"cd", b"ef"), http_version=version)
    with anyio.fail_after(30):
        assert (await client.run()).body == b"abcdef"


async def test_of_a_body_that_nobody_announced_the_client_may_leave():
    got = []

    async def app(scope, receive, send):
        await anyio.sleep(0.25)
        got.extend([await receive(), await receive()])

    client = Client(Middleware(app), "POST", body=(b"ab",), http_version="2")
    receive = client.receive

    async def broken():
        message = await receive()
        return {**message, "more_body": True} if message["type"] == "http.request" else message

    client.receive = broken
    client.left.set()
    with anyio.fail_after(30):
        await client.run()
    assert [message["type"] for message in got] == ["http.request", "http.disconnect"]
    assert numbers(client.app) == (0, 0, 0, 1)


async def test_without_a_body_the_client_of_http2_is_watched():
    async def app(scope, receive, send):
        await anyio.sleep(60)

    client = Client(Middleware(app), http_version="2")
    client.left.set()
    with anyio.fail_after(30):
        await client.run()
    assert numbers(client.app) == (0, 0, 0, 1)


@pytest.mark.parametrize("status", [0, 400])
async def test_a_body_that_breaks_off_is_a_client_that_has_left_whatever_the_app_makes_of_it(status):
    async def app(scope, receive, send):
        assert (await receive())["type"] == "http.disconnect"
        if status:
            await answer(send, status)

    client = Client(Middleware(app), "POST", headers=[(b"content-length", b"4")], body=())
    client.left.set()
    assert (await client.run()).status == 499
    assert numbers(client.app) == (0, 0, 0, 1)


@pytest.mark.parametrize("begun", [False, True])
async def test_who_does_not_answer_has_failed(begun):
    async def app(scope, receive, send):
        if begun:
            await send(BEGUN)

    client = await Client(Middleware(app)).run()
    assert numbers(client.app) == (1, 0, 1, 0)
    assert client.app.metrics()["routes/GET -/failures"] == 1


# --- answers after the deadline ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), (meshlib.timeout(0.05),)], ids=["deadline", "timeout"])
async def test_an_answer_from_a_thread_that_nobody_could_stop_comes_too_late(layers):
    async def app(scope, receive, send):
        await anyio.to_thread.run_sync(time.sleep, 0.4)
        await answer(send)

    client = await Client(Middleware(app, *layers), headers=() if layers else SOON).run()
    assert client.status == 504
    assert numbers(client.app) == (1, 0, 1, 0)
    assert client.app.metrics()["failures/DeadlineExceeded"] == 1


async def test_an_app_that_ignores_its_cancellation_is_too_late_too():
    async def app(scope, receive, send):
        with anyio.move_on_after(60, shield=True):
            await anyio.sleep(0.4)
        await answer(send)

    client = await Client(Middleware(app), headers=SOON).run()
    assert (client.status, client.problem["title"]) == (504, "Gateway Timeout")
    assert numbers(client.app) == (1, 0, 1, 0)


class InTasks:
    """Handles each request in a task of its own beside one that waits for the client to leave, as Quart and Django."""

    def __init__(self, seconds=60.0):
        self.seconds, self.ended, self.task = seconds, "not yet", None

    async def __call__(self, scope, receive, send):
        async def listen():
            while (await receive())["type"] != "http.disconnect":
                pass

        async def handle():
            try:
                await asyncio.sleep(self.seconds)
                await answer(send)
                self.ended = "by itself"
            except BaseException as error:
                self.ended = type(error).__name__
                raise

        self.task, listening = asyncio.create_task(handle()), asyncio.create_task(listen())
        _, pending = await asyncio.wait([self.task, listening], return_when=asyncio.FIRST_COMPLETED)
        for each in pending:
            each.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_handlers_in_tasks_of_their_own_end_with_the_deadline_and_with_the_server(anyio_backend):
    app = InTasks()
    client = await Client(Middleware(app), headers=SOON).run()
    assert (client.status, app.ended) == (504, "CancelledError")
    assert numbers(client.app) == (1, 0, 1, 0)
    app = InTasks()
    client = Client(Middleware(app))
    async with anyio.create_task_group() as group:
        group.start_soon(client.run)
        await anyio.sleep(0.2)
        await client.app.wait_idle(0)
    assert (client.status, app.ended) == (503, "CancelledError")
    app = InTasks()
    client = Client(Middleware(app))
    client.left.set()
    await client.run()
    assert (client.status, app.ended) == (499, "CancelledError")
    assert numbers(client.app) == (0, 0, 0, 1)
    app = InTasks(0.0)
    client = await Client(Middleware(app), headers=LATER).run()
    assert (client.status, app.ended) == (200, "by itself")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_a_task_left_behind_says_is_not_sent(anyio_backend):
    left = []

    async def later(receive, send):
        await asyncio.sleep(0.4)
        await answer(send)
        left.append(await receive())

    async def app(scope, receive, send):
        left.append(asyncio.create_task(later(receive, send)))
        await anyio.sleep(60)

    client = await Client(Middleware(app), headers=SOON).run()
    assert client.status == 504
    await left[0]
    assert left[1]["type"] == "http.disconnect"
    assert client.body.count(b"title") == 1


# --- 500s in whose place there is a better answer ---------------------------------------------------------------------

ERRORS = {
    "/rejected": (meshlib.Rejected("not now"), 503),
    "/invalid": (meshlib.InvalidArgument("bad age"), 400),
    "/late": (meshlib.DeadlineExceeded("too late"), 504),
}


def raising(framework):
    if framework == "fastapi":
        app = FastAPI()
        for path, (error, _) in ERRORS.items():

            @app.get(path)
            async def fail(error=error):
                raise error

        return app

    async def fail(request):
        raise ERRORS[request.url.path][0]

    return Starlette(routes=[Route(path, fail) for path in ERRORS])


@pytest.mark.parametrize("path", ERRORS)
@pytest.mark.parametrize("where", ["within", "around"])
@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
async def test_an_error_of_ours_is_an_answer_wherever_the_middleware_stands(framework, where, path):
    app = raising(framework)
    if where == "within":
        app.add_middleware(Middleware)
    client = await Client(app if where == "within" else Middleware(app), path=path, state={}).run()
    assert client.status == ERRORS[path][1]
    assert client.problem["detail"] == ERRORS[path][0].message
    assert (client.headers.get("finagle-http-nack") == "true") == (path == "/rejected")


async def test_other_errors_are_answered_and_raised_as_ever():
    async def fail(request):
        raise ZeroDivisionError

    async def refuse(request):
        raise HTTPException(503, "full")

    middleware = Middleware(Starlette(routes=[Route("/", fail), Route("/refuse", refuse)]))
    client = Client(middleware)
    with pytest.raises(ZeroDivisionError):
        await client.run()
    assert (client.status, client.body) == (500, b"Internal Server Error")
    client = await Client(middleware, path="/refuse").run()
    assert (client.status, client.body) == (503, b"full")
    assert numbers(middleware, "requests", "failures", "failures/reply") == (2, 2, 2)


async def test_a_500_waits_for_nothing_but_what_follows_at_once():
    """Neither for the rest of a stream, nor for background tasks."""
    begun, go = anyio.Event(), anyio.Event()

    async def app(scope, receive, send):
        await send({**BEGUN, "status": 503})
        if scope["path"] == "/stream":
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": b"b", "more_body": True})
        elif scope["path"] == "/slow":
            begun.set()
            await go.wait()
        await send({"type": "http.response.body", "body": b"c"})
        begun.set()
        await go.wait()

    middleware = Middleware(app)
    for path, expected in {"/": b"c", "/stream": b"abc", "/slow": b""}.items():
        client, begun, go = Client(middleware, path=path), anyio.Event(), anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(client.run)
            await begun.wait()
            with anyio.fail_after(30):
                while not client.status or client.body != expected:  # noqa: ASYNC110 - it tells nobody
                    await anyio.sleep(0.001)
            go.set()
        assert client.body[-1:] == b"c"
    assert numbers(middleware, "requests", "failures") == (3, 3)


async def test_background_work_after_a_500_is_not_for_the_caller():
    left = []

    async def app(scope, receive, send):
        await answer(send, 503)
        await anyio.lowlevel.checkpoint()
        left.append(meshlib.remaining())

    assert (await Client(Middleware(app), headers=LATER).run()).status == 503
    assert left == [None]


# --- clients that leave, with other middleware outside ----------------------------------------------------------------


async def test_middleware_outside_of_ours_misses_no_answer_of_a_client_that_left(caplog):
    app = FastAPI()

    @app.get("/")
    async def slow() -> JSONResponse:
        await anyio.sleep(60)
        return JSONResponse(1)

    app.add_middleware(Middleware, linger=None)

    @app.middleware("http")
    async def look_on(request, call_next):
        return await call_next(request)

    client = Client(app, state={})
    client.left.set()
    with anyio.fail_after(30):
        await client.run()
    assert not caplog.records


@pytest.mark.parametrize("http2", [False, True])
async def test_servers_discard_the_answer_to_a_client_that_left(http2, caplog):
    ended = anyio.Event()

    async def slow(scope, receive, send):
        if scope["type"] == "http":
            try:
                await anyio.sleep(60)
            finally:
                ended.set()

    async with meshlib.http.serve(slow, http2=http2) as server:
        async with httpx.AsyncClient(http1=not http2, http2=http2) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.get(f"http://{server.address}/", timeout=0.3)
        with anyio.fail_after(30):
            await ended.wait()
            while not server.metrics()["disconnects"]:  # noqa: ASYNC110 - it tells nobody
                await anyio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_all_who_wait_until_nothing_is_under_way_are_told():
    go, waited = anyio.Event(), []

    async def app(scope, receive, send):
        await go.wait()
        await answer(send)

    middleware = Middleware(app)

    async def wait():
        await middleware.wait_idle(60)
        waited.append(True)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(Client(middleware).run)
            await anyio.sleep(0.01)
            for _ in range(3):
                group.start_soon(wait)
                await anyio.sleep(0.01)
            go.set()
    assert waited == [True] * 3
