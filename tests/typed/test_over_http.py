"""What is special to typed calls over HTTP: where they go, what they are counted as, and who else may ask."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

import meshlib
from meshlib import rpc


class Shop:
    @rpc(idempotent=True)
    async def price(self, item: str) -> float:
        return 2.5

    @rpc
    async def buy(self, item: str) -> str:
        return item


class health:  # noqa: N801
    """Whose method has a path that probes ask for."""

    @rpc(idempotent=True)
    async def ready(self) -> str:
        return "mine"


def asking(server: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{server.address}")


async def test_requests_are_counted_by_method() -> None:
    async with meshlib.serve(Shop(), "http://127.0.0.1:0") as server, asking(server) as client:
        await client.post("/Shop/buy", json={"item": "tea"})
        await client.get("/Shop/price?item=tea")
        await client.post("/Shop/price", json={"item": 3})
        await client.get("/Shop/steal")
    numbers = {name: n for name, n in server.metrics().items() if name.startswith("routes/")}
    counted = {name.split("/requests")[0]: n for name, n in numbers.items() if name.endswith("/requests")}
    assert counted == {
        "routes/POST /Shop/buy": 1,
        "routes/GET /Shop/price": 1,
        "routes/POST /Shop/price": 1,
        "routes/GET -": 1,
    }


async def test_probes_are_answered() -> None:
    async with meshlib.serve(Shop(), "http://127.0.0.1:0", meshlib.concurrency_limit(1)) as server:
        async with asking(server) as client:
            for path in ("/ready", "/readyz", "/health", "/healthz", "/livez", "/ping"):
                reply = await client.get(path)
                assert (reply.status_code, reply.text) == (200, "ok\n")
            assert (await client.head("/ready")).status_code == 200
            assert (await client.post("/ready")).status_code == 405
            server.middleware.drain()  # type: ignore[attr-defined]
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
        assert server.metrics()["requests"] == 0


async def test_other_paths_may_be_the_probes() -> None:
    paths = {"health": ["/alive"], "ready": ["/open"]}
    async with meshlib.serve(Shop(), "http://127.0.0.1:0", **paths) as server, asking(server) as client:
        assert [(await client.get(path)).status_code for path in ("/alive", "/open", "/ready")] == [200, 200, 404]


async def test_a_method_is_nearer_than_a_probe() -> None:
    async with meshlib.serve(health(), "http://127.0.0.1:0") as server, asking(server) as client:
        assert (await client.get("/health/ready")).json() == "mine"


async def test_an_app_to_be_mounted_answers_probes_only_where_it_is_told() -> None:
    for app, status in ((meshlib.asgi(Shop()), 404), (meshlib.asgi(Shop(), health=["/ready"]), 200)):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            assert (await client.get("/ready")).status_code == status


async def test_the_document_and_the_body_have_their_options() -> None:
    options: dict[str, Any] = {"title": "The shop", "version": "7", "largest": 10}
    async with meshlib.serve(Shop(), "http://127.0.0.1:0", **options) as server, asking(server) as client:
        assert (await client.get("/openapi.json")).json()["info"] == {"title": "The shop", "version": "7"}
        assert (await client.post("/Shop/buy", json={"item": "a long name"})).status_code == 413
    with pytest.raises(meshlib.ConfigurationError, match=r"title=…\): that is for @rpc services"):
        meshlib.serve(meshlib.asgi(Shop()), "http://127.0.0.1:0", title="x")


@pytest.mark.parametrize("label", ["shop/eu", "shop:eu", "a@b?c"])
async def test_a_label_is_no_address(label: str) -> None:
    hosts = []

    @meshlib.filter
    async def look(exchange: Any, service: Any) -> Any:
        hosts.append(dict(exchange.scope["headers"])[b"host"])
        return await service(exchange)

    async with (
        meshlib.http.serve(meshlib.asgi(Shop()), "http://127.0.0.1:0", look) as server,
        meshlib.client(Shop, f"{server.address},{server.address}", protocol="http", label=label) as shop,
    ):
        assert await shop.buy("tea") == "tea"
    assert hosts == [b"rpc"]


@pytest.mark.parametrize(("root", "path"), [("", "/"), ("/api", "/api"), ("/api", "/api/"), ("/api/v 1", "/api/v%201")])
async def test_a_target_may_say_where_the_app_is_mounted(root: str, path: str) -> None:
    inner = meshlib.asgi(Shop())

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await inner({**scope, "root_path": root}, receive, send)

    async with (
        meshlib.http.serve(mounted, "http://127.0.0.1:0") as server,
        meshlib.client(Shop, f"http://{server.address}{path}") as shop,
    ):
        assert await shop.buy("tea") == "tea"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("http://localhost", "say the port too: http://localhost:80"),
        ("https://shop.example/", "say the port too: https://shop.example:443"),
        ("https://[::1]/api", r"say the port too: https://\[::1\]:443"),
        ("http://127.0.0.1:1/api?x=1", "query"),
        ("http://127.0.0.1:1/api#x", "fragment"),
    ],
)
async def test_a_target_that_cannot_be_is_told(target: str, says: str) -> None:
    with pytest.raises(meshlib.ConfigurationError, match=says):
        meshlib.client(Shop, target)


async def test_what_json_has_no_number_for_is_no_result() -> None:
    class Odd:
        @rpc
        async def number(self) -> float:
            return float("nan")

        @rpc
        async def maybe(self) -> float | None:
            return float("inf")

    async with (
        meshlib.serve(Odd(), "http://127.0.0.1:0") as server,
        meshlib.client(Odd, f"http://{server.address}") as odd,
    ):
        assert await odd.maybe() is None
        with pytest.raises(meshlib.InvalidReply, match=r"expected `float`, got `null`"):
            await odd.number()
