"""The power of two choices: fair when idle, to the less loaded when not, in proportion to weight, and curious."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib import ConfigurationError
from meshlib.balancing.choose import EXPLORE_EVERY, P2C, P2CPicker, metric_of, p2c, picker_of
from meshlib.balancing.load import LeastLoaded, PeakEwma, least_loaded, peak_ewma
from meshlib.core.env import Env
from tests.balancing.traffic import begin, end, nodes_of


def picker_over(nodes, seed=5):
    picker = P2CPicker(random.Random(seed), explores=False)
    picker.update(nodes, nodes)
    return picker


def shares(nodes, picks=20_000):
    """What part of picks each node gets while nothing is under way."""
    picker = picker_over(nodes)
    counts = Counter(picker.pick(0.0).address.port for _ in range(picks))
    return [counts[node.address.port] / picks for node in nodes]


def busy_loads(nodes, under_way, steps=20_000):
    """The mean load of each node while ``under_way`` requests are always open, each ending at random."""
    rng, picker = random.Random(6), picker_over(nodes)
    open_, means = [], [0.0] * len(nodes)
    for step in range(steps):
        while len(open_) < under_way:
            node = picker.pick(0.0)
            begin(node)
            open_.append(node)
        if step >= steps // 4:
            for i, node in enumerate(nodes):
                means[i] += node.load / (steps - steps // 4)
        ends = rng.randrange(len(open_))
        open_[ends], open_[-1] = open_[-1], open_[ends]
        end(open_.pop())
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
    nodes = nodes_of([1] * 50)
    picker = picker_over(nodes, seed=9)
    for _ in range(5000):
        begin(picker.pick(0.0))
    loads = [node.load for node in nodes]
    assert max(loads) - min(loads) <= 8  # drawing one at random instead of two spreads them by about 45


@given(st.lists(st.integers(0, 5), min_size=2, max_size=8), st.integers(0, 2**32))
def test_of_the_two_that_are_drawn_the_more_loaded_is_never_picked(loads, seed):
    nodes = nodes_of([1] * len(loads))
    for node, load in zip(nodes, loads, strict=True):
        node.meter.pending = load
    picker = picker_over(nodes, seed)
    picked = {picker.pick(0.0).load for _ in range(50)}
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
        node.meter.pending = load
    per_weight = [load / weight for load, weight in pair]
    picker = picker_over(nodes, seed)
    picks = Counter(picker.pick(0.0).address.port for _ in range(60))
    if per_weight[0] != per_weight[1]:
        best = nodes[per_weight.index(min(per_weight))].address.port
        # where weights differ, the heavier may be drawn every time
        assert picks[best] >= (60 if pair[0][1] == pair[1][1] else 20)


def test_one_node_is_picked_without_drawing():
    (node,) = nodes_of([1])
    picker = P2CPicker(SimpleNamespace(random=None), explores=True)
    picker.update([node], [node])
    assert picker.pick(0.0) is node


class Counting(list):
    """Nodes that count how many of them are looked at."""

    looked = 0

    def __getitem__(self, index):
        self.looked += 1
        return super().__getitem__(index)

    def __iter__(self):
        raise AssertionError("a pick must not look at all nodes")


@pytest.mark.parametrize("size", [10, 10_000])
def test_a_pick_looks_at_two_nodes_however_many_there_are(size):
    picker = picker_over(nodes_of([1] * size))
    picker.nodes = Counting(picker.nodes)
    for _ in range(100):
        picker.pick(0.0)
    assert picker.nodes.looked == 200


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 2, 3]])
def test_picks_repeat_from_a_seed(weights):
    nodes = nodes_of(weights)
    first, second = ([picker.pick(0.0) for _ in range(50)] for picker in (picker_over(nodes, 3), picker_over(nodes, 3)))
    assert first == second


# --- exploring --------------------------------------------------------------------------------------------------------


def two(slow, fast):
    """A picker over a slow and a fast node, measured at 0 and not used since."""
    nodes = nodes_of([1, 1], peak_ewma())
    for node, took in zip(nodes, (slow, fast), strict=True):
        node.meter.succeeded(took, 0.0)
        node.meter.used = 0.0
    picker = picker_of(p2c(), Env(rng=random.Random(1)))
    picker.update(nodes, nodes)
    return (*nodes, picker)


def test_one_pick_in_200_finds_out_how_a_node_is_that_was_not_used():
    slow, _, picker = two(5.0, 0.001)
    times = [n for n in range(10 * EXPLORE_EVERY) if picker.pick(20 + n * 1e-6) is slow]
    assert times[0] == EXPLORE_EVERY
    assert times[1] - times[0] == EXPLORE_EVERY + 1
    assert len(times) == 9


def test_a_node_that_was_used_lately_is_not_explored():
    slow, _, picker = two(5.0, 0.001)
    slow.meter.used = 20.0
    picks = [picker.pick(20 + n / 10_000) for n in range(20_000)]
    assert picks.index(slow) == 10_000
    assert picks.count(slow) == 1  # and it is left alone for twice as long now


def test_least_loaded_has_nothing_to_find_out():
    nodes = nodes_of([1, 1], least_loaded())
    nodes[0].meter.pending = 1
    picker = picker_of(p2c(least_loaded()), Env())
    picker.update(nodes, nodes)
    assert {picker.pick(float(n)) for n in range(1000)} == {nodes[1]}


# --- why --------------------------------------------------------------------------------------------------------------


def test_a_pick_can_be_explained():
    slow, fast, picker = two(5.0, 0.001)
    node = picker.pick(0.0)
    assert node is fast
    assert picker.why(node, 0.0) == "cost 0.001 s: 1 ms, 0 under way; not h:1 (cost 5 s: 5000 ms, 0 under way)"
    while node is not slow:
        node = picker.pick(20.0)
    assert "to find out how it is now, instead of h:2" in picker.why(node, 20.0)
    picker.update([slow], [slow])
    assert picker.why(picker.pick(20.0), 20.0).endswith("; there was no other")


# --- values -----------------------------------------------------------------------------------------------------------


def test_a_chooser_is_a_value_and_its_pickers_share_nothing():
    chooser, env = p2c(), Env()
    one, two = picker_of(chooser, env), picker_of(chooser, env)
    one.update(nodes_of([1]), ())
    assert (len(one.nodes), len(two.nodes)) == (1, 0)
    assert chooser.metric.meter() is not chooser.metric.meter()


def test_a_chooser_of_ones_own_is_one_method():
    class First:
        def pick(self, nodes, rng):
            assert rng is env.rng
            return nodes[0]

        def __repr__(self):
            return "first"

    env, nodes = Env(), nodes_of([1, 1])
    picker = picker_of(First(), env)
    picker.update(nodes, nodes)
    assert picker.pick(0.0) is nodes[0]
    assert picker.nodes is nodes
    assert picker.why(nodes[0], 0.0) == "first; 0 under way"
    assert isinstance(metric_of(First()), LeastLoaded)


def test_they_print_as_they_are_typed_and_refuse_what_is_no_metric():
    assert repr(p2c()) == repr(P2C()) == "p2c(peak_ewma(decay=10, penalty=5))"
    assert repr(p2c(least_loaded())) == "p2c(least_loaded())"
    for wrong in (3, PeakEwma, p2c()):
        with pytest.raises(ConfigurationError, match=r"p2c\(.*give a load metric, such as peak_ewma\(\)"):
            p2c(wrong)
