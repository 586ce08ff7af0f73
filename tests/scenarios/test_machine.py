"""Anything may happen to a cluster, in any order; what must hold, holds. See ``world.py`` for what is checked.

Two ways in: a hypothesis state machine, which shrinks what it finds to the fewest steps and prints them, and random
walks from numbered seeds, long ones, of which a failure names its seed: ``MESHLIB_WALK=17 pytest -k walk`` takes that
walk again, and ``MESHLIB_WALKS=5000`` takes so many.
"""

import os

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import meshlib
from tests.scenarios.world import SERVERS, Step, a_walk, play

servers = st.integers(0, SERVERS - 1)
amounts = st.floats(0, 1, exclude_max=True, width=16)
HEDGED = (meshlib.hedge(0.1),)


class ClusterMachine(RuleBasedStateMachine):
    """Collects what happens; the walk is taken when it is complete, since virtual time runs in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.walk: list[Step] = []
        self.seed = 0

    @rule(seed=st.integers(0, 2**16))
    def another_seed(self, seed):
        self.seed = seed

    @rule(which=servers, amount=amounts)
    def send(self, which, amount):
        self.walk.append(Step("send", which, amount))

    @rule(which=servers, amount=amounts)
    def send_what_must_not_be_repeated(self, which, amount):
        self.walk.append(Step("send_once", which, amount))

    @rule(which=servers, amount=amounts)
    def burst(self, which, amount):
        self.walk.append(Step("burst", which, amount))

    @rule(amount=amounts)
    def cancel(self, amount):
        self.walk.append(Step("cancel", 0, amount))

    @rule(amount=amounts)
    def advance(self, amount):
        self.walk.append(Step("advance", 0, amount))

    @rule(amount=amounts)
    def wait(self, amount):
        self.walk.append(Step("wait", 0, amount))

    @rule(which=servers)
    def add(self, which):
        self.walk.append(Step("add", which))

    @rule(which=servers)
    def remove(self, which):
        self.walk.append(Step("remove", which))

    @rule(which=servers, amount=amounts)
    def slow(self, which, amount):
        self.walk.append(Step("slow", which, amount))

    @rule(which=servers, amount=amounts)
    def fail(self, which, amount):
        self.walk.append(Step("fail", which, amount))

    @rule(which=servers)
    def heal(self, which):
        self.walk.append(Step("heal", which))

    @rule(which=servers)
    def hang(self, which):
        self.walk.append(Step("hang", which))

    @rule(which=servers)
    def unhang(self, which):
        self.walk.append(Step("unhang", which))

    @rule(which=servers)
    def crash(self, which):
        self.walk.append(Step("crash", which))

    @rule(which=servers, amount=amounts)
    def restart(self, which, amount):
        self.walk.append(Step("restart", which, amount))

    @rule(which=servers)
    def start(self, which):
        self.walk.append(Step("start", which))

    @rule(which=servers)
    def darken(self, which):
        self.walk.append(Step("darken", which))

    @rule(which=servers)
    def lighten(self, which):
        self.walk.append(Step("lighten", which))

    def teardown(self):
        note(f"play({self.walk!r}, {self.seed})")
        play(self.walk, self.seed)


def test_the_books_balance_after_any_steps_that_hypothesis_finds():
    examples = int(os.environ.get("MESHLIB_MACHINE", "8"))
    chosen = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    run_state_machine_as_test(ClusterMachine, settings=chosen)


WALKS = (
    [int(os.environ["MESHLIB_WALK"])]
    if "MESHLIB_WALK" in os.environ
    else range(int(os.environ.get("MESHLIB_WALKS", "10")))
)


@pytest.mark.parametrize("seed", WALKS)
def test_the_books_balance_after_a_random_walk(seed):
    play(a_walk(seed, 150), seed, HEDGED if seed % 2 else ())


def test_the_same_walk_from_the_same_seed_is_the_same_to_the_last_number():
    first, again = (play(a_walk(4, 120), 4, HEDGED) for _ in range(2))
    assert first == again
    assert play(a_walk(4, 120), 5, HEDGED) != first
