"""Retries: only when it may help, when it is safe, and when the budget allows it."""

import inspect
import random

import anyio
import pytest
import tenacity

import meshlib
from meshlib.core.backoff import Exponential
from meshlib.core.classify import ResponseClass
from meshlib.core.clock import Clock
from meshlib.core.context import CallRecord, current, deadline, use
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError
from meshlib.filters.budget import RetryBudget
from meshlib.filters.retry import FIRST_WAIT, LAST_WAIT, retry
from meshlib.mux import Request
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual

SAFE = Request(idempotent=True)


def lost():
    return meshlib.ConnectionLost("cut")


class Bench:
    """A service that fails as it is told and then answers, under a retry, in virtual time."""

    def __init__(self, layer, *script, budget=None, classifier=None, chained=False):
        self.layer, self.script = layer, list(script)
        self.registry = Registry()
        self.budget = budget or RetryBudget()
        self.classifier = classifier
        self.record = CallRecord(0.0, chained)
        self.attempts, self.times, self.last_tries = [], [], []

    async def serve(self, request):
        self.attempts.append(current().attempt)
        self.times.append(anyio.current_time())
        self.last_tries.append(self.record.last_try)
        step = self.script.pop(0) if self.script else None
        if callable(step) and not isinstance(step, type):
            step = step()
        if isinstance(step, BaseException):
            raise step
        return "done"

    def run(self, request=SAFE, left=None, attempt=0):
        async def main():
            more = {"classifier": self.classifier} if self.classifier else {}
            env = Env(metrics=self.registry, rng=random.Random(3), clock=Clock(), **more)
            env.params[RetryBudget] = self.budget
            service = self.layer.build(env, self.serve)
            with use(current().evolve(record=self.record, attempt=attempt)):
                try:
                    if left is None:
                        return await service(request)
                    with deadline(left):
                        return await service(request)
                except Exception as error:
                    return error

        return run_virtual(main)

    @property
    def waits(self):
        return [pytest.approx(b - a) for a, b in zip(self.times, self.times[1:], strict=False)]

    def count(self, name):
        return self.registry.snapshot()[f"retries/{name}"]


# --- what is made again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [lost, lambda: meshlib.AttemptTimeout("slow"), lambda: meshlib.Rejected("full")])
def test_an_idempotent_call_that_failed_in_a_way_that_may_pass_is_made_again(error):
    bench = Bench(retry(), error, error)
    assert bench.run() == "done"
    assert bench.attempts == [0, 1, 2]
    assert (bench.count("retries"), bench.record.retries) == (2, 2)


def test_a_call_that_is_not_idempotent_is_made_once():
    error = lost()
    bench = Bench(retry(), error)
    assert bench.run(Request()) is error
    assert bench.attempts == [0]
    assert error.verdict == "the request is not idempotent"


@pytest.mark.parametrize("error", [meshlib.RemoteError("x"), meshlib.InvalidArgument("x"), ValueError("x")], ids=repr)
def test_a_failure_that_cannot_pass_is_raised_as_it_is(error):
    bench = Bench(retry(), error)
    assert bench.run() is error
    assert bench.attempts == [0]
    assert not getattr(error, "verdict", "")
    assert not getattr(error, "__notes__", ())


def test_the_last_failure_is_raised_itself_with_the_reason_for_going_no_further():
    errors = [lost(), lost(), lost(), lost()]
    bench = Bench(retry(attempts=3), *errors)
    error = bench.run()
    assert error is errors[2]
    assert error.verdict == "3 attempts were made"
    assert "not retried: 3 attempts were made" in str(error)
    assert error.retryable
    assert bench.attempts == [0, 1, 2]


def test_an_error_of_somebody_else_carries_the_reason_as_a_note():
    bench = Bench(retry(attempts=2, on=OSError), OSError("a"), OSError("b"))
    error = bench.run()
    assert str(error) == "b"
    assert error.__notes__ == ["meshlib: not retried: 2 attempts were made"]


def test_one_attempt_turns_retries_off():
    error = lost()
    bench = Bench(retry(attempts=1), error)
    assert bench.run() is error
    assert bench.attempts == [0]
    assert bench.last_tries == [True]


def test_a_classifier_decides_what_may_pass():
    def classifier(request, reply, error):
        return ResponseClass.RETRYABLE if isinstance(error, KeyError) else ResponseClass.FAILURE

    bench = Bench(retry(), KeyError("x"), lost(), classifier=classifier)
    assert isinstance(bench.run(), meshlib.ConnectionLost)
    assert bench.attempts == [0, 1]


def test_a_failure_that_a_budget_below_made_final_is_not_tried_again_whatever_on_says():
    error = meshlib.Rejected("full")
    error.finalize("the retry budget is spent")
    bench = Bench(retry(on=meshlib.MeshError), error)
    assert bench.run() is error
    assert bench.attempts == [0]
    assert error.verdict == "the retry budget is spent"


def test_what_the_requeues_below_have_given_up_on_is_not_tried_again():
    error = meshlib.Rejected("full")
    error.verdict = "servers refused it 21 times"
    bench = Bench(retry(), error)
    assert bench.run() is error
    assert bench.attempts == [0]
    assert error.verdict == "servers refused it 21 times"


async def test_a_function_may_be_tried_again_although_a_client_that_it_called_has_given_up():
    tries = []

    @retry(attempts=3, wait=0)
    async def fetch():
        tries.append(current().attempt)
        error = lost()
        error.label, error.verdict = "back", "3 attempts were made"
        raise error

    with pytest.raises(meshlib.ConnectionLost):
        await fetch()
    assert tries == [0, 1, 2]


@pytest.mark.parametrize(
    ("on", "tried"),
    [
        (KeyError, 2),
        ((KeyError, OSError), 3),
        (lambda error: "again" in str(error), 2),
        (tenacity.retry_if_exception_type(KeyError), 2),
        (tenacity.retry_if_exception_message(match=".*again"), 2),
        (tenacity.retry_any(tenacity.retry_if_exception_type(KeyError), tenacity.retry_if_exception_type(OSError)), 3),
        (tenacity.retry_if_exception_type(KeyError) | tenacity.retry_if_exception_type(OSError), 3),
        (tenacity.retry_if_not_exception_type(ValueError), 3),
        (tenacity.retry_never, 1),
    ],
)
def test_on_says_which_failures_are_tried_again(on, tried):
    bench = Bench(retry(attempts=5, on=on), KeyError("again"), OSError("broken"), ValueError("no"))
    bench.run()
    assert len(bench.attempts) == tried


def test_an_own_predicate_made_of_tenacitys_base_is_asked_in_tenacitys_way():
    class Busy(tenacity.retry_base):
        def __call__(self, retry_state):
            return "busy" in str(retry_state.outcome.exception()) and retry_state.attempt_number < 3

    bench = Bench(retry(attempts=9, on=Busy()), *[KeyError("busy")] * 9)
    bench.run()
    assert len(bench.attempts) == 3


# --- when -------------------------------------------------------------------------------------------------------------


def test_by_default_waits_are_jittered_between_5_and_200_ms():
    bench = Bench(retry(attempts=40), *[lost] * 39)
    assert bench.run() == "done"
    waits = [b - a for a, b in zip(bench.times, bench.times[1:], strict=False)]
    assert all(FIRST_WAIT - 1e-9 <= wait <= LAST_WAIT + 1e-9 for wait in waits)
    assert waits[0] <= 3 * FIRST_WAIT + 1e-9
    assert max(waits) > 10 * FIRST_WAIT
    assert len({round(wait, 6) for wait in waits}) > 20


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (0, [0, 0, 0]),
        (0.5, [0.5, 0.5, 0.5]),
        (lambda state: state.attempt_number / 10, [0.1, 0.2, 0.3]),
        (tenacity.wait_fixed(2), [2, 2, 2]),
        (tenacity.wait_exponential(multiplier=0.1), [0.1, 0.2, 0.4]),
        (tenacity.wait_exponential_jitter(max=3, jitter=0), [1, 2, 3]),
        (tenacity.wait_fixed(1) + tenacity.wait_incrementing(start=0, increment=1), [1, 2, 3]),
        (tenacity.wait_chain(tenacity.wait_fixed(3), tenacity.wait_fixed(1)), [3, 1, 1]),
        (tenacity.wait_none(), [0, 0, 0]),
        (lambda state: -5, [0, 0, 0]),
    ],
)
def test_waits_can_be_given_as_numbers_functions_and_tenacitys(wait, expected):
    bench = Bench(retry(attempts=4, wait=wait), lost, lost, lost)
    assert bench.run() == "done"
    assert bench.waits == expected


def test_a_wait_may_look_at_the_error():
    class Busy(Exception):
        after = 0.7

    bench = Bench(retry(on=Busy, wait=lambda state: state.outcome.exception().after), Busy)
    bench.script = [Busy()]
    bench.run()
    assert bench.waits == [0.7]


@pytest.mark.parametrize(
    ("stop", "tried"),
    [
        (tenacity.stop_after_attempt(2), 2),
        (tenacity.stop_after_delay(2.5), 4),
        (tenacity.stop_before_delay(2.5), 3),
        (tenacity.stop_any(tenacity.stop_after_attempt(3), tenacity.stop_after_delay(100)), 3),
        (tenacity.stop_after_attempt(2) & tenacity.stop_after_delay(2.5), 4),
        (tenacity.stop_never, 9),
        (lambda state: state.attempt_number >= 2, 2),
    ],
)
def test_it_can_be_stopped_earlier(stop, tried):
    bench = Bench(retry(attempts=9, wait=1, stop=stop), *[lost] * 20)
    error = bench.run()
    assert len(bench.attempts) == tried
    assert error.verdict == (f"stop={stop!r}" if tried < 9 else "9 attempts were made")


def test_jittered_waits_of_tenacity_keep_their_bounds():
    bench = Bench(retry(attempts=9, wait=tenacity.wait_random_exponential(multiplier=0.1, max=2)), *[lost] * 8)
    assert bench.run() == "done"
    for n, (a, b) in enumerate(zip(bench.times, bench.times[1:], strict=False)):
        assert b - a <= min(2, 0.1 * 2**n) + 1e-9


def test_a_wait_is_not_asked_about_a_failure_that_is_not_tried_again():
    def impossible(state):
        raise AssertionError("asked")

    error = ValueError("x")
    assert Bench(retry(on=KeyError, wait=impossible), error).run() is error


def test_it_stops_when_the_deadline_would_pass_before_the_next_try():
    bench = Bench(retry(attempts=9, wait=1), *[lost] * 20)
    error = bench.run(left=2.5)
    assert isinstance(error, meshlib.ConnectionLost)
    assert error.verdict == "the deadline would pass first"
    assert bench.waits == [1, 1]


# --- the budget and the chain -----------------------------------------------------------------------------------------


def test_each_retry_is_charged_and_a_spent_budget_makes_the_failure_final():
    bench = Bench(retry(attempts=9), *[lost] * 20, budget=RetryBudget(0, 2, 1))
    error = bench.run()
    assert bench.attempts == [0, 1, 2]
    assert (error.retryable, error.verdict) == (False, "the retry budget is spent")
    assert bench.count("budget_exhausted") == 1


def test_what_is_refused_for_another_reason_is_not_charged():
    budget = RetryBudget(0, 2, 1)
    Bench(retry(attempts=2), meshlib.RemoteError("x"), budget=budget).run()
    Bench(retry(attempts=2, wait=5), lost, budget=budget).run(left=1)
    Bench(retry(attempts=1), lost, budget=budget).run()
    assert budget.balance(0.0) == 2


def test_a_call_that_serves_a_retry_is_not_retried_again():
    error = lost()
    bench = Bench(retry(), error, chained=True)
    assert bench.run() is error
    assert error.verdict == "this call serves a retry already"
    assert error.retryable
    assert bench.last_tries == [True]


def test_each_try_knows_its_number_and_whether_another_can_follow():
    bench = Bench(retry(attempts=3), lost, lost)
    bench.run(attempt=4)
    assert bench.attempts == [4, 5, 6]
    assert bench.last_tries == [False, False, True]


async def test_calls_made_while_a_retry_is_served_are_not_multiplied():
    served = {"front": [], "back": []}
    again = retry(3, on=meshlib.RemoteError, wait=0)

    async def back(request):
        served["back"].append(current().attempt)
        raise ValueError("broken")

    async def front(request):
        served["front"].append(current().attempt)
        return await onward(SAFE)

    async with (
        meshlib.mux.serve(back) as end,
        meshlib.mux.serve(front) as begin,
        meshlib.mux.client(end.address, again) as onward,
        meshlib.mux.client(begin.address, again) as caller,
    ):
        with pytest.raises(meshlib.RemoteError, match="3 attempts"):
            await caller(SAFE)
    assert served == {"front": [0, 1, 2], "back": [0, 1, 2, 0, 0]}


# --- cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "on", [None, BaseException, tenacity.retry_if_not_exception_type(KeyError), lambda error: True]
)
async def test_a_cancellation_is_never_retried(on):
    tries = []

    async def hang(request):
        tries.append(request)
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        scope.cancel()
        await (retry(on=on, wait=0) >> hang)(SAFE)
    assert scope.cancelled_caught
    assert len(tries) == 1


async def test_a_cancellation_of_a_later_try_is_not_retried_either():
    tries = []

    async def fail_then_hang(request):
        tries.append(request)
        if len(tries) == 1:
            raise lost()
        scope.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        await (retry(on=lambda error: True, wait=0) >> fail_then_hang)(SAFE)
    assert scope.cancelled_caught
    assert len(tries) == 2


def test_a_wait_can_be_cancelled():
    async def fail(request):
        raise lost()

    async def main():
        with anyio.move_on_after(3) as scope:
            await (retry(wait=5) >> fail)(SAFE)
        return scope.cancelled_caught, anyio.current_time()

    assert run_virtual(main) == (True, pytest.approx(3))


# --- decorating -------------------------------------------------------------------------------------------------------


async def test_it_decorates_any_function_whose_errors_are_named():
    tries = []

    @retry(attempts=3, on=OSError, wait=0)
    async def fetch(path: str, *, fresh: bool = False) -> str:
        tries.append(path)
        if len(tries) < 3:
            raise OSError("flaky")
        return f"{path} {fresh}"

    assert await fetch("/x", fresh=True) == "/x True"
    assert tries == ["/x"] * 3
    assert list(inspect.signature(fetch).parameters) == ["path", "fresh"]


async def test_the_calls_of_a_decorated_function_know_that_they_are_retries():
    attempts = []

    @retry(on=OSError, wait=0)
    async def fetch():
        attempts.append(current().attempt)
        if len(attempts) < 3:
            raise OSError("flaky")

    await fetch()
    assert attempts == [0, 1, 2]
    assert current().attempt == 0


# --- wrong parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"attempts": 0}, "give the number of tries in all, 1 or more"),
        ({"attempts": 1.5}, "give the number of tries in all"),
        ({"attempts": True}, "give the number of tries in all"),
        ({"wait": -1}, "give seconds, a backoff, or a function such as tenacity's waits"),
        ({"wait": "1"}, "give seconds"),
        ({"stop": 3}, "give a function such as tenacity's stops"),
        ({"on": "OSError"}, "give exception types, or a function of the error"),
        ({"on": (OSError, "KeyError")}, "give exception types, or a function of the error"),
        ({"on": int}, "give exception types, or a function of the error"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_told_at_construction(wrong, says):
    with pytest.raises(ConfigurationError, match=says):
        retry(**wrong)


def test_it_prints_its_terms():
    assert repr(retry()) == "retry(attempts=3, wait=5…200 ms)"
    assert repr(retry(5, on=OSError, wait=0.1)) == "retry(attempts=5, on=<class 'OSError'>, wait=0.1)"


# --- a server that asks to be left alone ------------------------------------------------------------------------------


def asking(seconds, kind=meshlib.ConnectionLost):
    error = kind("full")
    error.retry_after = seconds
    return error


@pytest.mark.parametrize("seconds", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("wait", [None, 1.0, tenacity.wait_fixed(1)], ids=["default", "fixed", "tenacity"])
def test_a_server_that_says_how_long_to_wait_is_obeyed_to_the_number(seconds, wait):
    bench = Bench(retry(wait=wait), asking(seconds))
    assert bench.run() == "done"
    assert bench.waits == [seconds]


def test_after_that_the_waits_begin_anew():
    bench = Bench(retry(4, wait=Exponential(0.1, 10)), asking(3.0), lost, lost)
    bench.run()
    assert bench.waits == [3.0, 0.2, 0.4]
    bench = Bench(retry(3), asking(3.0), lost)
    bench.run()
    assert FIRST_WAIT <= bench.times[2] - bench.times[1] <= 3 * FIRST_WAIT


def test_a_wait_that_would_outlast_the_deadline_is_not_begun():
    error = asking(2.0)
    bench = Bench(retry(), error)
    assert bench.run(left=1.0) is error
    assert bench.times == [0.0]
    assert error.verdict == "the deadline would pass first (the server asked for 2.000 s)"
    assert bench.budget.balance(0.0) == 100


def test_one_that_asks_never_to_be_asked_again_is_not():
    error = asking(-0.001)
    bench = Bench(retry(), error)
    assert bench.run() is error
    assert error.verdict == "the server asked not to be tried again"
    assert codes(bench) == [("no_retry", "pushback")]


def test_asking_for_time_makes_no_failure_retryable_that_is_not():
    error = asking(0.1, meshlib.RemoteError)
    bench = Bench(retry(), error)
    assert bench.run() is error
    assert codes(bench) == [("no_retry", "not_retryable")]


# --- what is told -----------------------------------------------------------------------------------------------------


def codes(bench):
    return [(decision.kind, decision.code) for decision in bench.record.decisions]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (lost, "lost"),
        (lambda: meshlib.AttemptTimeout("slow"), "timeout"),
        (lambda: meshlib.Rejected("full"), "refused"),
        (lambda: meshlib.RemoteError("broken", retryable=True), "failure"),
        (lambda: asking(0.0), "pushback"),
    ],
)
def test_a_retry_is_told_with_what_it_is_for(error, code):
    bench = Bench(retry(wait=0), error)
    bench.run()
    assert codes(bench) == [("retry", code)]
    assert bench.record.decisions[0].detail.startswith("try 2 of 3, 0 ms after ")


@pytest.mark.parametrize(
    ("layer", "script", "more", "code"),
    [
        (retry(2), [lost, lost], {}, "attempts"),
        (retry(), [lost], {"left": 0.001}, "deadline"),
        (retry(), [lost], {"request": Request()}, "not_idempotent"),
        (retry(), [lambda: meshlib.RemoteError("x")], {}, "not_retryable"),
        (retry(), [lambda: meshlib.RemoteError("x")], {"request": Request()}, "not_retryable"),
        (retry(stop=tenacity.stop_after_attempt(1)), [lost], {}, "stop"),
    ],
    ids=["attempts", "deadline", "not idempotent", "not retryable", "neither", "stop"],
)
def test_a_retry_that_is_not_made_is_told_with_the_reason(layer, script, more, code):
    bench = Bench(layer, *script)
    error = bench.run(**more)
    assert isinstance(error, meshlib.MeshError)
    assert codes(bench)[-1] == ("no_retry", code)
    assert "; the retry budget has 9" in bench.record.decisions[-1].detail or "100 left" in str(
        bench.record.decisions[-1]
    )


def test_a_spent_budget_and_a_chain_are_told():
    bench = Bench(retry(), lost, budget=RetryBudget(0, 0))
    bench.run()
    assert codes(bench) == [("no_retry", "budget")]
    bench = Bench(retry(), lost, chained=True)
    bench.run()
    assert codes(bench) == [("no_retry", "chain")]


def test_without_an_account_a_request_that_is_itself_a_retry_is_not_retried():
    async def main():
        tries = []

        @retry(3, on=OSError, wait=0)
        async def work():
            tries.append(current().attempt)
            raise OSError("again")

        with use(current().evolve(attempt=1)), pytest.raises(OSError, match="again") as caught:
            await work()
        return tries, caught.value.__notes__

    assert run_virtual(main) == ([1], ["meshlib: not retried: this call serves a retry already"])


async def test_the_error_of_a_client_carries_what_was_decided_and_stays_short():
    async def broken(request):
        raise ValueError("broken")

    async with (
        meshlib.mux.serve(broken) as server,
        meshlib.mux.client(server.address, retry(2, on=meshlib.RemoteError, wait=0)) as client,
    ):
        with pytest.raises(meshlib.RemoteError) as caught:
            await client(SAFE)
        counts = client.metrics()
    error = caught.value
    assert [(d.kind, d.code, d.endpoint) for d in error.decisions] == [
        ("retry", "failure", server.address),
        ("no_retry", "attempts", server.address),
    ]
    assert "left" in error.decisions[1].detail
    assert "left" not in str(error)
    assert str(error).endswith("not retried: 2 attempts were made]")
    assert (counts["decisions/retry/failure"], counts["decisions/no_retry/attempts"]) == (1, 1)


# --- the budget, with no requeues below -------------------------------------------------------------------------------


async def test_a_decorated_function_pays_in_for_its_successes():
    layer = retry(2, on=OSError, wait=0)
    calls = []

    @layer
    async def work(fails):
        calls.append(fails)
        if fails and len(calls) % 2:
            raise OSError

    budget = layer._budget
    for _ in range(50):
        await work(False)
    now = layer._env.clock.now()
    assert budget.balance(now) == 110
    calls.clear()
    for _ in range(10):
        await work(True)
    assert len(calls) == 20
    assert budget.balance(now) == 110 + 2 - 10
    assert (budget.turns.calls, budget.turns.taken) == (0, 0)


def test_retries_under_way_are_ten_when_all_calls_have_failed_and_the_rest_waits():
    async def main():
        layer = retry(2, on=OSError, wait=0)
        failed, most = set(), 0

        @layer
        async def work(n):
            nonlocal most
            if n not in failed:
                failed.add(n)
                raise OSError
            most = max(most, layer._budget.turns.taken)
            await anyio.sleep(1)

        async with anyio.create_task_group() as group:
            for n in range(100):
                group.start_soon(work, n)
        turns = layer._budget.turns
        assert (turns.calls, turns.taken, turns.waiting) == (0, 0, 0)
        return most, anyio.current_time()

    most, took = run_virtual(main)
    assert most == 10
    assert took == pytest.approx(10, abs=1)


@pytest.mark.parametrize("after", [0.05, 0.5, 1.5])
def test_a_cancelled_retry_gives_its_turn_back(after):
    async def main():
        layer = retry(2, on=OSError, wait=0.1)

        @layer
        async def work(tries):
            tries.append(1)
            if len(tries) == 1:
                raise OSError
            await anyio.sleep(1)

        turns = layer._budget.turns
        turns.least, turns.share = 1, 0
        with anyio.move_on_after(after):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(work, [])
        assert (turns.calls, turns.taken, turns.waiting) == (0, 0, 0)

    run_virtual(main)


# --- backoffs ---------------------------------------------------------------------------------------------------------


def test_a_backoff_says_how_long_to_wait():
    bench = Bench(retry(5, wait=Exponential(0.1, 0.35)), lost, lost, lost, lost)
    assert bench.run() == "done"
    assert bench.waits == [0.1, 0.2, 0.35, 0.35]
    assert "wait=Exponential(first=0.1, last=0.35)" in repr(bench.layer)
