"""The whole stack, client and servers, over streams in memory and in virtual time: minutes in milliseconds."""

from __future__ import annotations

import random
from typing import Any

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.testing import Network, run_virtual

RATE = 8
"""Calls a second."""


async def five_minutes(seed: int) -> dict[str, float]:
    """A client and three servers, one of which is replaced every twenty seconds, half of the time without a drain."""
    rng = random.Random(seed)
    network = Network()
    addresses = [f"10.0.0.{i}:80" for i in range(3)]

    async def work(request: mux.Request) -> mux.Response:
        await anyio.sleep(rng.lognormvariate(-3, 0.5))
        return mux.Response(request.body)

    for address in addresses:
        network.listen(mux.serve(work, address, seed=seed))
    client = network.client(",".join(addresses), seed=seed)
    failures: list[str] = []

    async def call() -> None:
        try:
            await client(mux.Request(b"x", idempotent=True))
        except meshlib.MeshError as error:
            failures.append(str(error))

    async def calls(group: Any) -> None:
        for _ in range(300 * RATE):
            group.start_soon(call)
            await anyio.sleep(rng.expovariate(RATE))

    async with client, anyio.create_task_group() as group:
        group.start_soon(calls, group)
        for _ in range(14):
            await anyio.sleep(20)
            address = rng.choice(addresses)
            server = network.leave(address)
            assert server is not None
            await server.aclose(grace=5 if rng.random() < 0.5 else 0)
            await anyio.sleep(rng.uniform(0.1, 5))
            network.listen(mux.serve(work, address, seed=seed))
    for server in network.servers.values():
        await server.aclose()
    assert failures == []
    return client.metrics() | {"ended": anyio.current_time()}


def test_five_minutes_of_restarts_lose_no_idempotent_call_and_repeat_from_a_seed() -> None:
    first = run_virtual(five_minutes, 7)
    assert first["requests"] == first["success"] == 300 * RATE
    assert first["pool/connects"] >= 10
    again = run_virtual(five_minutes, 7)
    volatile = ("received_bytes", "sent_bytes")
    assert {k: v for k, v in first.items() if not k.endswith(volatile)} == {
        k: v for k, v in again.items() if not k.endswith(volatile)
    }
    other = run_virtual(five_minutes, 8)
    assert other["request_latency_ms.sum"] != first["request_latency_ms.sum"]


async def a_deadline_crosses_two_hops() -> None:
    network = Network()
    seen: list[float | None] = []

    async def slow(request: mux.Request) -> mux.Response:
        seen.append(meshlib.remaining())
        try:
            await anyio.sleep(60)
        finally:
            seen.append(anyio.current_time())
        return mux.Response()

    async def middle(request: mux.Request) -> mux.Response:
        seen.append(meshlib.remaining())
        await anyio.sleep(0.1)
        return await inner(mux.Request(dest="/slow"))

    network.listen(mux.serve(middle, "10.0.0.1:80"))
    network.listen(mux.serve(slow, "10.0.0.2:80"))
    inner = network.client("10.0.0.2:80")
    async with network.client("10.0.0.1:80") as outer, inner:
        started = anyio.current_time()
        late = pytest.raises(meshlib.DeadlineExceeded, match=r"inherited deadline passed, 1\.000 s after the call")
        with meshlib.deadline(1.0), late:
            await outer(mux.Request(dest="/middle"))
        assert 1.0 <= anyio.current_time() - started <= 1.02
        await anyio.sleep(0.1)
    first, second, cancelled = seen
    assert first is not None
    assert second is not None
    assert cancelled is not None
    assert 0.98 < first <= 1.0
    assert 0.88 < second <= 0.9
    assert cancelled - started <= 1.02, "the innermost handler was cancelled when the outermost caller gave up"
    for server in network.servers.values():
        await server.aclose()


def test_a_deadline_is_shared_by_every_hop_and_cancels_the_innermost_handler() -> None:
    run_virtual(a_deadline_crosses_two_hops)


async def a_trace_and_a_dtab_cross_two_hops() -> None:
    network = Network()
    seen: list[meshlib.Context] = []

    async def leaf(request: mux.Request) -> mux.Response:
        seen.append(meshlib.current())
        return mux.Response()

    async def middle(request: mux.Request) -> mux.Response:
        seen.append(meshlib.current())
        return await inner(mux.Request())

    network.listen(mux.serve(middle, "10.0.0.1:80"))
    network.listen(mux.serve(leaf, "10.0.0.2:80", trust_context=False))
    inner = network.client("10.0.0.2:80")
    async with network.client("10.0.0.1:80") as outer, inner:
        mine = meshlib.current().evolve(
            dtab=(("/s/users", "/s/canary"),), client_id="web", baggage="k=v", opaque=((b"custom", b"\0\xff"),)
        )
        with meshlib.use(mine):
            await outer(mux.Request())
    one, two = seen
    assert one.trace is not None
    assert two.trace is not None
    assert one.trace.parent is None
    assert (two.trace.trace, two.trace.parent) == (one.trace.trace, one.trace.span)
    assert one.dtab == mine.dtab
    assert (one.client_id, one.baggage, one.opaque) == ("web", "k=v", ((b"custom", b"\0\xff"),))
    assert two.dtab == (), "a server that does not trust its callers drops their Dtab"
    assert (two.client_id, two.baggage, two.opaque) == ("", "", ()), "and whatever else they say of themselves"
    for server in network.servers.values():
        await server.aclose()


def test_trace_dtab_and_unknown_contexts_cross_every_hop() -> None:
    run_virtual(a_trace_and_a_dtab_cross_two_hops)
