"""Client throttling: only what servers refuse counts, never all is held back, and it is over when they let in again."""

import contextlib
import random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import concurrency_limit, throttle
from meshlib.core.clock import Clock
from meshlib.core.context import CallRecord, Context, use
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError, ConnectError, DeadlineExceeded, Rejected, RemoteError
from meshlib.core.events import Decisions
from meshlib.core.priority import Priority
from meshlib.filters.throttle import SHORTEST_RUN, Throttle
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual


def account(accepts=0, refusals=0, at=0.0, k=2.0, cap=0.75):
    """An account over 30 s in which so many were let in, and then so many refused."""
    one = Throttle(k, 30.0, cap)
    for n in (accepts, refusals):
        for _ in range(n):
            one.under_way += 1
            (one.accepted if n is accepts else one.refused)(at)
    return one


def too_many():
    """A server's refusal of what was too much of this caller, and would have been let in of another."""
    error = Rejected("too many requests")
    error.by_peer = error.over_rate = True
    return error


# --- the account ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepts", "refusals", "probability"),
    [(0, 0, 0.0), (100, 0, 0.0), (100, 50, 0.0), (100, 100, 0.0), (100, 150, 50 / 251), (10, 200, 0.75), (0, 50, 0.75)],
)
def test_the_probability_is_that_of_the_book_up_to_the_cap(accepts, refusals, probability):
    assert account(accepts, refusals).probability(0.0) == pytest.approx(probability)


def test_what_is_under_way_counts_as_let_in_until_it_is_refused():
    one = account(0, 1)
    one.under_way += 99  # a burst; the servers are slow, and have refused one
    assert one.probability(0.0) == 0.0
    for _ in range(99):
        one.refused(0.0)
    assert one.probability(0.0) == 0.75


def test_what_is_held_back_counts_as_a_request():
    one, rng = account(20, 60), random.Random(1)
    before = one.probability(0.0)
    held = sum(not one.admit(i / 1000, rng) for i in range(100))
    assert held > 0
    one.under_way = 0
    assert one.probability(0.1) > before


def test_few_requests_are_never_held_back():
    one, rng = account(0, 100), random.Random(1)
    for i in range(200):
        assert one.admit(i * 0.26, rng)
        one.refused(i * 0.26)
    assert one.probability(52.0) == 0.75
    assert not all(one.admit(52 + i * 0.2, rng) for i in range(20))


def test_what_was_long_ago_is_forgotten():
    one = account(0, 100)
    assert one.probability(29.9) == 0.75
    assert one.probability(33.1) == 0.0
    assert one.refusals is None


# Accepts among a thousand requests, and the run of them that comes by chance once in a million times. By hand: 0.5 to
# the 20th; 1 % of all, so at most 4 % of what was sent, to the 5th; a tenth, so at most four tenths, to the 16th.
@pytest.mark.parametrize(("accepts", "run"), [(500, 20), (900, 20), (100, 16), (10, 5), (0, SHORTEST_RUN)])
def test_a_run_that_is_no_chance_ends_it_at_once_and_a_refusal_ends_the_run(accepts, run):
    one = account(accepts, 1000 - accepts)
    for _ in range(3):
        for _ in range(run - 1):
            one.under_way += 1
            one.accepted(1.0)
            assert one.refusals is not None
        one.under_way += 1
        one.refused(1.0)
    one = account(accepts, 1000 - accepts)
    for _ in range(run):
        assert one.refusals is not None
        one.under_way += 1
        one.accepted(1.0)
    assert one.refusals is None
    assert one.probability(1.0) == 0.0


def test_each_accept_of_a_run_lets_more_through():
    one = account(10, 990)
    found = [one.probability(1.0)]
    for _ in range(4):
        one.under_way += 1
        one.accepted(1.0)
        found.append(one.probability(1.0))
    assert found == pytest.approx([0.75 * (1 - n / 5) for n in range(5)])
    one.under_way += 1
    one.refused(1.0)
    assert one.probability(1.0) == 0.75


@given(
    st.lists(
        st.tuples(st.sampled_from(["admit", "accepted", "refused", "abandoned"]), st.floats(0, 10), st.integers(1, 40)),
        max_size=60,
    ),
    st.floats(1.01, 10),
    st.floats(0.01, 0.95),
    st.integers(0, 9),
)
def test_the_probability_never_leaves_its_bounds_and_nothing_under_way_is_lost(happened, k, cap, seed):
    one, rng, now, sent = Throttle(k, 30.0, cap), random.Random(seed), 0.0, 0
    for what, wait, times in happened:
        for _ in range(times):
            now += wait / 10
            if what == "admit":
                sent += one.admit(now, rng)
            elif sent:
                sent -= 1
                one.abandoned() if what == "abandoned" else getattr(one, what)(now)
            assert one.under_way == sent
            assert 0.0 <= one.probability(now) <= cap
            assert one.refusals is None or min(one.refusals) >= 0
    assert one._sum == sum(one._accepts) >= 0


# --- the filter -------------------------------------------------------------------------------------------------------


class Bench:
    """A throttle around a service that ends each request as it is told to, in virtual time."""

    def __init__(self, seed=1, **settings):
        self.registry, clock = Registry(), Clock()
        env = Env(clock=clock, metrics=self.registry, events=Decisions(clock, self.registry), rng=random.Random(seed))
        self.service = throttle(**settings).build(env, self.handle)
        self.outcome = None
        self.arrived = 0
        self.held, self.decisions = [], set()

    async def handle(self, request):
        self.arrived += 1
        if self.outcome is not None:
            raise self.outcome
        return request

    async def rounds(self, seconds, rate=50, priority=Priority.DEFAULT):
        """Send at a rate; give how many arrived and how many were held back."""
        before, held = self.arrived, 0
        for _ in range(int(seconds * rate)):
            record = CallRecord(0.0)
            with use(Context(priority=priority, record=record)):
                try:
                    await self.service("x")
                except Exception as error:
                    if error is not self.outcome:
                        held += 1
                        self.held.append(error)
                        self.decisions.update((d.kind, d.code) for d in record.decisions)
            await anyio.sleep(1 / rate)
        return self.arrived - before, held

    def refuse(self):
        self.outcome = Rejected("full")
        self.outcome.by_peer = True


def test_servers_that_refuse_get_less_and_enough_to_notice_when_they_recover():
    bench = Bench()

    async def play():
        assert await bench.rounds(10) == (500, 0)
        bench.refuse()
        await bench.rounds(30)
        arrived, held = await bench.rounds(20)
        assert 0.68 <= held / (arrived + held) <= 0.8
        bench.outcome = None
        await bench.rounds(4)
        assert await bench.rounds(10) == (500, 0)

    run_virtual(play)
    assert bench.decisions == {("throttle", "refusals")}
    for error in bench.held:
        assert isinstance(error, Rejected)
        assert (error.retryable, error.requeueable, error.by_peer) == (False, False, False)
    assert len(bench.held) == bench.registry.snapshot()["throttle/throttled"]
    assert bench.registry.snapshot()["throttle/throttled"] == bench.registry.snapshot()["decisions/throttle/refusals"]


def test_refusals_of_less_than_half_change_nothing():
    bench = Bench()

    async def play():
        for i in range(1000):
            bench.outcome = None
            if i % 5 in (1, 3):
                bench.refuse()
            with contextlib.suppress(Rejected):
                await bench.service("x")
            await anyio.sleep(0.01)

    run_virtual(play)
    assert bench.arrived == 1000


@pytest.mark.parametrize(
    "outcome",
    [
        ValueError("x"),
        RemoteError("x"),
        DeadlineExceeded("x"),
        ConnectError("x"),
        Rejected("no tag is free"),
        too_many(),
    ],
    ids=repr,
)
def test_other_failures_are_not_its_business(outcome):
    bench = Bench()
    bench.outcome = outcome

    async def play():
        assert await bench.rounds(10) == (500, 0)

    run_virtual(play)


def test_each_priority_has_an_account_of_its_own():
    bench = Bench()

    async def play():
        bench.refuse()
        _, held = await bench.rounds(10, priority=Priority.SHEDDABLE)
        assert held > 200
        bench.outcome = None
        for priority in (Priority.CRITICAL, Priority.DEFAULT):
            assert (await bench.rounds(5, priority=priority))[1] == 0

    run_virtual(play)
    assert bench.registry.snapshot()["throttle/probability"] > 0


def test_a_call_that_is_tried_again_is_not_held_back_for_its_own_refusals():
    bench, record = Bench(), CallRecord(0.0)

    async def play():
        bench.refuse()
        with use(Context(record=record)):
            for _ in range(200):
                with pytest.raises(Rejected, match="full"):
                    await bench.service("x")
                record.retries += 1
                await anyio.sleep(0.01)

    run_virtual(play)
    assert bench.arrived == 200


def test_calls_that_are_served_elsewhere_are_no_refused_calls():
    bench = Bench()

    async def play():
        for _ in range(500):
            record = CallRecord(0.0)
            with use(Context(record=record)):
                bench.refuse()
                for _ in range(3):  # two servers of three refuse everything
                    with pytest.raises(Rejected, match="full"):
                        await bench.service("x")
                    record.retries += 1
                bench.outcome = None
                await bench.service("x")
            await anyio.sleep(0.01)

    run_virtual(play)
    assert bench.arrived == 2000


def test_the_same_seed_holds_back_the_same_requests():
    def play(seed):
        bench, kept = Bench(seed), []

        async def main():
            bench.refuse()
            for _ in range(300):
                before = bench.arrived
                with pytest.raises(Rejected):
                    await bench.service("x")
                kept.append(bench.arrived - before)
                await anyio.sleep(0.01)

        run_virtual(main)
        return kept

    assert play(7) == play(7) != play(8)


async def test_nothing_is_left_under_way_after_a_storm_of_cancellations():
    rng = random.Random(1)
    layer = throttle()

    async def handle(request):
        await anyio.sleep(rng.random() * 0.002)
        if rng.random() < 0.5:
            refusal = Rejected("full")
            refusal.by_peer = True
            raise refusal
        if rng.random() < 0.2:
            raise ValueError

    service = layer.bind(handle)

    async def call():
        with anyio.move_on_after(rng.random() * 0.003):
            with contextlib.suppress(Rejected, ValueError):
                await service("x")

    async with anyio.create_task_group() as group:
        for _ in range(300):
            group.start_soon(call)
    assert [one.under_way for one in layer._each] == [0, 0, 0]


async def test_a_client_of_a_server_that_refuses_all_soon_leaves_it_alone_and_tries_nowhere_else():
    gate = anyio.Event()

    async def busy(request):
        await gate.wait()
        return meshlib.mux.Response()

    async with (
        meshlib.mux.serve(busy, "127.0.0.1:0", concurrency_limit(1)) as server,
        meshlib.mux.client(server.address) as other,
        meshlib.mux.client(server.address, seed=1, stack=lambda s: s.remove("requeue")) as client,
        anyio.create_task_group() as group,
    ):
        group.start_soon(other, meshlib.mux.Request())
        while server.metrics()["limit/concurrency"] < 1:
            await anyio.lowlevel.checkpoint()
        held = 0
        for _ in range(100):
            with pytest.raises(Rejected) as refused:
                await client(meshlib.mux.Request())
            if not refused.value.by_peer:
                held += 1
                assert "throttled" in str(refused.value)
                assert "throttle" in {decision.kind for decision in refused.value.decisions}
        gate.set()
    assert held == client.metrics()["throttle/throttled"]
    assert 40 < held < 90


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 1},
        {"k": "2"},
        {"k": True},
        {"window": 0.5},
        {"window": 1e9},
        {"cap": 0},
        {"cap": 1},
        {"cap": float("nan")},
    ],
)
def test_what_makes_no_sense_is_told_at_construction(wrong):
    with pytest.raises(ConfigurationError, match="k is above 1"):
        throttle(**wrong)


def test_it_prints_as_it_is_typed():
    assert repr(throttle(1.5, cap=0.5)) == "throttle(k=1.5, window=30, cap=0.5)"
    assert repr(account(3, 2)) == "<Throttle: 3 accepted, 0 under way, 2 refused>"
