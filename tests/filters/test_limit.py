"""The concurrency limit: refuses what is too much, and forgets nothing that has ended."""

import anyio
import pytest

import meshlib
from meshlib import concurrency_limit
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError, Rejected
from meshlib.core.service import Lasting
from meshlib.telemetry.metrics import Registry


class Bench:
    def __init__(self, limit):
        self.gate = anyio.Event()
        self.registry = Registry()
        self.service = concurrency_limit(limit).build(Env(metrics=self.registry), self.serve)

    async def serve(self, request):
        await self.gate.wait()
        if request == "fail":
            raise ValueError("x")
        return request

    def count(self, name):
        return self.registry.snapshot()[f"limit/{name}"]


async def test_what_is_over_the_limit_is_refused_at_once_and_the_rest_is_served():
    bench, replies = Bench(2), []

    async def call(request):
        replies.append(await bench.service(request))

    async with anyio.create_task_group() as group:
        group.start_soon(call, 1)
        group.start_soon(call, 2)
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            with pytest.raises(Rejected, match="limit of 2") as refused:
                await bench.service(3)
        assert refused.value.requeueable
        assert not refused.value.by_peer
        assert (bench.count("concurrency"), bench.count("rejected")) == (2, 3)
        bench.gate.set()
    assert sorted(replies) == [1, 2]
    assert await bench.service(4) == 4
    assert (bench.count("concurrency"), bench.count("rejected")) == (0, 3)


async def test_slots_are_given_back_after_errors_and_cancellations():
    bench = Bench(3)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(bench.service, "x")
        await anyio.wait_all_tasks_blocked()
        assert bench.count("concurrency") == 3
        group.cancel_scope.cancel()
    assert bench.count("concurrency") == 0
    bench.gate.set()
    for _ in range(5):
        with pytest.raises(ValueError, match="x"):
            await bench.service("fail")
    assert bench.count("concurrency") == 0


class Stream:
    """A reply whose end is told."""

    def on_end(self, callback):
        self.end = callback


@pytest.mark.parametrize("limit", [2, meshlib.adaptive(2, max_limit=2)])
async def test_a_reply_that_lasts_has_its_place_until_it_ends(limit):
    env = Env(metrics=Registry())
    env.params[Lasting] = lambda reply: reply if isinstance(reply, Stream) else None

    async def serve(request):
        if isinstance(request, Exception):
            raise request
        return request

    layer = concurrency_limit(limit, queue=0)
    service = layer.build(env, serve)
    one, two = Stream(), Stream()
    assert (await service(one), await service(two)) == (one, two)
    with pytest.raises(Rejected):
        await service("three")
    one.end(None)
    assert await service("three") == "three"
    with pytest.raises(ValueError, match="wrong"):
        await service(ValueError("wrong"))
    assert env.metrics.snapshot()["limit/concurrency"] == 1
    two.end(ValueError("broke off"))
    assert env.metrics.snapshot()["limit/concurrency"] == 0


async def test_a_storm_never_exceeds_the_limit_and_leaves_nothing():
    most = now = 0

    async def serve(request):
        nonlocal most, now
        now += 1
        most = max(most, now)
        try:
            for _ in range(request % 4):
                await anyio.lowlevel.checkpoint()
            if request % 5 == 0:
                raise ValueError
        finally:
            now -= 1

    service = concurrency_limit(7) >> serve
    outcomes = {"served": 0, "failed": 0, "refused": 0}

    async def call(request):
        try:
            await service(request)
            outcomes["served"] += 1
        except ValueError:
            outcomes["failed"] += 1
        except Rejected:
            outcomes["refused"] += 1

    async with anyio.create_task_group() as group:
        for i in range(200):
            group.start_soon(call, i)
            if i % 10 == 0:
                await anyio.lowlevel.checkpoint()
    assert sum(outcomes.values()) == 200
    assert outcomes["served"] > 0
    assert outcomes["refused"] > 0
    assert most <= 7
    assert now == 0


async def test_each_server_and_each_composition_counts_its_own():
    layer = concurrency_limit(1)
    gate = anyio.Event()

    async def wait(request):
        await gate.wait()

    one, two = layer.build(Env(), wait), layer.build(Env(), wait)
    async with anyio.create_task_group() as group:
        group.start_soon(one, "x")
        group.start_soon(two, "x")
        await anyio.wait_all_tasks_blocked()
        gate.set()


async def test_a_full_server_is_nacked_on_the_wire_and_the_client_goes_elsewhere():
    gate = anyio.Event()

    async def busy(request):
        await gate.wait()
        return meshlib.mux.Response(b"busy")

    async def free(request):
        return meshlib.mux.Response(b"free")

    async with (
        meshlib.mux.serve(busy, "127.0.0.1:0", concurrency_limit(1), label="shop") as full,
        meshlib.mux.client(full.address) as alone,
        anyio.create_task_group() as group,
    ):
        group.start_soon(alone, meshlib.mux.Request())
        while full.metrics()["limit/concurrency"] < 1:
            await anyio.lowlevel.checkpoint()
        async with meshlib.mux.serve(free) as other:
            target = f"{full.address},{other.address}"
            async with meshlib.mux.client(target, seed=1) as client:
                replies = [(await client(meshlib.mux.Request())).body for _ in range(20)]
        gate.set()
    assert replies == [b"free"] * 20


async def test_a_refused_function_promises_nothing_of_the_request_that_it_is_a_part_of():
    gate, served = anyio.Event(), []

    @concurrency_limit(1)
    async def scarce():
        await gate.wait()

    async def handler(request):
        served.append(request)
        await scarce()
        return meshlib.mux.Response()

    async with (
        meshlib.mux.serve(handler) as server,
        meshlib.mux.client(server.address) as client,
        anyio.create_task_group() as group,
    ):
        group.start_soon(client, meshlib.mux.Request())
        while not served:
            await anyio.lowlevel.checkpoint()
        with pytest.raises(meshlib.MeshError) as caught:
            await client(meshlib.mux.Request())
        gate.set()
    assert not caught.value.requeueable
    assert len(served) == 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "9", True, None])
def test_what_is_no_limit_is_told_at_construction(wrong):
    with pytest.raises(ConfigurationError, match="give a whole number of requests, 1 or more"):
        concurrency_limit(wrong)


def test_it_prints_its_limit():
    assert repr(concurrency_limit(7)) == "concurrency_limit(7)"
