"""The concurrency limit's queue, priorities and adaptive form, in virtual time and in storms."""

import random

import anyio
import pytest

import meshlib
from meshlib import adaptive, concurrency_limit
from meshlib.core.clock import Clock
from meshlib.core.context import CallRecord, Context, current, use
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError, DeadlineExceeded, Rejected
from meshlib.core.events import Decisions
from meshlib.core.priority import Priority
from meshlib.filters.limit import ConcurrencyLimit
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual

SHEDDABLE, DEFAULT, CRITICAL = Priority


class Bench:
    """A limit around a handler that takes so many seconds on so many workers. Says how each request ended, and when."""

    def __init__(self, limit, queue=None, *, took=1.0, workers=10**6, seed=1):
        self.registry, clock = Registry(), Clock()
        self.events = Decisions(clock, self.registry)
        env = Env(metrics=self.registry, events=self.events, clock=clock, rng=random.Random(seed))
        self.filter = ConcurrencyLimit(limit, queue, env)
        self.service = self.filter.bind(self.handle)
        self.took, self.workers = took, workers
        self.running, self.most = 0, 0
        self.served, self.ended = [], {}

    async def handle(self, request):
        self.served.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async with self.capacity:
                await anyio.sleep(self.took)
        finally:
            self.running -= 1

    async def call(self, name, priority=DEFAULT, left=None):
        began = anyio.current_time()
        record = CallRecord(began)
        with use(Context(priority=priority, deadline=None if left is None else began + left, record=record)):
            try:
                await self.service(name)
                outcome = "ok"
            except (Rejected, DeadlineExceeded) as error:
                (decision,) = record.decisions
                if decision.kind == "shed" and error.processed is False:
                    outcome = decision.code if isinstance(error, Rejected) else "late"
                else:
                    outcome = f"{decision}, {error.processed}"
        self.ended[name] = (outcome, round(anyio.current_time() - began, 4))

    def run(self, play):
        async def main():
            self.capacity = anyio.CapacityLimiter(self.workers)
            async with anyio.create_task_group() as group:
                await play(group)
            assert self.filter.active == self.running == 0
            assert self.registry.snapshot().get("limit/queue", 0) == 0

        run_virtual(main, seed=1)


async def begin(group, bench, *calls):
    """Begin calls one after the other, a millisecond apart, so that their order is known."""
    for call in calls:
        group.start_soon(bench.call, *call)
        await anyio.sleep(0.001)


# --- priorities without a queue ---------------------------------------------------------------------------------------


def test_sheddable_requests_are_refused_at_nine_tenths_of_the_limit():
    bench = Bench(10)

    async def play(group):
        await begin(group, bench, *((f"s{i}", SHEDDABLE) for i in range(10)))
        await begin(group, bench, ("d", DEFAULT), ("d2", DEFAULT), ("c", CRITICAL))

    bench.run(play)
    assert bench.served == [*(f"s{i}" for i in range(9)), "d"]
    assert {name: how for name, (how, _) in bench.ended.items() if how != "ok"} == dict.fromkeys(
        ("s9", "d2", "c"), "full"
    )
    assert bench.registry.snapshot()["decisions/shed/full"] == 3


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_a_low_limit_leaves_a_place_for_sheddable_requests_too(limit):
    bench = Bench(limit)

    async def play(group):
        await begin(group, bench, *((i, SHEDDABLE) for i in range(limit)))

    bench.run(play)
    assert len(bench.served) == limit


# --- the queue --------------------------------------------------------------------------------------------------------


def test_a_place_that_becomes_free_goes_to_whoever_is_next():
    bench = Bench(1, 10, took=0.02)

    async def play(group):
        await begin(
            group, bench, ("first", DEFAULT), ("low", SHEDDABLE), ("a", DEFAULT), ("b", DEFAULT), ("c", CRITICAL)
        )

    bench.run(play)
    assert bench.served == ["first", "c", "a", "b", "low"]
    assert bench.most == 1
    assert {how for how, _ in bench.ended.values()} == {"ok"}


def test_by_default_nobody_waits_for_a_fixed_limit():
    bench = Bench(1, took=0.02)

    async def play(group):
        await begin(group, bench, ("first",), ("second",))

    bench.run(play)
    assert bench.ended == {"first": ("ok", 0.02), "second": ("full", 0.0)}


def test_nobody_waits_longer_than_an_interval():
    bench = Bench(1, 10, took=5.0)

    async def play(group):
        await begin(group, bench, ("first",), ("second",))

    bench.run(play)
    assert bench.ended["second"] == ("codel", 0.1)


def test_in_a_standing_queue_the_newest_goes_first_and_others_leave_soon():
    bench = Bench(1, 100, took=0.01)

    async def play(group):
        for i in range(300):  # ten times what can be served
            group.start_soon(bench.call, i)
            await anyio.sleep(0.001)

    bench.run(play)
    late = [wait for i, (how, wait) in bench.ended.items() if how == "codel" and i > 150]
    assert len(late) > 100
    assert max(late) <= 0.016  # the target, and the time until somebody looks
    waits = [wait - 0.01 for i, (how, wait) in bench.ended.items() if how == "ok" and i > 150]
    assert len(waits) >= 10
    assert max(waits) <= 0.0051


def test_who_matters_more_takes_the_last_seat():
    bench = Bench(1, 2, took=0.05)

    async def play(group):
        await begin(group, bench, ("first",), ("low", SHEDDABLE), ("mid", DEFAULT), ("c1", CRITICAL), ("c2", CRITICAL))
        await begin(group, bench, ("c3", CRITICAL), ("low2", SHEDDABLE))

    bench.run(play)
    assert {name: how for name, (how, _) in bench.ended.items()} == {
        "first": "ok",
        "low": "displaced",
        "mid": "displaced",
        "c1": "ok",
        "c2": "ok",
        "c3": "full",
        "low2": "full",
    }


def test_who_cannot_be_done_in_time_does_not_wait():
    bench = Bench(1, 10, took=0.05)

    async def play(group):
        for i in range(40):  # the limit learns how long requests take
            await bench.call(i)
        await begin(
            group, bench, ("first",), ("hopeless", DEFAULT, 0.04), ("tight", DEFAULT, 0.08), ("fine", DEFAULT, 0.2)
        )

    bench.run(play)
    assert bench.ended["hopeless"] == ("deadline", 0.0)
    assert bench.ended["tight"][0] == "deadline"
    assert bench.ended["tight"][1] == pytest.approx(0.03, abs=0.002)  # no sooner than it became hopeless
    assert bench.ended["fine"][0] == "ok"


def test_a_deadline_that_passes_in_the_queue_is_told_as_such():
    bench = Bench(1, 10, took=0.2)

    async def play(group):
        await begin(group, bench, ("first",), ("late", DEFAULT, 0.05))

    bench.run(play)
    assert bench.ended["late"] == ("late", 0.05)
    assert bench.served == ["first"]


def test_a_sheddable_request_waits_for_its_own_share():
    bench = Bench(10, 10, took=0.05)

    async def play(group):
        await begin(group, bench, *((f"d{i}", DEFAULT) for i in range(9)), ("low", SHEDDABLE), ("d9", DEFAULT))

    bench.run(play)
    assert bench.served[9:] == ["d9", "low"]


async def test_a_waiter_that_is_cancelled_leaves_no_trace_and_takes_nobodys_place():
    bench = Bench(1, 10)
    gate = anyio.Event()
    done = []

    async def handle(request):
        await gate.wait()
        done.append(request)

    service = bench.filter.bind(handle)
    async with anyio.create_task_group() as group:
        group.start_soon(service, 1)
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as waiting:
            waiting.start_soon(service, 2)
            await anyio.wait_all_tasks_blocked()
            assert bench.registry.snapshot()["limit/queue"] == 1
            waiting.cancel_scope.cancel()
        assert bench.registry.snapshot()["limit/queue"] == 0
        group.start_soon(service, 3)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    assert done == [1, 3]
    assert bench.filter.active == 0


async def test_a_place_handed_over_in_the_moment_of_a_cancellation_is_not_lost():
    bench = Bench(1, 10)
    done = []

    async def handle(request):
        done.append(request)
        if request == 1:
            await anyio.sleep(0.01)

    service = bench.filter.bind(handle)

    async def first(scope):
        await service(1)
        scope.cancel()  # the place has just been handed to the second, which has not run since

    async with anyio.create_task_group() as group:
        scope = anyio.CancelScope()
        group.start_soon(first, scope)
        await anyio.lowlevel.checkpoint()

        async def second():
            with scope:
                await service(2)

        await anyio.wait_all_tasks_blocked()
        group.start_soon(second)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(service, 3)
    assert 3 in done
    assert bench.filter.active == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("limit", "queue"), [(1, 3), (7, 0), (5, 5), (adaptive(4, max_limit=8), None)])
async def test_a_storm_of_cancellations_loses_no_place_and_gives_none_twice(limit, queue, seed):
    rng = random.Random(seed)
    one = ConcurrencyLimit(limit, queue)
    running = most = begun = 0
    ended = []

    async def handle(request):
        nonlocal running, most, begun
        begun += 1
        running += 1
        most = max(most, running)
        try:
            if begun % 3 == 2:  # not by chance: few get in where the limit is 1
                raise ValueError
            for _ in range(rng.randrange(4)):
                await anyio.lowlevel.checkpoint()
            if rng.random() < 0.1:
                await anyio.sleep(0.001)
        finally:
            running -= 1

    service = one.bind(handle)

    async def call():
        with use(Context(priority=rng.choice(list(Priority)))), anyio.CancelScope() as scope:
            if rng.random() < 0.5:
                scope.deadline = anyio.current_time() + rng.random() * 0.002
            try:
                await service("x")
                ended.append("ok")
            except ValueError:
                ended.append("failed")
            except Rejected:
                ended.append("refused")
        if scope.cancelled_caught:
            ended.append("cancelled")

    async with anyio.create_task_group() as group:
        for i in range(400):
            group.start_soon(call)
            if i % 8 == 0:
                await anyio.lowlevel.checkpoint()
    assert len(ended) == 400
    assert {"ok", "failed", "refused"} <= set(ended)
    assert most <= (8 if isinstance(limit, meshlib.filters.adaptive.Adaptive) else limit)
    assert (one.active, running, len(one._line)) == (0, 0, 0)
    await service_is_free(one)


async def service_is_free(one):
    """Every place can be taken again."""
    gate, inside = anyio.Event(), []

    async def wait(request):
        inside.append(request)
        await gate.wait()

    service = one.bind(wait)
    async with anyio.create_task_group() as group:
        for i in range(one.limit):
            group.start_soon(service, i)
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        gate.set()
    assert len(inside) == one.limit


# --- the adaptive limit under load ------------------------------------------------------------------------------------


def offered(bench, seed, *phases, shares=(0.2, 0.6, 0.2)):
    """Open-loop Poisson load: (seconds, requests a second) after each other. Gives [(began, priority, how, wait)]."""
    rng = random.Random(seed)
    ended = []

    async def one(priority):
        began = anyio.current_time() - start
        with use(Context(priority=priority)):
            try:
                await bench.service("x")
                how = "ok"
            except Rejected:
                how = "refused"
        ended.append((began, priority, how, anyio.current_time() - start - began))

    async def play(group):
        nonlocal start
        start = end = anyio.current_time()
        for seconds, rate in phases:
            end += seconds
            while anyio.current_time() < end:
                await anyio.sleep(rng.expovariate(rate))
                group.start_soon(one, rng.choices(list(Priority), shares)[0])

    start = 0.0
    bench.run(play)
    return ended


def lost(ended, priority, begin, end):
    outcomes = [how for began, p, how, _ in ended if p is priority and begin <= began < end]
    return sum(how != "ok" for how in outcomes) / len(outcomes)


def test_at_twice_its_capacity_a_server_does_all_that_it_can_and_keeps_what_matters():
    # 10 workers of 20 ms, so 500 a second, and 20 ms without load. Twice that comes from 2 s to 10 s.
    bench = Bench(adaptive(), took=0.02, workers=10)
    ended = offered(bench, 1, (2, 200), (8, 1000), (3, 200))
    waits = sorted(wait for began, _, how, wait in ended if how == "ok" and 2 <= began < 10)
    assert len(waits) >= 0.95 * 8 * 500
    assert waits[int(0.99 * len(waits))] <= 5 * 0.020
    assert lost(ended, CRITICAL, 2, 10) <= 0.01
    assert lost(ended, SHEDDABLE, 2, 10) >= 0.8
    assert lost(ended, DEFAULT, 0, 2) == 0
    for priority in Priority:  # and it is over when it is over
        assert lost(ended, priority, 10.2, 13) == 0
    assert max(wait for began, _, _, wait in ended if began >= 10.2) <= 0.06


def test_without_a_limit_the_same_load_is_its_collapse():
    bench = Bench(10**6, took=0.02, workers=10)
    ended = offered(bench, 1, (3, 1000))
    waits = sorted(wait for _, _, how, wait in ended if how == "ok")
    assert waits[len(waits) // 2] > 1.0


def test_a_limit_of_its_own_for_each_server_and_composition():
    layer = concurrency_limit(adaptive())
    one, two = ConcurrencyLimit(layer._spec), ConcurrencyLimit(layer._spec)
    assert one._policy is not two._policy


def test_as_a_decorator_it_promises_nothing_and_waits_too():
    order = []

    @concurrency_limit(1, queue=1)
    async def work(n):
        await anyio.sleep(0.05)
        order.append(n)

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(work, 1)
            await anyio.sleep(0.001)
            group.start_soon(work, 2)
            await anyio.sleep(0.001)
            with pytest.raises(Rejected) as refused:
                await work(3)
            assert refused.value.processed is None
            assert not refused.value.requeueable

    run_virtual(main)
    assert order == [1, 2]


def test_it_tells_what_it_does():
    bench = Bench(adaptive(), took=0.01)

    async def play(group):
        await begin(group, bench, ("a",))
        numbers = bench.registry.snapshot()
        assert numbers["limit/limit"] == 20
        assert numbers["limit/concurrency"] == 1
        assert numbers["limit/queue"] == 0
        assert current().priority is DEFAULT

    bench.run(play)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3"])
def test_a_queue_that_makes_no_sense_is_told_at_construction(wrong):
    with pytest.raises(ConfigurationError, match="whole number of requests that may wait, 0 or more"):
        concurrency_limit(5, queue=wrong)
