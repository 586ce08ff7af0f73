"""The wheel takes a bounded amount of memory, whatever deadlines it is given, and is no less exact for it."""

import math
import random

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.core.clock import Clock
from meshlib.core.deadlines import LEAST_WAIT, Wheel
from meshlib.testing import run_virtual

FEW_THOUSAND = 5000
TICK = 0.01

YEAR = 365 * 86400.0
DISTANCES = [(0.0, 1.0), (0.0, 60.0), (0.0, 86400.0), (0.0, YEAR), (0.0, 1e9), (1e9, 1e300)]


class Hands:
    """A clock that is turned by hand."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


@pytest.mark.parametrize("start", [0.0, 1000.0, 10 * YEAR])
def test_a_wheel_holds_a_few_thousand_buckets_whatever_deadlines_it_is_given(start):
    rng = random.Random(1)
    wheel = Wheel(Clock(now=lambda: start), print)
    for low, high in DISTANCES:
        for i in range(20_000):
            wheel.add(start + rng.uniform(low, high), (low, high, i))
    for i in range(20_000):
        wheel.add(start + 10 ** rng.uniform(-3, 12), i)
    wheel.add(math.inf, "never")
    assert len(wheel) == 20_000 * (len(DISTANCES) + 1) + 1
    assert len(wheel._buckets) == len(wheel._ticks) < FEW_THOUSAND


def test_a_wheel_does_not_grow_while_calls_come_and_go():
    async def main():
        wheel = Wheel(Clock(), print)
        async with anyio.create_task_group() as group:
            group.start_soon(wheel.run)
            most = 0
            for i in range(20_000):  # ten minutes of calls, each with an hour to go
                wheel.discard(wheel.add(anyio.current_time() + 3600, i), i)
                await anyio.sleep(0.03)
                most = max(most, len(wheel._buckets))
            assert len(wheel) == 0
            assert most < 200
            group.cancel_scope.cancel()

    run_virtual(main)


@settings(max_examples=300)
@given(
    st.floats(0, 10 * YEAR),
    st.one_of(st.floats(0, 10), st.floats(0, 10 * YEAR), st.floats(0, 1e9)),
)
def test_a_bucket_is_due_never_early_and_late_by_a_tick_and_a_small_part_of_the_distance(start, distance):
    wheel = Wheel(Clock(now=lambda: start), print)
    deadline = start + distance
    at = wheel.add(deadline, "key") * TICK
    rounding = 1e-6 + deadline * 1e-12
    assert deadline <= at + rounding
    assert at <= deadline + TICK + distance / 128 + rounding


@given(st.lists(st.one_of(st.floats(0, 3), st.floats(0, 5000)), min_size=1, max_size=40), st.floats(0, 50))
def test_deadlines_far_and_near_that_come_one_after_the_other_fire_on_time(distances, pause):
    fired, due = {}, {}

    async def main():
        clock = Clock()
        wheel = Wheel(clock, lambda key: fired.__setitem__(key, clock.now()))
        async with anyio.create_task_group() as group:
            group.start_soon(wheel.run)
            for key, distance in enumerate(distances):
                due[key] = clock.now() + distance
                wheel.add(due[key], key)
                await anyio.sleep(pause / len(distances))
            wheel.add(math.inf, "never")
            await anyio.sleep(6000)
            assert len(wheel) == 1
            group.cancel_scope.cancel()

    run_virtual(main)
    assert fired.keys() == due.keys()
    for key, at in fired.items():
        assert due[key] <= at + 1e-6
        assert at <= due[key] + TICK + distances[key] / 128 + LEAST_WAIT + 1e-6


@pytest.mark.parametrize("deadline", [math.inf, 1e300, 1e15])
def test_a_deadline_without_end_is_watched_and_can_be_taken_back(deadline):
    hands = Hands(1000.0)
    wheel = Wheel(Clock(now=hands), print)
    tick = wheel.add(deadline, "key")
    assert len(wheel) == 1
    hands.at += 1e6
    wheel.discard(tick, "key")
    assert len(wheel) == 0
