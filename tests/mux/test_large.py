"""Large messages, many at once: each in fragments, and no more begun than the other side holds."""

from __future__ import annotations

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.core.context import Context

MEGABYTE = 1 << 20


async def test_more_large_replies_at_once_than_the_client_would_hold_all_arrive() -> None:
    limits = mux.Limits(max_frame=MEGABYTE)

    async def large(request: mux.Request) -> mux.Response:
        return mux.Response(request.body * (MEGABYTE - 100))

    async with (
        mux.serve(large, "127.0.0.1:0", limits=limits) as server,
        mux.client(server.address, limits=limits) as client,
    ):
        replies = []

        async def call(n: int) -> None:
            replies.append((await client(mux.Request(bytes([n])))).body)

        async with anyio.create_task_group() as group:
            for n in range(12):
                group.start_soon(call, n)
        assert sorted(reply[0] for reply in replies) == list(range(12))
        assert {len(reply) for reply in replies} == {MEGABYTE - 100}
        assert client.metrics()["pool/connects"] == 1


async def test_more_large_requests_at_once_than_the_server_would_hold_all_arrive() -> None:
    limits = mux.Limits(max_frame=MEGABYTE)

    async def size(request: mux.Request) -> mux.Response:
        return mux.Response(b"%d" % len(request.body))

    async with (
        mux.serve(size, "127.0.0.1:0", limits=limits) as server,
        mux.client(server.address, limits=limits) as client,
    ):
        sizes = []

        async def call() -> None:
            sizes.append((await client(mux.Request(bytes(MEGABYTE - 300)))).body)

        async with anyio.create_task_group() as group:
            for _ in range(12):
                group.start_soon(call)
        assert sizes == [b"%d" % (MEGABYTE - 300)] * 12
        assert client.metrics()["pool/connects"] == 1


async def test_a_local_dtab_over_the_limit_harms_its_own_call_alone() -> None:
    async def echo(request: mux.Request) -> mux.Response:
        await anyio.sleep(0.01)
        return mux.Response(request.body)

    async with mux.serve(echo, "127.0.0.1:0") as server, mux.client(server.address) as client:
        await client(mux.Request())
        async with anyio.create_task_group() as group:
            group.start_soon(client, mux.Request(b"innocent"))
            too_much = Context(dtab=(("/s", "/" + "t" * 30_000),) * 3)
            with meshlib.use(too_much), pytest.raises(meshlib.InvalidArgument, match="Dtab"):
                await client(mux.Request())
        assert client.metrics()["pool/connects"] == 1
