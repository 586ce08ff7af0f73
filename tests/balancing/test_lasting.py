"""Replies that last: streams, and bodies that are still being read. They are load, and not slowness."""

from __future__ import annotations

from types import SimpleNamespace

import anyio
import pytest

from meshlib.balancing.accrual import FailureAccrual, failure_accrual
from meshlib.balancing.balancer import Balancer
from meshlib.balancing.choose import P2C
from meshlib.balancing.load import LONGEST_REST, peak_ewma
from meshlib.balancing.node import Node
from meshlib.core.backoff import Exponential
from meshlib.core.errors import ConnectionLost
from meshlib.core.service import Lasting
from meshlib.core.var import Var
from meshlib.names.addr import Address, Bound
from meshlib.testing import run_virtual
from tests.balancing.fakes import make_env


class Stream:
    """A reply whose end is told."""

    def on_end(self, callback):
        self.end = callback


async def one_node():
    """A balancer over one endpoint, which answers a stream at once and everything else in 0.1 s."""
    env = make_env()
    env.params[Lasting] = lambda reply: reply if isinstance(reply, Stream) else None

    async def service(request):
        if request == "stream":
            return Stream()
        await anyio.sleep(0.1)
        return "answer"

    balancer = Balancer(
        env, lambda address, health: Node(address, service, env.evolve(health=health)), P2C(peak_ewma())
    )
    balancer.follow(SimpleNamespace(addr=Var(Bound.of([Address("h", 1)]))))
    await balancer("measure")
    (node,) = balancer.nodes
    return balancer, node, env.clock.now


def test_an_old_stream_counts_as_one_and_not_as_its_age():
    async def scenario():
        balancer, node, now = await one_node()
        before = node.meter.cost(now())
        stream = await balancer("stream")
        assert node.load == 1
        await anyio.sleep(3600)
        await balancer("measure")  # what had faded is known again
        assert node.meter.cost(now()) == pytest.approx(2 * before, rel=0.01)
        stream.end(None)
        assert (node.load, node.meter.lasting, node.meter.begun) == (0, 0, 0.0)
        assert node.meter.cost(now()) == pytest.approx(before, rel=0.01)

    run_virtual(scenario)


def test_what_waits_beside_it_is_as_old_as_it_is():
    async def scenario():
        balancer, node, now = await one_node()
        streams = [await balancer("stream") for _ in range(3)]
        await anyio.sleep(50)
        meter = node.meter
        meter.pending += 1
        meter.begun += now()  # as the balancer does for one that waits
        await anyio.sleep(7)
        assert meter.cost(now()) == pytest.approx(7.0 * 5, rel=0.01)
        for stream in streams:
            stream.end(None)
        assert meter.cost(now()) == pytest.approx(7.0 * 2, rel=0.01)

    run_virtual(scenario)


def test_one_that_breaks_off_costs_the_penalty_and_not_its_age():
    async def scenario():
        balancer, node, _ = await one_node()
        streams = [await balancer("stream") for _ in range(100)]
        await anyio.sleep(1000)
        for stream in streams:  # a connection is cut: that is one failure, not a hundred in a row
            stream.end(RuntimeError("cut"))
        assert node.load == 0
        assert node.meter.estimate == pytest.approx(5.0)
        assert node.meter.estimate < LONGEST_REST

    run_virtual(scenario)


# --- failure accrual --------------------------------------------------------------------------------------------------


class Ended(Stream):
    """A reply that is over already."""

    def __init__(self, error=None):
        self.error = error

    def on_end(self, callback):
        callback(self.error)


def accruing(outcomes):
    """A service with failure accrual; gives it, its circuit, and what it counted."""
    env = make_env()
    env.params[Lasting] = lambda reply: reply if isinstance(reply, Stream) else None

    async def service(request):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    layer = FailureAccrual(failure_accrual().thresholds, Exponential(1.0, 1.0), env)
    return layer.bind(service), layer.circuit, env


def test_streams_that_fail_count_once_and_whether_they_do_so_at_once_or_later():
    async def scenario():
        streams = [Stream() for _ in range(2)]
        service, circuit, env = accruing([Ended(ValueError("at once")) for _ in range(3)] + streams)
        for _ in range(5):
            await service("x")
        assert circuit.state.name == "CLOSED"
        streams[0].end(ValueError("later"))
        assert circuit.state.name == "CLOSED"
        streams[1].end(ValueError("later"))
        assert circuit.state.name == "OPEN"
        assert "5 failures in a row" in circuit.reason
        await env.supervisor.aclose()

    run_virtual(scenario)


def test_a_stream_that_goes_on_hides_no_failures_until_it_has_ended_well():
    async def scenario():
        stream = Stream()
        service, circuit, env = accruing(
            [*[Ended(ValueError("wrong")) for _ in range(4)], stream, Ended(), *[Ended(ValueError("wrong"))] * 5]
        )
        for _ in range(5):
            await service("x")
        stream.end(None)
        await service("x")
        for _ in range(4):
            await service("x")
        assert circuit.state.name == "OPEN"  # by its share of successes, as the run has begun anew
        assert "succeeded within" in circuit.reason
        await env.supervisor.aclose()

    run_virtual(scenario)


@pytest.mark.parametrize("probe", ["goes on", "is over", "has failed"])
def test_a_probe_is_answered_by_the_beginning_of_its_reply(probe):
    async def scenario():
        reply = {"goes on": Stream(), "is over": Ended(), "has failed": Ended(ValueError("wrong"))}[probe]
        service, circuit, env = accruing([*[Ended(ValueError("wrong")) for _ in range(5)], reply])
        for _ in range(5):
            await service("x")
        assert circuit.state.name == "OPEN"
        await anyio.sleep(1.1)
        await service("x")
        assert circuit.state.name == ("OPEN" if probe == "has failed" else "CLOSED")
        await env.supervisor.aclose()

    run_virtual(scenario)


def test_one_lost_connection_is_one_failure_for_all_streams_that_were_on_it():
    async def scenario():
        streams = [Stream() for _ in range(6)]
        good = [Stream() for _ in range(30)]
        service, circuit, env = accruing([*streams, *good])
        for _ in range(36):
            await service("x")
        for stream in good:
            stream.end(None)
        for stream in streams:
            stream.end(ConnectionLost("cut"))
        assert circuit.state.name == "CLOSED"
        await env.supervisor.aclose()

    run_virtual(scenario)
