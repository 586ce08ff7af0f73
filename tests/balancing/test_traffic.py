"""What the balancers make of a slow node, of one that fails fast, and of one that heals: policies alone, no client.

Linkerd's "Beyond Round Robin" (2016): 11 nodes, 1000 requests a second, one of them ten times slower for half of the
minute; a success is an answer within a second.
"""

import pytest

from meshlib.balancing.aperture import aperture
from meshlib.balancing.choose import P2C, p2c
from meshlib.balancing.load import least_loaded, peak_ewma
from meshlib.balancing.rotation import heap, round_robin
from tests.balancing.traffic import drive, production, share, success

SLOW_FROM, SLOW_UNTIL = 15.0, 45.0


def slow_for_a_while(node, at, rng):
    slow = node == 0 and SLOW_FROM <= at < SLOW_UNTIL
    return production(rng) * (10 if slow else 1), "ok"


def fails_fast(node, at, rng):
    return (0.001, "fail") if node == 0 else (production(rng), "ok")


@pytest.mark.parametrize(
    ("chooser", "least", "most"),
    [
        (round_robin(), 0.954, 0.955),
        (p2c(least_loaded()), 0.9935, 0.996),
        (heap(), 0.994, 0.996),
        (p2c(peak_ewma()), 0.9988, 1.0),
        (aperture(coordinate=(0, 1)), 0.9988, 1.0),
    ],
    ids=repr,
)
def test_beyond_round_robin(chooser, least, most):
    assert least <= success(drive(chooser, slow_for_a_while)) <= most


@pytest.mark.parametrize("seed", range(2))
def test_a_timeout_that_cancels_makes_it_better_and_not_worse(seed):
    # Where a cancelled request counts as having taken a second, twice as many fail: 99.81 %.
    assert success(drive(p2c(), slow_for_a_while, seed=seed, timeout=1.0)) >= 0.9995


@pytest.mark.parametrize("rate", [100, 1000])
def test_a_node_that_heals_has_its_share_back(rate):
    for timeout in (None, 1.0):
        sent = drive(p2c(), slow_for_a_while, rate=rate, seconds=75, timeout=timeout)
        assert share(sent, 0, SLOW_FROM + 2, SLOW_UNTIL) < 0.06
        assert share(sent, 0, SLOW_UNTIL + 10, SLOW_UNTIL + 15) > 0.5
        assert share(sent, 0, SLOW_UNTIL + 20, SLOW_UNTIL + 30) > 0.85


@pytest.mark.parametrize("nodes", [3, 11])
@pytest.mark.parametrize("rate", [100, 1000])
def test_a_node_that_fails_fast_attracts_nothing(nodes, rate):
    # Counting requests under way, it looks idle: it gets two in n.
    assert 1 - success(drive(p2c(least_loaded()), fails_fast, nodes=nodes, rate=1000, seconds=10)) > 1.5 / nodes
    assert 1 - success(drive(p2c(), fails_fast, nodes=nodes, rate=rate)) <= 0.005


def test_where_others_have_many_under_way_the_penalty_still_is_a_penalty():
    sent = drive(p2c(), fails_fast, nodes=2, rate=2000, seconds=20)  # 340 under way on one node
    assert success([one for one in sent if one.at > 1]) > 0.999


def test_an_overload_in_which_all_refuse_leaves_the_load_even():
    def refuses(node, at, rng):
        return (0.002, "fail") if rng.random() < 0.5 else (0.05, "ok")

    sent = drive(p2c(), refuses, nodes=5, rate=500, seconds=30)
    for node in range(5):
        assert share(sent, node, 5, 30) == pytest.approx(1, rel=0.35)


def test_at_a_low_rate_a_slow_node_is_avoided_too():
    def slow(node, at, rng):
        return production(rng) * (10 if node == 0 else 1), "ok"

    sent = drive(p2c(), slow, rate=5, seconds=300)
    assert share(sent, 0, 5, 300) < 0.3


def test_one_blip_does_not_cost_a_node_its_share():
    def one_blip(node, at, rng):
        return (2.0 if node == 0 and 10 <= at < 10.02 else production(rng)), "ok"

    sent = drive(p2c(), one_blip, seconds=40)
    assert share(sent, 0, 12, 13) < 0.2
    assert share(sent, 0, 16, 20) > 0.5


def test_it_repeats_from_a_seed():
    assert drive(P2C(), slow_for_a_while, seconds=20, seed=4) == drive(P2C(), slow_for_a_while, seconds=20, seed=4)
