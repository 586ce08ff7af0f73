"""Requeues: what was provably never processed is sent again, and nothing else is."""

import random

import anyio
import pytest

import meshlib
from meshlib.core.clock import Clock
from meshlib.core.context import EMPTY, CallRecord, Context, current, use
from meshlib.core.env import Env
from meshlib.core.health import Health, Peers
from meshlib.filters.budget import RetryBudget, budget_of
from meshlib.filters.requeue import FIRST_WAIT, LAST_WAIT, LIMIT, Requeue
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual


def refusal(by_peer=True):
    error = meshlib.Rejected("full")
    error.by_peer = by_peer
    return error


class Counted(RetryBudget):
    def __init__(self, *args):
        super().__init__(*args)
        self.deposits = self.withdrawals = 0

    def deposit(self, now):
        self.deposits += 1
        super().deposit(now)

    def try_withdraw(self, now):
        paid = super().try_withdraw(now)
        self.withdrawals += paid
        return paid


class Bench:
    """A service that fails as it is told and then answers, under a requeue, in virtual time."""

    def __init__(self, *script, budget=None):
        self.script = list(script)
        self.registry = Registry()
        self.budget = budget or Counted()
        self.attempts, self.times = [], []
        self.record = CallRecord(0.0)
        self.elapsed = 0.0

    async def serve(self, request):
        self.attempts.append(current().attempt)
        self.times.append(anyio.current_time())
        if self.script:
            step = self.script.pop(0)
            if isinstance(step, BaseException):
                raise step
        return f"{request} done"

    def run(self, context=EMPTY):
        async def main():
            env = Env(metrics=self.registry, rng=random.Random(3), clock=Clock())
            env.params[RetryBudget] = self.budget
            service = Requeue().build(env, self.serve)
            deadline = None if context.deadline is None else anyio.current_time() + context.deadline
            with use(context.evolve(record=self.record, deadline=deadline)):
                try:
                    return await service("x")
                except Exception as error:
                    return error
                finally:
                    assert current().attempt == context.attempt

        return run_virtual(main)

    def count(self, name):
        return self.registry.snapshot()[f"retries/{name}"]


@pytest.mark.parametrize(
    ("error", "attempts"),
    [(refusal(), [0, 1]), (refusal(by_peer=False), [0, 0]), (meshlib.ConnectError("refused"), [0, 0])],
    ids=str,
)
def test_what_was_never_processed_is_sent_again_at_once(error, attempts):
    bench = Bench(error)
    assert bench.run() == "x done"
    assert bench.attempts == attempts
    assert bench.times == [0.0, 0.0]
    assert (bench.count("requeues"), bench.record.retries) == (1, 1)


@pytest.mark.parametrize(
    "error",
    [
        meshlib.ConnectionLost("cut"),
        meshlib.AttemptTimeout("slow"),
        meshlib.RemoteError("broken"),
        meshlib.DeadlineExceeded("late"),
        meshlib.NoEndpoints("none"),
        meshlib.ServiceClosed("closed"),
        meshlib.Rejected("full", retryable=False),
        ValueError("theirs"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_nothing_else_is(error):
    bench = Bench(error)
    assert bench.run() is error
    assert bench.attempts == [0]
    assert bench.count("requeues") == 0
    assert not getattr(error, "verdict", "")


def test_a_failure_of_another_kind_ends_it():
    last = meshlib.RemoteError("broken")
    bench = Bench(refusal(), refusal(), last)
    assert bench.run() is last
    assert bench.attempts == [0, 1, 2]


def test_what_never_left_this_process_is_free_of_charge():
    bench = Bench(*[refusal(by_peer=False)] * 10, meshlib.ConnectError("refused"))
    assert bench.run() == "x done"
    assert (bench.budget.withdrawals, bench.count("requeues")) == (0, 11)


def test_what_a_server_refused_is_charged():
    bench = Bench(refusal(), refusal(by_peer=False), refusal())
    assert bench.run() == "x done"
    assert bench.budget.withdrawals == 2


def test_when_the_budget_is_spent_the_failure_is_final_and_says_so():
    bench = Bench(*[refusal() for _ in range(5)], budget=Counted(0, 0, 1))
    error = bench.run()
    assert isinstance(error, meshlib.Rejected)
    assert (error.retryable, error.verdict) == (False, "the retry budget is spent")
    assert not error.requeueable
    assert bench.attempts == [0]
    assert bench.count("budget_exhausted") == 1


def test_one_call_may_spend_a_fifth_of_the_budget():
    bench = Bench(*[refusal() for _ in range(9)], budget=Counted(0, 20, 1))
    error = bench.run()
    assert (error.verdict, error.retryable) == ("servers refused it 5 times", True)
    assert bench.attempts == [0, 1, 2, 3, 4]
    assert bench.budget.withdrawals == 4
    assert (bench.count("request_limit"), bench.count("budget_exhausted")) == (1, 0)


def test_a_spent_budget_does_not_stop_what_is_free():
    bench = Bench(*[refusal(by_peer=False)] * 5, budget=Counted(0, 0, 1))
    assert bench.run() == "x done"


def test_it_gives_up_in_the_end():
    errors = [meshlib.ConnectError(str(i)) for i in range(LIMIT + 5)]
    bench = Bench(*errors)
    error = bench.run()
    assert error is errors[LIMIT]
    assert len(bench.attempts) == LIMIT + 1
    assert (error.verdict, error.retryable) == (f"requeued {LIMIT} times", True)
    assert bench.count("request_limit") == 1


def test_one_call_spends_a_fifth_of_the_budget_and_no_more():
    bench = Bench(*[refusal() for _ in range(30)])
    error = bench.run()
    assert bench.budget.withdrawals == 20
    assert len(bench.attempts) == 21
    assert (error.verdict, error.retryable) == ("servers refused it 21 times", True)
    assert bench.count("request_limit") == 1
    assert bench.budget.balance(0.0) == 80


def test_waits_grow_and_stay_small():
    bench = Bench(*[meshlib.ConnectError("refused") for _ in range(20)])
    bench.run()
    waits = [b - a for a, b in zip(bench.times, bench.times[1:], strict=False)]
    assert waits[0] == 0
    for n, wait in enumerate(waits[1:], 2):
        assert 0 <= wait <= min(LAST_WAIT, FIRST_WAIT * 2 ** (n - 1)) + 1e-9
    assert sum(waits[10:]) > 0


def test_it_stops_when_the_deadline_would_pass_first():
    bench = Bench(*[meshlib.ConnectError("refused") for _ in range(20)])
    error = bench.run(Context(deadline=0.1))
    assert isinstance(error, meshlib.ConnectError)
    assert error.verdict == "the deadline would pass first"
    assert error.retryable
    assert bench.times[-1] < 0.1
    assert len(bench.times) > 1


def test_each_call_that_succeeds_deposits_once_however_often_it_was_sent():
    bench = Bench(refusal(), refusal(), refusal())
    bench.run()
    assert bench.budget.deposits == 1


def test_a_call_that_fails_deposits_nothing():
    for error in (meshlib.RemoteError("x"), ValueError("x")):
        bench = Bench(error)
        bench.run()
        assert bench.budget.deposits == 0
    bench = Bench(*[meshlib.ConnectError("refused")] * 100)
    bench.run()
    assert bench.budget.deposits == 0


def test_to_the_servers_it_is_a_retry_only_once_one_of_them_has_seen_it():
    bench = Bench(refusal(by_peer=False), refusal(), meshlib.ConnectError("refused"), refusal())
    bench.run()
    assert bench.attempts == [0, 0, 1, 1, 2]


def test_attempts_go_on_counting_from_a_retry_above():
    bench = Bench(refusal())
    bench.run(Context(attempt=2))
    assert bench.attempts == [2, 3]


async def test_a_cancelled_call_is_not_sent_again():
    sent = []

    async def hang(request):
        sent.append(request)
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        scope.cancel()
        await (Requeue() >> hang)("x")
    assert scope.cancelled_caught
    assert sent == ["x"]


def test_a_call_can_be_cancelled_while_it_waits_to_be_sent_again():
    async def refuse(request):
        raise meshlib.ConnectError("refused")

    async def main():
        with anyio.move_on_after(0.05) as scope:
            await (Requeue(Env(rng=random.Random(1))) >> refuse)("x")
        return scope.cancelled_caught

    assert run_virtual(main)


def test_a_client_has_one_budget_and_shows_it():
    registry = Registry()
    env = Env(metrics=registry, clock=Clock(now=lambda: 5.0))
    budget = budget_of(env)
    assert budget_of(env) is budget
    assert registry.snapshot()["retries/budget"] == 100
    budget.try_withdraw(5.0)
    assert registry.snapshot()["retries/budget"] == 99


def test_it_prints_its_terms():
    assert repr(Requeue()) == f"requeue(limit={LIMIT}, budget(20% + 10/s))"


# --- a server that asks to be left alone ------------------------------------------------------------------------------


def asking(seconds, by_peer=True):
    error = refusal(by_peer)
    error.retry_after = seconds
    return error


def codes(bench):
    return [(decision.kind, decision.code) for decision in bench.record.decisions]


@pytest.mark.parametrize("seconds", [0.0, 0.03, 2.0])
def test_a_server_that_asks_to_be_left_alone_is_for_exactly_as_long(seconds):
    bench = Bench(asking(seconds))
    assert bench.run() == "x done"
    assert bench.times == [0.0, seconds]
    assert codes(bench) == [("requeue", "pushback")]


def test_one_that_asks_for_longer_than_there_is_ends_the_call_at_once_and_says_so():
    error = asking(2.0)
    bench = Bench(error)
    assert bench.run(Context(deadline=1.0)) is error
    assert bench.times == [0.0]
    assert error.verdict == "the deadline would pass first"
    assert bench.budget.withdrawals == 0
    assert codes(bench) == [("no_requeue", "deadline")]


def test_one_that_asks_never_to_be_asked_again_is_not_and_nobody_above_does():
    error = asking(-1)
    bench = Bench(error)
    assert bench.run() is error
    assert bench.times == [0.0]
    assert (error.verdict, error.retryable) == ("the server asked not to be tried again", False)
    assert codes(bench) == [("no_requeue", "pushback")]


def test_others_are_tried_while_one_is_left_alone():
    bench = Bench(asking(2.0), asking(2.0), asking(0.5))
    tried = iter("abcd")

    async def serve(request):
        try:
            return await Bench.serve(bench, request)
        except meshlib.Rejected:
            bench.record.tried += (next(tried),)
            raise

    async def main():
        env = Env(rng=random.Random(3), clock=Clock())
        peers = env.shared(Peers, Peers)
        for _ in range(3):
            peers.join(Health())
        with use(EMPTY.evolve(record=bench.record)):
            return await Requeue().build(env, serve)("x")

    assert run_virtual(main) == "x done"
    waits = [b - a for a, b in zip(bench.times, bench.times[1:], strict=False)]
    assert waits[0] == 0
    assert waits[1] < 0.1
    assert waits[2] == pytest.approx(0.5)


# --- what is told -----------------------------------------------------------------------------------------------------


def test_every_decision_is_told():
    bench = Bench(refusal(), refusal(by_peer=False), meshlib.ConnectError("refused"))
    bench.run()
    assert codes(bench) == [("requeue", "refused"), ("requeue", "unsent"), ("requeue", "unsent")]
    bench = Bench(*[refusal() for _ in range(3)], budget=Counted(0, 1, 1))
    bench.run()
    assert codes(bench) == [("requeue", "refused"), ("no_requeue", "attempts")]
    bench = Bench(refusal(), budget=Counted(0, 0, 1))
    bench.run()
    assert codes(bench) == [("no_requeue", "budget")]
    assert bench.record.decisions[0].detail == "the retry budget is spent; the retry budget has 0 left"


# --- turns ------------------------------------------------------------------------------------------------------------


def burst(n, error, *, seconds=0.1, deadline=None, budget=None):
    """``n`` calls at once, each refused at first; how they end, when, and how many were under way again at most."""

    async def main():
        env = Env(clock=Clock(), rng=random.Random(1))
        env.params[RetryBudget] = budget or RetryBudget()
        turns = env.params[RetryBudget].turns
        seen, most, outcomes = set(), 0, []

        async def serve(n):
            nonlocal most
            if n not in seen:
                seen.add(n)
                await anyio.sleep(0.01)
                raise error()
            most = max(most, turns.taken)
            await anyio.sleep(seconds)
            return "done"

        service = Requeue().build(env, serve)

        async def one(n):
            at = None if deadline is None else deadline
            with use(EMPTY.evolve(record=CallRecord(0.0), deadline=at)):
                try:
                    outcomes.append(await service(n))
                except meshlib.MeshError as failure:
                    outcomes.append(failure.verdict)

        async with anyio.create_task_group() as group:
            for i in range(n):
                group.start_soon(one, i)
        assert (turns.taken, turns.waiting, turns.calls) == (0, 0, 0)
        return outcomes, anyio.current_time(), most

    return run_virtual(main)


def test_a_burst_of_refused_calls_is_sent_again_a_few_at_a_time_and_none_is_lost():
    outcomes, took, most = burst(100, refusal)
    assert outcomes == ["done"] * 100
    assert most == 17  # the first of them, a fifth of the 83 that have not failed yet; and then, as all have, ten
    assert 0.9 < took < 1.1


def test_what_never_left_this_process_waits_for_no_turn():
    outcomes, took, most = burst(100, lambda: refusal(by_peer=False))
    assert (outcomes, most) == (["done"] * 100, 0)
    assert took < 0.2


def test_who_gets_no_turn_within_the_deadline_is_told():
    outcomes, took, _ = burst(40, refusal, seconds=1.0, deadline=0.5, budget=RetryBudget(0.2, 10, 10, 5))
    assert outcomes.count("done") == 7
    late = [verdict for verdict in outcomes if verdict != "done"]
    assert set(late) == {"no turn within the deadline, with 7 other retries under way"}
    assert took < 1.1
