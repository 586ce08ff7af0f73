"""``@rpc`` services as curl, a browser, or another language would call them; and as strangers would abuse them."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import gzip
import json
import logging
from typing import Annotated, Literal

import httpx
import msgspec
import pytest

import meshlib
from meshlib import rpc
from meshlib.http import Middleware

from .servers import serving


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Line(msgspec.Struct):
    item: str
    count: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1


class Tree(msgspec.Struct):
    leaves: list[Tree] = []


@dataclasses.dataclass
class SoldOut(Exception):
    """It is gone."""

    item: str
    status = 409


class Closed(Exception):
    pass


class Broken(Exception):
    status = 503


@dataclasses.dataclass
class Late(Exception):
    status: int


class Shop:
    """Sells."""

    @rpc(idempotent=True)
    async def price(
        self,
        item: str,
        count: int = 1,
        size: Size = Size.SMALL,
        day: datetime.date | None = None,
        grade: Literal["a", "b"] = "a",
    ) -> float:
        """What it would cost.

        With all that is known.
        """
        return count * (2.5 if size is Size.SMALL else 4.0) + (day is not None)

    @rpc(raises=[SoldOut, Closed, Broken, Late])
    async def buy(self, lines: list[Line]) -> dict[str, int]:
        if lines[0].item == "gold":
            raise SoldOut("gold")
        if lines[0].item == "sunday":
            raise Closed("on Sundays")
        if lines[0].item == "broken":
            raise Broken("for now")
        if lines[0].item in ("late", "odd"):
            raise Late(410 if lines[0].item == "late" else 200)
        if lines[0].item == "bug":
            raise RuntimeError("hunter2")
        return {line.item: line.count for line in lines}

    @rpc(idempotent=True)
    async def depth(self, tree: Tree) -> int:
        return 1 + max([await self.depth(leaf) for leaf in tree.leaves], default=0)

    @rpc
    async def anything(self, value=None):
        return value


@pytest.fixture(scope="module")
def app():
    return Middleware(meshlib.asgi(Shop(), largest=100_000), linger=None)


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url) as given:
        yield given


def test_a_call_is_a_post_of_json(client):
    reply = client.post("/Shop/buy", json={"lines": [{"item": "tea", "count": 2}, {"item": "cake"}]})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"tea": 2, "cake": 1}
    assert client.post("/Shop/anything").text == "null"
    assert client.post("/Shop/anything", json={"value": [1, {"a": None}]}).json() == [1, {"a": None}]


def test_an_idempotent_method_with_simple_arguments_is_a_get(client):
    assert client.get("/Shop/price", params={"item": "tea"}).json() == 2.5
    more = {"item": "tea & cake", "count": "3", "size": "large", "day": "2026-11-26", "grade": "b"}
    assert client.get("/Shop/price", params=more).json() == 13.0
    refused = client.get("/Shop/buy")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert client.get("/Shop/depth").status_code == 405  # a tree is no simple argument
    refused = client.delete("/Shop/price")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, POST")


def test_a_head_is_what_the_get_would_be_but_its_body(client):
    got, head = client.get("/Shop/price?item=tea"), client.head("/Shop/price?item=tea")
    assert (head.status_code, head.content) == (200, b"")
    assert [head.headers[name] for name in ("content-type", "content-length")] == ["application/json", "3"]
    assert got.headers["content-length"] == "3"
    assert client.head("/Shop/buy").status_code == 405
    assert client.get("/Shop/price?item=tea").json() == 2.5  # the connection is none the worse for it


@pytest.mark.parametrize(
    ("item", "status", "raised", "error"),
    [
        ("gold", 409, "SoldOut", {"item": "gold"}),
        ("sunday", 422, "Closed", [["on Sundays"], {}]),
        ("broken", 503, "Broken", [["for now"], {}]),
        ("late", 410, "Late", {"status": 410}),
        ("odd", 422, "Late", {"status": 200}),
    ],
)
def test_a_declared_exception_is_a_problem_with_its_own_status(client, item, status, raised, error):
    reply = client.post("/Shop/buy", json={"lines": [{"item": item}]})
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert (problem["status"], problem["title"], problem["raised"], problem["error"]) == (status, raised, raised, error)


def test_any_other_exception_says_nothing(client, caplog):
    with caplog.at_level(logging.ERROR):
        reply = client.post("/Shop/buy", json={"lines": [{"item": "bug"}]})
    assert reply.status_code == 500
    assert reply.json()["detail"].startswith("internal error (trace ")
    assert "hunter2" not in reply.text
    assert [record.name for record in caplog.records] == ["meshlib.server"]


def test_its_document_describes_it(client):
    reply = client.get("/openapi.json")
    assert reply.headers["content-type"] == "application/json"
    document = reply.json()
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]) == {"/Shop/price", "/Shop/buy", "/Shop/depth", "/Shop/anything"}
    price = document["paths"]["/Shop/price"]
    assert price["post"]["summary"] == "What it would cost."
    assert price["post"]["description"] == "With all that is known."
    parameters = {each["name"]: each for each in price["get"]["parameters"]}
    assert parameters["item"] == {"name": "item", "in": "query", "required": True, "schema": {"type": "string"}}
    assert not parameters["count"]["required"]
    assert "get" not in document["paths"]["/Shop/buy"]
    buy = document["paths"]["/Shop/buy"]["post"]
    assert set(buy["responses"]) == {"200", "409", "422", "503", "default"}
    for reference in references(document):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    assert document["components"]["schemas"]["Line"]["properties"]["count"] == {
        "type": "integer", "minimum": 1, "maximum": 100, "default": 1,
    }  # fmt: skip
    assert client.head("/openapi.json").status_code == 200
    assert client.post("/openapi.json").status_code == 405


def references(value):
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from references(each)


def post(content, kind="application/json", path="/Shop/buy", **headers):
    return lambda client: client.post(path, content=content, headers={"content-type": kind, **headers})


def get(query, path="/Shop/price"):
    return lambda client: client.get(f"{path}?{query}")


LINES = b'{"lines": [{"item": "tea"}]}'
HOSTILE = {
    "nothing": (post(b""), 400, "missing required field `lines`"),
    "no-json": (post(b"lines=tea"), 400, "Shop.buy(): JSON is malformed"),
    "half": (post(LINES[:-1]), 400, "truncated"),
    "twice": (post(LINES + LINES), 400, "malformed"),
    "array": (post(b"[]"), 400, "expected `object`, got `array`"),
    "text": (post(b'"lines"'), 400, "got `str`"),
    "number": (post(b"12"), 400, "got `int`"),
    "null": (post(b"null"), 400, "got `null`"),
    "nan": (post(b'{"lines": NaN}'), 400, "malformed"),
    "infinity": (post(b"Infinity"), 400, "malformed"),
    "huge number": (post(b'{"lines": ' + b"9" * 5000 + b"}"), 400, ""),
    "huge exponent": (post(b'{"lines": [{"item": "tea", "count": 1e999}]}'), 400, ""),
    "below": (post(b'{"lines": [{"item": "tea", "count": 0}]}'), 400, ">= 1"),
    "above": (post(b'{"lines": [{"item": "tea", "count": 101}]}'), 400, "<= 100"),
    "float": (post(b'{"lines": [{"item": "tea", "count": 1.5}]}'), 400, "got `float`"),
    "wrong type": (post(b'{"lines": [{"item": 7}]}'), 400, "lines[0].item"),
    "wrong depth": (post(b'{"lines": {"item": "tea"}}'), 400, "expected `array`"),
    "missing": (post(b'{"lines": [{}]}'), 400, "missing required field `item`"),
    "bad utf-8": (post(b'{"lines": [{"item": "\xff\xfe"}]}'), 400, ""),
    "utf-16": (post(LINES.decode().encode("utf-16")), 400, "malformed"),
    "bom": (post(b"\xef\xbb\xbf" + LINES), 400, "malformed"),
    "lone surrogate": (post(b'{"lines": [{"item": "\\ud800"}]}'), 400, ""),
    "control character": (post(b'{"lines": [{"item": "a\x00b"}]}'), 400, ""),
    "comment": (post(b"/* */" + LINES), 400, "malformed"),
    "nul": (post(b"\x00" * 100), 400, "malformed"),
    "deep array": (post(b"[" * 50_000), 400, ""),
    "deep object": (post(b'{"lines":' * 9_000), 400, ""),
    "deep ignored": (post(b'{"x": ' + b"[" * 40_000 + b"]" * 40_000 + b', "lines": []}'), 400, ""),
    "deep any": (post(b'{"value": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", path="/Shop/anything"), 400, ""),
    "deep type": (post(b'{"tree": ' + b'{"leaves": [' * 5_000 + b"]}" * 5_000 + b"}", path="/Shop/depth"), 400, ""),
    "too large": (post(b" " * 100_001), 413, "100000 bytes"),
    "form": (post(b"item=tea", "application/x-www-form-urlencoded"), 415, "JSON object"),
    "plain": (post(LINES, "text/plain"), 415, "JSON object"),
    "xml": (post(b"<a/>", "application/xml"), 415, ""),
    "no type at all": (post(LINES, ";"), 415, ""),
    "multipart": (lambda client: client.post("/Shop/buy", files={"lines": b"x"}), 415, ""),
    "unknown method": (post(LINES, path="/Shop/steal"), 404, "service Shop has no method 'steal'"),
    "unknown service": (post(LINES, path="/Bank/buy"), 404, "no service 'Bank' here"),
    "root": (post(LINES, path="/"), 404, ""),
    "longer": (post(LINES, path="/Shop/buy/now"), 404, ""),
    "shorter": (post(LINES, path="/Shop"), 404, ""),
    "slash": (post(LINES, path="/Shop/buy/"), 404, ""),
    "private": (post(LINES, path="/Shop/__init__"), 404, ""),
    "dunder": (post(LINES, path="/Shop/__class__"), 404, ""),
    "dots": (lambda client: client.post("/Shop/%2e%2e/buy", content=LINES), 404, ""),
    "nul in path": (post(LINES, path="/Shop/buy%00"), 404, ""),
    "utf-8 in path": (post(LINES, path="/Sh%c3%b6p/buy"), 404, ""),
    "long path": (post(LINES, path="/" + "a" * 5_000), 404, ""),
    "put": (lambda client: client.put("/Shop/buy", content=LINES), 405, "POST"),
    "patch": (lambda client: client.patch("/Shop/price", content=LINES), 405, "GET or HEAD or POST"),
    "head": (lambda client: client.head("/Shop/price"), 400, None),
    "head of a post": (lambda client: client.head("/Shop/buy"), 405, None),
    "gzip": (post(gzip.compress(LINES), **{"content-encoding": "gzip"}), 415, "not compressed"),
    "said to be gzip": (post(LINES, **{"content-encoding": "gzip"}), 415, "not compressed"),
    "identity": (post(LINES, **{"content-encoding": "identity"}), 200, ""),
    "options": (lambda client: client.options("/Shop/price"), 405, ""),
    "trace": (lambda client: client.request("TRACE", "/Shop/price"), 405, ""),
    "made up": (lambda client: client.request("STEAL", "/Shop/price"), 405, ""),
    "no arguments": (get(""), 400, "missing required field `item`"),
    "no number": (get("item=tea&count=two"), 400, "count"),
    "empty number": (get("item=tea&count="), 400, "count"),
    "float for int": (get("item=tea&count=1.5"), 400, "count"),
    "hex count": (get("item=tea&count=0x10"), 400, "count"),
    "huge count": (get("item=tea&count=" + "9" * 5000), 400, "count"),
    "no such size": (get("item=tea&size=medium"), 400, "size"),
    "no such grade": (get("item=tea&grade=c"), 400, "grade"),
    "no day": (get("item=tea&day=2026-02-30"), 400, "day"),
    "given twice": (get("item=tea&item=cake"), 400, "given twice"),
    "no pairs": (get("item"), 400, "cannot be read"),
    "bad escape": (get("item=%ff%fe"), 400, "cannot be read"),
    "many": (get("&".join(f"a{n}=1" for n in range(1_500))), 400, "cannot be read"),
    "semicolons": (get("item=tea;count=2"), 200, ""),
    "unknown argument": (get("item=tea&colour=red"), 200, ""),
    "trailing": (post(LINES + b"  \n"), 200, ""),
    "json with charset": (post(LINES, "application/json; charset=utf-8"), 200, ""),
    "json of a kind": (post(LINES, "application/vnd.shop+json"), 200, ""),
    "extra": (post(b'{"lines": [{"item": "tea", "x": 1}], "y": 2}'), 200, ""),
    "same key twice": (post(b'{"lines": 1, "lines": [{"item": "tea"}]}'), 400, ""),
    "bad deadline": (post(LINES, **{"finagle-ctx-com.twitter.finagle.deadline": "soon"}), 200, ""),
    "bad dtab": (post(LINES, **{"dtab-local": "=>=>"}), 200, ""),
    "bad trace": (post(LINES, traceparent="00-0-0-0"), 200, ""),
    "huge header": (post(LINES, x="a" * 70_000), (400, 431), None),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_stranger_sends_is_answered_and_is_no_crash(client, caplog, name):
    send, status, words = HOSTILE[name]
    with caplog.at_level(logging.WARNING):
        reply = send(client)
    assert reply.status_code in (status if isinstance(status, tuple) else (status,)), reply.text
    if words is not None and reply.status_code >= 400:
        assert reply.headers["content-type"] == "application/problem+json"
        assert words in reply.json()["detail"]
        assert reply.json()["status"] == reply.status_code
    assert [record for record in caplog.records if record.name != "httpx"] == []
    assert client.post("/Shop/buy", content=LINES).json() == {"tea": 1}


def test_a_body_of_chunks_is_bounded_too(client):
    reply = client.post("/Shop/buy", content=iter([b" " * 60_000] * 3), headers={"content-type": "application/json"})
    assert reply.status_code == 413


def test_an_app_may_hold_it(url):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    outer = Starlette(routes=[Mount("/rpc", app=meshlib.asgi(Shop()))])
    with serving(outer) as address, httpx.Client(base_url=address) as client:
        assert client.get("/rpc/Shop/price?item=tea").json() == 2.5
        assert client.get("/rpc/openapi.json").json()["info"]["title"] == "Shop"
        assert client.get("/Shop/price?item=tea").status_code == 404


@pytest.mark.parametrize("frame", ["starlette", "fastapi"])
def test_requests_are_counted_by_method_whatever_it_is_mounted_in(frame):
    from fastapi import FastAPI
    from starlette.applications import Starlette

    outer = FastAPI() if frame == "fastapi" else Starlette()
    outer.mount("/api", meshlib.asgi(Shop()))
    app = Middleware(outer, linger=None)
    with serving(app) as address, httpx.Client(base_url=address) as client:
        client.get("/api/Shop/price?item=tea")
        client.post("/api/Shop/steal")
        client.get("/api/openapi.json")
    routes = {name.split("/requests")[0] for name in app.metrics() if name.endswith("/requests")}
    assert "routes/GET /api/Shop/price" in routes
    assert "routes/GET /api/openapi.json" in routes
    assert not any("steal" in route for route in routes)


def test_curl_can_call_it(url):
    import shutil
    import subprocess

    from ..conftest import missing

    if shutil.which("curl") is None:
        missing("curl")
    command = ["curl", "-s", f"{url}/Shop/buy", "--json", '{"lines": [{"item": "tea"}]}']
    assert json.loads(subprocess.run(command, check=True, capture_output=True, timeout=20).stdout) == {"tea": 1}
