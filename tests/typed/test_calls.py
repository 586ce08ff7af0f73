"""Typed calls over real connections."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest

import meshlib
from meshlib import mux

from ..conftest import BACKENDS
from .services import Both, Colour, Counter, Greeter, Item, NotFound, Order, Refused, Shop

ORDER = Order(
    uuid.UUID(int=7),
    [Item("tea", decimal.Decimal("2.50"), ["hot"]), Item("cake", decimal.Decimal("3.25"))],
    datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC),
    Colour.BLUE,
)


PROTOCOLS = {"mux": BACKENDS, "http": BACKENDS, "grpc": ("asyncio", "uvloop")}
over = ""
"""The protocol that `shop` speaks now."""


@pytest.fixture(
    scope="module",
    params=[(protocol, loop) for protocol, loops in PROTOCOLS.items() for loop in loops],
    ids="-".join,
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Every protocol, on every event loop that it runs on."""
    global over
    over, loop = request.param
    return BACKENDS[loop]


@contextlib.asynccontextmanager
async def shop(service: Any = None, contract: type = Shop) -> AsyncIterator[Any]:
    async with (
        meshlib.serve(service or Shop(), f"{over}://127.0.0.1:0") as server,
        meshlib.client(contract, f"{over}://{server.address}") as client,
    ):
        yield client


async def test_every_kind_of_value_arrives_as_it_was_sent() -> None:
    async with shop() as client:
        assert await client.total(ORDER) == decimal.Decimal("5.75")
        assert await client.same(ORDER) == ORDER
        assert await client.nothing() is None
        assert await client.untyped(1) == [1, 2]
        assert await client.untyped({"k": None}, y=[1.5]) == [{"k": None}, [1.5]]
        reply = await client.mirror(b"\0\xff", {"x": 1.0, "y": 2}, None, {"k": []}, Colour.RED, g=(2, "y"))
        assert reply == {
            "a": "AP8=" if over == "http" else b"\0\xff",  # of no declared type, so JSON keeps it text
            "b": {"x": 1.0, "y": 2.0},
            "c": None,
            "d": 1,
            "e": "red",
            "f": "PT1S",
            "g": [2, "y"],
        }


@pytest.mark.parametrize(
    ("arguments", "path", "words"),
    [
        ((3,), "order", "got `int`"),
        ((msgspec.structs.replace(ORDER, id="x"),), "order.id", "invalid UUID"),
        ((msgspec.structs.replace(ORDER, items=[Item("tea", "much")]),), "order.items[0].price", "invalid decimal"),
        ((msgspec.structs.replace(ORDER, items=[ORDER.items[0], {"name": "x"}]),), "order.items[1]", "`price`"),
        ((msgspec.structs.replace(ORDER, colour="green"),), "order.colour", "'green'"),
        ((msgspec.structs.replace(ORDER, note=object()),), "order", "object"),
    ],
)
async def test_a_bad_argument_is_refused_before_it_is_sent(arguments: Any, path: str, words: str) -> None:
    async with shop() as client:
        with pytest.raises(meshlib.InvalidArgument) as caught:
            await client.total(*arguments)
        assert caught.value.path == path
        assert words.lower() in caught.value.message.lower()
        assert "Shop.total()" in caught.value.message


async def test_a_bad_argument_from_a_careless_client_is_refused_by_the_server() -> None:
    async with meshlib.serve(Shop()) as server, mux.client(server.address) as raw:
        for body, path in (
            (msgspec.msgpack.encode({"order": {"id": 1}}), "order.id"),
            (msgspec.msgpack.encode({}), ""),
            (msgspec.msgpack.encode([1, 2]), ""),
            (b"", ""),
            (b"\xc1 garbage", ""),
            (b"\x91" * 5000, ""),
        ):
            with pytest.raises(meshlib.InvalidArgument) as caught:
                await raw(mux.Request(body, "/Shop/total"))
            assert caught.value.path == path
            assert caught.value.processed is False


async def test_arity_is_checked_as_for_a_call_in_the_process() -> None:
    async with shop() as client:
        with pytest.raises(TypeError, match=r"Shop\.find\(\): missing a required argument: 'key'"):
            await client.find()
        with pytest.raises(TypeError, match=r"Shop\.find\(\): too many positional arguments"):
            await client.find("a", "b")
        with pytest.raises(TypeError, match=r"Shop\.find\(\): got an unexpected keyword argument 'bogus'"):
            await client.find("a", bogus=1)
        with pytest.raises(TypeError, match=r"multiple values for argument 'key'"):
            await client.find("a", key="b")
        with pytest.raises(TypeError, match=r"too many positional"):
            await client.mirror(b"", {"x": 1, "y": 1}, 1, {}, Colour.RED, datetime.timedelta(1), (1, "x"))


async def test_declared_exceptions_arrive_as_themselves_with_their_fields() -> None:
    async with shop() as client:
        with pytest.raises(NotFound) as caught:
            await client.find("missing")
        assert (caught.value.key, caught.value.tried) == ("missing", 3)
        with pytest.raises(Refused) as refused:
            await client.find("refused")
        assert refused.value.args == ("closed on Sundays",)
        assert refused.value.why == "closed on Sundays"
        assert refused.value.at == datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


async def test_a_subclass_of_a_declared_exception_arrives_as_the_declared_one() -> None:
    async with shop() as client:
        with pytest.raises(Refused) as caught:
            await client.find("more")
        assert type(caught.value) is Refused
        assert caught.value.why == "closed for good"


async def test_a_declared_exception_counts_as_an_answer_and_is_not_retried() -> None:
    service = Shop()
    async with meshlib.serve(service) as server:
        client = meshlib.client(Shop, server.address)
        async with client as stub:
            with pytest.raises(NotFound):
                await stub.find("missing")
        assert service.calls == 1
        assert client.metrics()["success"] == 1
        assert client.metrics()["failures"] == 0


async def test_other_exceptions_arrive_opaque_and_the_story_is_in_the_server_log(caplog: Any) -> None:
    async with shop() as client:
        with caplog.at_level(logging.ERROR), pytest.raises(meshlib.RemoteError) as caught:
            await client.find("bug")
        assert "hunter2" not in str(caught.value)
        assert "RuntimeError" not in str(caught.value)
        assert caught.value.processed is True
        [record] = caplog.records
        assert record.exc_info is not None
        assert "hunter2" in str(record.exc_info[1])
        trace = caught.value.message.split("trace ")[1].rstrip(")")
        assert trace in record.getMessage()


async def test_a_handler_that_failed_is_not_asked_again() -> None:
    service = Shop()
    async with shop(service) as client:
        with pytest.raises(meshlib.RemoteError):
            await client.look()
    assert service.calls == 1


async def test_a_result_that_does_not_fit_the_contract_is_told_by_the_caller() -> None:
    async with shop() as client:
        with pytest.raises(meshlib.InvalidReply, match=r"Shop\.wrong\(\) answered with a value: expected `int`"):
            await client.wrong()


async def test_a_result_that_cannot_be_sent_is_an_internal_error(caplog: Any) -> None:
    async with shop() as client:
        with pytest.raises(meshlib.RemoteError):
            await client.unsendable()
        assert "unsupported" in str(caplog.records[-1].exc_info[1])


async def test_unknown_services_and_methods_are_told_with_those_there_are() -> None:
    class Elsewhere:
        @meshlib.rpc
        async def find(self, key: str) -> str: ...

    async with meshlib.serve(Shop()) as server:
        async with meshlib.client(Elsewhere, server.address) as client:
            with pytest.raises(meshlib.UnknownService, match="no service 'Elsewhere' here; there is Shop"):
                await client.find("x")
        async with mux.client(server.address) as raw:
            with pytest.raises(meshlib.UnknownMethod, match="service Shop has no method 'nope'; it has find, hang"):
                await raw(mux.Request(b"", "/Shop/nope"))
            for dest in ("", "/", "/Shop", "/Shop/", "//", "Shop/find"):
                with pytest.raises((meshlib.UnknownService, meshlib.UnknownMethod)):
                    await raw(mux.Request(b"", dest))


async def test_filters_under_rpc_work_on_handlers() -> None:
    service = Shop()
    async with shop(service) as client:
        with pytest.raises(meshlib.DeadlineExceeded, match=r"no reply within the timeout of 0\.05 s"):
            await client.impatient()
        assert await client.stubborn() == 3


async def test_a_deadline_cancels_the_handler_on_the_server() -> None:
    service = Shop()
    async with shop(service) as client:
        await client.find("x")  # connected, so that the deadline passes in the handler
        with pytest.raises(meshlib.DeadlineExceeded), meshlib.deadline(0.3):
            await client.hang()
        with anyio.fail_after(2):
            while not service.cancelled:  # noqa: ASYNC110
                await anyio.sleep(0.001)


async def test_protocols_and_abstract_classes_are_contracts_and_one_object_may_serve_several() -> None:
    async with (
        meshlib.serve(Both()) as server,
        meshlib.client(Greeter, server.address) as greeter,
        meshlib.client(Counter, server.address) as counter,
    ):
        assert await greeter.hello("world") == "hello, world"
        assert await counter.count(3) == [0, 1, 2]


async def test_several_services_on_one_server() -> None:
    async with (
        meshlib.serve([Both(), Shop()]) as server,
        meshlib.client(Greeter, server.address) as greeter,
        meshlib.client(Shop, server.address) as client,
    ):
        assert await greeter.hello("you") == "hello, you"
        assert await client.find("x") == "x"


async def test_a_client_may_be_used_bare_and_closed_elsewhere() -> None:
    async with meshlib.serve(Shop()) as server:
        client = meshlib.client(Shop, server.address)
        assert await client.stub.find("a") == "a"
        assert await client.find("b") == "b"

        async with anyio.create_task_group() as group:
            group.start_soon(client.aclose)
        with pytest.raises(meshlib.ServiceClosed, match="client 'Shop' is closed"):
            await client.find("c")


async def test_idempotence_reaches_the_stack() -> None:
    seen = []

    @meshlib.filter
    async def look(request: mux.Request, service: Any) -> mux.Response:
        seen.append((request.dest, request.idempotent))
        return await service(request)

    async with meshlib.serve(Shop()) as server, meshlib.client(Shop, server.address, look) as client:
        await client.total(ORDER)
        await client.find("x")
    assert seen == [("/Shop/total", True), ("/Shop/find", False)]


async def test_the_stub_and_client_introduce_themselves() -> None:
    async with meshlib.serve(Shop()) as server:
        client = meshlib.client(Shop, server.address)
        async with client as stub:
            assert repr(stub) == f"<client of Shop at {server.address}>"
            with pytest.raises(AttributeError, match="Shop has no @rpc method 'nope'; it has find, hang"):
                _ = stub.nope
            assert stub.total.__doc__ == "Add up."
        lines = repr(client).splitlines()
        assert lines[0].startswith("Shop client 'Shop' -> <" + server.address)
        assert [line.split()[0] for line in lines[1:4]] == ["trace", "stats", "source"]
        assert repr(server).startswith("server 'Shop' on 127.0.0.1:")
