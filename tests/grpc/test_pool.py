"""The pool: when a further connection is made, who waits for it, and what comes after one that has ended."""

import anyio
import anyio.lowlevel
import pytest

from meshlib.balancing.failfast import Failfast, failfast
from meshlib.core.context import deadline
from meshlib.core.errors import ConnectError, DeadlineExceeded, ServiceClosed
from meshlib.core.service import Status
from meshlib.grpc.calling.pool import Connections, SessionPool, connections
from meshlib.testing import run_virtual
from tests.balancing.fakes import Factory, make_env


class Session:
    """A connection with room for ``limit`` calls, each of which takes a second."""

    def __init__(self, number, limit):
        self.number, self.limit = number, limit
        self.exchanges = set()
        self.status = Status.OPEN
        self.graceful = False
        self.on_leave = self.on_room = None
        self.retired = 0

    @property
    def load(self):
        return len(self.exchanges)

    @property
    def full(self):
        return self.load >= self.limit

    async def __call__(self, request):
        assert not self.full, "a call too many"
        mark = object()
        self.exchanges.add(mark)
        try:
            await anyio.sleep(1)
            return self.number
        finally:
            self.exchanges.discard(mark)
            if self.on_room is not None:
                self.on_room()

    def leave(self, graceful=False):
        self.status, self.graceful = Status.CLOSED, graceful
        callback, self.on_leave = self.on_leave, None
        if callback is not None:
            callback()

    def retire(self):
        self.retired += 1
        self.leave()


class Makes(Factory):
    """Makes such connections."""

    def __init__(self, *script, takes=0.0, limit=10):
        super().__init__(*script, takes=takes)
        self.limit = limit

    async def acquire(self):
        await super().acquire()
        self.sessions[-1] = Session(len(self.sessions), self.limit)
        return self.sessions[-1]


def virtual(test):
    """Run an async test of (pool, factory, env) in virtual time, and see that nothing is left running."""

    def around(*script, policy=None, **options):
        async def main():
            env = make_env()
            env.params[Failfast] = failfast()
            factory = Makes(*script, **options)
            pool = SessionPool(factory, env, policy or connections())
            await test(pool, factory, env)
            pool.close()
            await env.supervisor.aclose()
            assert env.supervisor.jobs == 0

        run_virtual(main)

    return around


async def at_once(pool, calls):
    """So many calls; gives the number of the connection that each had."""
    call, had = pool.to_service(), []

    async def one():
        had.append(await call("x"))

    async with anyio.create_task_group() as group:
        for _ in range(calls):
            group.start_soon(one)
    return sorted(had)


def numbers(env):
    return {name: n for name, n in env.metrics.snapshot().items() if name.startswith("pool")}


def test_calls_share_one_connection_while_it_has_room():
    @virtual
    async def check(pool, factory, env):
        assert await at_once(pool, 8) == [1] * 8
        assert len(factory.sessions) == 1

    check(takes=2)


def test_the_next_connection_is_begun_before_the_last_one_is_full():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        await call("x")
        async with anyio.create_task_group() as group:
            for _ in range(9):
                group.start_soon(call, "x")
            await anyio.sleep(0.5)
            assert len(factory.sessions) == 2
            assert repr(pool) == "<pool of h:1: ready, calls 9+0>"

    check(takes=0.1)


def test_those_who_find_no_room_wait_for_one_connect_together():
    @virtual
    async def check(pool, factory, env):
        await pool.to_service()("x")
        assert await at_once(pool, 20) == [1] * 10 + [2] * 10
        assert anyio.current_time() == pytest.approx(0.2 + 1 + 0.2 + 1)
        # 18 of 20: the third was begun, too.
        assert len(factory.sessions) == 3
        assert numbers(env)["pool/waited"] == 10

    check(takes=0.2)


def test_beyond_the_most_they_wait_for_calls_to_end_in_turn():
    @virtual
    async def check(pool, factory, env):
        assert await at_once(pool, 6) == [1] * 6
        assert anyio.current_time() == pytest.approx(3)
        assert len(factory.sessions) == 1

    check(limit=2, policy=connections(most=1))


def test_one_word_that_makes_much_room_is_for_all_who_wait():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        async with anyio.create_task_group() as group:
            for _ in range(7):
                group.start_soon(call, "x")
            await anyio.sleep(0.5)
            (session,) = factory.sessions
            session.limit = 6
            session.on_room()
            await anyio.sleep(0.1)
            assert session.load == 6
        assert anyio.current_time() == pytest.approx(2)

    check(limit=1, policy=connections(most=1))


def test_who_gives_up_waiting_passes_the_turn_on():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        async with anyio.create_task_group() as group:
            group.start_soon(call, "x")
            await anyio.sleep(0.1)
            with deadline(0.5), pytest.raises(DeadlineExceeded, match="room in a connection to h:1"):
                await call("y")
            with anyio.move_on_after(0.2) as scope:
                await call("z")
            assert scope.cancelled_caught
            assert await call("w") == 1
        assert anyio.current_time() == pytest.approx(2)

    check(limit=1, policy=connections(most=1))


def test_a_further_connection_that_cannot_be_made_is_no_news_of_the_endpoint():
    @virtual
    async def check(pool, factory, env):
        assert await at_once(pool, 3) == [1] * 3
        assert env.health.status is Status.OPEN
        assert numbers(env)["pool/connects/fail"] == 1

    check(None, ConnectError("refused"), limit=2)


def test_when_the_first_ends_a_further_one_takes_its_place():
    @virtual
    async def check(pool, factory, env):
        await pool.to_service()("x")
        await at_once(pool, 4)
        first, second = factory.sessions[:2]
        first.leave()
        assert env.health.status is Status.OPEN
        assert pool.sessions[0] is second
        assert await pool.to_service()("x") == second.number
        second.leave()
        for other in factory.sessions[2:]:
            other.leave()
        assert env.health.status is Status.BUSY

    check(limit=2)


def test_one_that_was_asked_to_drain_is_made_again_at_once():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        await call("x")
        await anyio.sleep(5)
        left = anyio.current_time()
        factory.sessions[0].leave(graceful=True)
        await anyio.lowlevel.checkpoint()
        await anyio.sleep(0.001)
        assert factory.times[-1] == left
        assert await call("x") == 2
        factory.sessions[1].leave(graceful=True)  # it lasted no second
        await anyio.sleep(0.001)
        assert env.health.status in (Status.BUSY, Status.OPEN)

    check()


def test_further_connections_end_when_nobody_uses_them():
    @virtual
    async def check(pool, factory, env):
        await pool.to_service()("x")
        await at_once(pool, 4)
        assert len(pool.sessions) == 2
        await anyio.sleep(70)
        assert [session.retired for session in factory.sessions] == [0, 1]
        assert env.supervisor.jobs == 0
        await at_once(pool, 4)
        assert len(pool.sessions) >= 2

    check(limit=2)


def test_an_old_one_is_replaced_before_it_is_given_up():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        await call("x")
        await anyio.sleep(66)
        assert len(factory.sessions) == 2
        first, second = factory.sessions
        assert (first.retired, second.retired) == (1, 0)
        assert 54 <= factory.times[1] - 0 <= 66 + 1
        assert await call("x") == 2
        assert env.health.status is Status.OPEN
        assert numbers(env)["pool/replaced"] == 1

    check(policy=connections(age=60))


def test_an_old_one_that_cannot_be_replaced_stays():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        await call("x")
        await anyio.sleep(70)
        assert factory.sessions[0].retired == 0
        assert await call("x") == 1
        await anyio.sleep(30)
        assert factory.sessions[0].retired == 1

    check(None, *[ConnectError("refused")] * 30, policy=connections(age=60))


def test_closing_ends_all_and_tells_those_who_wait():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        await call("x")

        async def waits():
            with pytest.raises(ServiceClosed):
                await call("x")

        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(call, "x")
            await anyio.sleep(0.1)
            group.start_soon(waits)
            await anyio.sleep(0.1)
            pool.close()
        assert [session.retired for session in factory.sessions] == [1]
        pool.close()

    check(limit=2, policy=connections(most=1))


def test_it_prints_as_it_was_typed():
    assert repr(Connections()) == "connections(most=10, idle=30 s)"
    assert repr(connections(3, age=60, idle=5)) == "connections(most=3, age=60 s, idle=5 s)"


def test_each_of_several_grows_old_and_is_replaced():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()

        async def calls():
            while env.clock.now() < 95:
                await call("x")

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(calls)
            await anyio.sleep(90)
            # Both are past their 60 s, give or take a tenth, and those in their places are not.
            assert [session.retired for session in factory.sessions] == [1, 1, 0, 0]
            assert len(pool.sessions) == 2
        assert numbers(env)["pool/replaced"] == 2

    check(policy=connections(age=60), limit=2)


def test_one_that_grows_old_as_a_further_one_goes_on_growing_old_as_the_first():
    @virtual
    async def check(pool, factory, env):
        call = pool.to_service()
        await at_once(pool, 4)
        await anyio.sleep(1)
        assert len(pool.sessions) == 2
        await anyio.sleep(20)
        factory.sessions[0].leave()
        assert pool.sessions == (factory.sessions[1],)
        await anyio.sleep(50)
        assert factory.sessions[1].retired == 1
        assert await call("x") == 3
        assert len(pool.sessions) == 1

    check(policy=connections(age=60, idle=300), limit=2)


def test_one_that_leaves_while_it_is_being_replaced_is_not():
    @virtual
    async def check(pool, factory, env):
        await at_once(pool, 4)
        await anyio.sleep(10)
        assert len(pool.sessions) == 2
        with anyio.fail_after(200):
            while len(factory.times) < 3:  # noqa: ASYNC110 - the next connect has begun
                await anyio.sleep(0.5)
        for session in list(pool.sessions)[::-1]:
            session.leave()
        await anyio.sleep(10)
        assert sum(session.status is Status.OPEN for session in factory.sessions) == len(pool.sessions)

    check(policy=connections(age=60, idle=300), limit=2, takes=5.0)
