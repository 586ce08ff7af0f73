"""Env: what a layer is told about the client or server around it."""

import meshlib
from meshlib.core.env import Env
from meshlib.testing import run_virtual


def test_what_layers_share_is_made_once_by_whoever_asks_first():
    env = Env()
    made = env.shared(list, lambda: [1])
    assert env.shared(list, lambda: [2]) is made
    assert env.evolve(label="x").shared(list, lambda: [3]) is made
    assert Env().shared(list, lambda: [4]) == [4]


def test_filters_composed_by_hand_need_no_client_around_them():
    async def double(number):
        return 2 * number

    async def main():
        service = meshlib.timeout(1.0) >> meshlib.retry() >> meshlib.concurrency_limit(1) >> double
        assert await service(3) == 6

    run_virtual(main)


def test_numbers_that_nobody_reads_cost_nothing_and_break_nothing():
    metrics = Env().metrics
    metrics.counter("a").value += 1
    metrics.histogram("b").record(1.0)
    metrics.gauge("c", lambda: 1.0)
    metrics.scope("x", "y").drop()
    assert metrics.counter("a").value == 0
