"""Contracts that inherit their methods: each is called under the name of a service that the server offers."""

from __future__ import annotations

from typing import Protocol

import pytest

import meshlib
from meshlib import mux, rpc


class Base(Protocol):
    @rpc(idempotent=True)
    async def hello(self, name: str) -> str: ...


class Other(Protocol):
    @rpc
    async def count(self, to: int) -> list[int]: ...


class Bare(Base, Protocol):
    """Declares nothing of its own."""


class Barer(Bare, Protocol):
    """Nor does this."""


class Two(Base, Other, Protocol):
    """Inherits two contracts."""


class More(Base, Protocol):
    @rpc
    async def bye(self, name: str) -> str: ...


class BareMore(More, Protocol):
    """Inherits a contract that inherits one."""


class OnlyBase(Base):
    async def hello(self, name: str) -> str:
        return f"hello, {name}"


class OnlyOther(Other):
    async def count(self, to: int) -> list[int]:
        return list(range(to))


class All(More, Other):
    async def hello(self, name: str) -> str:
        return f"hello, {name}"

    async def bye(self, name: str) -> str:
        return f"bye, {name}"

    async def count(self, to: int) -> list[int]:
        return list(range(to))


@pytest.mark.parametrize(
    ("contract", "dests"),
    [
        (Base, {"hello": "/Base/hello"}),
        (Bare, {"hello": "/Base/hello"}),
        (Barer, {"hello": "/Base/hello"}),
        (OnlyBase, {"hello": "/Base/hello"}),
        (Two, {"hello": "/Base/hello", "count": "/Other/count"}),
        (More, {"hello": "/More/hello", "bye": "/More/bye"}),
        (BareMore, {"hello": "/Base/hello", "bye": "/More/bye"}),
        (All, {"hello": "/Base/hello", "bye": "/More/bye", "count": "/Other/count"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_method_is_called_under_the_name_of_the_contract_that_declares_it(contract, dests):
    called = {}

    async def note(request: mux.Request) -> mux.Response:
        called[request.dest.rpartition("/")[2]] = request.dest
        raise meshlib.RemoteError("noted")

    async with mux.serve(note) as server, meshlib.client(contract, server.address) as client:
        for name in dests:
            with pytest.raises(meshlib.RemoteError, match="noted"):
                await getattr(client, name)(1 if name == "count" else "x")
    assert called == dests


@pytest.mark.parametrize("contract", [Base, Bare, Barer, OnlyBase, Two, BareMore, All], ids=lambda c: c.__name__)
async def test_a_server_of_the_base_alone_answers_clients_of_what_inherits_from_it(contract):
    async with meshlib.serve(OnlyBase()) as server, meshlib.client(contract, server.address) as client:
        assert await client.hello("you") == "hello, you"


async def test_contracts_that_one_client_inherits_may_be_implemented_by_different_objects():
    async with (
        meshlib.serve([OnlyBase(), OnlyOther()]) as server,
        meshlib.client(Two, server.address) as client,
    ):
        assert await client.hello("you") == "hello, you"
        assert await client.count(3) == [0, 1, 2]


@pytest.mark.parametrize("contract", [Base, Bare, More, BareMore, Two, All], ids=lambda c: c.__name__)
async def test_a_server_of_everything_answers_clients_of_each_part(contract):
    async with meshlib.serve(All()) as server, meshlib.client(contract, server.address) as client:
        assert await client.hello("you") == "hello, you"
        if hasattr(contract, "bye"):
            assert await client.bye("you") == "bye, you"
        if hasattr(contract, "count"):
            assert await client.count(2) == [0, 1]
