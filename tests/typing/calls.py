# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""Typed calls, as type checkers see them. Read by mypy and pyright, never run."""

from typing import Protocol, assert_type

import meshlib
from meshlib import TypedClient, retry, rpc, timeout


class Sold(Exception):
    pass


class Greeter:
    @rpc
    async def bare(self, name: str) -> str:
        return name

    @rpc(idempotent=True, raises=[Sold])
    async def hello(self, name: str, *, times: int = 1) -> list[str]:
        return [name] * times

    @rpc(idempotent=True)
    @timeout(0.5)
    @retry(attempts=3)
    async def limited(self, name: str) -> bytes:
        return name.encode()

    async def local(self) -> None: ...


class Contract(Protocol):
    @rpc
    async def add(self, a: int, b: int) -> int: ...


class Adder(Contract):
    async def add(self, a: int, b: int) -> int:
        return a + b


async def a_client_has_the_contracts_own_signatures() -> None:
    async with meshlib.client(Greeter, "h:1", timeout(1.0), retry(attempts=2), label="x", seed=1) as greeter:
        assert_type(greeter, Greeter)
        assert_type(await greeter.bare("x"), str)
        assert_type(await greeter.hello("x", times=2), list[str])
        assert_type(await greeter.limited("x"), bytes)
        await greeter.hello(5)  # type: ignore[arg-type]
        await greeter.hello("x", 2)  # type: ignore[call-arg]
        await greeter.hello("x", often=2)  # type: ignore[call-arg]
        await greeter.hello()  # type: ignore[call-arg]
        greeter.helo  # type: ignore[attr-defined]  # noqa: B018
        wrong: int = await greeter.bare("x")  # type: ignore[assignment]
        del wrong


async def a_bare_client_has_them_too() -> None:
    client = meshlib.client(Greeter, "h:1")
    assert_type(client, TypedClient[Greeter])
    assert_type(client.stub, Greeter)
    assert_type(await client.stub.hello("x"), list[str])
    await client.stub.hello(5)  # type: ignore[arg-type]
    await client.aclose()


async def decorated_methods_keep_their_signatures() -> None:
    greeter = Greeter()
    assert_type(await greeter.limited("x"), bytes)
    await greeter.limited(5)  # type: ignore[arg-type]
    await greeter.hello(5)  # type: ignore[arg-type]


async def an_implementation_is_served() -> None:
    async with meshlib.serve(Adder(), "127.0.0.1:0") as server:
        assert_type(server.address, str)
    server = await meshlib.serve([Adder(), Greeter()])
    await server.aclose()


def a_sync_method_cannot_be_called_from_elsewhere() -> None:
    class Wrong:
        @rpc  # type: ignore[type-var]
        def sync(self) -> int:
            return 1

    del Wrong
