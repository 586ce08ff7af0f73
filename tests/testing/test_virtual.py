"""Virtual time: the clock jumps, and a seed decides who is first."""

from __future__ import annotations

import sys
import time

import anyio
import pytest
import trio

import meshlib
from meshlib.testing import run_virtual


def test_hours_take_no_time_and_the_clock_of_the_library_follows() -> None:
    async def nap() -> tuple[float, float | None]:
        with meshlib.deadline(7200):
            await anyio.sleep(3600)
            return anyio.current_time(), meshlib.remaining()

    began = time.monotonic()
    now, left = run_virtual(nap)
    assert (now, left) == (3600, 3600)
    assert time.monotonic() - began < 5


def test_arguments_go_in_and_results_and_errors_come_out() -> None:
    async def divide(a: int, b: int) -> float:
        return a / b

    assert run_virtual(divide, 6, 3) == 2
    with pytest.raises(ZeroDivisionError):
        run_virtual(divide, 1, 0)


async def _order() -> list[int]:
    order: list[int] = []

    async def append(n: int) -> None:
        await anyio.sleep(1)
        order.append(n)

    async with anyio.create_task_group() as group:
        for n in range(20):
            group.start_soon(append, n)
    return order


def test_a_seed_fixes_the_order_of_tasks_and_other_seeds_try_others() -> None:
    orders = [run_virtual(_order, seed=seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == list(range(20))


def test_the_scheduler_is_left_as_it_was_found() -> None:
    before = trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING, trio._core._run._r.getstate()
    run_virtual(_order, seed=3)
    assert (trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING, trio._core._run._r.getstate()) == before


def test_without_trio_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trio", None)
    with pytest.raises(meshlib.ConfigurationError, match=r'pip install "meshlib-rpc\[testing\]"'):
        run_virtual(_order)
