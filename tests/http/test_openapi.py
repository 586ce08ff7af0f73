"""The document of typed services, held to OpenAPI's own rules, and what callers by GET leave to the handler."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import uuid
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import anyio
import httpx
import msgspec
import pytest
from openapi_spec_validator import validate

import meshlib
from meshlib import rpc

T = TypeVar("T")
UserId = NewType("UserId", int)
MISSING: Any = object()


class Colour(enum.Enum):
    RED = "red"


class Tree(msgspec.Struct):
    leaves: list[Tree] = []


class Page(msgspec.Struct, Generic[T]):
    items: list[T]
    next: str | None = None


class Point(TypedDict, total=False):
    x: float


class Pair(NamedTuple):
    first: int
    second: str = ""


@dataclasses.dataclass
class Problem:
    """A user's own type, by the name of the standard's."""

    what: str


@dataclasses.dataclass
class Gone(Exception):
    problem: Problem
    status = 410


def item(**fields: type) -> type:
    """A class ``Item``; there are several of them in the world."""
    made = type("Item", (), {"__annotations__": fields, "__module__": __name__})
    return dataclasses.dataclass(made)


ITEM_A, ITEM_B = item(sku=str), item(weight=float)


class Everything:
    """Types of every kind."""

    @rpc(idempotent=True)
    async def tree(self, tree: Tree) -> Tree: ...

    @rpc
    async def pages(self, a: Page[int], b: Page[Tree], c: Point, d: Pair) -> Page[Point]: ...

    @rpc(raises=[Gone])
    async def bytes(self, a: bytes = b"x", b: dict[int, float] = {1: 2.0}, c: tuple[int, ...] = ()) -> uuid.UUID: ...  # noqa: B006

    @rpc(idempotent=True)
    async def simple(
        self,
        user: UserId,
        colour: Colour = Colour.RED,
        kind: Literal["a", 1] = "a",
        age: Annotated[int, msgspec.Meta(ge=0)] = 7,
        day: datetime.date | None = None,
        most: float = math.inf,
        mark: int = MISSING,
    ) -> list[Any]:
        return [user, colour, kind, age, day, most == math.inf, mark is MISSING]

    @rpc
    async def odd(self, value: dict[str, complex], other: int) -> None: ...


class One:
    @rpc
    async def put(self, item: ITEM_A) -> None: ...


class Two:
    @rpc
    async def put(self, item: ITEM_B) -> None: ...


One.put.__annotations__["item"], Two.put.__annotations__["item"] = ITEM_A, ITEM_B


async def asked(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        return await client.request(method, path, **more)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def document(*services: Any) -> dict[str, Any]:
    told = (await asked(meshlib.asgi(*services), "GET", "/openapi.json")).text
    assert "Infinity" not in told
    found: dict[str, Any] = json.loads(told)
    validate(found)
    return found


async def test_it_is_valid_whatever_the_types_are():
    found = await document(Everything())
    schemas = found["components"]["schemas"]
    assert schemas["MeshlibProblem"]["required"] == ["title", "status"]
    assert schemas["Problem"]["required"] == ["what"]
    parameters = {each["name"]: each for each in found["paths"]["/Everything/simple"]["get"]["parameters"]}
    assert parameters["age"]["schema"]["default"] == 7
    assert "default" not in parameters["most"]["schema"]
    odd = found["paths"]["/Everything/odd"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert odd["properties"] == {"value": {}, "other": {"type": "integer"}}


async def test_two_types_of_one_name_are_told_apart():
    found = await document(One(), Two())

    def fields(path: str) -> set[str]:
        body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        arguments = at(found, body["$ref"])
        return set(at(found, arguments["properties"]["item"]["$ref"])["properties"])

    assert (fields("/One/put"), fields("/Two/put")) == ({"sku"}, {"weight"})


def at(whole: Any, reference: str) -> Any:
    for part in reference.removeprefix("#/").split("/"):
        whole = whole[part]
    return whole


async def test_what_a_query_does_not_say_is_left_to_the_handler():
    app = meshlib.asgi(Everything())
    for reply in (
        await asked(app, "GET", "/Everything/simple?user=3"),
        await asked(app, "POST", "/Everything/simple", json={"user": 3}),
    ):
        assert reply.json() == [3, "red", "a", 7, None, True, True]
    reply = await asked(app, "GET", "/Everything/simple?user=3&mark=4&day=2026-11-26")
    assert reply.json() == [3, "red", "a", 7, "2026-11-26", True, False]


async def test_an_app_that_is_mounted_says_where():
    app = meshlib.asgi(Everything())

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": "/api", "path": f"/api{scope['path']}"}, receive, send)

    found = (await asked(mounted, "GET", "/openapi.json")).json()
    validate(found)
    assert found["servers"] == [{"url": "/api"}]


async def test_a_body_that_does_not_come_is_not_waited_for():
    app, sent = meshlib.asgi(Everything(), patience=0.05), []
    scope = {"type": "http", "method": "POST", "path": "/Everything/odd", "headers": [(b"content-length", b"10")]}
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        for part in parts:
            return part
        return await anyio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)

    with anyio.fail_after(5):
        await app(scope, receive, send)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


@dataclasses.dataclass
class SoldOut(Exception):
    item: ITEM_A
    status = 409


SoldOut.__annotations__["item"] = ITEM_A


class Base:
    @rpc(raises=[SoldOut])
    async def buy(self, item: ITEM_A) -> ITEM_A: ...


class Derived(Base):
    @rpc(raises=[SoldOut])
    async def reserve(self, item: ITEM_A) -> None: ...


class Other:
    @rpc(raises=[SoldOut])
    async def weigh(self, item: ITEM_B, trees: list[Tree]) -> Tree: ...


for method, kind in ((Base.buy, ITEM_A), (Derived.reserve, ITEM_A), (Other.weigh, ITEM_B)):
    method.__annotations__["item"] = kind
Base.buy.__annotations__["return"] = ITEM_A


async def test_an_exception_that_several_methods_declare_is_one_component():
    found = await document(Derived())
    names = set(found["components"]["schemas"])
    assert names == {"Item", "SoldOut", "Base_buy", "Derived_buy", "Derived_reserve", "MeshlibProblem"}


async def test_only_names_that_clash_are_numbered():
    found = await document(Derived(), Other())
    schemas = found["components"]["schemas"]
    assert {name for name in schemas if name[-1].isdigit()} == {"Item_2"}
    assert set(schemas["Item"]["properties"]) == {"sku"}
    assert set(schemas["Item_2"]["properties"]) == {"weight"}
    assert schemas["Other_weigh"]["properties"]["item"] == {"$ref": "#/components/schemas/Item_2"}
    assert schemas["SoldOut"]["properties"]["item"] == {"$ref": "#/components/schemas/Item"}
    assert schemas["Tree"]["properties"]["leaves"]["items"] == {"$ref": "#/components/schemas/Tree"}


class Cat(msgspec.Struct, tag="cat"):
    lives: Annotated[int, msgspec.Meta(ge=1)] = 0


class Dog(msgspec.Struct, tag="dog"):
    name: str | None = None
    default: float = math.nan


class Lax(msgspec.Struct):
    count: int = None  # type: ignore[assignment]
    parts: tuple[int, ...] = (1, None)  # type: ignore[assignment]
    good: tuple[int, ...] = (1, 2)
    most: Annotated[tuple[int, ...], msgspec.Meta(max_length=1)] = (1, 2)


class Careless:
    @rpc(idempotent=True)
    async def implicit(
        self,
        x: int = None,  # type: ignore[assignment]  # noqa: RUF013
        y: str = 5,  # type: ignore[assignment]
        z: int | None = None,
        few: Annotated[int, msgspec.Meta(ge=1)] = 0,
        short: Annotated[str, msgspec.Meta(max_length=2, pattern="^x")] = "xy",
        long: Annotated[str, msgspec.Meta(max_length=2)] = "xyz",
        colour: Colour = "green",  # type: ignore[assignment]
        kind: Literal["a", 1] = "b",  # type: ignore[assignment]
    ) -> list[Any]:
        return [x, y]

    @rpc
    async def inside(self, pet: Cat | Dog, lax: Lax, pair: Pair = Pair("x")) -> Lax: ...  # type: ignore[arg-type]  # noqa: B008


async def test_a_default_that_its_own_type_refuses_is_not_described():
    found = await document(Careless())
    schemas = found["components"]["schemas"]

    def defaults(properties: dict[str, Any]) -> dict[str, Any]:
        return {name: each["default"] for name, each in properties.items() if "default" in each}

    told = {"z": None, "short": "xy"}
    assert defaults(schemas["Careless_implicit"]["properties"]) == told
    parameters = {each["name"]: each["schema"] for each in found["paths"]["/Careless/implicit"]["get"]["parameters"]}
    assert defaults(parameters) == {"short": "xy"}
    assert "required" not in schemas["Careless_implicit"] or not schemas["Careless_implicit"]["required"]
    assert defaults(schemas["Lax"]["properties"]) == {"good": [1, 2]}
    assert defaults(schemas["Cat"]["properties"]) == {}
    assert defaults(schemas["Dog"]["properties"]) == {"name": None}
    assert "default" in schemas["Dog"]["properties"]
    assert (await asked(meshlib.asgi(Careless()), "GET", "/Careless/implicit")).json() == [None, 5]
