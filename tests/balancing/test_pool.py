"""The pool: one shared session an endpoint, made lazily, made again when it ends, in every state it can be in.

The waits between connects are those of an endpoint that has no others; see test_failfast.py for when it has.
"""

import anyio
import pytest

import meshlib
from meshlib.balancing.failfast import FIRST_ALONE, LAST_ALONE, Failfast, failfast
from meshlib.balancing.pool import Pool, SingletonPool
from meshlib.core.context import Context, deadline, use
from meshlib.core.errors import ConnectError, DeadlineExceeded, ServiceClosed
from meshlib.core.service import Status
from meshlib.testing import run_virtual
from tests.balancing.fakes import Factory, make_env


def refused():
    return ConnectError("refused")


def virtual(test):
    """Run an async test of (pool, factory, env) in virtual time, and see that nothing is left running."""

    def around(*script, **options):
        async def main():
            env = make_env(**options.pop("env", {}))
            if options.pop("reconnects", True):
                env.params[Failfast] = failfast()
            factory = Factory(*script, **options)
            pool = SingletonPool(factory, env)
            await test(pool, factory, env)
            pool.close()
            await env.supervisor.aclose()

        run_virtual(main)

    return around


def numbers(env, scope=""):
    return {name: n for name, n in env.metrics.snapshot().items() if name.startswith(scope)}


def test_nothing_connects_before_the_first_request():
    @virtual
    async def check(pool, factory, env):
        await anyio.sleep(60)
        assert factory.times == []
        assert pool.status is Status.OPEN
        assert repr(pool) == "<SingletonPool of h:1: idle>"

    check()


def test_a_connect_is_shared_by_all_who_come_while_it_is_under_way():
    @virtual
    async def check(pool, factory, env):
        replies = []
        call = pool.to_service()

        async def one():
            replies.append((await call("x"), anyio.current_time()))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(one)
                await anyio.sleep(0.1)
        assert replies == [(1, pytest.approx(2))] * 5
        assert len(factory.sessions) == 1
        assert await call("y") == 1
        assert numbers(env, "pool") == {"pool/connects": 1, "pool/connects/fail": 0}
        assert repr(pool) == "<SingletonPool of h:1: ready>"

    check(takes=2)


def test_a_caller_that_is_cancelled_leaves_the_connect_to_the_others():
    @virtual
    async def check(pool, factory, env):
        sessions = []

        async def one():
            sessions.append(await pool.acquire())

        async with anyio.create_task_group() as group:
            with anyio.move_on_after(1) as first:
                await pool.acquire()
            assert first.cancelled_caught
            group.start_soon(one)
        assert sessions == factory.sessions
        assert (len(factory.times), factory.cancelled) == (1, 0)

    check(takes=2)


def test_a_connect_goes_on_when_all_who_waited_for_it_have_gone():
    @virtual
    async def check(pool, factory, env):
        with anyio.move_on_after(1):
            await pool.acquire()
        await anyio.sleep(5)
        assert await pool.acquire() is factory.sessions[0]
        assert len(factory.times) == 1

    check(takes=2)


def test_a_connect_sees_nothing_of_the_call_that_asked_for_it():
    @virtual
    async def check(pool, factory, env):
        with use(Context(client_id="caller")), deadline(1):
            await pool.acquire()
        assert factory.contexts == [Context()]

    check()


def test_a_wait_for_a_connect_ends_with_the_calls_deadline():
    @virtual
    async def check(pool, factory, env):
        with deadline(1), pytest.raises(DeadlineExceeded, match="waiting for a connection to h:1") as caught:
            await pool.acquire()
        assert caught.value.kept_here
        assert anyio.current_time() == pytest.approx(1)
        await anyio.sleep(5)
        assert len(factory.sessions) == 1

    check(takes=3)


def test_all_who_waited_are_told_when_the_connect_fails_and_who_comes_later_is_told_at_once():
    @virtual
    async def check(pool, factory, env):
        errors = []

        async def one():
            try:
                await pool.acquire()
            except ConnectError as error:
                errors.append(error)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(one)
        assert [str(error) for error in errors] == ["refused [endpoint h:1]"] * 3
        assert all(error.requeueable and error.__cause__ is not None for error in errors)
        before = anyio.current_time()
        with pytest.raises(ConnectError, match="refused"):
            await pool.acquire()
        assert anyio.current_time() == before
        assert pool.status is Status.BUSY
        assert env.health.status is Status.BUSY
        assert env.health.reason.startswith("connect: refused; next try within 0.")

    check(refused(), takes=1)


def test_it_reconnects_by_itself_and_says_when_it_is_back():
    @virtual
    async def check(pool, factory, env):
        with pytest.raises(ConnectError):
            await pool.acquire()
        await anyio.sleep(1)
        assert (pool.status, env.health.status, env.health.reason) == (Status.OPEN, Status.OPEN, "")
        assert await pool.acquire() is factory.sessions[0]
        assert numbers(env) == {
            "pool/connects": 1,
            "pool/connects/fail": 2,
            "failfast/marked_dead": 1,
            "failfast/marked_available": 1,
        }

    check(refused(), refused())


@pytest.mark.parametrize("seed", range(5))
def test_waits_between_connects_double_up_to_a_limit_each_fully_jittered(seed):
    @virtual
    async def check(pool, factory, env):
        with pytest.raises(ConnectError):
            await pool.acquire()
        await anyio.sleep(60)
        waits = [b - a for a, b in zip(factory.times, factory.times[1:], strict=False)]
        for n, wait in enumerate(waits):
            assert 0 <= wait <= min(LAST_ALONE, FIRST_ALONE * 2**n) + 1e-6
        long = sorted(waits[10:])
        assert long[len(long) // 10] < 0.2 * LAST_ALONE
        assert long[-len(long) // 10] > 0.8 * LAST_ALONE

    check(*[refused() for _ in range(500)], env={"seed": seed})


def test_after_a_success_waits_begin_small_again():
    @virtual
    async def check(pool, factory, env):
        with pytest.raises(ConnectError):
            await pool.acquire()
        await anyio.sleep(100)
        factory.script = [refused(), None]
        factory.times.clear()
        left = anyio.current_time()
        factory.sessions[-1].leave()
        await anyio.sleep(1)
        assert factory.times[0] - left <= FIRST_ALONE + 1e-6
        assert factory.times[1] - factory.times[0] <= FIRST_ALONE + 1e-6

    check(*[refused() for _ in range(6)])


def test_when_the_session_ends_it_is_made_again_in_the_background():
    @virtual
    async def check(pool, factory, env):
        first = await pool.acquire()
        first.leave()
        assert env.health.status is Status.BUSY
        assert env.health.reason.startswith("connect: the session ended; reconnecting within 0.")
        await anyio.sleep(3)
        assert env.health.status is Status.OPEN
        second = await pool.acquire()
        assert second is not first
        assert second is factory.sessions[1]

    check(takes=2)


def test_requests_that_come_while_it_reconnects_wait_for_it():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        assert await call("x") == 1
        factory.sessions[0].leave()
        assert await call("x") == 2
        assert anyio.current_time() == pytest.approx(4), "it waits for no backoff"
        assert len(factory.times) == 2

    check(takes=2)


def test_a_session_that_left_before_is_not_mistaken_for_the_present_one():
    @virtual
    async def check(pool, factory, env):
        first = await pool.acquire()
        stale = first.on_leave
        first.leave()
        second_session = await pool.acquire()
        stale()
        assert env.health.status is Status.OPEN
        assert await pool.acquire() is second_session
        assert len(factory.times) == 2

    check()


def test_what_nobody_expected_of_a_connect_is_a_failure_like_another():
    @virtual
    async def check(pool, factory, env):
        with pytest.raises(ConnectError, match="UnicodeError") as caught:
            await pool.acquire()
        assert isinstance(caught.value.__cause__.__cause__, UnicodeError)
        await anyio.sleep(1)
        assert await pool.acquire() is factory.sessions[0]

    check(UnicodeError("label too long"))


# --- without failfast: on demand alone -------------------------------------------------------------------------------


def test_without_failfast_a_connect_that_failed_is_tried_again_by_the_next_request():
    @virtual
    async def check(pool, factory, env):
        for _ in range(2):
            with pytest.raises(ConnectError, match="refused") as caught:
                await pool.acquire()
            assert caught.value.requeueable
            assert (pool.status, env.health.status) == (Status.OPEN, Status.OPEN)
            await anyio.sleep(60)
        assert await pool.acquire() is factory.sessions[0]
        assert len(factory.times) == 3

    check(refused(), refused(), reconnects=False)


def test_without_failfast_a_session_that_ended_is_made_again_by_the_next_request():
    @virtual
    async def check(pool, factory, env):
        (await pool.acquire()).leave()
        await anyio.sleep(60)
        assert (len(factory.times), env.health.status) == (1, Status.OPEN)
        assert await pool.acquire() is factory.sessions[1]
        assert numbers(env) == {
            "pool/connects": 2,
            "pool/connects/fail": 0,
            "failfast/marked_dead": 0,
            "failfast/marked_available": 0,
        }

    check(reconnects=False)


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_session_whose_lease_ran_out_is_busy_and_serves_all_the_same():
    @virtual
    async def check(pool, factory, env):
        session = await pool.acquire()
        session.on_lease(False)
        assert (env.health.status, env.health.serves, env.health.reason) == (Status.BUSY, True, "lease: it ran out")
        assert await pool.acquire() is session
        session.on_lease(True)
        assert env.health.status is Status.OPEN

    check()


def test_a_lease_ends_with_its_session():
    @virtual
    async def check(pool, factory, env):
        session = await pool.acquire()
        session.on_lease(False)
        session.leave()
        await anyio.sleep(1)
        assert (env.health.status, env.health.reason) == (Status.OPEN, "")
        session.on_lease(False)
        assert env.health.status is Status.OPEN

    check()


# --- closing in every state -------------------------------------------------------------------------------------------


async def refuses(pool):
    with pytest.raises(ServiceClosed, match="the endpoint was removed") as caught:
        await pool.acquire()
    assert caught.value.requeueable
    assert caught.value.endpoint == "h:1"
    assert pool.status is Status.CLOSED
    await anyio.sleep(60)


def test_closed_while_idle():
    @virtual
    async def check(pool, factory, env):
        pool.close()
        await refuses(pool)
        assert factory.times == []

    check()


def test_closed_while_connecting_those_who_wait_are_told():
    @virtual
    async def check(pool, factory, env):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(refuses, pool)
            await anyio.sleep(1)
            pool.close()
        assert factory.cancelled == 1
        assert factory.sessions == []

    check(takes=5)


def test_closed_while_ready_the_session_is_retired_and_not_made_again():
    @virtual
    async def check(pool, factory, env):
        session = await pool.acquire()
        pool.close()
        assert session.retired == 1
        await refuses(pool)
        assert len(factory.times) == 1

    check()


def test_closed_while_backing_off_it_connects_no_more():
    @virtual
    async def check(pool, factory, env):
        with pytest.raises(ConnectError):
            await pool.acquire()
        pool.close()
        await refuses(pool)
        assert len(factory.times) == 1

    check(refused())


def test_closed_while_reconnecting():
    @virtual
    async def check(pool, factory, env):
        (await pool.acquire()).leave()
        await anyio.sleep(1)
        pool.close()
        await refuses(pool)
        assert (len(factory.times), len(factory.sessions)) == (2, 1)

    check(takes=2)


def test_closed_while_waiting_to_reconnect():
    @virtual
    async def check(pool, factory, env):
        (await pool.acquire()).leave()
        pool.close()
        await refuses(pool)
        assert len(factory.times) == 1

    check()


def test_closing_twice_is_the_same_as_once():
    @virtual
    async def check(pool, factory, env):
        session = await pool.acquire()
        pool.close()
        pool.close()
        assert session.retired == 1

    check()


@pytest.mark.parametrize("fails", [False, True])
def test_a_connect_that_ends_in_the_moment_of_closing_leaves_no_session(fails):
    class Unstoppable(Factory):
        async def acquire(self):
            with anyio.CancelScope(shield=True):
                return await super().acquire()

    async def main():
        env = make_env()
        factory = Unstoppable(*[refused()] * fails, takes=2)
        pool = SingletonPool(factory, env)
        async with anyio.create_task_group() as group:
            group.start_soon(refuses, pool)
            await anyio.sleep(1)
            pool.close()
        assert pool.status is Status.CLOSED
        assert env.health.status is Status.OPEN
        assert [session.retired for session in factory.sessions] == [1] * (not fails)
        assert len(factory.times) == 1
        await env.supervisor.aclose()

    run_virtual(main)


def test_as_a_layer_it_closes_with_its_endpoint():
    async def main():
        env, factory = make_env(), Factory()
        service = Pool().build(env, factory)
        assert await service("x") == 1
        for close in env.closers:
            close()
        assert factory.sessions[0].retired == 1
        with pytest.raises(ServiceClosed):
            await service("x")
        await env.supervisor.aclose()

    run_virtual(main)
    assert repr(Pool()) == "pool(sessions=1)"


async def test_a_storm_of_callers_cancellations_and_failures_leaves_nothing():
    env = make_env()
    factory = Factory(*[step for _ in range(5) for step in (refused(), None)])
    call = SingletonPool(factory, env).to_service()
    outcomes = []

    async def one(i):
        with anyio.CancelScope() as scope:
            if i % 3 == 0:
                scope.cancel()
            try:
                outcomes.append(await call(i))
            except meshlib.MeshError as error:
                outcomes.append(type(error))
            if i % 17 == 0:
                for session in factory.sessions:
                    session.leave()

    async with anyio.create_task_group() as group:
        for i in range(200):
            group.start_soon(one, i)
            await anyio.lowlevel.checkpoint()
    assert len(outcomes) > 100
    await env.supervisor.aclose()
    assert env.supervisor.jobs == 0
