"""The layer ``balance(…)``, and what the balancer makes of how each request ends."""

import contextlib
import random
from types import SimpleNamespace

import anyio
import pytest

import meshlib
from meshlib import ConfigurationError, Status
from meshlib.balancing.aperture import aperture
from meshlib.balancing.balance import Balance, balance
from meshlib.balancing.balancer import EXPIRY, SWEEP
from meshlib.balancing.choose import p2c
from meshlib.balancing.load import NACKED, LeastLoaded, least_loaded, peak_ewma
from meshlib.balancing.rotation import heap, round_robin
from meshlib.client import default_layers
from meshlib.core.classify import ResponseClass
from meshlib.core.context import CallRecord, current, use
from meshlib.core.stack import Layer
from meshlib.names.addr import Address, Bound
from meshlib.testing import run_virtual
from tests.balancing.fakes import make_env
from tests.balancing.test_balancer import Cluster, at, down, up

TOOK, PENALTY = 0.25, 5.0


class Measured(Cluster):
    """A cluster that takes a quarter of a second for each request, and balances by what it measures."""

    def __init__(self, addr=None, **more):
        super().__init__(addr or at(1), chooser=more.pop("chooser", p2c()), **more)
        self.serve = self.take_time
        self.error = None

    async def take_time(self, request):
        await anyio.sleep(TOOK)
        if self.error is not None:
            raise self.error

    def estimate(self, port=1):
        return self.node(port).meter.estimate


def refused(retry_after=None):
    error = meshlib.Rejected("full")
    error.by_peer = True
    error.retry_after = retry_after
    return error


def asked(seconds):
    error = meshlib.RemoteError("down for maintenance")
    error.retry_after = seconds
    return error


# --- what an outcome means for the load -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "estimate"),
    [
        (None, TOOK),
        (meshlib.RemoteError("x"), PENALTY),
        (meshlib.ConnectionLost("x"), PENALTY),
        (meshlib.ConnectError("x"), PENALTY),
        (meshlib.UnknownMethod("x"), PENALTY),
        (ValueError("x"), PENALTY),
        (meshlib.AttemptTimeout("x"), PENALTY),
        (meshlib.DeadlineExceeded("x"), PENALTY),
        (refused(), PENALTY * NACKED),
        (refused(20.0), 20.0),
        (asked(30.0), 30.0),
        (meshlib.InvalidArgument("x"), 0),
        (meshlib.ConfigurationError("x"), 0),
    ],
    ids=repr,
)
def test_what_an_answer_or_a_failure_counts_for(error, estimate):
    async def main():
        cluster = Measured()
        cluster.error = error
        with contextlib.suppress(type(error) if error else ()):
            await cluster.call()
        assert cluster.estimate() == pytest.approx(estimate)
        assert (cluster.node(1).load, cluster.node(1).meter.begun) == (0, 0)

    run_virtual(main)


def test_a_request_that_was_cancelled_is_a_censored_sample_and_one_out_of_time_a_timeout():
    async def main():
        cluster = Measured()
        await cluster.call()
        with anyio.move_on_after(TOOK / 2):
            await cluster.call()
        assert cluster.estimate() == pytest.approx(TOOK)
        cluster.serve = lambda request: anyio.sleep(60)
        with anyio.move_on_after(2 * TOOK):
            await cluster.call()
        assert cluster.estimate() == pytest.approx(2 * TOOK)
        with use(current().evolve(deadline=anyio.current_time() + TOOK / 10)), anyio.move_on_after(TOOK / 10):
            await cluster.call()
        assert cluster.estimate() == pytest.approx(2 * TOOK)  # the caller was in a hurry
        with use(current().evolve(deadline=anyio.current_time() + 1)), anyio.move_on_after(1):
            await cluster.call()
        assert cluster.estimate() == PENALTY
        assert cluster.node(1).load == 0

    run_virtual(main)


def test_the_classifier_decides_what_a_failure_is():
    verdicts = {
        "good": ResponseClass.SUCCESS,
        "bad": ResponseClass.FAILURE,
        "again": ResponseClass.RETRYABLE,
        "never mind": ResponseClass.IGNORABLE,
    }

    def classifier(request, reply, error):
        return verdicts[request]

    async def main(error):
        found = {}
        for request in verdicts:
            cluster = Measured(env=make_env(classifier=classifier))
            cluster.error = error
            with contextlib.suppress(ValueError):
                await cluster.call(request)
            found[request] = cluster.estimate()
        return found

    expected = {"good": TOOK, "bad": PENALTY, "again": PENALTY, "never mind": 0}
    assert run_virtual(main, None) == pytest.approx(expected)
    assert run_virtual(main, ValueError("x")) == pytest.approx(expected)


def test_a_reply_may_say_for_how_long_to_leave_its_server_alone():
    async def main():
        cluster = Measured(env=make_env(classifier=lambda request, reply, error: ResponseClass.FAILURE))

        async def service(request):
            return SimpleNamespace(retry_after=40.0)

        cluster.node(1).service = service
        await cluster.call()
        assert cluster.estimate() == 40

    run_virtual(main)


def test_an_endpoint_whose_connection_came_back_is_measured_anew():
    async def main():
        cluster = Measured(at(1, 2))
        cluster.error = meshlib.ConnectionLost("cut")
        for _ in range(2):
            with pytest.raises(meshlib.ConnectionLost):
                await cluster.call()
        assert cluster.estimate(1) == PENALTY
        down(cluster, 1)
        up(cluster, 1)
        assert cluster.estimate(1) == 0
        cluster.node(2).health.mark("accrual", Status.BUSY, "5 failures", serves=True)
        cluster.node(2).health.mark("accrual", Status.OPEN)
        assert cluster.estimate(2) == PENALTY

    run_virtual(main)


# --- new endpoints, panic, expiry -------------------------------------------------------------------------------------


def test_endpoints_that_come_or_recover_warm_up_if_there_are_others():
    async def main():
        cluster = Measured(at(1, 2))
        await anyio.sleep(50)
        assert all(node.warm_from < 0 for node in cluster.balancer.nodes)
        now = cluster.env.clock.now()
        cluster.addr.set(at(1, 2, 3))
        assert cluster.node(3).warm_from == now
        down(cluster, 1)
        up(cluster, 1)
        assert cluster.node(1).warm_from == now
        down(cluster, 1, 2, 3)
        await anyio.sleep(1)
        up(cluster, 2)
        assert cluster.node(2).warm_from < 0  # alone
        cluster.addr.set(at(7, 8))
        assert all(node.warm_from < 0 for node in cluster.balancer.nodes)  # all are new

        never = Measured(at(1), slow_start=0)
        never.addr.set(at(1, 2))
        assert never.node(2).warm_from < 0

    run_virtual(main)


def eject(cluster, *ports):
    for port in ports:
        cluster.node(port).health.mark("accrual", Status.BUSY, "5 failures in a row", serves=True)


async def test_panic_is_counted_and_told():
    cluster, told = Cluster(at(1, 2, 3, 4, 5)), []
    cluster.env.events.listen(lambda decision: decision.kind == "panic" and told.append(decision))
    eject(cluster, 1, 2)
    assert {await cluster.call() for _ in range(100)} == {3, 4, 5}
    assert not told
    eject(cluster, 3)
    record = CallRecord(0.0)
    with use(current().evolve(record=record)):
        assert {await cluster.call() for _ in range(100)} == {1, 2, 3, 4, 5}
    assert str(told[0]) == "panic (began: 2 of 5 endpoints are open)"
    sent = [decision for decision in told if decision.code == "not_open"]
    assert len(sent) == cluster.count("panicked") > 30
    assert sent[0].detail == "accrual: 5 failures in a row"
    assert {decision.endpoint for decision in sent} == {"h:1", "h:2", "h:3"}
    assert any(decision.code == "not_open" for decision in record.decisions)
    cluster.node(1).health.mark("accrual", Status.OPEN)
    assert {await cluster.call() for _ in range(100)} == {1, 4, 5}
    assert str(told[-1]) == "panic (ended: 3 of 5 endpoints are open)"


async def test_picks_are_told_only_while_somebody_listens():
    cluster, told = Cluster(at(1, 2), chooser=p2c()), []
    await cluster.call()
    stop = cluster.env.events.listen(told.append)
    await cluster.call()
    stop()
    await cluster.call()
    assert [(d.kind, d.code) for d in told] == [("pick", "chosen")]
    assert told[0].endpoint in ("h:1", "h:2")
    assert "; not h:" in told[0].detail


async def test_listening_does_not_change_what_is_picked():
    silent, heard = Cluster(at(1, 2, 3), seed=7), Cluster(at(1, 2, 3), seed=7)
    heard.env.events.listen(lambda decision: None)
    assert [await silent.call() for _ in range(50)] == [await heard.call() for _ in range(50)]


def test_idle_endpoints_outside_of_an_aperture_give_up_their_connections():
    async def main():
        chooser = aperture(least_loaded(), minimum=2)
        cluster = Cluster(at(*range(1, 11)), chooser=chooser)
        for _ in range(50):
            await cluster.call()
        inside = {node.address.port for node in cluster.balancer._routing.nodes}
        assert {port for port in range(1, 11) if cluster.node(port).meter.used >= 0} == inside
        outside = next(port for port in range(1, 11) if port not in inside)
        before = cluster.node(outside)
        before.meter.used = cluster.env.clock.now()  # as when the aperture was elsewhere
        busy = next(port for port in range(1, 11) if port not in inside and port != outside)
        cluster.node(busy).meter.used = cluster.env.clock.now()
        cluster.node(busy).meter.pending = 1
        await anyio.sleep(EXPIRY - SWEEP / 2)
        assert cluster.closed == {}
        await anyio.sleep(SWEEP)
        assert cluster.closed == {outside: 1}
        assert cluster.node(outside) is not before
        assert (cluster.count("expired"), cluster.count("size"), cluster.count("available")) == (1, 10, 10)
        assert {await cluster.call() for _ in range(50)} == inside
        await cluster.env.supervisor.aclose()

    run_virtual(main)


async def test_with_a_small_name_nothing_is_expired_and_nothing_runs():
    cluster = Cluster(at(1, 2))
    assert cluster.env.supervisor.jobs == 0
    cluster.balancer.expire()
    assert cluster.closed == {}


async def test_a_name_that_changes_while_many_endpoints_flap_is_seen_at_once():
    ports = range(1, 301)
    cluster = Cluster(at(*ports))
    await cluster.call()
    down(cluster, *range(1, 100))
    cluster.addr.set(at(*range(100, 200)))
    assert {await cluster.call() for _ in range(2000)} == set(range(100, 200))
    down(cluster, *range(100, 140))
    assert {await cluster.call() for _ in range(2000)} == set(range(140, 200))


async def test_numbers_of_a_balancer():
    cluster = Cluster(at(1, 2, 3, 4))
    down(cluster, 1)
    cluster.node(2).health.mark("session", Status.CLOSED, "draining")
    cluster.addr.set(at(1, 2, 3))
    await cluster.call()
    names = ("size", "available", "busy", "closed", "load", "adds", "removes", "updates", "rebuilds", "panicked")
    assert [cluster.count(name) for name in names] == [3, 1, 1, 1, 0, 4, 1, 2, 1, 0]


# --- the layer --------------------------------------------------------------------------------------------------------


def built(layer, seed=1):
    """The balancer that a client would have."""
    return layer.build(make_env(seed), None)


def test_it_is_a_layer_that_clients_may_share():
    layer = balance(peak_ewma())
    assert isinstance(layer, Layer)
    assert layer.keeps_deadline
    one, two = built(layer), built(layer)
    assert one._routing is not two._routing
    assert one._routing._picker is not two._routing._picker


def test_the_default_is_p2c_over_peak_ewma():
    (layer,) = [layer for layer in default_layers() if isinstance(layer, Balance)]
    assert repr(layer) == repr(balance()) == "balance(p2c(peak_ewma(decay=10, penalty=5)), panic=0.5, slow_start=10)"


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        (balance(least_loaded()), "balance(p2c(least_loaded()), panic=0.5, slow_start=10)"),
        (balance(round_robin(), panic=0), "balance(round_robin(), panic=0, slow_start=10)"),
        (balance(heap(), slow_start=2.5, zone="eu"), "balance(heap(), panic=0.5, slow_start=2.5, zone='eu')"),
        (
            balance(aperture(least_loaded(), coordinate=(3, 10))),
            "balance(aperture(least_loaded(), coordinate=(3, 10), minimum=12), panic=0.5, slow_start=10)",
        ),
    ],
)
def test_it_prints_as_it_is_typed(layer, shown):
    assert repr(layer) == shown
    assert repr(eval(shown, vars(meshlib))) == shown


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"how": 3}, r"balance\(3\): give a load metric, such as peak_ewma\(\), or a chooser"),
        ({"how": LeastLoaded}, "give a load metric"),
        ({"panic": -0.1}, "give a share of the endpoints, from 0"),
        ({"panic": 50}, "give a share"),
        ({"panic": True}, "give a share"),
        ({"slow_start": -1}, r"balance\(slow_start=-1\): give seconds, or 0"),
        ({"slow_start": None}, "give seconds"),
        ({"zone": 3}, "give the name of the zone"),
    ],
    ids=str,
)
def test_wrong_parameters_are_told_at_once(wrong, says):
    with pytest.raises(ConfigurationError, match=says):
        balance(**wrong)


def test_the_zone_comes_from_the_environment_unless_it_is_given(monkeypatch):
    monkeypatch.setenv("MESHLIB_ZONE", "eu-1")
    assert built(balance())._routing._zone == "eu-1"
    assert built(balance(zone="us-2"))._routing._zone == "us-2"
    assert built(balance(zone=""))._routing._zone == ""
    monkeypatch.delenv("MESHLIB_ZONE")
    assert built(balance())._routing._zone == ""


async def test_calls_stay_in_the_zone_while_it_can_carry_them():
    metadata = [(("zone", "a"),), (("zone", "a"),), (("zone", "b"),), (("zone", "b"),)]
    addr = Bound.of(Address("h", port, metadata=m) for port, m in enumerate(metadata, 1))
    cluster = Cluster(addr, zone="a")
    assert {await cluster.call() for _ in range(100)} == {1, 2}
    down(cluster, 1, 2)
    assert {await cluster.call() for _ in range(100)} == {3, 4}
    up(cluster, 1)
    assert {await cluster.call() for _ in range(300)} == {1, 3, 4}


async def test_every_way_to_choose_works_in_a_real_client():
    async def echo(request):
        return meshlib.mux.Response(request.body)

    async with meshlib.mux.serve(echo) as one, meshlib.mux.serve(echo) as two:
        for how in (peak_ewma(), least_loaded(), p2c(), round_robin(), heap(), aperture(), aperture(coordinate=(0, 2))):
            client = meshlib.mux.client(f"{one.address},{two.address}", balance(how), seed=random.randrange(9))
            async with client, anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(client, meshlib.mux.Request(b"x"))
            assert client.metrics()["success"] == 20
            assert client.metrics()["loadbalancer/load"] == 0
