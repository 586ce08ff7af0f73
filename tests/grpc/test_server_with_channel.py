"""Our channel and our server together: what either says that only the other understands."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

import meshlib
from meshlib.filters.limit import concurrency_limit
from meshlib.grpc.calling.channel import Channel
from meshlib.grpc.serving.server import serve

from .raw import wait_until
from .server_worker import interop_handler


async def test_a_full_server_sends_its_callers_elsewhere_at_once() -> None:
    from meshprotos import interop_grpc
    from meshprotos import interop_pb2 as pb

    full, free = interop_handler("full"), interop_handler("free")
    async with (
        serve([full], "127.0.0.1:0", concurrency_limit(1)) as one,
        serve([free]) as other,
        Channel(one.address) as channel,
    ):
        holding = asyncio.ensure_future(interop_grpc.InteropStub(channel).UnaryCall(pb.SimpleRequest(delay=60)))
        await wait_until(lambda: full.under_way == 1)
        async with Channel(f"{one.address},{other.address}", seed=1) as both:
            stub = interop_grpc.InteropStub(both)
            # UnaryCall is not idempotent: only a promise that nothing was done allows another try.
            answers = {(await stub.UnaryCall(pb.SimpleRequest())).server for _ in range(30)}
            assert answers == {"free"}
            assert both.metrics()["retries/requeues"] > 0
        assert full.calls == 1
        assert one.metrics()["limit/rejected"] > 0
        holding.cancel()
        await asyncio.wait([holding])


async def test_a_deadline_and_all_else_travel_through_a_handler_to_what_it_calls() -> None:
    from meshprotos import interop_grpc
    from meshprotos import interop_pb2 as pb

    seen: list[Any] = []

    def telling(name: str, then: Any = None) -> Any:
        handler = interop_handler(name)

        async def unary(stream: Any) -> None:
            request = await stream.recv_message()
            seen.append((name, meshlib.current(), meshlib.remaining()))
            if then is not None:
                await then(request)
            await stream.send_message(pb.SimpleReply(server=name))

        handler.UnaryCall = unary
        return handler

    async with serve([telling("back")]) as back, Channel(back.address) as behind:
        stub_behind = interop_grpc.InteropStub(behind)
        async with serve([telling("front", stub_behind.UnaryCall)]) as front, Channel(front.address) as channel:
            with meshlib.dtab("/s/a => /s/b"):
                await interop_grpc.InteropStub(channel).UnaryCall(pb.SimpleRequest(), timeout=7)
    (_, context, left), (name, below, left_below) = seen
    assert name == "back"
    assert 0 < left_below < left <= 7
    assert below.trace.trace == context.trace.trace
    assert below.dtab == context.dtab == (("/s/a", "/s/b"),)


async def test_a_caller_that_gives_up_ends_the_work_at_both_hops() -> None:
    from meshprotos import interop_grpc
    from meshprotos import interop_pb2 as pb

    last = interop_handler("last")
    async with serve([last]) as back, Channel(back.address) as behind:
        first = interop_handler("first")

        async def unary(stream: Any) -> None:
            await interop_grpc.InteropStub(behind).UnaryCall(await stream.recv_message())

        first.UnaryCall = unary
        async with serve([first]) as front, Channel(front.address) as channel:
            stub = interop_grpc.InteropStub(channel)
            with anyio.move_on_after(0.2) as scope:
                await stub.UnaryCall(pb.SimpleRequest(delay=60))
            assert scope.cancelled_caught
            await wait_until(lambda: last.cancelled == 1)
            with pytest.raises((GRPCError, TimeoutError)) as caught:
                await stub.UnaryCall(pb.SimpleRequest(delay=60), timeout=0.1)
            assert getattr(caught.value, "status", Status.DEADLINE_EXCEEDED) is Status.DEADLINE_EXCEEDED
            await wait_until(lambda: last.cancelled == 2)
            await wait_until(lambda: front.metrics()["streams"] == back.metrics()["streams"] == 0)
