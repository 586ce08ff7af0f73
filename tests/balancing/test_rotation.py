"""Round robin and the heap: exact turns, in proportion to weight, and nothing lost when nodes come and go."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.balancing.choose import picker_of
from meshlib.balancing.rotation import SPARE, heap, round_robin
from meshlib.core.env import Env
from tests.balancing.traffic import begin, end, nodes_of

CHOOSERS = [round_robin(), heap()]


def picker_over(chooser, nodes, seed=1):
    picker = picker_of(chooser, Env(rng=random.Random(seed)))
    picker.update(nodes, nodes)
    return picker


def send(picker):
    node = picker.pick(0.0)
    begin(node)
    if picker.watches_load:
        picker.changed(node, 1, 0.0)
    return node


def answer(picker, node):
    end(node)
    if picker.watches_load:
        picker.changed(node, -1, 0.0)


def turns(picker, n):
    """Which nodes get ``n`` requests, each answered before the next is sent."""
    taken = []
    for _ in range(n):
        taken.append(send(picker))
        answer(picker, taken[-1])
    return taken


@pytest.mark.parametrize("chooser", CHOOSERS, ids=repr)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_each_gets_exactly_its_turn(chooser, n):
    nodes = nodes_of([1] * n)
    taken = turns(picker_over(chooser, nodes), 10 * n)
    assert Counter(taken) == dict.fromkeys(nodes, 10)
    assert taken[:n] == taken[n : 2 * n]


@pytest.mark.parametrize("chooser", CHOOSERS, ids=repr)
@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=1, max_size=8), st.integers(0, 1000))
def test_turns_are_in_proportion_to_weight_to_within_one_or_two(chooser, weights, seed):
    nodes = nodes_of(weights)
    rounds = 20
    counts = Counter(turns(picker_over(chooser, nodes, seed), int(rounds * sum(weights))))
    for node, weight in zip(nodes, weights, strict=True):
        assert abs(counts[node] - rounds * weight) <= 2


def test_a_heavy_node_does_not_take_all_its_turns_at_once():
    light, heavy = nodes_of([1, 4])
    taken = turns(picker_over(round_robin(), [light, heavy]), 100)
    gaps = [i for i, node in enumerate(taken) if node is light]
    assert {b - a for a, b in pairwise(gaps)} == {5}


def test_clients_begin_somewhere_else():
    pickers = [picker_over(round_robin(), nodes_of([1] * 5), seed) for seed in range(200)]
    firsts = Counter(picker.pick(0.0).address.port for picker in pickers)
    assert set(firsts) == {1, 2, 3, 4, 5}
    assert max(firsts.values()) < 80


@pytest.mark.parametrize("chooser", CHOOSERS, ids=repr)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=10), st.integers(0, 100))
def test_whoever_comes_and_goes_only_those_there_are_picked_and_none_is_forgotten(chooser, sets, seed):
    everyone = nodes_of([1] * 6)
    picker = picker_of(chooser, Env(rng=random.Random(seed)))
    for present in sets:
        nodes = [everyone[i] for i in sorted(present)]
        picker.update(nodes, everyone)
        assert set(turns(picker, 3 * len(nodes))) == set(nodes)


@pytest.mark.parametrize("chooser", CHOOSERS, ids=repr)
def test_a_node_that_was_away_does_not_catch_up(chooser):
    nodes = nodes_of([1, 1])
    picker = picker_over(chooser, nodes)
    turns(picker, 10)
    picker.update(nodes[:1], nodes)
    turns(picker, 1000)
    picker.update(nodes, nodes)
    assert abs(turns(picker, 20).count(nodes[1]) - 10) <= 1


# --- the heap ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=2, max_size=6),
    st.lists(st.one_of(st.none(), st.integers(0, 10_000)), max_size=200),
)
def test_the_least_loaded_for_its_weight_is_always_picked(weights, events):
    nodes = nodes_of(weights)
    picker, open_ = picker_over(heap(), nodes), []
    for event in events:
        if event is None or not open_:
            best = min(node.load / node.address.weight for node in nodes)
            node = send(picker)
            assert (node.load - 1) / node.address.weight == best
            open_.append(node)
        else:
            answer(picker, open_.pop(event % len(open_)))


def test_its_heap_does_not_grow():
    nodes = nodes_of([1] * 5)
    picker = picker_over(heap(), nodes)
    for _ in range(100):
        taken = [send(picker) for _ in range(50)]
        for node in taken:
            answer(picker, node)
        assert len(picker._heap) <= 2 * len(nodes) + SPARE


def test_what_becomes_of_a_node_that_has_left_does_not_matter():
    nodes = nodes_of([1, 1])
    picker = picker_over(heap(), nodes)
    taken = [send(picker) for _ in range(4)]
    picker.update(nodes[1:], nodes)
    for node in taken:
        answer(picker, node)
    assert set(turns(picker, 5)) == {nodes[1]}


# --- values -----------------------------------------------------------------------------------------------------------


def test_they_print_as_they_are_typed_and_say_why():
    assert [repr(chooser) for chooser in CHOOSERS] == ["round_robin()", "heap()"]
    nodes = nodes_of([1, 1])
    for chooser, why in zip(
        CHOOSERS, ["its turn; 0 under way", "the least of 2 for its weight; 0 under way"], strict=True
    ):
        picker = picker_over(chooser, nodes)
        assert picker.why(picker.pick(0.0), 0.0) == why
