"""A `meshlib.http.Middleware` inside another, below a root path, and used for one server after another."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

import meshlib
from meshlib.core.priority import Priority
from meshlib.http import Middleware

from .test_middleware import Client, answer, app_of, sent

pytestmark = pytest.mark.anyio


def told():
    """Headers of somebody who says a lot."""
    return sent(dtab=(("/s", "/t"),), priority=Priority.CRITICAL, client_id="billing", attempt=1, baggage="tenant=root")


class Noted:
    """An app that notes what it runs under."""

    def __init__(self):
        self.seen = []

    async def __call__(self, scope, receive, send):
        self.seen.append(meshlib.current())
        await anyio.lowlevel.checkpoint()
        await answer(send)

    @property
    def said(self):
        (context,) = self.seen
        return context.dtab, context.priority, context.client_id, context.attempt, context.baggage


NOTHING = ((), Priority.DEFAULT, "", 0, "")


async def test_strangers_are_believed_in_nothing_but_their_deadline_and_trace():
    app = Noted()
    headers = [*told(), (b"finagle-ctx-com.twitter.finagle.deadline", b"1000000000 6000000000")]
    await Client(Middleware(app, trust_context=False), headers=headers).run()
    assert app.said == NOTHING
    assert app.seen[0].deadline is not None


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_an_inner_one_that_does_not_trust_is_heard(kind):
    app = Noted()
    inner = Middleware(app, trust_context=False)
    outer = Middleware(inner)
    await Client(outer, headers=told(), type=kind).run()
    assert app.said == NOTHING
    app.seen.clear()
    await Client(Middleware(Middleware(app)), headers=told(), type=kind).run()
    assert app.said[2] == "billing"


async def test_an_inner_one_of_a_part_of_the_app_is_heard_too():
    app = Noted()
    part = Middleware(app, trust_context=False)
    whole = Middleware(Starlette(routes=[Mount("/admin", part), Mount("/", app)]))
    await Client(whole, path="/admin/x", headers=told()).run()
    assert app.said == NOTHING
    app.seen.clear()
    await Client(whole, path="/x", headers=told()).run()
    assert app.said[2] == "billing"


async def test_the_layers_of_an_inner_one_stand():
    inside, done = anyio.Event(), anyio.Event()

    async def hold(scope):
        inside.set()
        await done.wait()

    inner = Middleware(app_of(hold), meshlib.concurrency_limit(1))
    outer = Middleware(inner)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(Client(outer).run)
            await inside.wait()
            refused = await Client(outer).run()
            assert refused.status == 503
            assert refused.headers["finagle-http-nack"] == "true"
            done.set()
    assert (await Client(outer).run()).status == 200
    assert outer.metrics()["requests"] == inner.metrics()["requests"] == 3
    assert outer.metrics()["failures"] == 1


async def test_a_deadline_and_a_client_that_leaves_end_the_work_of_both():
    async def slow(scope):
        await anyio.sleep(60)

    inner = Middleware(app_of(slow), meshlib.concurrency_limit(1))
    outer = Middleware(inner)
    headers = [(b"finagle-ctx-com.twitter.finagle.deadline", b"1000000000 1050000000")]
    assert (await Client(outer, headers=headers).run()).status == 504
    client = Client(outer)
    client.left.set()
    await client.run()
    for each in (outer, inner):
        assert each.metrics()["limit/concurrency"] == 0
        assert "(0 requests)" in repr(each)
    assert (outer.metrics()["disconnects"], outer.metrics()["failures"]) == (1, 1)


async def test_an_app_served_with_its_own_middleware_keeps_what_that_was_told():
    app = FastAPI()
    app.add_middleware(Middleware, meshlib.rate_limit(1, burst=1), trust_context=False)

    @app.get("/")
    async def who() -> str:
        return repr(meshlib.current().client_id)

    async with (
        meshlib.serve(app, "http://127.0.0.1:0") as server,
        httpx.AsyncClient(base_url=f"http://{server.address}") as client,
    ):
        reply = await client.get("/", headers={"meshlib-client-id": "billing"})
        assert (reply.status_code, reply.json()) == (200, "''")
        assert (await client.get("/")).status_code == 429


async def test_readiness_of_an_inner_one_is_the_outer_ones():
    inner = Middleware(Noted(), ready=("/warm",))
    outer = Middleware(inner)
    assert (await Client(outer, path="/warm").run()).status == 200
    outer.drain()
    assert (await Client(outer, path="/warm").run()).status == 503


async def test_below_a_root_path_readiness_is_readiness():
    app = Middleware(app_of(lambda scope: anyio.lowlevel.checkpoint()))
    for path in ("/api/readyz", "/readyz"):
        assert (await Client(app, path=path, root_path="/api").run()).status == 200
    assert app.metrics()["requests"] == 0
    app.drain()
    for path in ("/api/readyz", "/readyz"):
        assert (await Client(app, path=path, root_path="/api").run()).status == 503
    assert (await Client(app, path="/api/livez", root_path="/api").run()).status == 200
    assert (await Client(app, path="/other/readyz", root_path="/api").run()).status == 200
    assert app.metrics()["requests"] == 1


async def test_one_server_after_another():
    middleware = Middleware(app_of(lambda scope: anyio.lowlevel.checkpoint()), linger=None)
    for _ in range(2):
        async with (
            meshlib.http.serve(middleware) as server,
            httpx.AsyncClient(base_url=f"http://{server.address}") as client,
        ):
            reply = await client.get("/")
            assert reply.status_code == 200
            assert "connection" not in reply.headers
            assert (await client.get("/readyz")).status_code == 200
        assert middleware.env.supervisor.jobs == 0
