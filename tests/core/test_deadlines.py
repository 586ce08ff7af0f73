"""The wheel: many deadlines, one timer. And waits that end with the deadline."""

import math

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.clock import Clock
from meshlib.core.deadlines import LEAST_WAIT, Wheel, passed, wait_by
from meshlib.core.errors import DeadlineExceeded
from meshlib.testing import run_virtual

TICK = 0.01


def fire(script):
    """Run ``script(wheel, now)`` beside a wheel; give when each key fired."""
    fired = {}

    async def main():
        clock = Clock()
        start = clock.now()
        wheel = Wheel(clock, lambda key: fired.__setitem__(key, clock.now() - start))
        async with anyio.create_task_group() as group:
            group.start_soon(wheel.run)
            await script(wheel, start)
            await anyio.sleep(200)
            assert len(wheel) == 0
            group.cancel_scope.cancel()

    run_virtual(main)
    return fired


@given(st.lists(st.floats(0, 100), max_size=30), st.floats(0, 5))
def test_every_deadline_fires_never_early_and_late_by_a_tick_and_a_small_part_of_its_distance(delays, pause):
    async def script(wheel, now):
        for key, delay in enumerate(delays):
            if key == len(delays) // 2:
                await anyio.sleep(pause)
            wheel.add(now + delay, key)

    fired = fire(script)
    assert set(fired) == set(range(len(delays)))
    for key, at in fired.items():
        due = delays[key] if key < len(delays) // 2 else max(delays[key], pause)
        assert due <= at + 1e-6
        assert at <= due + TICK + delays[key] / 128 + LEAST_WAIT + 1e-6


def test_one_that_was_taken_back_does_not_fire():
    async def script(wheel, now):
        ticks = {key: wheel.add(now + 1, key) for key in "abc"}
        wheel.discard(ticks["b"], "b")

    assert set(fire(script)) == {"a", "c"}


def test_near_deadlines_take_a_tick_each_and_far_ones_share():
    wheel = Wheel(Clock(now=lambda: 1000.0), print)
    for i in range(100_000):
        wheel.add(1000.0 + i * 37.0, i)
    wheel.add(math.inf, "never")
    assert len(wheel) == 100_001
    assert int(repr(wheel).split(" in ")[1].split()[0]) < 3000


def test_taking_back_what_has_fired_or_never_was_is_harmless():
    async def script(wheel, now):
        tick = wheel.add(now + 1, "a")
        await anyio.sleep(2)
        wheel.discard(tick, "a")
        wheel.discard(10**9, "x")

    assert set(fire(script)) == {"a"}


def test_an_earlier_deadline_that_comes_later_is_not_kept_waiting():
    async def script(wheel, now):
        wheel.add(now + 100, "late")
        await anyio.sleep(1)
        wheel.add(now + 2, "early")

    assert fire(script)["early"] == pytest.approx(2, abs=4 * TICK)


def test_it_prints_what_it_holds():
    wheel = Wheel(Clock(now=lambda: 0.0), print)
    wheel.add(1.0, "a")
    wheel.add(1.0, "b")
    assert repr(wheel) == "<Wheel: 2 deadlines in 1 buckets>"


def test_a_wait_ends_with_its_event_or_with_the_deadline():
    async def main():
        clock = Clock()
        start = clock.now()
        done, never = anyio.Event(), anyio.Event()
        done.set()
        await wait_by(done, None, clock, "it")
        await wait_by(done, start + 1, clock, "it")
        with pytest.raises(DeadlineExceeded, match="waiting for the moon"):
            await wait_by(never, start + 1, clock, "the moon")
        assert clock.now() == pytest.approx(start + 1)
        with pytest.raises(DeadlineExceeded):
            await wait_by(never, start, clock, "what is past")
        assert clock.now() == pytest.approx(start + 1)

    run_virtual(main)


def test_after_a_cancellation_a_deadline_that_was_kept_a_little_early_has_passed():
    clock = Clock(now=lambda: 5.0)
    assert not passed(None, clock)
    assert passed(4.0, clock)
    assert passed(5.001, clock)  # event loops count whole milliseconds
    assert not passed(5.1, clock)


async def test_a_wait_that_is_cancelled_is_no_deadline_exceeded():
    clock = Clock()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await wait_by(anyio.Event(), clock.now() + 50, clock, "it")
    assert scope.cancelled_caught
