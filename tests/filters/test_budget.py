"""The retry budget: its exact numbers, and that no history of requests and retries ever overdraws it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import mux
from meshlib.core.errors import ConfigurationError
from meshlib.filters.budget import RetryBudget, retry_budget


def spend(budget, now):
    """Withdraw until nothing is left; say how often that was."""
    n = 0
    while budget.try_withdraw(now):
        n += 1
        assert n < 100_000
    return n


def test_it_begins_with_finagles_hundred_retries():
    budget = RetryBudget()
    assert budget.balance(0.0) == 100
    assert spend(budget, 0.0) == 100
    assert budget.balance(0.0) == 0


def test_five_requests_pay_for_one_retry():
    budget = RetryBudget()
    spend(budget, 0.0)
    for _ in range(4):
        budget.deposit(0.0)
    assert not budget.try_withdraw(0.0)
    budget.deposit(0.0)
    assert budget.try_withdraw(0.0)
    assert not budget.try_withdraw(0.0)


def test_a_refused_withdrawal_takes_nothing():
    budget = RetryBudget(min_per_second=0)
    for _ in range(4):
        budget.deposit(0.0)
        assert not budget.try_withdraw(0.0)
    budget.deposit(0.0)
    assert budget.try_withdraw(0.0)


@pytest.mark.parametrize(("share", "per_hundred"), [(0.1, 10), (0.2, 20), (0.3, 30), (0.5, 50), (1, 100), (2, 200)])
def test_the_share_is_kept_to_the_number(share, per_hundred):
    budget = RetryBudget(share=share, min_per_second=0)
    for _ in range(100):
        budget.deposit(0.0)
    assert spend(budget, 0.0) == per_hundred


def test_without_a_share_only_the_reserve_pays():
    budget = RetryBudget(share=0, min_per_second=2, ttl=5)
    for _ in range(1000):
        budget.deposit(0.0)
    assert spend(budget, 0.0) == 10


def test_without_share_or_reserve_nothing_is_affordable():
    budget = RetryBudget(share=0, min_per_second=0)
    budget.deposit(0.0)
    assert budget.balance(0.0) == 0
    assert not budget.try_withdraw(0.0)


def test_deposits_and_withdrawals_are_forgotten_after_the_window():
    budget = RetryBudget(min_per_second=0)
    for _ in range(50):
        budget.deposit(0.0)
    assert budget.balance(9.9) == 10
    assert budget.balance(10.0) == 0
    budget = RetryBudget()
    spend(budget, 0.0)
    assert budget.balance(9.9) == 0
    assert budget.balance(10.0) == 100


def test_slices_roll_over_one_by_one():
    budget = RetryBudget(min_per_second=0)
    for second in range(10):
        for _ in range(5):
            budget.deposit(second)
    assert [budget.balance(float(t)) for t in range(9, 21)] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0]


def test_a_long_silence_forgets_everything():
    budget = RetryBudget()
    for _ in range(500):
        budget.deposit(0.0)
    assert budget.balance(1e6) == 100
    budget.deposit(1e6 + 0.5)
    assert budget.balance(1e6 + 0.5) == 100


def test_it_counts_from_whenever_the_clock_begins():
    budget = RetryBudget()
    for now in (123456.7, 123460.0):
        budget.deposit(now)
    assert spend(budget, 123461.0) == 100


# --- against a model --------------------------------------------------------------------------------------------------

# Quarters of a second, so that arithmetic with times is exact.
STEPS = st.lists(st.tuples(st.sampled_from(["deposit", "withdraw", "balance"]), st.integers(0, 24)), max_size=300)
# Weighted towards many retries at few requests, where the limits are.
BURSTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.integers(0, 12)), max_size=60)


class Model:
    """Every event, with its slice; sums are made anew each time."""

    def __init__(self, share, per_second, ttl):
        self.cost = round(1000 / share) if share else 1
        self.reserve = round(per_second * ttl * self.cost)
        self.deposit_of = 1000 if share else 0
        self.slice = ttl / 10
        self.began = None
        self.events = []

    def live(self, now):
        if self.began is None:
            self.began = now
        current = math.floor((now - self.began) / self.slice)
        return current, [(at, tokens) for at, tokens in self.events if at > current - 10]

    def left(self, now):
        return self.reserve + sum(tokens for _, tokens in self.live(now)[1])

    def add(self, now, tokens):
        self.events.append((self.live(now)[0], tokens))


@given(
    st.sampled_from([0, 0.1, 0.2, 0.5, 1.0, 4.0]), st.sampled_from([0, 0.5, 1, 10]), st.sampled_from([10, 20, 5]), STEPS
)
def test_it_agrees_with_a_model_that_remembers_everything(share, per_second, ttl, steps):
    budget, model = RetryBudget(share, per_second, ttl), Model(share, per_second, ttl)
    now = 1000.0
    for step, quarters in steps:
        now += quarters / 4
        if step == "deposit":
            budget.deposit(now)
            model.add(now, model.deposit_of)
        elif step == "withdraw":
            affordable = model.left(now) >= model.cost
            assert budget.try_withdraw(now) is affordable
            if affordable:
                model.add(now, -model.cost)
        assert budget.balance(now) == max(0, model.left(now) // model.cost)


@given(BURSTS)
def test_over_any_window_retries_are_at_most_a_fifth_of_requests_and_the_reserve(bursts):
    budget, now = RetryBudget(share=0.2, min_per_second=1), 0.0
    budget.balance(now)  # slices are counted from the first time that it is asked
    requests, retries = [], []
    for n_requests, n_retries, quarters in bursts:
        now += quarters / 4
        for _ in range(n_requests):
            budget.deposit(now)
            requests.append(now)
        for _ in range(n_retries):
            if budget.try_withdraw(now):
                retries.append(now)
        window = math.floor(now) - 9
        recent_requests = sum(at >= window for at in requests)
        recent_retries = sum(at >= window for at in retries)
        if retries and retries[-1] == now:
            assert recent_retries <= 0.2 * recent_requests + 10


def test_in_an_outage_the_load_grows_by_a_fifth_and_the_reserve_and_no_more():
    budget, retries = RetryBudget(), []
    for tick in range(60 * 100):  # 100 requests a second for a minute, each of which would like 3 retries
        now = tick / 100
        budget.deposit(now)
        retries.append(sum(budget.try_withdraw(now) for _ in range(3)))
    steady = sum(retries[20 * 100 :]) / 40
    assert steady == pytest.approx(0.2 * 100 + 10, rel=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": -0.1},
        {"share": 1001},
        {"share": math.nan},
        {"share": "20%"},
        {"share": True},
        {"min_per_second": -1},
        {"min_per_second": math.inf},
        {"ttl": 0.5},
        {"ttl": 61},
        {"min_concurrency": 0},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_told_at_construction(wrong):
    says = r"share is a number from 0 .*ttl is 1 to 60 seconds, min_concurrency is 1 or more"
    for make in (RetryBudget, retry_budget):
        with pytest.raises(ConfigurationError, match=says):
            make(**wrong)


def test_it_prints_its_terms():
    assert repr(RetryBudget()) == "budget(20% + 10/s)"


# --- as a layer -------------------------------------------------------------------------------------------------------


def test_each_client_that_is_given_the_layer_has_a_budget_of_its_own_on_its_terms():
    layer = retry_budget(0.1, min_per_second=2)
    one, two = (mux.client("127.0.0.1:1", layer, meshlib.hedge()) for _ in range(2))
    budgets = [client.env.params[RetryBudget] for client in (one, two)]
    assert budgets[0] is not budgets[1]
    assert one.metrics()["retries/budget"] == 20
    budgets[0].try_withdraw(one.env.clock.now())
    assert (one.metrics()["retries/budget"], two.metrics()["retries/budget"]) == (19, 20)
    assert (one.metrics()["retries/under_way"], one.metrics()["retries/waiting"]) == (0, 0)
    server = mux.serve(print, "127.0.0.1:0", layer, meshlib.retry())
    assert server.env.params[RetryBudget].share == 0.1


def test_the_layer_prints_as_it_is_typed():
    assert repr(retry_budget()) == "retry_budget(0.2, min_per_second=10, ttl=10, min_concurrency=10)"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), max_size=40), st.floats(0.05, 1.0))
def test_requests_told_of_all_at_once_are_as_many_deposits(steps, share):
    one, many, now = RetryBudget(share, 0), RetryBudget(share, 0), 0.0
    for requests, quarters in steps:
        now += quarters / 4
        one.deposit(now, requests)
        for _ in range(requests):
            many.deposit(now)
        many.balance(now)
        assert one.balance(now) == many.balance(now)
