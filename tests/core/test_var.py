"""Var: a value that changes, and those who wait for it."""

from contextlib import aclosing

import anyio
import pytest
from anyio.lowlevel import checkpoint

from meshlib.core.var import Var


def test_watchers_are_told_the_current_value_and_each_later_one_in_their_order():
    var, seen = Var(1), []
    var.watch(lambda value: seen.append(("a", value)))
    var.watch(lambda value: seen.append(("b", value)))
    var.set(2)
    assert seen == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert var.value == 2


def test_a_watcher_that_has_left_is_told_no_more():
    var, seen = Var(1), []
    unwatch = var.watch(seen.append)
    unwatch()
    unwatch()
    var.set(2)
    assert seen == [1]


def test_a_watcher_may_leave_while_it_is_told():
    var, seen = Var(0), []

    def once(value):
        seen.append(value)
        if value == 1:
            unwatch()

    unwatch = var.watch(once)
    var.watch(seen.append)
    var.set(1)
    var.set(2)
    assert seen == [0, 0, 1, 1, 2]


def test_the_version_counts_changes_even_to_an_equal_value():
    var = Var("x")
    assert var.version == 0
    var.set("x")
    assert var.version == 1
    assert repr(var) == "Var('x', version=1)"


async def test_a_change_that_is_past_is_not_waited_for():
    var = Var(1)
    var.set(2)
    assert await var.changed(0) == 1


async def test_all_who_wait_are_woken_by_one_change():
    var, woken = Var(1), []

    async def wait():
        woken.append(await var.changed(var.version))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert woken == []
        var.set(2)
    assert woken == [1, 1, 1]


async def test_a_waiter_that_is_cancelled_takes_nothing_from_the_others():
    var, woken = Var(1), []

    async def wait():
        woken.append(await var.changed(var.version))

    async with anyio.create_task_group() as group:
        async with anyio.create_task_group() as doomed:
            doomed.start_soon(wait)
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
        assert woken == []
        var.set(2)
    assert woken == [1]


async def test_waiting_for_a_state_ends_when_it_holds():
    var = Var(0)
    assert await var.wait_for(lambda value: value == 0) == 0
    found = []

    async def wait():
        found.append(await var.wait_for(lambda value: value >= 2))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        for value in (1, 2):
            await anyio.wait_all_tasks_blocked()
            assert found == []
            var.set(value)
    assert found == [2]


async def test_states_give_the_current_value_first_and_then_each_change():
    var, seen = Var("a"), []

    async def read():
        async with aclosing(var.states()) as states:
            async for value in states:
                seen.append(value)
                if value == "c":
                    return

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        var.set("b")
        await anyio.wait_all_tasks_blocked()
        var.set("c")
    assert seen == ["a", "b", "c"]


async def test_a_slow_reader_skips_states_but_never_misses_the_last():
    var, seen = Var(0), []
    reading, proceed = anyio.Event(), anyio.Event()

    async def read():
        async with aclosing(var.states()) as states:
            async for value in states:
                seen.append(value)
                reading.set()
                await proceed.wait()
                if value == 99:
                    return

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await reading.wait()
        for value in range(1, 100):
            var.set(value)
        proceed.set()
    assert seen == [0, 99]


@pytest.mark.parametrize("changes", range(1, 6))
async def test_no_last_state_is_missed_however_changes_and_reads_interleave(changes):
    var, seen = Var(0), []

    async def read():
        async with aclosing(var.states()) as states:
            async for value in states:
                seen.append(value)
                for _ in range(value % 3):
                    await checkpoint()
                if value == changes:
                    return

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        for value in range(1, changes + 1):
            for _ in range(value % 2):
                await checkpoint()
            var.set(value)
    assert seen[-1] == changes
    assert seen == sorted(set(seen))
