"""Contracts that several tests call."""

from __future__ import annotations

import abc
import dataclasses
import datetime
import decimal
import enum
import uuid
from typing import Any, Protocol, TypedDict

import anyio
import msgspec

from meshlib import retry, rpc, timeout


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Item:
    name: str
    price: decimal.Decimal
    tags: list[str] = dataclasses.field(default_factory=list)


class Order(msgspec.Struct):
    id: uuid.UUID
    items: list[Item]
    placed: datetime.datetime
    colour: Colour = Colour.RED
    note: str | None = None


class Point(TypedDict):
    x: float
    y: float


@dataclasses.dataclass
class NotFound(Exception):
    key: str
    tried: int = 0


class Refused(Exception):
    """Carries what it was constructed with, and an attribute."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why
        self.at = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)

    at: datetime.datetime


class MoreRefused(Refused):
    """Not declared itself; its parent is."""


class Shop:
    """Every kind of value, and every way to fail."""

    def __init__(self) -> None:
        self.calls = 0
        self.cancelled = 0

    @rpc(idempotent=True)
    async def total(self, order: Order) -> decimal.Decimal:
        """Add up."""
        return sum((item.price for item in order.items), decimal.Decimal(0))

    @rpc
    async def mirror(
        self,
        a: bytes,
        b: Point,
        c: int | str | None,
        d: dict[str, list[Item]],
        e: Colour,
        f: datetime.timedelta = datetime.timedelta(seconds=1),
        *,
        g: tuple[int, str] = (1, "x"),
    ) -> dict[str, Any]:
        return {"a": a, "b": b, "c": c, "d": len(d), "e": e, "f": f, "g": g}

    @rpc
    async def same(self, order: Order) -> Order:
        return order

    @rpc
    async def nothing(self) -> None:
        return None

    @rpc
    async def untyped(self, x, y=2):
        return [x, y]

    @rpc(idempotent=True)
    async def look(self) -> None:
        self.calls += 1
        raise RuntimeError("it is dark")

    @rpc(raises=[NotFound, Refused])
    async def find(self, key: str) -> str:
        self.calls += 1
        if key == "missing":
            raise NotFound(key, 3)
        if key == "refused":
            raise Refused("closed on Sundays")
        if key == "more":
            raise MoreRefused("closed for good")
        if key == "bug":
            raise RuntimeError("the password is hunter2")
        return key

    @rpc
    async def wrong(self) -> int:
        return "seven"  # type: ignore[return-value]

    @rpc
    async def unsendable(self) -> object:
        return object()

    @rpc
    async def hang(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled += 1

    @rpc
    @timeout(0.05)
    async def impatient(self) -> None:
        await anyio.sleep_forever()

    @rpc
    @retry(attempts=3, on=OSError, wait=0)
    async def stubborn(self) -> int:
        self.calls += 1
        if self.calls < 3:
            raise OSError("not yet")
        return self.calls


class Greeter(Protocol):
    @rpc(idempotent=True)
    async def hello(self, name: str) -> str: ...


class Counter(abc.ABC):
    @rpc
    @abc.abstractmethod
    async def count(self, to: int) -> list[int]: ...


class Both(Greeter, Counter):
    """Implements two contracts; the overrides carry no decorator."""

    async def hello(self, name: str) -> str:
        return f"hello, {name}"

    async def count(self, to: int) -> list[int]:
        return list(range(to))
