"""Failfast: out at once when there is no connection, back soon, and not all at the same moment."""

import random
from bisect import bisect_left
from itertools import pairwise

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import ConfigurationError, ConnectError, Status, failfast, mux
from meshlib.balancing.failfast import FIRST_ALONE, FIRST_WAIT, LAST_ALONE, LAST_WAIT, STEADY, Waits
from meshlib.balancing.pool import Pool
from meshlib.core.backoff import Constant, Exponential
from meshlib.core.events import Decisions
from meshlib.core.health import Health, Peers
from meshlib.testing import run_virtual
from tests.balancing.fakes import Factory, make_env

# --- the waits --------------------------------------------------------------------------------------------------------


def longest(n, first, last):
    return min(last, first * 2.0 ** min(max(0, n - 1), 60))


@given(
    st.lists(st.tuples(st.sampled_from(["failure", "loss", "hurry"]), st.booleans(), st.floats(0, 30))), st.integers()
)
def test_each_wait_is_between_nothing_and_what_its_number_allows(steps, seed):
    waits = Waits(failfast(), random.Random(seed))
    failures = {True: 0, False: 0}
    for kind, alone, lasted in steps:
        if kind == "hurry":
            alone = True
            wait = waits.hurried()
        elif kind == "failure":
            failures[alone] += 1
            wait = waits.after_failure(alone)
        else:
            if lasted >= STEADY:
                failures = {True: 0, False: 0}
            else:
                failures[alone] += 1
            wait = waits.after_loss(lasted, alone)
        first, last = (FIRST_ALONE, LAST_ALONE) if alone else (FIRST_WAIT, LAST_WAIT)
        assert 0 <= wait <= longest(failures[alone], first, last)


def test_waits_double_and_are_short_again_after_a_connection_that_lasted():
    waits = Waits(failfast(Exponential(1, 32), alone=Exponential(0.1, 1)), random.Random(1))
    assert [waits.after_failure(False) for _ in range(7)] == [1, 2, 4, 8, 16, 32, 32]
    assert [waits.after_failure(True) for _ in range(5)] == [0.1, 0.2, 0.4, 0.8, 1]
    assert waits.after_loss(STEADY - 1, False) == 32, "accepting and hanging up is no better than refusing"
    assert waits.after_loss(STEADY, False) == 1
    assert [waits.after_failure(False) for _ in range(2)] == [1, 2]


def test_what_fails_while_nobody_serves_does_not_lengthen_the_waits_of_afterwards():
    waits = Waits(failfast(Exponential(1, 32)), random.Random(1))
    for _ in range(50):
        waits.after_failure(True)
    assert waits.after_failure(False) == 1


# --- what endpoints know of each other --------------------------------------------------------------------------------


def test_who_is_down_is_hurried_when_the_last_one_goes():
    peers, hurried = Peers(), []
    one, two, three = Health(), Health(), Health()
    for health in (one, two, three, three):
        peers.join(health)
    assert peers.count == 3
    peers.down(one, lambda: hurried.append(1))
    peers.down(two, lambda: hurried.append(2))
    assert (peers.downs, peers.all_down, hurried) == (2, False, [])
    peers.down(three, lambda: hurried.append(3))
    assert (peers.all_down, hurried) == (True, [1, 2, 3])
    peers.down(three, lambda: hurried.append(3))
    assert hurried == [1, 2, 3], "it was down already"
    peers.up(two)
    assert not peers.all_down
    assert repr(peers) == "<Peers: 3, 2 down>"


def test_who_leaves_may_leave_nobody_behind_that_serves():
    peers, hurried = Peers(), []
    one, two = Health(), Health()
    peers.join(one)
    peers.join(two)
    peers.down(one, lambda: hurried.append(1))
    peers.leave(two)
    assert (peers.count, peers.all_down, hurried) == (1, True, [1])
    peers.leave(one)
    peers.leave(one)
    assert (peers.count, peers.downs, hurried) == (0, 0, [1])
    peers.down(one, lambda: hurried.append(1))
    assert peers.downs == 0, "who is no member is nobody's last resort"


# --- pools that have peers --------------------------------------------------------------------------------------------


class Client:
    """Pools of one client, each with a factory of its own; ``up`` says who accepts connections."""

    def __init__(self, n, layer=None, seed=1):
        self.env = make_env(seed)
        self.env = self.env.evolve(events=Decisions(self.env.clock, self.env.metrics))
        self.told = []
        self.env.events.listen(lambda decision: self.told.append((decision.kind, decision.code, decision.endpoint)))
        self.up = [True] * n
        self.times = [[] for _ in range(n)]
        self.factories, self.calls, self.envs = [], [], []
        for i in range(n):
            self._endpoint(i, layer or failfast())

    def _endpoint(self, i, layer):
        client = self

        class Here(Factory):
            async def acquire(self):
                client.times[i].append(anyio.current_time())
                if not client.up[i]:
                    raise ConnectError("refused")
                return await super().acquire()

        env = self.env.evolve(address=f"h:{i}", health=Health(), closers=[])
        factory = Here()
        self.factories.append(factory)
        self.envs.append(env)
        self.calls.append(layer.build(env, Pool().build(env, factory)))

    def fail(self, i):
        """The server goes away, and its connection with it."""
        self.up[i] = False
        for session in self.factories[i].sessions:
            session.leave()

    @property
    def statuses(self):
        return [env.health.status for env in self.envs]

    async def close(self):
        for env in self.envs:
            for closer in env.closers:
                closer()
        await self.env.supervisor.aclose()
        assert self.env.shared(Peers, Peers).count == 0


def virtual(test):
    def around(*args, **options):
        async def main():
            client = Client(*args, **options)
            await test(client)
            await client.close()

        run_virtual(main)

    return around


def test_one_failed_connect_takes_an_endpoint_out_and_it_comes_back_by_itself():
    @virtual
    async def check(client):
        client.up[0] = False
        with pytest.raises(ConnectError, match="refused") as caught:
            await client.calls[0]("x")
        assert caught.value.requeueable
        assert client.statuses == [Status.BUSY, Status.OPEN]
        assert not client.envs[0].health.serves
        await anyio.sleep(20)
        client.up[0] = True
        await anyio.sleep(LAST_WAIT)
        assert client.statuses == [Status.OPEN] * 2
        assert client.told == [("eject", "connect", "h:0"), ("revive", "connect", "h:0")]
        snapshot = client.env.metrics.snapshot()
        names = ("marked_dead", "marked_available", "is_marked_dead")
        assert [snapshot[f"failfast/{name}"] for name in names] == [1, 1, 0]

    check(2)


@pytest.mark.parametrize("seed", range(5))
def test_while_another_serves_the_waits_grow_to_half_a_minute(seed):
    @virtual
    async def check(client):
        client.up[0] = False
        with pytest.raises(ConnectError):
            await client.calls[0]("x")
        await anyio.sleep(1000)
        waits = [b - a for a, b in pairwise(client.times[0])]
        for n, wait in enumerate(waits, 1):
            assert wait <= longest(n, FIRST_WAIT, LAST_WAIT) + 1e-6
        assert max(waits) > LAST_WAIT / 2
        assert len(waits) < 120

    check(2, seed=seed)


def test_when_the_last_one_goes_those_who_had_long_to_wait_are_woken():
    @virtual
    async def check(client):
        for call in client.calls:
            await call("x")
        client.fail(0)
        await anyio.sleep(300)
        client.up[0] = True
        tries = len(client.times[0])
        client.fail(1)
        await anyio.sleep(LAST_ALONE + 0.01)
        assert len(client.times[0]) == tries + 1
        assert client.statuses == [Status.OPEN, Status.BUSY]

    # A second last wait of half a minute without jitter, so that nothing but waking can end it in time.
    check(2, failfast(Exponential(1, 3000), alone=(0.1, 1)))


def test_a_client_of_one_endpoint_is_back_within_a_second():
    @virtual
    async def check(client):
        await client.calls[0]("x")
        client.fail(0)
        for outage in (0.3, 3, 300):
            await anyio.sleep(outage)
            client.up[0] = True
            await anyio.sleep(LAST_ALONE)
            assert client.statuses == [Status.OPEN]
            client.fail(0)

    check(1)


def test_a_request_that_finds_no_session_after_a_loss_does_not_wait_for_the_backoff():
    @virtual
    async def check(client):
        await client.calls[0]("x")
        client.factories[0].sessions[0].leave()
        before = anyio.current_time()
        assert await client.calls[0]("x") == 2
        assert anyio.current_time() == before
        await anyio.sleep(100)
        assert len(client.times[0]) == 2
        client.factories[0].sessions[1].leave()
        await anyio.sleep(50)
        assert await client.calls[0]("x") == 2 + 1
        assert anyio.current_time() == before + 150

    check(2, failfast(Constant(60)))


@pytest.mark.parametrize("when", [0, 0.5])
def test_removed_while_it_waits_it_leaves_nothing(when):
    @virtual
    async def check(client):
        client.up[0] = False
        with pytest.raises(ConnectError):
            await client.calls[0]("x")
        await anyio.sleep(when)
        for closer in client.envs[0].closers:
            closer()
        await anyio.wait_all_tasks_blocked()
        assert client.env.supervisor.jobs == 0
        await anyio.sleep(100)
        assert len(client.times[0]) == 1
        assert client.env.shared(Peers, Peers).count == 1

    check(2, failfast(Constant(0.5 + when)))


def test_removed_in_the_moment_in_which_its_wait_ends_it_stays_closed():
    @virtual
    async def check(client):
        client.up[0] = False
        with pytest.raises(ConnectError):
            await client.calls[0]("x")
        await anyio.sleep(5)
        for closer in client.envs[0].closers:
            closer()
        with anyio.fail_after(1), pytest.raises(meshlib.ServiceClosed):
            await client.calls[0]("x")
        await anyio.sleep(100)
        assert len(client.times[0]) <= 2

    for seed in range(8):
        check(2, failfast(Constant(5)), seed=seed)


# --- the herd ---------------------------------------------------------------------------------------------------------

CLIENTS, SERVERS = 200, 2


@pytest.mark.parametrize("outage", [0.0, 2.0, 8.0])
def test_no_server_is_overrun_when_all_restart_at_once(outage):
    """200 clients lose all connections in one moment; what a server then sees, of connects that reach it.

    While it is away it sees nothing. From when it is back it has 200 connections to take: no second may bring more than
    one and a half times that, and no tenth of a second half of them.
    """

    async def main():
        clients = [Client(SERVERS, seed=i) for i in range(CLIENTS)]
        for client in clients:
            for call in client.calls:
                await call("x")
        await anyio.sleep(60)
        lost = anyio.current_time()
        for client in clients:
            for i in range(SERVERS):
                client.fail(i)
        if outage:
            await anyio.sleep(outage)
        for client in clients:
            client.up = [True] * SERVERS
        back = anyio.current_time()
        await anyio.sleep(60)
        for i in range(SERVERS):
            times = sorted(at for client in clients for at in client.times[i] if at >= max(back, lost + 1e-9))
            assert len(times) == CLIENTS
            assert times[-1] - back <= 2 * LAST_ALONE, "and all are back soon"
            assert busiest(times, 1.0) <= 1.5 * CLIENTS
            if outage > LAST_ALONE:
                assert busiest(times, 0.1) < CLIENTS / 2
        for client in clients:
            assert client.statuses == [Status.OPEN] * SERVERS
            await client.close()

    run_virtual(main)


def test_a_server_that_restarts_alone_meets_its_clients_one_by_one():
    async def main():
        clients = [Client(SERVERS, seed=i) for i in range(CLIENTS)]
        for client in clients:
            for call in client.calls:
                await call("x")
        await anyio.sleep(60)
        lost = anyio.current_time()
        for client in clients:
            client.fail(0)
            client.up[0] = True
        await anyio.sleep(60)
        times = sorted(client.times[0][-1] for client in clients)
        assert times[-1] - lost <= FIRST_WAIT
        assert busiest(times, 0.1) < CLIENTS / 5
        for client in clients:
            await client.close()

    run_virtual(main)


def busiest(times, seconds):
    """The most that came within any such stretch; ``times`` is sorted."""
    return max(bisect_left(times, at + seconds) - i for i, at in enumerate(times))


# --- forms ------------------------------------------------------------------------------------------------------------


def test_every_client_has_it():
    assert repr(failfast()) == "failfast((1, 32), alone=(0.1, 1))"
    assert repr(failfast()) in repr(mux.client("h:1"))
    assert repr(failfast(Constant(3))) == "failfast(Constant(seconds=3), alone=(0.1, 1))"


async def test_a_client_without_it_connects_on_demand():
    def without(stack):
        return stack.remove("failfast").remove("accrual").remove("requeue")

    client = mux.client("127.0.0.1:1", stack=without)
    async with client:
        for _ in range(2):
            with pytest.raises(ConnectError):
                await client(mux.Request())
        assert [node.status for node in client.endpoints] == [Status.OPEN]
        assert client.metrics()["pool/connects/fail"] == 2


@pytest.mark.parametrize(
    "given", [{"backoff": 5}, {"backoff": (2, 1)}, {"alone": (0, 1)}, {"alone": ("a", "b")}], ids=str
)
def test_wrong_parameters_are_told_at_construction(given):
    with pytest.raises(ConfigurationError, match=rf"failfast\({next(iter(given))}="):
        failfast(**given)
