"""Event-loop lag: what it means (pure), and that a server whose loop is late sheds the right requests."""

import random
import time

import anyio
import pytest

import meshlib
from meshlib import adaptive, concurrency_limit
from meshlib.core.clock import Clock
from meshlib.core.context import Context, use
from meshlib.core.env import Env
from meshlib.core.errors import Rejected
from meshlib.core.events import Decisions
from meshlib.core.priority import Priority
from meshlib.core.supervisor import Supervisor
from meshlib.filters.lag import EVERY, LATE, TARGET, LagGate
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual

SHEDDABLE, DEFAULT, CRITICAL = Priority


def gate(*late):
    """A gate after samples that came so many seconds late; its next one is due at 0."""
    one = LagGate()
    for seconds in late:
        one.due = 0.0
        one.record(seconds)
    one.due = 0.0
    return one


@pytest.mark.parametrize(
    ("late", "overloaded"),
    [
        ((), False),
        ((5.0,), False),
        ((5.0, 5.0), False),
        ((LATE, LATE, LATE), False),
        ((LATE * 1.01,) * 3, True),
        ((5.0, 0.0, 5.0), False),
        ((0.0, 1.0, 1.0, 1.0), True),
        ((1.0, 1.0, 1.0, 0.001), False),
        ((-1.0, 1.0, 1.0), False),
    ],
)
def test_only_three_late_samples_in_a_row_are_lag(late, overloaded):
    one = gate(*late)
    assert one.overloaded is overloaded
    assert one.lag == (max(0.0, min(late[-3:])) if len(late) >= 3 else 0.0)


def test_requests_that_had_waited_are_lag_as_well():
    one = LagGate()
    for _ in range(3):
        one.due = 0.0
        for waited in (0.0, 0.3, 0.3):
            one.arrived(waited)
        one.record(0.0)
    assert one.overloaded
    assert one.lag == pytest.approx(0.2)
    one.record(one.due)  # nobody came
    assert not one.overloaded


def test_one_client_that_claims_a_year_counts_for_ten_seconds():
    one = LagGate()
    for _ in range(3):
        one.due = 0.0
        one.arrived(3e7)
        for _ in range(999):
            one.arrived(0.0)
        one.record(0.0)
    assert one.lag == pytest.approx(0.01)
    assert not one.overloaded


def test_who_has_waited_long_is_refused_and_who_has_not_is_let_in():
    late = gate(0.2, 0.1, 0.3)
    assert [late.admits(priority, 0.0, TARGET) for priority in Priority] == [False, True, True]
    assert [late.admits(priority, 0.0, TARGET * 1.01) for priority in Priority] == [False, False, True]
    assert gate(0.0, 0.0, 0.0).admits(SHEDDABLE, 0.0, 5.0)


def test_who_is_let_in():
    calm, late = gate(0.0, 0.0, 0.0), gate(0.2, 0.1, 0.3)
    for priority in Priority:
        assert calm.admits(priority, 100.0)
    assert [late.admits(priority, TARGET) for priority in Priority] == [False, True, True]
    assert [late.admits(priority, TARGET + 0.001) for priority in Priority] == [False, False, True]


def test_at_rest_it_forgets():
    one = gate(1.0, 1.0, 1.0)
    one.rest()
    assert (one.lag, one.overloaded) == (0.0, False)
    assert all(one.admits(priority, 1e9) for priority in Priority)


class Core:
    """One core: each turn handles what came during the one before. Serving costs 1 ms, refusing a twentieth of it."""

    SERVE, REFUSE = 0.001, 0.00005

    def __init__(self, seed):
        self.rng, self.gate = random.Random(seed), LagGate()
        self.now = self.arrives = 0.0
        self.gate.due = EVERY
        self.served, self.refused, self.waits = dict.fromkeys(Priority, 0), dict.fromkeys(Priority, 0), []

    def run(self, seconds, load, critical=0.1, sheddable=0.1):
        until = self.now + seconds
        while self.now < until:
            came = []
            while self.arrives <= self.now:
                came.append(self.arrives)
                self.arrives += self.rng.expovariate(load / self.SERVE)
            if not came:
                self.now = min(self.arrives, max(self.gate.due, self.now))
                self.now += 1e-9
            for at in came:
                draw = self.rng.random()
                priority = CRITICAL if draw < critical else SHEDDABLE if draw < critical + sheddable else DEFAULT
                if self.gate.admits(priority, self.now):
                    self.now += self.SERVE
                    self.served[priority] += 1
                    self.waits.append(self.now - at)
                else:
                    self.now += self.REFUSE
                    self.refused[priority] += 1
            if self.now >= self.gate.due:
                self.gate.record(self.now)


@pytest.mark.parametrize("load", [1.2, 1.5, 2.0, 3.0])
def test_a_saturated_core_serves_what_it_can_and_soon(load):
    core = Core(1)
    core.run(1, 0.5)
    assert not any(core.refused.values())
    core.run(10, load)
    assert core.refused[CRITICAL] == 0
    assert core.refused[SHEDDABLE] > 0.9 * core.served[DEFAULT] * 0.1
    before, core.waits = sum(core.served.values()), []
    core.run(10, load)
    useful = 1 - Core.REFUSE / Core.SERVE * (load - 1)  # the rest goes into refusing
    assert sum(core.served.values()) - before >= 0.93 * useful * 10 / Core.SERVE
    assert sorted(core.waits)[int(0.99 * len(core.waits))] <= 0.3
    core.run(1, 0.5)
    refused = sum(core.refused.values())
    core.run(5, 0.5)
    assert sum(core.refused.values()) == refused


def test_a_core_that_is_nearly_saturated_refuses_nothing_that_matters():
    core = Core(1)
    core.run(20, 0.9)
    assert core.refused[DEFAULT] == core.refused[CRITICAL] == 0


# --- the shell --------------------------------------------------------------------------------------------------------


def surroundings():
    registry, clock = Registry(), Clock()
    return Env(
        kind="server",
        label="shop",
        clock=clock,
        metrics=registry,
        events=Decisions(clock, registry),
        supervisor=Supervisor("test"),
    )


async def echo(request):
    return request


async def test_a_loop_that_is_blocked_again_and_again_sheds_and_says_so(anyio_backend):
    env = surroundings()
    service = concurrency_limit(adaptive()).build(env, echo)
    assert await service("first") == "first"
    for _ in range(4):
        await anyio.sleep(0.001)
        time.sleep(0.1)  # noqa: ASYNC251 - the point
        await anyio.sleep(0.001)
    assert env.metrics.snapshot()["loop_lag_ms"] > 25
    with use(Context(priority=SHEDDABLE)), pytest.raises(Rejected, match=r"its event loop is 0\.\d+ s late") as refused:
        await service("low")
    assert refused.value.requeueable
    assert refused.value.retry_after > LATE
    time.sleep(EVERY + TARGET + 0.01)  # noqa: ASYNC251
    with pytest.raises(Rejected, match="late"):
        await service("middle")
    with use(Context(priority=CRITICAL)):
        assert await service("high") == "high"
    with anyio.fail_after(5):
        while env.metrics.snapshot()["loop_lag_ms"]:  # noqa: ASYNC110 - it tells nobody
            await anyio.sleep(EVERY)
    with use(Context(priority=SHEDDABLE)):
        assert await service("low") == "low"
    assert env.metrics.snapshot()["decisions/shed/lag"] == 2
    await env.supervisor.aclose()


def test_in_virtual_time_nothing_is_late_and_the_monitor_rests_when_nobody_calls():
    async def main():
        env = surroundings()
        service = concurrency_limit(adaptive()).build(env, echo)
        assert env.supervisor.jobs == 0
        for _ in range(50):
            await service("x")
            assert env.supervisor.jobs == 1
            await anyio.sleep(0.1)
        assert env.metrics.snapshot()["loop_lag_ms"] == 0
        await anyio.sleep(2)
        assert env.supervisor.jobs == 0
        await service("x")
        assert env.supervisor.jobs == 1
        await env.supervisor.aclose()
        await service("x")  # closed: nobody measures, and nothing fails
        assert env.supervisor.jobs == 0

    run_virtual(main)


async def test_only_servers_measure():
    async with meshlib.mux.serve(echo_mux) as server:
        client = meshlib.mux.client(server.address, concurrency_limit(adaptive()))
        async with client:
            await client(meshlib.mux.Request())
            assert "loop_lag_ms" not in client.metrics()
    async with (
        meshlib.mux.serve(echo_mux, "127.0.0.1:0", concurrency_limit(adaptive())) as server,
        meshlib.mux.client(server.address) as client,
    ):
        assert (await client(meshlib.mux.Request(b"x"))).body == b"x"
        assert server.metrics()["loop_lag_ms"] == 0
        assert server.metrics()["limit/limit"] == 20


async def echo_mux(request):
    return meshlib.mux.Response(request.body)


def test_it_prints_what_it_knows():
    assert repr(gate(0.2, 0.2, 0.2)) == "<LagGate: 200 ms late, overloaded>"
    assert repr(gate()) == "<LagGate: 0 ms late>"
