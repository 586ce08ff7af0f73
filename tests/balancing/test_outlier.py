"""Outlier detection: gRPC's A50, number by number, and the layer around it."""

import contextlib
import random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import ConfigurationError, Status, outlier_detection
from meshlib.balancing.outlier import Detector, Host
from meshlib.core.events import Decisions
from meshlib.core.health import Health
from meshlib.testing import run_virtual
from tests.balancing.fakes import make_env

RNG = random.Random(1)


class Cluster:
    """Hosts and a detector; ``serve`` says what each has done, ``sweep`` looks at it."""

    def __init__(self, n, **given):
        self.told = []
        self.detector = Detector(
            outlier_detection(**given).rules,
            lambda host, code, why: self.told.append((self.hosts.index(host), code, why)),
            lambda host: self.told.append((self.hosts.index(host), "back")),
        )
        self.hosts = [Host() for _ in range(n)]
        for host in self.hosts:
            self.detector.add(host)
        self.now = 0.0

    def sweep(self, *done):
        """Each host's successes and failures since the last sweep; what became of them."""
        for host, (succeeded, failed) in zip(self.hosts, done, strict=True):
            host.succeeded, host.failed = succeeded, failed
        self.now += 10
        self.told = []
        self.detector.sweep(self.now, RNG)
        return [told[:2] for told in self.told]

    @property
    def out(self):
        return [i for i, host in enumerate(self.hosts) if host.ejected_at is not None]


def test_an_outlier_of_five_is_ejected():
    cluster = Cluster(5)
    assert cluster.sweep(*[(99, 1)] * 4, (60, 40)) == [(4, "success_rate")]
    # mean 91.2 %, deviation of the population 15.6 %: 91.2 - 1.9 * 15.6 = 61.56
    assert cluster.told[0][2] == "60.0 % succeeded, below 61.6 %, which is 1.9 deviations under the mean of all"


def test_the_deviation_is_that_of_the_population_and_the_comparison_is_strict():
    # Rates 1, 1, 1, 1, 0.5: mean 0.9, deviation 0.2. At exactly two deviations the outlier is on the line.
    on_the_line = [(100, 0)] * 4 + [(50, 50)]
    assert Cluster(5, deviation=2.1).sweep(*on_the_line) == []
    assert Cluster(5, deviation=1.99).sweep(*on_the_line) == [(4, "success_rate")]
    assert Cluster(5).sweep(*[(70, 30)] * 5) == [], "when all are alike nobody is below"


@pytest.mark.parametrize(("hosts", "requests", "ejected"), [(5, 100, 1), (4, 100, 0), (5, 99, 0)])
def test_the_success_rate_needs_five_hosts_with_a_hundred_requests(hosts, requests, ejected):
    cluster = Cluster(hosts, deviation=1.0, failure_rate=None)
    assert len(cluster.sweep(*[(requests, 0)] * (hosts - 1), (0, requests))) == ejected


@pytest.mark.parametrize(("failed", "ejected"), [(84, 0), (85, 0), (86, 1)])
def test_85_percent_of_failures_is_not_more_than_85_percent(failed, ejected):
    cluster = Cluster(5, deviation=None)
    assert len(cluster.sweep(*[(100, 0)] * 4, (100 - failed, failed))) == ejected


@pytest.mark.parametrize("total", range(50, 400, 20))
def test_85_percent_is_85_percent_of_any_number(total):
    failed = 85 * total // 100
    exact = failed * 100 == 85 * total
    cluster = Cluster(5, deviation=None)
    assert cluster.sweep(*[(total, 0)] * 4, (total - failed, failed)) == []
    cluster.sweep(*[(total, 0)] * 4, (total - failed - 1, failed + 1))
    assert cluster.out == [4]
    assert exact == (total % 20 == 0)


@pytest.mark.parametrize(("hosts", "requests", "ejected"), [(5, 50, 1), (4, 50, 0), (5, 49, 0)])
def test_the_failure_percentage_needs_five_hosts_with_fifty_requests(hosts, requests, ejected):
    cluster = Cluster(hosts)
    told = cluster.sweep(*[(requests, 0)] * (hosts - 1), (0, requests))
    assert told == [(hosts - 1, "failure_percentage")] * ejected


@pytest.mark.parametrize(
    ("hosts", "share", "ejected"), [(6, 0.1, 1), (10, 0.1, 1), (11, 0.1, 2), (20, 0.5, 10), (8, 0, 1)]
)
def test_the_share_that_may_be_out_is_looked_at_before_each_ejection_and_one_always_may(hosts, share, ejected):
    cluster = Cluster(hosts, deviation=None, max_ejected=share)
    assert len(cluster.sweep(*[(0, 100)] * hosts)) == ejected
    assert cluster.detector.ejected == ejected
    assert len(cluster.sweep(*[(0, 100)] * hosts)) == 0


def test_who_breaks_both_rules_is_ejected_once():
    cluster = Cluster(5, max_ejected=1.0)
    assert cluster.sweep(*[(100, 0)] * 4, (0, 100)) == [(4, "success_rate")]
    assert cluster.hosts[4].multiplier == 1


def test_it_is_out_for_longer_each_time_and_less_long_after_good_times():
    cluster = Cluster(5)
    well = [(100, 0)] * 4

    def out_for():
        cluster.sweep(*well, (0, 100))
        assert cluster.out == [4]
        began = cluster.now
        while cluster.out:
            cluster.sweep(*well, (0, 0))
        return cluster.now - began

    # A sweep at the very end of the time is not after it: one more.
    assert [out_for() for _ in range(3)] == [40, 70, 100]
    assert [out_for() for _ in range(12)][-1] == 310, "at most 300 s"
    multiplier = cluster.hosts[4].multiplier
    for _ in range(2 * multiplier):
        cluster.sweep(*well, (100, 0))
    assert cluster.hosts[4].multiplier == 0
    assert out_for() == 40


def test_who_is_removed_while_it_is_out_makes_room_for_another():
    cluster = Cluster(6, deviation=None)
    cluster.sweep(*[(0, 100)] * 6)
    assert cluster.out == [0]
    gone = cluster.hosts.pop(0)
    cluster.detector.remove(gone)
    cluster.detector.remove(gone)
    assert cluster.detector.ejected == 0
    cluster.sweep(*[(0, 100)] * 5)
    assert cluster.out == [0]


def test_it_can_be_enforced_on_a_share_of_the_outliers():
    ejected = sum(bool(Cluster(5, enforce=0.3, failure_rate=None).sweep(*[(100, 0)] * 4, (0, 100))) for _ in range(300))
    assert 60 <= ejected <= 120


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=8, max_size=8), max_size=30),
    st.floats(0, 1),
)
def test_never_more_are_out_than_may_be_and_the_count_is_right(sweeps, share):
    cluster = Cluster(8, max_ejected=share, deviation=1.0, failure_rate=0.5)
    for done in sweeps:
        cluster.sweep(*done)
        assert cluster.detector.ejected == len(cluster.out) <= max(1, share * 8 + 1)
        assert all(host.multiplier >= (host.ejected_at is not None) for host in cluster.hosts)


# --- the layer --------------------------------------------------------------------------------------------------------


def test_as_a_layer_it_takes_out_the_outlier_and_takes_it_back():
    async def main():
        shared = make_env()
        shared = shared.evolve(events=Decisions(shared.clock, shared.metrics))
        told = []
        shared.events.listen(lambda decision: told.append((decision.kind, decision.code, decision.endpoint)))
        layer, bad = outlier_detection(), {4}

        def endpoint(i):
            async def serve(request):
                if i in bad:
                    raise ValueError("wrong")
                return "reply"

            env = shared.evolve(address=f"h:{i}", health=Health(), closers=[])
            return env, layer.build(env, serve)

        endpoints = [endpoint(i) for i in range(5)]
        await anyio.sleep(100)
        assert shared.supervisor.jobs == 0, "no sweep before the first request"

        async def traffic():
            for _ in range(150):
                for env, service in endpoints:
                    if env.health.status is Status.OPEN:
                        with contextlib.suppress(ValueError):
                            await service("request")
            await anyio.sleep(10.5)

        await traffic()
        assert [env.health.status for env, _ in endpoints] == [Status.OPEN] * 4 + [Status.BUSY]
        health = endpoints[4][0].health
        assert health.serves
        assert health.reason == (
            "outlier: 0.0 % succeeded, below 4.0 %, which is 1.9 deviations under the mean of all; back after 30 s"
        )
        assert shared.metrics.snapshot()["outlier_detection/ejections_active"] == 1
        bad.clear()
        for _ in range(4):
            await traffic()
        assert health.status is Status.OPEN
        assert told == [("eject", "outlier_success_rate", "h:4"), ("revive", "outlier", "h:4")]
        assert shared.metrics.snapshot()["outlier_detection/ejections_success_rate"] == 1
        assert shared.supervisor.jobs == 1
        for env, _ in endpoints:
            for closer in env.closers:
                closer()
        await anyio.sleep(20)
        assert len(told) == 2
        await shared.supervisor.aclose()
        assert shared.supervisor.jobs == 0
        await endpoints[0][1]("request")
        assert shared.supervisor.jobs == 0

    run_virtual(main)


def test_what_is_counted():
    async def main():
        env = make_env()
        outcome = None

        async def serve(request):
            if isinstance(outcome, Exception):
                raise outcome
            await anyio.sleep(5)

        service = outlier_detection().build(env, serve)
        layer = service.func.__self__
        await service("x")
        for outcome in (ValueError("x"), meshlib.ConnectionLost("x"), meshlib.Rejected("never left")):
            with pytest.raises(type(outcome)):
                await service("x")
        outcome = None
        with anyio.move_on_after(1):
            await service("x")
        with meshlib.deadline(1), anyio.move_on_after(1):
            await service("x")
        assert (layer._host.succeeded, layer._host.failed) == (1, 3)
        await env.supervisor.aclose()

    run_virtual(main)


async def test_composed_by_hand_it_does_nothing():
    async def serve(request):
        return request

    assert await (outlier_detection() >> serve)("x") == "x"


async def test_in_a_client_it_stands_below_accrual():
    text = repr(meshlib.mux.client("h:1", outlier_detection(interval=5)))
    line = "outlier_detection(interval=5, out_for=(30, 300), max_ejected=0.1, deviation=1.9, failure_rate=0.85)"
    assert line in text
    assert text.index("failure_accrual(") < text.index(line) < text.index("failfast(")


@pytest.mark.parametrize(
    "given",
    [
        {"interval": 0},
        {"out_for": 30},
        {"out_for": (300, 30)},
        {"max_ejected": 10},
        {"deviation": 0},
        {"failure_rate": 85},
        {"deviation": None, "failure_rate": None},
        {"deviation_requests": 0},
        {"failure_requests": 1.5},
        {"min_hosts": 0},
        {"enforce": 2},
    ],
    ids=str,
)
def test_wrong_parameters_are_told_at_construction(given):
    with pytest.raises(ConfigurationError, match=rf"outlier_detection\({list(given)[-1]}="):
        outlier_detection(**given)
