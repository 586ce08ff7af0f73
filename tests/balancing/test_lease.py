"""A lease that runs out turns traffic away, but only while there is somewhere else to go."""

from __future__ import annotations

import anyio

from meshlib import Status, mux
from meshlib.mux.server_session import ServerSession


async def echo(request: mux.Request) -> mux.Response:
    return mux.Response(request.body)


async def test_an_endpoint_without_a_lease_is_avoided_and_is_the_last_resort() -> None:
    async with mux.serve(echo, "127.0.0.1:0") as one, mux.serve(echo, "127.0.0.1:0") as two:
        client = mux.client(f"{one.address},{two.address}", seed=1)
        async with client:
            while not (one.connections and two.connections):
                await client(mux.Request(b"x"))
            first, second = client.endpoints
            [session] = one.connections
            assert isinstance(session, ServerSession)
            session.lease(0.001)
            while first.status is not Status.BUSY:  # noqa: ASYNC110 - a tick of the wheel, and the way there
                await anyio.sleep(0.001)
            assert first.health.reason == "lease: it ran out"
            before = one.metrics()["requests"]
            for _ in range(20):
                await client(mux.Request(b"x"))
            assert one.metrics()["requests"] == before

            second.health.mark("test", Status.BUSY, "out of the way")
            for _ in range(20):
                await client(mux.Request(b"x"))
            assert one.metrics()["requests"] == before + 20

            session.lease(3600)
            while first.status is not Status.OPEN:  # noqa: ASYNC110
                await anyio.sleep(0.001)
