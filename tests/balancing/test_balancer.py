"""The balancer: follows a name by differences, and sends each request to an endpoint that is ready, or says why not."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib.balancing.balancer import PATIENCE, Balancer
from meshlib.balancing.choose import P2C
from meshlib.balancing.load import LeastLoaded
from meshlib.balancing.node import Node
from meshlib.core.context import CallRecord, current, deadline, use
from meshlib.core.errors import DeadlineExceeded, NoEndpoints, ResolutionError, ServiceClosed
from meshlib.core.service import Status
from meshlib.core.var import Var
from meshlib.names.addr import Address, Bound, Failed, Neg, Pending
from meshlib.testing import run_virtual
from tests.balancing.fakes import make_env


def at(*ports, **more):
    return Bound.of(Address("h", port, **more) for port in ports)


class Cluster:
    """A balancer over endpoints that answer with their port, and do nothing unless they are told."""

    def __init__(self, addr=None, seed=1, chooser=None, **more):
        self.addr = Var(addr or Pending())
        self.env = more.pop("env", None) or make_env(seed)
        self.made, self.closed, self.serve = Counter(), Counter(), None
        self.balancer = Balancer(self.env, self.make_node, chooser or P2C(LeastLoaded()), **more)
        self.balancer.follow(SimpleNamespace(addr=self.addr))

    def make_node(self, address, health):
        self.made[address.port] += 1

        async def service(request):
            if self.serve is not None:
                await self.serve(request)
            return address.port

        return Node(
            address, service, self.env.evolve(health=health, closers=[lambda: self.closed.update([address.port])])
        )

    def node(self, port):
        (node,) = [node for node in self.balancer.nodes if node.address.port == port]
        return node

    def count(self, name):
        return self.env.metrics.snapshot()[f"loadbalancer/{name}"]

    async def call(self, request="x"):
        return await self.balancer(request)


def down(cluster, *ports, reason="refused"):
    for port in ports:
        cluster.node(port).health.mark("connect", Status.BUSY, reason)


def up(cluster, *ports):
    for port in ports:
        cluster.node(port).health.mark("connect", Status.OPEN)


async def test_requests_go_to_every_ready_endpoint():
    cluster = Cluster(at(1, 2, 3))
    counts = Counter([await cluster.call() for _ in range(300)])
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 50


async def test_an_endpoint_that_is_not_ready_gets_nothing_until_it_is():
    cluster = Cluster(at(1, 2, 3))
    down(cluster, 2)
    assert {await cluster.call() for _ in range(100)} == {1, 3}
    up(cluster, 2)
    assert {await cluster.call() for _ in range(100)} == {1, 2, 3}


async def test_when_no_endpoint_is_open_those_that_would_serve_all_the_same_are_used():
    cluster = Cluster(at(1, 2, 3), panic=0)
    down(cluster, 3)
    for port in (1, 2):
        cluster.node(port).health.mark("lease", Status.BUSY, "it ran out", serves=True)
    assert {await cluster.call() for _ in range(60)} == {1, 2}
    cluster.node(2).health.mark("lease", Status.OPEN)
    assert {await cluster.call() for _ in range(60)} == {2}


# --- load -------------------------------------------------------------------------------------------------------------


async def test_load_counts_what_is_under_way_and_is_given_back_however_it_ends():
    cluster, gate = Cluster(at(1)), anyio.Event()

    async def serve(request):
        await gate.wait()
        if request == "fail":
            raise ValueError("x")

    async def call(request):
        with contextlib.suppress(ValueError):
            await cluster.call(request)

    cluster.serve = serve
    async with anyio.create_task_group() as group:
        group.start_soon(call, "succeed")
        group.start_soon(call, "fail")
        async with anyio.create_task_group() as doomed:
            doomed.start_soon(call, "be cancelled")
            await anyio.wait_all_tasks_blocked()
            assert (cluster.node(1).load, cluster.count("load")) == (3, 3)
            doomed.cancel_scope.cancel()
        assert cluster.node(1).load == 2
        gate.set()
    assert (cluster.node(1).load, cluster.count("load")) == (0, 0)


async def test_the_less_loaded_endpoint_is_preferred():
    cluster = Cluster(at(1, 2))
    cluster.node(1).meter.pending = 5
    assert {await cluster.call() for _ in range(50)} == {2}


# --- updates ----------------------------------------------------------------------------------------------------------


async def test_an_endpoint_that_stays_keeps_its_node_and_its_load():
    cluster = Cluster(at(1, 2))
    kept = cluster.node(2)
    kept.meter.pending = 3
    cluster.addr.set(at(2, 3))
    assert cluster.node(2) is kept
    assert (kept.load, kept.removed) == (3, False)
    assert cluster.made == {1: 1, 2: 1, 3: 1}
    assert cluster.closed == {1: 1}
    assert (cluster.count("adds"), cluster.count("removes"), cluster.count("size")) == (3, 1, 2)


async def test_an_update_that_changes_nothing_changes_nothing():
    cluster = Cluster(at(1, 2))
    nodes = cluster.balancer.nodes
    cluster.addr.set(at(2, 1))
    assert set(cluster.balancer.nodes) == set(nodes)
    assert (cluster.count("adds"), cluster.count("removes")) == (2, 0)


async def test_a_changed_weight_is_taken_over_by_the_same_node():
    cluster = Cluster(at(1, 2))
    node = cluster.node(1)
    cluster.addr.set(Bound((Address("h", 1, weight=50.0, metadata=(("zone", "a"),)), Address("h", 2))))
    assert cluster.node(1) is node
    assert (node.address.weight, node.address.metadata) == (50.0, (("zone", "a"),))
    counts = Counter([await cluster.call() for _ in range(200)])
    assert counts[1] > 180


async def test_an_idle_endpoint_that_leaves_is_closed_at_once():
    cluster = Cluster(at(1, 2))
    node = cluster.node(1)
    cluster.addr.set(at(2))
    assert cluster.closed == {1: 1}
    assert node.status is Status.CLOSED
    assert {await cluster.call() for _ in range(20)} == {2}


async def test_a_busy_endpoint_that_leaves_finishes_what_it_has_and_is_then_closed():
    cluster, gate, replies = Cluster(at(1)), anyio.Event(), []

    async def serve(request):
        await gate.wait()

    async def call():
        replies.append(await cluster.call())

    cluster.serve = serve
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        cluster.addr.set(at(2))
        assert [str(node) for node in cluster.balancer.nodes] == ["h:2"]
        assert cluster.closed == {}
        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    assert sorted(replies) == [1, 1, 1, 2]
    assert cluster.closed == {1: 1}


async def test_an_endpoint_that_comes_back_while_it_finishes_stays_after_all():
    cluster, gate = Cluster(at(1)), anyio.Event()

    async def serve(request):
        await gate.wait()

    cluster.serve = serve
    async with anyio.create_task_group() as group:
        group.start_soon(cluster.call)
        await anyio.wait_all_tasks_blocked()
        node = cluster.node(1)
        cluster.addr.set(at(2))
        cluster.addr.set(at(1, 2, weight=7.0))
        assert cluster.node(1) is node
        assert (node.load, node.removed, node.address.weight) == (1, False, 7.0)
        gate.set()
    assert cluster.closed == {}
    assert cluster.made == {1: 1, 2: 1}
    cluster.addr.set(at(2))
    assert cluster.closed == {1: 1}


async def test_an_endpoint_that_comes_back_after_it_was_closed_is_made_anew():
    cluster = Cluster(at(1))
    cluster.addr.set(at(2))
    cluster.addr.set(at(1))
    assert cluster.made == {1: 2, 2: 1}
    assert cluster.closed == {1: 1, 2: 1}
    assert await cluster.call() == 1


@given(st.lists(st.sets(st.integers(1, 6)), max_size=20))
def test_whatever_the_updates_nodes_are_the_set_and_every_node_made_is_kept_or_closed(sets):
    cluster = Cluster()
    for ports in sets:
        before = {node.address.port: node for node in cluster.balancer.nodes}
        cluster.addr.set(at(*ports))
        after = {node.address.port: node for node in cluster.balancer.nodes}
        assert set(after) == ports
        assert all(after[port] is before[port] for port in set(before) & ports)
        assert cluster.made == cluster.closed + Counter(ports)


async def test_a_source_that_breaks_or_forgets_empties_nothing_but_what_it_says():
    cluster = Cluster(at(1, 2))
    cluster.addr.set(Bound(()))
    assert cluster.balancer.nodes == ()
    assert cluster.balancer.status is Status.CLOSED
    assert cluster.closed == {1: 1, 2: 1}


# --- patience ---------------------------------------------------------------------------------------------------------


async def error_of(cluster):
    started = anyio.current_time()
    with pytest.raises(meshlib.MeshError) as caught:
        await cluster.call()
    return caught.value, anyio.current_time() - started


def test_a_request_waits_for_the_first_endpoint_that_is_ready():
    async def main():
        cluster, replies = Cluster(), []

        async def call():
            replies.append((await cluster.call(), anyio.current_time()))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
            await anyio.sleep(1)
            cluster.addr.set(at(1))
        return replies

    async def late():
        cluster, replies = Cluster(at(1)), []
        down(cluster, 1)

        async def call():
            replies.append((await cluster.call(), anyio.current_time()))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
            await anyio.sleep(2)
            up(cluster, 1)
        return replies

    assert run_virtual(main) == [(1, pytest.approx(1))] * 3
    assert run_virtual(late) == [(1, pytest.approx(2))] * 3


def test_patience_ends_3_seconds_after_the_last_was_lost_and_then_requests_fail_at_once():
    async def main():
        cluster = Cluster(at(1, 2))
        down(cluster, 1)
        await anyio.sleep(10)
        down(cluster, 2)
        await anyio.sleep(1)
        assert (await error_of(cluster))[1] == pytest.approx(PATIENCE - 1)
        assert (await error_of(cluster))[1] == 0
        await anyio.sleep(60)
        assert (await error_of(cluster))[1] == 0
        up(cluster, 1)
        assert await cluster.call() == 1
        down(cluster, 1)
        assert (await error_of(cluster))[1] == pytest.approx(PATIENCE)

    run_virtual(main)


def test_a_nearer_deadline_ends_the_wait_and_the_error_tells_both():
    async def main():
        cluster = Cluster(at(1))
        down(cluster, 1)
        with deadline(1):
            error, elapsed = await error_of(cluster)
        assert type(error) is DeadlineExceeded
        assert error.kept_here
        assert error.message.startswith("the deadline passed: no endpoint of the shops is")
        assert elapsed == pytest.approx(1)
        with deadline(60):
            error, elapsed = await error_of(cluster)
        assert type(error) is NoEndpoints
        assert elapsed == pytest.approx(PATIENCE - 1)

    run_virtual(main)


@pytest.mark.parametrize("waits", [0.0, 0.5])
def test_a_request_that_is_less_patient_waits_for_as_long_as_it_says(waits):
    class Hasty:
        patience = waits

    async def main():
        for addr in (Pending(), Bound(()), Neg()):
            cluster, started = Cluster(addr), anyio.current_time()
            with pytest.raises(meshlib.MeshError) as caught:
                await cluster.balancer(Hasty())
            assert anyio.current_time() - started == pytest.approx(waits)
            assert caught.value.impatient
        assert not (await error_of(cluster))[0].impatient
        Hasty.patience = 60.0
        cluster = Cluster(Pending())
        with pytest.raises(ResolutionError, match="within 3 s") as caught:
            await cluster.balancer(Hasty())
        assert not caught.value.impatient

    run_virtual(main)


def test_nobody_waits_for_a_name_of_which_its_source_is_sure_that_there_is_none():
    async def main():
        cluster = Cluster(Neg("nobody.test does not exist", settled=True))
        error, elapsed = await error_of(cluster)
        assert (type(error), elapsed) == (NoEndpoints, 0)
        cluster, told = Cluster(Pending()), []

        async def call():
            told.append(await error_of(cluster))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
            await anyio.sleep(1)
            cluster.addr.set(Neg(settled=True))
        assert [(type(error), elapsed) for error, elapsed in told] == [(NoEndpoints, pytest.approx(1))] * 3
        cluster.addr.set(at(1))
        assert await cluster.call() == 1

    run_virtual(main)


@pytest.mark.parametrize(
    ("addr", "kind", "says"),
    [
        (Pending(), ResolutionError, "the shops has not been resolved within 3 s"),
        (Failed("no such host"), ResolutionError, "the shops cannot be resolved: no such host"),
        (Neg(), NoEndpoints, "the shops: no such name"),
        (Bound(()), NoEndpoints, "the shops resolves to no endpoints"),
    ],
)
def test_the_error_says_what_the_name_stands_for(addr, kind, says):
    async def main():
        error, _ = await error_of(Cluster(addr))
        assert type(error) is kind
        assert error.message == says
        assert error.processed is False
        assert not error.retryable

    run_virtual(main)


def test_the_error_says_of_each_endpoint_why_it_cannot_be_used():
    async def main():
        cluster = Cluster(at(1, 2))
        down(cluster, 1, reason="refused")
        cluster.node(2).health.mark("session", Status.CLOSED, "draining")
        cluster.node(2).health.mark("breaker", Status.BUSY)
        error, _ = await error_of(cluster)
        assert error.message == (
            "no endpoint of the shops is ready: h:1 (connect: refused), h:2 (session: draining, breaker)"
        )

    run_virtual(main)


def test_of_many_endpoints_the_error_names_twenty():
    async def main():
        cluster = Cluster(at(*range(1, 31)))
        down(cluster, *range(1, 31))
        error, _ = await error_of(cluster)
        assert error.message.count("refused") == 20
        assert error.message.endswith(", and 10 more")

    run_virtual(main)


def test_one_who_waits_can_be_cancelled():
    async def main():
        cluster = Cluster()
        with anyio.move_on_after(1) as scope:
            await cluster.call()
        assert scope.cancelled_caught
        cluster.addr.set(at(1))
        assert await cluster.call() == 1
        assert cluster.node(1).load == 0

    run_virtual(main)


# --- the account of a call --------------------------------------------------------------------------------------------


async def test_a_retry_avoids_endpoints_that_have_failed_the_call():
    cluster, tried = Cluster(at(1, 2, 3)), []

    async def serve(request):
        tried.append(current().record.endpoint.port)
        raise meshlib.ConnectionLost("cut")

    cluster.serve = serve
    for _ in range(20):
        tried.clear()
        with use(current().evolve(record=CallRecord(0.0))):
            for _ in range(3):
                with pytest.raises(meshlib.ConnectionLost):
                    await cluster.call()
            assert sorted(tried) == [1, 2, 3]
            with pytest.raises(meshlib.ConnectionLost):
                await cluster.call()
        assert len(tried) == 4


async def test_each_failed_try_is_noted_with_its_endpoint():
    cluster = Cluster(at(1))

    async def serve(request):
        raise meshlib.ConnectionLost("cut")

    cluster.serve = serve
    record = CallRecord(0.0)
    with use(current().evolve(record=record)), pytest.raises(meshlib.ConnectionLost):
        await cluster.call()
    assert [str(attempt) for attempt in record.attempts] == ["h:1: ConnectionLost: cut"]
    assert record.endpoint is None


async def test_the_endpoint_of_a_call_that_was_cancelled_stays_known():
    cluster = Cluster(at(1))

    async def serve(request):
        await anyio.sleep_forever()

    cluster.serve = serve
    record = CallRecord(0.0)
    with use(current().evolve(record=record)), anyio.CancelScope() as scope:
        scope.cancel()
        await cluster.call()
    assert record.endpoint == Address("h", 1)
    assert cluster.node(1).load == 0


# --- closing ----------------------------------------------------------------------------------------------------------


async def test_closing_closes_every_node_and_tells_those_who_wait():
    cluster, errors, gate = Cluster(at(1, 2)), [], anyio.Event()
    waiting = Cluster()

    async def serve(request):
        await gate.wait()

    async def wait_for_one():
        with deadline(0.5):
            errors.append((await error_of(waiting))[0])

    cluster.serve = serve
    async with anyio.create_task_group() as group:
        group.start_soon(cluster.call)
        group.start_soon(wait_for_one)
        await anyio.wait_all_tasks_blocked()
        leaving = {node.address.port for node in cluster.balancer.nodes if node.load}
        cluster.addr.set(at(*({1, 2} - leaving)))
        cluster.balancer.close()
        waiting.balancer.close()
        gate.set()
    assert set(cluster.closed) == {1, 2}
    assert [type(error) for error in errors] == [ServiceClosed]
    with pytest.raises(ServiceClosed, match="the client is closed"):
        await cluster.call()


async def test_after_closing_it_follows_the_name_no_more():
    cluster = Cluster(at(1))
    cluster.balancer.close()
    cluster.addr.set(at(1, 2))
    assert cluster.made == {1: 1}
    up(cluster, 1)
    with pytest.raises(ServiceClosed):
        await cluster.call()


async def test_its_numbers_and_how_it_prints():
    cluster = Cluster(at(1, 2, 3))
    down(cluster, 3)
    cluster.node(1).meter.pending = 2
    assert [cluster.count(name) for name in ("size", "available", "load")] == [3, 2, 2]
    assert cluster.balancer.status is Status.OPEN
    assert repr(cluster.balancer) == "<Balancer of the shops: 2 of 3 ready>"
    assert repr(cluster.node(3)) == "<h:3 busy: connect: refused, load 0>"
    assert repr(cluster.node(1)) == "<h:1 open, load 2>"
