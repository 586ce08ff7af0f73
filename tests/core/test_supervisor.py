"""Supervisors: background tasks that belong to an object, and end with it, whoever opens and closes it where."""

import asyncio
import contextvars
import logging
import random

import anyio
import pytest
import trio

import meshlib
from meshlib.core.errors import ServiceClosed
from meshlib.core.supervisor import Supervisor
from meshlib.testing import run_virtual

MINE = contextvars.ContextVar("mine", default="nobody's")


def living() -> int:
    """Every task of the event loop."""
    if trio.lowlevel.in_trio_run():
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


async def hang(ended=None):
    try:
        await anyio.sleep_forever()
    finally:
        if ended is not None:
            ended.append("cancelled")


async def test_it_runs_jobs_beside_the_caller_and_forgets_those_that_end():
    supervisor, done = Supervisor(), []
    supervisor.start(_note, done, "a")
    supervisor.start(_note, done, "b")
    assert supervisor.jobs == 2
    await supervisor.join()
    assert sorted(done) == ["a", "b"]
    assert supervisor.jobs == 0
    await supervisor.aclose()


async def _note(done, what):
    await anyio.lowlevel.checkpoint()
    done.append(what)


async def test_closing_cancels_every_job_and_waits_until_it_has_ended():
    before = living()
    supervisor, ended = Supervisor(), []
    for _ in range(5):
        supervisor.start(hang, ended)
    await anyio.wait_all_tasks_blocked()
    await supervisor.aclose()
    assert ended == ["cancelled"] * 5
    assert (supervisor.jobs, supervisor.closed) == (0, True)
    await anyio.wait_all_tasks_blocked()
    assert living() == before


async def test_closing_waits_for_what_a_job_does_last():
    supervisor, ended = Supervisor(), []

    async def slow_to_end():
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
            ended.append("slow")

    supervisor.start(slow_to_end)
    await anyio.wait_all_tasks_blocked()
    await supervisor.aclose()
    assert ended == ["slow"]


async def test_a_job_that_had_not_begun_is_cancelled_too():
    supervisor, ended = Supervisor(), []
    supervisor.start(hang, ended)
    await supervisor.aclose()
    assert supervisor.jobs == 0


async def test_it_may_be_opened_in_one_task_and_closed_in_another_in_any_order():
    before = living()
    supervisors = [Supervisor(str(i)) for i in range(6)]

    async def open_all():
        for supervisor in supervisors:
            supervisor.start(hang)
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(open_all)
    await anyio.wait_all_tasks_blocked()
    assert [supervisor.jobs for supervisor in supervisors] == [1] * 6
    random.Random(7).shuffle(supervisors)
    async with anyio.create_task_group() as group:
        for supervisor in supervisors:
            group.start_soon(supervisor.aclose)
    await anyio.wait_all_tasks_blocked()
    assert living() == before


async def test_a_job_outlives_the_task_and_the_cancel_scope_that_started_it():
    supervisor, gate, done = Supervisor(), anyio.Event(), []

    async def work():
        await gate.wait()
        done.append(True)

    with anyio.CancelScope() as scope:
        supervisor.start(work)
        scope.cancel()
        await anyio.lowlevel.checkpoint()
    gate.set()
    await supervisor.join()
    assert done == [True]


async def test_a_job_that_fails_is_logged_and_the_others_live(caplog):
    supervisor, gate, done = Supervisor("shop"), anyio.Event(), []

    async def fail():
        raise ValueError("broken")

    async def work():
        await gate.wait()
        done.append(True)

    supervisor.start(fail, name="the doomed")
    supervisor.start(work)
    await anyio.wait_all_tasks_blocked()
    assert supervisor.jobs == 1
    gate.set()
    await supervisor.join()
    assert done == [True]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("meshlib", logging.ERROR)
    assert record.getMessage() == "shop: background job the doomed failed"
    assert isinstance(record.exc_info[1], ValueError)


async def test_one_job_can_be_cancelled_alone(caplog):
    supervisor, ended = Supervisor(), []
    doomed = supervisor.start(hang, ended, name="doomed")
    supervisor.start(hang)
    await anyio.wait_all_tasks_blocked()
    assert repr(doomed) == "<Job doomed>"
    doomed.cancel()
    await anyio.wait_all_tasks_blocked()
    assert (ended, supervisor.jobs) == (["cancelled"], 1)
    await supervisor.aclose()
    assert not caplog.records


async def test_it_may_be_closed_by_one_of_its_own_jobs():
    supervisor, ended, closed = Supervisor(), [], anyio.Event()

    async def close():
        await supervisor.aclose()
        assert supervisor.jobs == 1
        closed.set()

    supervisor.start(hang, ended)
    await anyio.wait_all_tasks_blocked()
    supervisor.start(close)
    await closed.wait()
    assert ended == ["cancelled"]
    await supervisor.join()
    assert supervisor.jobs == 0


async def test_closing_from_within_a_jobs_task_group_ends_that_job_too():
    supervisor, ended = Supervisor(), []

    async def family():
        async with anyio.create_task_group() as group:
            group.start_soon(hang, ended)
            group.start_soon(supervisor.aclose)

    supervisor.start(family)
    await supervisor.join()
    assert ended == ["cancelled"]


async def test_after_closing_nothing_starts_and_closing_again_is_nothing():
    supervisor = Supervisor("shop")
    await supervisor.aclose()
    await supervisor.aclose()
    with pytest.raises(ServiceClosed, match="shop is closed"):
        supervisor.start(hang)
    assert supervisor.jobs == 0


async def test_several_may_close_at_once_and_all_wait():
    supervisor, release, closed = Supervisor(), anyio.Event(), []

    async def stubborn():
        with anyio.CancelScope(shield=True):
            await release.wait()

    async def close():
        await supervisor.aclose()
        closed.append(supervisor.jobs)

    supervisor.start(stubborn)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(close)
        await anyio.wait_all_tasks_blocked()
        assert closed == []
        release.set()
    assert closed == [0, 0, 0]


async def test_closing_can_be_cancelled_and_taken_up_again():
    supervisor, release = Supervisor(), anyio.Event()

    async def stubborn():
        with anyio.CancelScope(shield=True):
            await release.wait()

    supervisor.start(stubborn)
    await anyio.wait_all_tasks_blocked()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await supervisor.aclose()
    assert scope.cancelled_caught
    assert supervisor.jobs == 1
    release.set()
    await supervisor.aclose()
    assert supervisor.jobs == 0


async def test_jobs_see_no_context_unless_they_are_given_one():
    supervisor, seen = Supervisor(), []

    async def look():
        seen.append((MINE.get(), meshlib.current().client_id))

    token = MINE.set("the caller's")
    with meshlib.core.context.use(meshlib.Context(client_id="caller")):
        supervisor.start(look)
        supervisor.start(look, context=contextvars.copy_context())
        await supervisor.join()
    MINE.reset(token)
    assert sorted(seen) == [("nobody's", ""), ("the caller's", "caller")]


async def test_a_storm_of_jobs_and_closings_leaves_nothing():
    before = living()
    rng = random.Random(11)

    async def fickle():
        for _ in range(rng.randrange(4)):
            await anyio.lowlevel.checkpoint()

    async def one():
        supervisor = Supervisor()
        for _ in range(rng.randrange(6)):
            supervisor.start(rng.choice((fickle, hang)))
            if rng.random() < 0.5:
                await anyio.lowlevel.checkpoint()
        await supervisor.aclose()
        assert supervisor.jobs == 0

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(one)
    await anyio.wait_all_tasks_blocked()
    assert living() == before


def test_without_an_event_loop_nothing_starts_and_nothing_is_left_to_wait_for():
    supervisor = Supervisor()
    with pytest.raises(RuntimeError, match="event loop"):
        supervisor.start(hang)
    assert supervisor.jobs == 0
    anyio.run(supervisor.aclose)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_when_its_event_loop_has_ended_it_knows_and_closing_waits_for_nobody(backend):
    supervisor = Supervisor()

    async def begin():
        assert not supervisor.elsewhere
        supervisor.start(hang)
        assert not supervisor.elsewhere
        await anyio.lowlevel.checkpoint()

    async def end():
        assert supervisor.elsewhere
        await supervisor.aclose()
        assert supervisor.jobs == 0

    anyio.run(begin, backend=backend)
    anyio.run(end, backend="asyncio")
    anyio.run(end, backend="trio")


def test_it_prints_whose_it_is():
    supervisor = Supervisor("client 'shop'")
    assert repr(supervisor) == "<Supervisor of client 'shop': 0 jobs>"
    run_virtual(supervisor.aclose)
    assert repr(supervisor) == "<Supervisor of client 'shop': 0 jobs, closed>"
