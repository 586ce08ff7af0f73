"""What a handler's own calls and helpers raise is not said of the request that it serves."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import anyio
import pytest

import meshlib
from meshlib import mux, rpc


class Inner:
    @rpc
    async def double(self, n: int) -> int:
        return 2 * n

    @rpc
    async def refuse(self, n: int) -> int:
        raise meshlib.InvalidArgument("the inner secret", path="n")

    @rpc
    async def busy(self) -> None:
        raise meshlib.Rejected("inner is busy")


class Stranger:
    @rpc
    async def unknown(self) -> None: ...


class Outer:
    """Calls others for its callers, and has done something before it does."""

    def __init__(self, inner: Any, stranger: Any, helper: Any) -> None:
        self.inner, self.stranger, self.helper = inner, stranger, helper
        self.effects = 0

    @rpc
    async def wrong_type(self, n: int) -> int:
        return await self.inner.double("not a number")

    @rpc
    async def refused(self, n: int) -> int:
        return await self.inner.refuse(n)

    @rpc
    async def nacked(self) -> None:
        self.effects += 1
        await self.inner.busy()

    @rpc
    async def unknown(self) -> None:
        await self.stranger.unknown()

    @rpc
    async def too_large(self, n: int) -> int:
        return await self.inner.double(1 << 70)

    @rpc
    async def own(self, n: int) -> int:
        raise meshlib.InvalidArgument("n is odd", path="n")

    @rpc
    async def charge(self) -> str:
        self.effects += 1
        await self.helper()
        return "charged"


@contextlib.asynccontextmanager
async def nested(helper: Any = None) -> Any:
    async with (
        meshlib.serve(Inner()) as behind,
        meshlib.client(Inner, behind.address, stack=lambda stack: stack.remove("requeue")) as inner,
        meshlib.client(Stranger, behind.address) as stranger,
    ):
        implementation = Outer(inner, stranger, helper)
        async with meshlib.serve(implementation) as server:
            client = meshlib.client(Outer, server.address)
            async with client as outer:
                yield outer, implementation, client, server


async def test_a_helper_that_is_full_is_no_nack_of_the_request_that_calls_it():
    entered, go = anyio.Event(), anyio.Event()
    outcomes: list[Any] = []

    @meshlib.concurrency_limit(1)
    async def helper() -> None:
        entered.set()
        await go.wait()

    async def charge() -> None:
        outcomes.append(await outer.charge())

    async with nested(helper) as (outer, implementation, client, server):
        async with anyio.create_task_group() as group:
            group.start_soon(charge)
            await entered.wait()
            with pytest.raises(meshlib.MeshError) as caught:
                await outer.charge()
            assert not caught.value.retryable
            assert not caught.value.requeueable
            assert implementation.effects == 2
            go.set()
        assert outcomes == ["charged"]
        assert implementation.effects == 2
        assert server.metrics()["requests"] == 2
        assert client.metrics()["retries/requeues"] == 0


async def test_a_server_that_is_full_does_nack_and_the_call_goes_elsewhere():
    entered, go = anyio.Event(), anyio.Event()

    async def hang(request: mux.Request) -> mux.Response:
        entered.set()
        await go.wait()
        return mux.Response(b"first")

    async def second(request: mux.Request) -> mux.Response:
        return mux.Response(b"second")

    limit = meshlib.concurrency_limit(1)
    async with (
        mux.serve(hang, "127.0.0.1:0", limit) as full,
        mux.serve(second) as free,
        mux.client(full.address) as one,
        mux.client(f"{full.address},{free.address}") as client,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(one, mux.Request())
            await entered.wait()
            replies = {(await client(mux.Request())).body for _ in range(8)}
            go.set()
        assert replies == {b"second"}


async def test_the_nack_of_a_nested_call_does_not_have_the_outer_one_sent_again():
    async with nested() as (outer, implementation, client, _):
        with pytest.raises(meshlib.RemoteError, match="internal error"):
            await outer.nacked()
        assert implementation.effects == 1
        assert client.metrics()["retries/requeues"] == 0


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("wrong_type", (1,)), ("refused", (1,)), ("too_large", (1,)), ("unknown", ())],
)
async def test_the_arguments_of_a_nested_call_are_no_fault_of_the_outer_caller(method, arguments, caplog):
    caplog.set_level(logging.ERROR)
    async with nested() as (outer, _, _, _):
        with pytest.raises(meshlib.MeshError) as caught:
            await getattr(outer, method)(*arguments)
    assert type(caught.value) is meshlib.RemoteError
    assert not isinstance(caught.value, ValueError | LookupError)
    assert caught.value.message.startswith("internal error")
    assert f"the handler of /Outer/{method} failed" in caplog.text


async def test_what_the_handler_says_of_its_own_arguments_reaches_the_caller():
    async with nested() as (outer, _, _, _):
        with pytest.raises(meshlib.InvalidArgument, match="n is odd") as caught:
            await outer.own(1)
        assert caught.value.path == "n"
