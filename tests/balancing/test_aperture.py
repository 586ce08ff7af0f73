"""Apertures: every server gets the same from all clients together, over few connections that seldom move."""

import random
import subprocess
import sys
from collections import Counter
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib import ConfigurationError
from meshlib.balancing.aperture import SMOOTH, aperture
from meshlib.balancing.choose import picker_of
from meshlib.balancing.load import least_loaded
from meshlib.balancing.ring import SLACK, point, rank, windows
from meshlib.core.env import Env
from meshlib.names.addr import Address
from meshlib.telemetry.metrics import Registry
from tests.balancing.traffic import begin, end, nodes_of

SIZES = [(100, 100), (20, 100), (100, 20), (57, 31)]


def loads_of(clients, weights, least=12):
    """The share of all traffic that each server gets, and the servers of each client."""
    loads, members = [0.0] * len(weights), []
    for instance in range(clients):
        first, parts = windows(weights, instance, clients, least)
        for k, part in enumerate(parts):
            loads[(first + k) % len(weights)] += part / sum(parts) / clients
        members.append({(first + k) % len(weights) for k in range(len(parts))})
    return loads, members


# --- the ring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clients", "servers"), SIZES)
def test_every_server_gets_the_same(clients, servers):
    loads, _ = loads_of(clients, [1.0] * servers)
    assert pstdev(loads) / mean(loads) <= 0.01


@given(
    st.integers(1, 80),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=60),
    st.integers(1, 20),
)
def test_every_server_gets_its_weights_share_whatever_the_numbers(clients, weights, least):
    loads, members = loads_of(clients, weights, least)
    assert loads == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-6, abs=1e-8)
    assert all(len(mine) >= 1 for mine in members)


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 20))
def test_a_window_holds_as_many_as_it_should_and_few_more(clients, servers, least):
    _, members = loads_of(clients, [1.0] * servers, least)
    for mine in members:
        assert SLACK * min(least, servers) <= len(mine) <= min(servers, least + servers // clients + 3)


def test_connections_are_a_fraction():
    for clients, servers in [(100, 100), (20, 100)]:
        _, members = loads_of(clients, [1.0] * servers)
        assert sum(map(len, members)) <= 0.2 * clients * servers


def moved(before, after):
    """The share of pairs of client and server that are new, among all that there are."""
    pairs = [{(i, server) for i, mine in enumerate(members) for server in mine} for members in (before, after)]
    return len(pairs[1] - pairs[0]) / len(pairs[1])


@pytest.mark.parametrize(("clients", "servers"), SIZES)
@pytest.mark.parametrize("more", [1, -1])
def test_one_client_more_or_less_moves_few_connections(clients, servers, more):
    before = loads_of(clients, [1.0] * servers)[1]
    after = loads_of(clients + more, [1.0] * servers)[1]
    ours = min(clients, clients + more)
    # With 20 clients each is a twentieth of the ring, and stands for 5 servers: no less can move than these.
    assert moved(before[:ours], after[:ours]) <= (1 / 9 if clients < servers else 1 / 12)


@pytest.mark.parametrize(("clients", "servers"), SIZES)
def test_one_server_less_moves_few_connections(clients, servers):
    before = loads_of(clients, [1.0] * servers)[1]
    shares = []
    for gone in range(servers):
        there = [server for server in range(servers) if server != gone]
        after = [{there[k] for k in mine} for mine in loads_of(clients, [1.0] * (servers - 1))[1]]
        shares.append(moved(before, after))
    assert mean(shares) <= 1 / 12
    assert max(shares) <= 1 / 10


def test_points_are_the_same_in_every_process():
    program = "from meshlib.balancing.ring import point; print(point('10.0.0.1:9000'), point('h:1', 7))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=50)
    assert done.stdout.split() == [str(point("10.0.0.1:9000")), str(point(Address("h", 1), 7))]
    points = sorted(point(f"h:{port}") for port in range(10_000))
    assert max(abs(x - i / 10_000) for i, x in enumerate(points)) < 0.02


def test_ranks_are_in_proportion_to_weight():
    firsts = Counter(min((rank(f"h:{w}", w, seed), w) for w in (1, 2, 5))[1] for seed in range(4000))
    assert [firsts[w] / 4000 for w in (1, 2, 5)] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)


# --- with a coordinate ------------------------------------------------------------------------------------------------


def picker_over(nodes, usable=None, seed=1, **more):
    env = Env(rng=random.Random(seed), metrics=Registry())
    picker = picker_of(aperture(least_loaded(), **more), env)
    picker.update(nodes if usable is None else usable, nodes)
    return picker, env


def test_picks_of_all_clients_together_are_even():
    nodes, counts = nodes_of([1] * 31), Counter()
    for instance in range(57):
        picker, _ = picker_over(nodes, coordinate=(instance, 57), seed=instance)
        counts.update(picker.pick(0.0) for _ in range(1000))
    per_server = [counts[node] for node in nodes]
    assert pstdev(per_server) / mean(per_server) < 0.04  # of which chance alone makes 0.023


def test_clients_agree_on_the_ring_whatever_the_order_they_learn_of_servers():
    nodes = nodes_of([1] * 40)
    first, _ = picker_over(nodes, coordinate=(3, 10))
    again, _ = picker_over(nodes[::-1], coordinate=(3, 10))
    assert list(first.nodes) == list(again.nodes)
    assert len(first.nodes) in (12, 13, 14, 17)


def test_the_whole_ring_belongs_to_a_client_alone():
    nodes = nodes_of([1, 2, 3])
    picker, _ = picker_over(nodes, coordinate=(0, 1))
    counts = Counter(picker.pick(0.0) for _ in range(6000))
    assert [counts[node] / 6000 for node in nodes] == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.03)


def test_a_window_that_lost_a_few_does_without_them_and_one_that_lost_most_is_extended():
    nodes = nodes_of([1] * 100)
    picker, _ = picker_over(nodes, coordinate=(3, 100))
    mine = list(picker.nodes)
    assert len(mine) == 13
    picker.update([node for node in nodes if node not in mine[:5]], nodes)
    assert set(picker.nodes) == set(mine[5:])
    picker.update([node for node in nodes if node not in mine[:8]], nodes)
    assert len(picker.nodes) == 13
    assert set(mine[8:]) < set(picker.nodes)
    beyond = [node for node in nodes if node not in mine]
    picker.update(beyond, nodes)
    assert len(picker.nodes) == 13
    picker.update(beyond[:2], nodes)
    assert set(picker.nodes) == set(beyond[:2])
    picker.update(nodes, nodes)
    assert list(picker.nodes) == mine


# --- without ----------------------------------------------------------------------------------------------------------


def test_clients_without_a_coordinate_choose_differently_and_evenly_on_average():
    nodes, counts = nodes_of([1] * 50), Counter()
    chosen = set()
    for seed in range(300):
        picker, _ = picker_over(nodes, seed=seed)
        assert len(picker.nodes) == 12
        chosen.add(frozenset(picker.nodes))
        counts.update(picker.nodes)
    assert len(chosen) == 300
    assert [counts[node] for node in nodes] == pytest.approx([72] * 50, abs=35)


@given(st.integers(13, 60), st.integers(0, 1000))
def test_a_server_that_goes_moves_nobody_else(servers, seed):
    nodes = nodes_of([1] * servers)
    picker, _ = picker_over(nodes, seed=seed)
    before = set(picker.nodes)
    gone = nodes[seed % servers]
    rest = [node for node in nodes if node is not gone]
    picker.update(rest, rest)
    assert before - {gone} <= set(picker.nodes)
    assert len(picker.nodes) == min(12, servers - 1)
    picker.update(nodes, nodes)
    assert set(picker.nodes) == before


def offer(picker, under_way, since, seconds):
    """Keep so many requests under way, each for a tenth of a second."""
    open_ = []
    for step in range(int(seconds * 10)):
        now = since + step / 10
        for node in open_:
            end(node, now - 0.1)
            picker.changed(node, -1, now)
        open_ = [picker.pick(now) for _ in range(under_way)]
        for node in open_:
            begin(node, now)
            picker.changed(node, 1, now)
    for node in open_:
        end(node)
        picker.changed(node, -1, since + seconds)


def test_it_is_as_wide_as_the_load_needs_and_stays_so_when_servers_change():
    nodes = nodes_of([1] * 100)
    picker, env = picker_over(nodes)
    offer(picker, 40, 0, 6 * SMOOTH)
    wide = picker.size
    assert 40 / 1.125 - 1 <= wide <= 40 / 0.875 + 1
    assert env.metrics.snapshot()["logical_aperture"] == wide == len(picker.nodes)
    assert env.metrics.snapshot()["loadband/offered_load_ema"] == pytest.approx(40, rel=0.05)
    picker.update(nodes[1:], nodes[1:])
    assert len(picker.nodes) == wide
    picker.update(nodes[:20], nodes[:20])
    assert len(picker.nodes) == 20
    picker.update(nodes, nodes)
    assert len(picker.nodes) == wide
    offer(picker, 1, 6 * SMOOTH, 6 * SMOOTH)
    assert len(picker.nodes) == 12
    numbers = env.metrics.snapshot()
    assert numbers["loadband/widen"] == numbers["loadband/narrow"] == wide - 12


def test_its_numbers():
    nodes = nodes_of([1] * 50)
    _, ring = picker_over(nodes, coordinate=(0, 50))
    _, ranked = picker_over(nodes)
    assert ring.metrics.snapshot() == {"use_deterministic_ordering": 1, "physical_aperture": 13}
    assert ranked.metrics.snapshot()["use_deterministic_ordering"] == 0
    assert ranked.metrics.snapshot()["physical_aperture"] == 12


# --- parameters -------------------------------------------------------------------------------------------------------


def test_the_environment_may_say_the_coordinate(monkeypatch):
    nodes = nodes_of([1] * 50)
    given_, _ = picker_over(nodes, coordinate=(3, 10))
    monkeypatch.setenv("MESHLIB_COORDINATE", "3/10")
    found, _ = picker_over(nodes)
    assert list(found.nodes) == list(given_.nodes)
    explicit, _ = picker_over(nodes, coordinate=(7, 10))
    assert list(explicit.nodes) != list(given_.nodes)
    for wrong in ("3", "10/3", "3/10/2", "a/b", "-1/3", "3/"):
        monkeypatch.setenv("MESHLIB_COORDINATE", wrong)
        with pytest.raises(ConfigurationError, match=r"MESHLIB_COORDINATE='.*give which client this is"):
            picker_over(nodes)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"coordinate": (10, 10)}, r"coordinate=\(10, 10\)\): give which client this is, from 0"),
        ({"coordinate": (-1, 10)}, "give which client this is"),
        ({"coordinate": 3}, "give which client this is"),
        ({"coordinate": (1.0, 2)}, "give which client this is"),
        ({"coordinate": (False, True)}, "give which client this is"),
        ({"minimum": 0}, "give a number of servers, 1 or more"),
        ({"minimum": 2.5}, "give a number of servers"),
        ({"low": 1.2}, "give loads with 0 < low < 1 < high"),
        ({"high": 1.0}, "give loads with 0 < low < 1 < high"),
        ({"metric": 3}, "give a load metric"),
    ],
    ids=str,
)
def test_wrong_parameters_are_told_at_once(wrong, says):
    with pytest.raises(ConfigurationError, match=says):
        aperture(**wrong)


def test_it_prints_as_it_is_typed():
    assert repr(aperture()) == "aperture(peak_ewma(decay=10, penalty=5), minimum=12)"
    assert repr(aperture(least_loaded(), coordinate=(3, 10), minimum=20, low=0.5, high=2)) == (
        "aperture(least_loaded(), coordinate=(3, 10), minimum=20, low=0.5, high=2)"
    )
