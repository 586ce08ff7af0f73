"""The power of two choices: fair when idle, to the less loaded when not, and in proportion to weight."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.balance.choose import P2C
from meshlib.balance.node import Node
from meshlib.core.env import Env
from meshlib.names.addr import Address


def nodes_of(weights):
    nodes = [Node(Address("h", port, weight=weight), None, Env()) for port, weight in enumerate(weights, 1)]
    assert len(set(map(str, nodes))) == len(nodes)
    return nodes


def shares(nodes, picks=20_000, seed=5):
    """What part of picks each node gets while nothing is under way."""
    chooser, rng = P2C(), random.Random(seed)
    counts = Counter(chooser.pick(nodes, rng).address.port for _ in range(picks))
    return [counts[node.address.port] / picks for node in nodes]


def busy_loads(nodes, under_way, steps=20_000, seed=5):
    """The mean load of each node while ``under_way`` requests are always open, each ending at random."""
    chooser, rng = P2C(), random.Random(seed)
    open_, means = [], [0.0] * len(nodes)
    for step in range(steps):
        while len(open_) < under_way:
            node = chooser.pick(nodes, rng)
            node.load += 1
            open_.append(node)
        if step >= steps // 4:
            for i, node in enumerate(nodes):
                means[i] += node.load / (steps - steps // 4)
        ends = rng.randrange(len(open_))
        open_[ends], open_[-1] = open_[-1], open_[ends]
        open_.pop().load -= 1
    return means


@pytest.mark.parametrize("n", [2, 3, 10])
def test_idle_nodes_are_picked_equally(n):
    assert shares(nodes_of([1] * n)) == pytest.approx([1 / n] * n, rel=0.1)


@pytest.mark.parametrize(
    "weights", [[1, 3], [1, 1, 2], [1, 2, 3, 4], [0.5, 0.1, 0.4], [1] * 8 + [2] * 2, [99, 1]], ids=str
)
def test_idle_nodes_are_picked_in_proportion_to_their_weights(weights):
    nodes = nodes_of(weights)
    assert shares(nodes) == pytest.approx([w / sum(weights) for w in weights], rel=0.12, abs=0.002)


@pytest.mark.parametrize("under_way", [1, 5, 50])
def test_load_is_spread_evenly_however_much_of_it_there_is(under_way):
    nodes = nodes_of([1] * 10)
    assert busy_loads(nodes, under_way) == pytest.approx([under_way / 10] * 10, rel=0.15)


def test_load_is_spread_in_proportion_to_weight():
    nodes = nodes_of([1, 2, 5])
    assert busy_loads(nodes, 160) == pytest.approx([20, 40, 100], rel=0.1)


def test_the_fullest_is_never_far_above_the_mean():
    nodes, chooser, rng = nodes_of([1] * 50), P2C(), random.Random(9)
    for _ in range(5000):
        chooser.pick(nodes, rng).load += 1
    loads = [node.load for node in nodes]
    assert max(loads) - min(loads) <= 8  # drawing one at random instead of two spreads them by about 45


@given(st.lists(st.integers(0, 5), min_size=2, max_size=8), st.integers(0, 2**32))
def test_of_the_two_that_are_drawn_the_more_loaded_is_never_picked(loads, seed):
    nodes = nodes_of([1] * len(loads))
    for node, load in zip(nodes, loads, strict=True):
        node.load = load
    chooser, rng = P2C(), random.Random(seed)
    picked = {chooser.pick(nodes, rng).load for _ in range(50)}
    if loads.count(max(loads)) == 1:
        assert max(loads) not in picked
    if len(loads) == 2:
        assert picked == {min(loads)}


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 2.0, 4.0])), min_size=2, max_size=2),
    st.integers(0, 2**32),
)
def test_of_two_the_one_with_less_load_per_weight_is_picked(pair, seed):
    nodes = nodes_of([weight for _, weight in pair])
    for node, (load, _) in zip(nodes, pair, strict=True):
        node.load = load
    per_weight = [load / weight for load, weight in pair]
    chooser, rng = P2C(), random.Random(seed)
    picks = Counter(chooser.pick(nodes, rng).address.port for _ in range(60))
    if per_weight[0] != per_weight[1]:
        best = nodes[per_weight.index(min(per_weight))].address.port
        # where weights differ, the heavier may be drawn every time
        assert picks[best] >= (60 if pair[0][1] == pair[1][1] else 20)


def test_one_node_is_picked_without_drawing():
    (node,) = nodes_of([1])
    assert P2C().pick([node], None) is node


def test_a_change_of_the_nodes_or_of_a_weight_is_seen_at_once():
    chooser, rng = P2C(), random.Random(1)
    nodes = nodes_of([1, 1])
    chooser.pick(nodes, rng)
    nodes[0].address = Address("h", 1, weight=99)
    nodes = list(nodes)
    counts = Counter(chooser.pick(nodes, rng).address.port for _ in range(1000))
    assert counts[1] > 950
    more = nodes_of([1, 1, 1])
    assert {chooser.pick(more, rng).address.port for _ in range(100)} == {1, 2, 3}


def test_picks_repeat_from_a_seed():
    nodes = nodes_of([1, 2, 3])
    first, second = (
        [P2C().pick(nodes, rng).address.port for _ in range(20)] for rng in (random.Random(3), random.Random(3))
    )
    assert first == second
    assert repr(P2C()) == "p2c(least loaded)"
