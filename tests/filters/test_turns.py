"""Turns: never more extra tries under way than allowed, in order, and none is lost however the taker ends."""

import math
import random

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.filters.turns import Turns, patience
from meshlib.testing import run_virtual


@given(st.floats(0, 2), st.integers(1, 20), st.integers(0, 200))
def test_as_many_are_free_as_the_share_or_the_least_allows(share, least, calls):
    turns = Turns(share, least)
    turns.calls = calls
    taken = 0
    while turns.try_take():
        taken += 1
    # Of the calls some have an extra try under way, so that the others are first tries: taken < share * (calls - taken)
    first = share * calls / (1 + share)
    assert max(least, first) - 1e-9 <= taken < max(least, first) + 1
    assert turns.taken == taken
    turns.give_back()
    assert turns.try_take()
    assert not turns.try_take()


def test_who_waits_is_on_no_first_try():
    async def main():
        turns = Turns(0.5, 1)
        turns.calls = 6
        assert turns.try_take()
        assert turns.try_take()
        assert not turns.try_take()  # half of the four that are left
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(turns.take)
            await anyio.sleep(1)
            assert (turns.taken, turns.waiting) == (2, 4)
            turns.calls = 7
            turns.give_back()
            assert (turns.taken, turns.waiting) == (1, 4)  # 1 of 7 is on an extra try, 4 wait: half of the other two
            turns.calls = 9
            turns.give_back()
            assert (turns.taken, turns.waiting) == (3, 1)  # half of five
            group.cancel_scope.cancel()

    run_virtual(main)


@pytest.mark.parametrize(("deadline", "seconds"), [(None, math.inf), (10.0, 4.0), (2.0, 0.0), (1.0, 0.0)])
def test_a_turn_is_waited_for_half_of_what_is_left(deadline, seconds):
    assert patience(deadline, 2.0) == seconds


def test_those_who_wait_are_served_in_order_and_nobody_passes_them():
    async def main():
        turns, order = Turns(0, 1), []
        assert turns.try_take()

        async def one(n):
            await turns.take()
            order.append(n)
            await anyio.sleep(1)
            turns.give_back()

        async with anyio.create_task_group() as group:
            for n in range(5):
                group.start_soon(one, n)
                await anyio.sleep(0.01)
            assert turns.waiting == 5
            turns.give_back()
            assert not turns.try_take()
        assert order == list(range(5))
        assert anyio.current_time() == pytest.approx(5.05)
        assert (turns.taken, turns.waiting) == (0, 0)

    run_virtual(main)


def test_one_that_gives_up_waiting_leaves_no_trace():
    async def main():
        turns = Turns(0, 1)
        assert turns.try_take()
        with anyio.move_on_after(1) as scope:
            await turns.take()
        assert scope.cancelled_caught
        assert (turns.taken, turns.waiting) == (1, 0)

    run_virtual(main)


def test_a_turn_that_comes_in_the_moment_of_a_cancellation_goes_to_the_next():
    async def main():
        turns, served = Turns(0, 1), []
        assert turns.try_take()
        scopes = [anyio.CancelScope() for _ in range(3)]

        async def one(n):
            with scopes[n]:
                await turns.take()
                served.append(n)
                turns.give_back()

        async with anyio.create_task_group() as group:
            for n in range(3):
                group.start_soon(one, n)
                await anyio.sleep(0.01)
            turns.give_back()
            scopes[0].cancel()
        assert served in ([0, 1, 2], [1, 2])
        assert (turns.taken, turns.waiting) == (0, 0)

    run_virtual(main)


async def test_a_storm_of_takers_that_are_cancelled_loses_no_turn():
    turns, rng, most = Turns(0.2, 3), random.Random(5), 0

    async def one():
        nonlocal most
        turns.calls += 1
        try:
            with anyio.move_on_after(rng.expovariate(1000)):
                await turns.take()
                try:
                    most = max(most, turns.taken)
                    await anyio.sleep(rng.expovariate(2000))
                finally:
                    turns.give_back()
        finally:
            turns.calls -= 1

    async with anyio.create_task_group() as group:
        for i in range(300):
            group.start_soon(one)
            if i % 7 == 0:
                await anyio.lowlevel.checkpoint()
    assert (turns.taken, turns.waiting, turns.calls) == (0, 0, 0)
    assert 3 <= most <= 60


def test_it_tells_what_it_holds():
    assert repr(Turns()) == "<Turns: 0 taken, 0 wait, 0 calls>"
