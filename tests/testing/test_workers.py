"""The queueing server against closed forms, and against what is said of abandoned work."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import factorial
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib import ConfigurationError
from meshlib.core.supervisor import Supervisor
from meshlib.testing import Workers, run_virtual


def erlang_c(load: float, workers: int) -> float:
    """The chance that an arrival of an M/M/c queue has to wait; ``load`` in erlangs."""
    top = load**workers / factorial(workers) * workers / (workers - load)
    return top / (sum(load**k / factorial(k) for k in range(workers)) + top)


@pytest.mark.parametrize(("workers", "rate"), [(1, 0.5), (2, 1.5), (5, 4.0)])
def test_an_mmc_queue_waits_as_erlang_says(workers: int, rate: float) -> None:
    expected = erlang_c(rate, workers) / (workers - rate) + 1.0  # with a service rate of 1

    async def main() -> float:
        rng = random.Random(4)
        pool = Workers(workers, "dropped", Supervisor())
        took: list[float] = []

        async def one() -> None:
            began = anyio.current_time()
            await pool.work(lambda: rng.expovariate(1))
            took.append(anyio.current_time() - began)

        async with anyio.create_task_group() as group:
            for _ in range(8_000):
                await anyio.sleep(rng.expovariate(rate))
                group.start_soon(one)
        assert (pool.busy, pool.waiting) == (0, 0)
        return sum(took) / len(took)

    assert run_virtual(main, seed=1) == pytest.approx(expected, rel=0.1)


def test_a_ddc_queue_is_exact() -> None:
    """Six pieces of 1.5 s come to two workers, one each half second: each start and end can be computed."""

    async def main() -> list[float]:
        pool = Workers(2, "dropped", Supervisor())
        ends: list[float] = []

        async def one() -> None:
            await pool.work(lambda: 1.5)
            ends.append(anyio.current_time())

        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(one)
                await anyio.sleep(0.5)
        return ends

    # First come first served: they start at 0, 0.5, 1.5, 2, 3, 3.5.
    assert run_virtual(main, seed=1) == [1.5, 2.0, 3.0, 3.5, 4.5, 5.0]


def abandon(policy: Any, cancel_at: dict[int, float], until: float) -> tuple[list[tuple[int, float]], float]:
    """Four pieces of 1 s for one worker, all at 0; some are abandoned. Who was served, and what was wasted."""

    async def main() -> tuple[list[tuple[int, float]], float]:
        supervisor = Supervisor()
        pool = Workers(1, policy, supervisor)
        served: list[tuple[int, float]] = []

        async def one(n: int) -> None:
            with anyio.move_on_after(cancel_at.get(n, 1e6)):
                await pool.work(lambda: 1.0)
                served.append((n, anyio.current_time()))

        async with anyio.create_task_group() as group:
            for n in range(4):
                group.start_soon(one, n)
                await anyio.wait_all_tasks_blocked()
        await supervisor.join()
        assert (pool.busy, pool.waiting) == (0, 0)
        assert anyio.current_time() == pytest.approx(until)
        return served, pool.wasted

    return run_virtual(main)


@pytest.mark.parametrize(
    ("policy", "served", "wasted", "until"),
    [
        ("dropped", [(2, 1.5), (3, 2.5)], 0.0, 2.5),
        ("skipped", [(2, 2.0), (3, 3.0)], 0.5, 3.0),
        ("served", [(2, 3.0), (3, 4.0)], 1.5, 4.0),
    ],
)
def test_what_becomes_of_abandoned_work(
    policy: str, served: list[tuple[int, float]], wasted: float, until: float
) -> None:
    # The first is abandoned while it is worked on, the second while it waits.
    got = abandon(policy, {0: 0.5, 1: 0.3}, until)
    assert got == ([(n, pytest.approx(at)) for n, at in served], pytest.approx(wasted))


@settings(max_examples=40)
@given(
    st.sampled_from(["dropped", "skipped", "served"]),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(0, 60)), max_size=15),
    st.integers(0, 100),
)
def test_no_worker_is_ever_lost_or_invented(
    policy: Any, count: int, pieces: list[tuple[int, int, int]], seed: int
) -> None:
    """Whenever pieces come, take and are abandoned: never more at work than workers, and all are free at the end."""

    async def main() -> None:
        supervisor = Supervisor()
        pool = Workers(count, policy, supervisor)
        at_work = 0

        async def one(at: int, takes: int, patience: int) -> None:
            def begin() -> float:
                nonlocal at_work
                assert 1 <= pool.busy <= count
                at_work += 1
                return takes / 10

            await anyio.sleep(at / 10)
            with anyio.move_on_after(patience / 10):
                await pool.work(begin)

        async with anyio.create_task_group() as group:
            for piece in pieces:
                group.start_soon(one, *piece)
        await supervisor.join()
        assert (pool.busy, pool.waiting) == (0, 0)
        assert at_work <= len(pieces)
        if policy == "served" and all(patience for _, _, patience in pieces):
            assert at_work == len(pieces)

    run_virtual(main, seed=seed)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Workers(0, "dropped", Supervisor()), "workers=0: give a whole number, 1 or more"),
        (lambda: Workers(1, "burnt", Supervisor()), "abandoned='burnt': there are 'dropped', 'skipped', 'served'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_parameters_are_told(make: Callable[[], Workers], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        make()
