"""What requests are called in metrics and spans, by what each framework leaves in the scope."""

from __future__ import annotations

import pytest
from fastapi import APIRouter, FastAPI
from opentelemetry import trace as otel
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from meshlib.http import Middleware

from .test_completion import spans  # noqa: F401 - a fixture
from .test_middleware import Client, answer

pytestmark = pytest.mark.anyio


async def number(number: int) -> int:
    return number


def router(*inner, **options):
    made = APIRouter(**options)
    for each, prefix in inner:
        made.include_router(each, prefix=prefix)
    if not inner:
        made.get("/{number}")(number)
    return made


def bigger_application():
    """As FastAPI's own page of that name has it, and then some."""
    app, part = FastAPI(), FastAPI()
    app.include_router(router(), prefix="/users")
    app.include_router(router(), prefix="/items")
    app.include_router(router(prefix="/own"))
    app.include_router(router((router(), "/in")), prefix="/out")
    app.get("/plain/{number}")(number)
    part.include_router(router(), prefix="/users")
    part.get("/plain/{number}")(number)
    app.mount("/part", part)
    return app


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/users/1", "/users/{number}"),
        ("/users/x", "/users/{number}"),
        ("/items/1", "/items/{number}"),
        ("/own/1", "/own/{number}"),
        ("/out/in/1", "/out/in/{number}"),
        ("/plain/1", "/plain/{number}"),
        ("/part/users/1", "/part/users/{number}"),
        ("/part/plain/1", "/part/plain/{number}"),
        ("/part/nothing", "-"),
        ("/nothing", "-"),
    ],
)
@pytest.mark.parametrize("root", ["", "/api"])
async def test_routes_of_fastapi(path, route, root):
    middleware = Middleware(bigger_application())
    await Client(middleware, path=root + path, root_path=root, state={}).run()
    assert middleware.metrics()[f"routes/GET {route}/requests"] == 1


async def test_routes_of_starlette(tmp_path):
    async def page(request):
        return PlainTextResponse("page")

    (tmp_path / "page").write_text("page")
    part = Starlette(routes=[Route("/b/{id}", page)])
    routes = [
        Route("/a/{id}", page),
        Mount("/m", app=part),
        Mount("/n", routes=[Route("/c/{id}", page)]),
        Mount("/static", StaticFiles(directory=tmp_path)),
        Mount("/deep", routes=[Mount("/static", StaticFiles(directory=tmp_path))]),
    ]
    middleware = Middleware(Starlette(routes=routes))
    for path in ("/a/1", "/m/b/2", "/n/c/3", "/static/page", "/deep/static/page", "/m/nothing", "/nothing"):
        await Client(middleware, path=path).run()
    names = {name.split("/requests")[0] for name in middleware.metrics() if name.endswith("/requests")}
    expected = ("/a/{id}", "/m/b/{id}", "/n/c/{id}", "/static", "/deep/static", "/m", "-")
    assert names == {f"routes/GET {route}" for route in expected}


@pytest.mark.parametrize("route", [lambda scope: scope["endpoint"].__name__, lambda scope: None])
async def test_a_route_that_cannot_be_told_is_none_and_costs_no_request(route, caplog):
    async def app(scope, receive, send):
        await answer(send, 404)

    middleware = Middleware(app, route=route)
    for _ in range(3):
        assert (await Client(middleware).run()).status == 404
    assert middleware.metrics()["routes/GET -/success"] == 3
    assert len(caplog.records) <= 1  # once is enough


async def test_a_method_that_nobody_knows_is_no_name_of_a_span(spans):  # noqa: F811
    async def app(scope, receive, send):
        scope["path_template"] = "/users/{id}"
        await answer(send)

    await Client(Middleware(app), "MADE-UP").run()
    await Client(Middleware(app), "GET").run()
    other, known = spans.ended
    assert (other.name, known.name) == ("HTTP /users/{id}", "GET /users/{id}")
    assert other.attributes["http.request.method"] == "_OTHER"
    assert other.attributes["http.request.method_original"] == "MADE-UP"
    assert "http.request.method_original" not in known.attributes
    assert otel.SpanKind.SERVER is other.kind
