"""The rate limit: never more than a burst and the rate, in order, and exact about when to come back."""

import contextlib
import random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import rate_limit
from meshlib.core.clock import Clock
from meshlib.core.context import CallRecord, Context, use
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError, Rejected
from meshlib.core.events import Decisions
from meshlib.filters.rate_limit import Gcra, RateLimit
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual

# --- the bucket -------------------------------------------------------------------------------------------------------


@given(
    st.floats(0.01, 1e5),
    st.integers(1, 50),
    st.lists(st.floats(0, 3).map(lambda x: x**4), min_size=1, max_size=200),
)
def test_in_no_stretch_of_time_are_there_more_than_a_burst_and_the_rate(rate, burst, gaps):
    bucket, now, taken = Gcra(rate, burst), 0.0, []
    for gap in gaps:
        now += gap / rate
        if not bucket.take(now):
            taken.append(now)
    for i, start in enumerate(taken):
        for n, end in enumerate(taken[i:], 1):
            assert n <= burst + (end - start) * rate * (1 + 1e-6) + 1e-3


@given(st.floats(0.01, 1e5), st.integers(1, 50), st.lists(st.floats(0, 5), min_size=1, max_size=100))
def test_who_comes_back_when_told_gets_a_token_and_nobody_sooner(rate, burst, gaps):
    bucket, now = Gcra(rate, burst), 0.0
    for gap in gaps:
        now += gap / rate
        wait = bucket.wait(now)
        assert bucket.take(now) == wait
        assert 0 <= wait <= 1 / rate * (1 + 1e-6)
        if wait:
            assert bucket.wait(now + wait * 0.9) > 0 or wait < 1e-7
            now += wait
            assert bucket.take(now) == 0


def test_after_a_pause_there_is_a_burst_and_no_more_however_long_it_was():
    for pause in (1.0, 1e6):
        bucket = Gcra(10, 5)
        assert [bucket.take(pause) == 0 for _ in range(7)] == [True] * 5 + [False] * 2
        assert bucket.take(pause) == pytest.approx(0.1)
        assert [bucket.take(pause + 0.25) == 0 for _ in range(3)] == [True, True, False]


# --- the filter -------------------------------------------------------------------------------------------------------


class Bench:
    """A rate limit around a service that answers at once, in virtual time."""

    def __init__(self, *args, **kwargs):
        self.registry, clock = Registry(), Clock()
        env = Env(clock=clock, metrics=self.registry, events=Decisions(clock, self.registry))
        self.filter = RateLimit(*args, env=env, **kwargs)
        self.service = self.filter.bind(self.handle)
        self.served, self.refused = [], {}

    async def handle(self, request):
        self.served.append((request, round(anyio.current_time() - self.start, 6)))

    async def call(self, request, left=None):
        deadline = None if left is None else anyio.current_time() + left
        record = CallRecord(0.0)
        with use(Context(deadline=deadline, record=record)):
            try:
                await self.service(request)
            except Rejected as error:
                (decision,) = record.decisions
                self.refused[request] = (decision.kind, decision.code, round(error.retry_after, 6))

    def run(self, play):
        async def main():
            self.start = anyio.current_time()
            async with anyio.create_task_group() as group:
                await play(group)
            for bucket in (self.filter._one, *self.filter._each.values()):
                assert not bucket.line

        run_virtual(main)


def test_what_is_over_the_rate_is_refused_and_told_when_to_come_back():
    bench = Bench(10, 2)

    async def play(group):
        for i in range(4):
            await bench.call(i)
        await anyio.sleep(0.06)
        await bench.call(4)
        await anyio.sleep(0.04)
        await bench.call(5)

    bench.run(play)
    assert bench.served == [(0, 0), (1, 0), (5, 0.1)]
    late = ("rate_limit", "rate")
    assert bench.refused == {2: (*late, 0.1), 3: (*late, 0.1), 4: (*late, 0.04)}
    assert bench.registry.snapshot()["rate_limit/rejected"] == 3


def test_who_may_wait_is_served_in_order_at_the_rate():
    bench = Bench(10, 1, wait=0.35)

    async def play(group):
        for i in range(6):
            group.start_soon(bench.call, i)
            await anyio.sleep(0.001)

    bench.run(play)
    assert [name for name, _ in bench.served] == [0, 1, 2, 3]
    assert [at for _, at in bench.served] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert {name: code for name, (_, code, _) in bench.refused.items()} == {4: "rate", 5: "rate"}
    assert bench.refused[4][2] == pytest.approx(0.396, abs=1e-4)
    assert bench.registry.snapshot()["rate_limit/waited"] == 3


def test_nobody_overtakes_those_who_wait():
    bench = Bench(10, 1, wait=1.0)

    async def play(group):
        for i in range(3):
            group.start_soon(bench.call, i)
            await anyio.sleep(0)  # noqa: ASYNC115
        await anyio.sleep(0.1)  # the token of the second is there in this very moment
        group.start_soon(bench.call, "late")

    bench.run(play)
    assert [name for name, _ in bench.served][-1] == "late"


def test_a_deadline_that_would_pass_in_line_is_not_waited_for():
    bench = Bench(10, 1, wait=1.0)

    async def play(group):
        await bench.call(0)
        await bench.call("hopeless", 0.05)
        await bench.call("fine", 0.15)

    bench.run(play)
    assert bench.served == [(0, 0), ("fine", 0.1)]
    assert bench.refused == {"hopeless": ("rate_limit", "deadline", 0.1)}


def test_who_leaves_the_line_costs_nobody_a_token():
    bench = Bench(10, 1, wait=5.0)

    async def play(group):
        scopes = {i: anyio.CancelScope() for i in range(1, 4)}

        async def waits(i):
            with scopes[i]:
                await bench.call(i)

        await bench.call(0)
        for i in scopes:
            group.start_soon(waits, i)
            await anyio.sleep(0.001)
        scopes[1].cancel()  # the first in line, which sleeps
        await anyio.sleep(0.001)
        scopes[2].cancel()  # the new first
        await anyio.sleep(0.001)
        group.start_soon(bench.call, 4)

    bench.run(play)
    assert bench.served == [(0, 0), (3, 0.1), (4, 0.2)]


def test_each_key_has_a_rate_of_its_own():
    bench = Bench(1, 1, key=lambda request: request[0])

    async def play(group):
        for name in ("a1", "a2", "b1", "b2", "c1"):
            await bench.call(name)

    bench.run(play)
    assert [name for name, _ in bench.served] == ["a1", "b1", "c1"]
    assert bench.registry.snapshot()["rate_limit/keys"] == 3


def test_keys_are_forgotten_when_there_are_too_many_the_longest_unused_first():
    bench = Bench(0.001, 1, key=str, keys=3)

    async def play(group):
        for name in ("a", "b", "c", "a", "d", "a", "b"):
            await bench.call(name)

    bench.run(play)
    assert [name for name, _ in bench.served] == ["a", "b", "c", "d", "b"]
    assert len(bench.filter._each) == 3


def test_a_key_that_somebody_waits_for_is_not_forgotten():
    bench = Bench(10, 1, wait=1.0, key=lambda request: request[0], keys=1)

    async def play(group):
        for name in ("a1", "a2", "b1", "a3", "c1"):
            group.start_soon(bench.call, name)
            await anyio.sleep(0.001)
        await anyio.sleep(1)
        await bench.call("d1")
        await bench.call("e1")

    bench.run(play)
    assert dict(bench.served)["a2"] == pytest.approx(0.1)
    assert dict(bench.served)["a3"] == pytest.approx(0.2)
    assert len(bench.filter._each) == 1


async def test_a_storm_of_cancellations_leaves_nobody_in_line_and_the_rate_as_it_is():
    rng = random.Random(1)
    one = RateLimit(2000, 3, wait=0.05)
    served = []

    async def handle(request):
        served.append(anyio.current_time())

    service = one.bind(handle)

    async def call():
        with anyio.move_on_after(rng.random() * 0.02):
            with contextlib.suppress(Rejected):
                await service("x")

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        for _ in range(200):
            group.start_soon(call)
            if rng.random() < 0.1:
                await anyio.sleep(0.0005)
    assert not one._one.line
    assert 0 < len(served) <= 3 + 2000 * (anyio.current_time() - start) + 1
    await anyio.sleep(0.01)
    await service("x")


async def test_a_server_nacks_what_is_over_its_rate_and_says_when_to_come_back():
    async def echo(request):
        return meshlib.mux.Response(request.body)

    async with (
        meshlib.mux.serve(echo, "127.0.0.1:0", rate_limit(0.01, 1)) as server,
        meshlib.mux.client(server.address, stack=lambda s: s.remove("requeue").remove("retry")) as client,
    ):
        await client(meshlib.mux.Request())
        with pytest.raises(Rejected, match=r"over the rate of 0\.01 a second") as refused:
            await client(meshlib.mux.Request())
    assert refused.value.by_peer
    assert 90 < refused.value.retry_after <= 100


async def test_a_client_refuses_before_anything_is_sent():
    async def echo(request):
        return meshlib.mux.Response(request.body)

    async with (
        meshlib.mux.serve(echo) as server,
        meshlib.mux.client(server.address, rate_limit(0.01, 1)) as client,
    ):
        await client(meshlib.mux.Request())
        with pytest.raises(Rejected, match="over the rate") as refused:
            await client(meshlib.mux.Request())
        assert not refused.value.by_peer
        assert refused.value.attempts == ()
        assert server.metrics()["requests"] == 1


async def test_a_refused_function_promises_nothing_of_the_request_that_it_is_a_part_of():
    @rate_limit(0.01, 1)
    async def scarce():
        return 1

    assert await scarce() == 1
    with pytest.raises(Rejected) as refused:
        await scarce()
    assert refused.value.processed is None


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (((0,), {}), "requests a second, a number above 0"),
        (((True,), {}), "requests a second, a number above 0"),
        ((("5",), {}), "requests a second, a number above 0"),
        (((float("nan"),), {}), "requests a second, a number above 0"),
        (((5, 0), {}), "whole number of requests, 1 or more"),
        (((5, 1.5), {}), "whole number of requests, 1 or more"),
        (((5,), {"wait": -1}), "seconds that a request may wait, 0 or more"),
        (((5,), {"key": "user"}), "a function from a request"),
        (((5,), {"keys": 0}), "how many keys to know at a time"),
    ],
)
def test_what_makes_no_sense_is_told_at_construction(wrong, sentence):
    args, kwargs = wrong
    with pytest.raises(ConfigurationError, match=sentence):
        rate_limit(*args, **kwargs)


def test_it_prints_as_it_is_typed():
    assert repr(rate_limit(100)) == "rate_limit(100, burst=100)"
    assert repr(rate_limit(0.5)) == "rate_limit(0.5, burst=1)"
    assert repr(rate_limit(5, 9, wait=0.5, key=str, keys=7)) == "rate_limit(5, burst=9, wait=0.5, key=str, keys=7)"
