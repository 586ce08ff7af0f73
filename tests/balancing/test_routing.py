"""Which nodes may be used: the open ones, in panic all that serve, one's own zone first, new ones little by little."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.balancing.aperture import aperture
from meshlib.balancing.choose import p2c
from meshlib.balancing.load import least_loaded
from meshlib.balancing.rotation import heap, round_robin
from meshlib.balancing.routing import AT_ONCE, COLDEST, PER_NODE, Routing
from meshlib.balancing.zone import local_share
from meshlib.core.env import Env
from meshlib.core.health import Health
from meshlib.core.service import Status
from meshlib.names.addr import Address
from tests.balancing.fakes import make_env
from tests.balancing.traffic import nodes_of

EVERY = [p2c(), p2c(least_loaded()), round_robin(), heap(), aperture(), aperture(coordinate=(1, 3), minimum=3)]


def mark(node, status, *, serves=True):
    """As an ejection would (it still serves), or the loss of its connection."""
    if not isinstance(node.health, Health) or node.health.status is Status.OPEN:
        node.health = Health()
    node.health.mark("test", status, "for a test", serves=serves)


def routing_over(nodes, chooser=None, *, panic=0.5, slow_start=0.0, zone="", now=0.0, seed=1):
    routing = Routing(make_env(seed), chooser or p2c(least_loaded()), panic, slow_start, zone)
    routing.refresh(nodes, now)
    return routing


def picks(routing, n=2000, now=0.0):
    return Counter(routing.pick(now) for _ in range(n))


# --- who may be used --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["open", "ejected", "lost"]), min_size=1, max_size=8),
    st.sampled_from(EVERY),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 100),
)
def test_a_node_that_is_not_open_is_picked_in_panic_only_and_one_that_cannot_serve_never(states, chooser, panic, seed):
    nodes = nodes_of([1] * len(states), chooser.metric)
    for node, state in zip(nodes, states, strict=True):
        if state != "open":
            mark(node, Status.BUSY, serves=state == "ejected")
    serving = {node for node, state in zip(nodes, states, strict=True) if state != "lost"}
    if not serving:
        return
    routing = routing_over(nodes, chooser, panic=panic, seed=seed)
    few = states.count("open") < panic * len(states) or "open" not in states
    allowed = serving if few else {node for node, state in zip(nodes, states, strict=True) if state == "open"}
    assert set(picks(routing, 50)) <= allowed
    assert routing.panicking is (few and "ejected" in states)


@pytest.mark.parametrize(("down", "panicking"), [(0, False), (5, False), (6, True), (10, True)])
def test_panic_begins_when_fewer_than_half_are_open(down, panicking):
    nodes = nodes_of([1] * 10)
    for node in nodes[:down]:
        mark(node, Status.BUSY)
    routing = routing_over(nodes)
    assert routing.panicking is panicking
    assert len(picks(routing)) == (10 if panicking else 10 - down)


def test_without_panic_even_the_last_that_is_open_is_used_alone():
    nodes = nodes_of([1] * 10)
    for node in nodes[1:]:
        mark(node, Status.BUSY)
    assert set(picks(routing_over(nodes, panic=0))) == {nodes[0]}
    mark(nodes[0], Status.BUSY)
    assert len(picks(routing_over(nodes, panic=0))) == 10


# --- many nodes -------------------------------------------------------------------------------------------------------


def test_in_a_large_cluster_changes_are_worked_out_together_and_nobody_who_is_down_is_picked():
    n = 10 * AT_ONCE
    nodes = nodes_of([1] * n)
    routing = routing_over(nodes)
    for node in nodes[: n // 2]:
        mark(node, Status.BUSY)
    routing.stale = True
    assert not routing.due(n, 0.5 * n * PER_NODE)
    assert routing.due(n, n * PER_NODE)
    assert routing.due(AT_ONCE, 0.0)
    for _ in range(1000):
        node = routing.pick(0.0)
        if node.health.status is not Status.OPEN:
            node = routing.open_one(node, nodes, 0.0)
        assert node.health.status is Status.OPEN
    routing.members_changed()
    assert routing.due(n, 0.0)


def test_a_try_avoids_those_that_failed_even_if_nearly_all_did():
    nodes = nodes_of([1] * 200)
    for chooser in EVERY[:4]:
        routing = routing_over(nodes, chooser)
        tried = {node.address for node in nodes[1:]}
        assert {routing.fresh_one(nodes[5], tried, 0.0) for _ in range(20)} == {nodes[0]}
        everyone = {node.address for node in nodes}
        assert routing.fresh_one(nodes[5], everyone, 0.0) is nodes[5]


# --- zones ------------------------------------------------------------------------------------------------------------


def in_zones(**zones):
    """So many nodes in each zone."""
    nodes, port = [], 0
    for zone, count in zones.items():
        for node in nodes_of([1] * count):
            port += 1
            metadata = (("rack", "7"), ("zone", zone)) if zone != "nowhere" else ()
            node.address = Address("h", port, metadata=metadata)
            nodes.append(node)
    return nodes


@pytest.mark.parametrize(
    ("zones", "down", "stays"),
    [
        ({"a": 3, "b": 3}, 0, 1.0),  # as many as anywhere: all stays
        ({"a": 6, "b": 3}, 0, 1.0),  # more than its share of callers needs
        ({"a": 1, "b": 3}, 0, 0.5),  # half of the callers, a quarter of the capacity
        ({"a": 2, "b": 2, "c": 4}, 0, 0.75),
        ({"a": 4, "b": 3}, 2, 0.8),  # two of five that are left
        ({"a": 4, "b": 3}, 3, None),  # in trouble: zones do not count
        ({"a": 3}, 0, None),  # there is no other
        ({"b": 3, "c": 3}, 0, None),  # nobody is here
        ({"a": 2, "nowhere": 3}, 0, None),
    ],
    ids=str,
)
def test_what_stays_in_the_zone_is_what_it_can_carry(zones, down, stays):
    nodes = in_zones(**zones)
    ready = nodes[down:]
    assert local_share("a", ready, nodes) == (None if stays is None else pytest.approx(stays))


def test_weights_count_and_when_only_the_zone_is_left_it_has_all():
    nodes = in_zones(a=1, b=1)
    nodes[1].address = Address("h", 2, weight=3.0, metadata=(("zone", "b"),))
    assert local_share("a", nodes, nodes) == pytest.approx(0.5)
    assert local_share("a", nodes[:1], nodes) is None


@pytest.mark.parametrize("chooser", [p2c(least_loaded()), round_robin()], ids=repr)
def test_traffic_is_split_in_that_proportion(chooser):
    nodes = in_zones(a=2, b=2, c=4)
    routing = routing_over(nodes, chooser, zone="a")
    counts = picks(routing, 8000)
    assert sum(counts[node] for node in nodes[:2]) / 8000 == pytest.approx(0.75, abs=0.02)
    assert [counts[node] / 8000 for node in nodes[2:]] == pytest.approx([0.25 / 6] * 6, abs=0.01)
    assert set(routing.nodes) == set(nodes)
    assert routing.why(nodes[0], 0.0).startswith("of zone 'a', which gets 75%; ")
    assert routing.why(nodes[3], 0.0).startswith("outside of zone 'a', which gets 75%; ")


def test_zones_come_into_play_and_go_again_as_nodes_do():
    nodes = in_zones(a=3, b=3)
    routing = routing_over(nodes, zone="a")
    assert set(picks(routing)) == set(nodes[:3])
    for node in nodes[:2]:
        mark(node, Status.BUSY)
    routing.refresh(nodes, 0.0)
    assert set(picks(routing)) == set(nodes[2:])
    elsewhere = routing_over(nodes, zone="z")
    assert set(picks(elsewhere)) == set(nodes[2:])


def test_a_heap_of_each_part_hears_of_its_own_nodes():
    nodes = in_zones(a=2, b=2, c=4)
    routing = routing_over(nodes, heap(), zone="a")
    for _ in range(400):
        node = routing.pick(0.0)
        node.meter.pending += 1
        routing.changed(node, 1, 0.0)
    here, beyond = [node.load for node in nodes[:2]], [node.load for node in nodes[2:]]
    assert max(here) - min(here) <= 1
    assert max(beyond) - min(beyond) <= 1
    assert sum(here) == pytest.approx(300, abs=30)


# --- slow start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chooser", EVERY[1:4], ids=repr)
@pytest.mark.parametrize(("age", "factor"), [(0.0, COLDEST), (2.0, 0.2), (5.0, 0.5), (9.0, 0.9), (10.0, 1.0)])
def test_a_new_node_gets_a_share_that_rises(chooser, age, factor):
    nodes = nodes_of([1] * 10, chooser.metric)
    nodes[0].warm_from = 100.0
    routing = routing_over(nodes, chooser, slow_start=10.0, now=100.0)
    n = 20_000
    counts = picks(routing, n, now=100.0 + age)
    # Drawn again, it may come up a second time.
    assert counts[nodes[0]] / n == pytest.approx(0.1 * (factor + (1 - factor) * 0.1), rel=0.2, abs=0.011)
    assert max(counts.values()) < 1.3 * n / 10


def test_when_all_are_new_all_are_used():
    nodes = nodes_of([1] * 4)
    for node in nodes:
        node.warm_from = 100.0
    counts = picks(routing_over(nodes, slow_start=10.0, now=100.0), now=100.0)
    assert [counts[node] / 2000 for node in nodes] == pytest.approx([0.25] * 4, rel=0.2)


def test_it_costs_nothing_once_all_are_warm():
    nodes = nodes_of([1] * 4)
    nodes[0].warm_from = 100.0
    routing = routing_over(nodes, slow_start=10.0, now=100.0)
    assert routing.pick == routing._warming
    routing.pick(110.0)
    assert routing.pick == routing._picker.pick


def test_a_weight_is_kept_while_zones_and_warming_are_at_work():
    nodes = in_zones(a=2, b=2)
    nodes[0].address = Address("h", 1, weight=3.0, metadata=(("zone", "a"),))
    routing = Routing(Env(rng=random.Random(2)), p2c(least_loaded()), 0.5, 10.0, "a")
    routing.refresh(nodes, 0.0)
    counts = picks(routing, 8000)
    assert counts[nodes[0]] / (counts[nodes[0]] + counts[nodes[1]]) == pytest.approx(0.75, abs=0.03)
