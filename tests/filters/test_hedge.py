"""Hedges: what is slow is sent once more, elsewhere; the first success wins, and the loser counts for nothing."""

import contextlib
import random

import anyio
import pytest

import meshlib
from meshlib import mux
from meshlib.core.classify import ResponseClass
from meshlib.core.clock import Clock
from meshlib.core.context import EMPTY, CallRecord, current, use
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError
from meshlib.core.events import Decisions
from meshlib.core.supervisor import Supervisor
from meshlib.filters.budget import RetryBudget
from meshlib.filters.hedge import ENOUGH, Hedge, hedge
from meshlib.filters.retry import retry
from meshlib.mux import Request, Response
from meshlib.telemetry.metrics import Registry
from meshlib.testing import Network, run_virtual

SAFE = Request(idempotent=True)
USUAL = 0.1
"""Seconds that the service takes when it is told nothing."""


class Bench:
    """A hedge that has learnt what is usual, over a service that does what it is told, in virtual time."""

    def __init__(self, layer=None, *, learn=200, usual=USUAL, budget=None, classifier=None, seed=3):
        self.layer = layer or hedge(0.05)
        self.learn, self.usual, self.budget, self.classifier = learn, usual, budget, classifier
        self.registry = Registry()
        self.rng = random.Random(seed)
        self.script = []
        self.log, self.contexts = [], []
        self.record = None
        self.under_way = 0

    async def serve(self, request):
        """Steps are ``(seconds, outcome)``; an exception is raised, anything else is the reply."""
        seconds, outcome = self.script.pop(0) if self.script else (self.usual, "done")
        self.contexts.append(current())
        record = current().record
        n = len(self.log)
        if record is not None:
            record.endpoint = f"host{n}"
        self.log.append([anyio.current_time(), "under way", None if record is None else record.tried])
        self.under_way += 1
        try:
            await anyio.sleep(seconds)
            if isinstance(outcome, BaseException):
                raise outcome
            self.log[n][1] = "answered"
            return outcome
        except Exception as error:
            self.log[n][1] = "failed"
            if record is not None:
                record.failed(error)
            raise
        except BaseException:
            self.log[n][1] = "cancelled"
            raise
        finally:
            self.under_way -= 1

    def run(self, body):
        """``await body(call)``, after the hedge has learnt."""

        async def main():
            more = {"classifier": self.classifier} if self.classifier else {}
            clock = Clock()
            supervisor = Supervisor()
            events = Decisions(clock, self.registry)
            env = Env(metrics=self.registry, rng=self.rng, clock=clock, supervisor=supervisor, events=events, **more)
            self.env = env
            self.budget = env.params[RetryBudget] = self.budget or RetryBudget()
            service = self.layer.build(env, self.serve)
            self.hedge = service.func.__self__
            for _ in range(self.learn):
                with use(EMPTY.evolve(record=CallRecord(anyio.current_time()))):
                    await service(SAFE)
            self.log.clear()
            self.record = CallRecord(anyio.current_time())
            with use(EMPTY.evolve(record=self.record)):
                result = await body(service)
            assert self.under_way == 0, "a copy outlived its call"
            assert self.budget.turns.taken == 0, "a turn was not given back"
            assert all(race.done for race in self.hedge._line), "a call is over, and its hour would still come"
            await supervisor.aclose()
            return result

        return run_virtual(main)

    def call(self, *script, request=SAFE, left=None):
        async def body(service):
            self.script = list(script)
            self.started = anyio.current_time()
            try:
                if left is None:
                    return await service(request)
                with meshlib.deadline(left):
                    return await service(request)
            except Exception as error:
                return error
            finally:
                self.took = anyio.current_time() - self.started
                await anyio.sleep(0.01)  # for whoever was cancelled to be gone

        return self.run(body)

    @property
    def outcomes(self):
        return [outcome for _, outcome, _ in self.log]

    @property
    def codes(self):
        return [(decision.kind, decision.code) for decision in self.record.decisions]


# --- when a copy is sent ----------------------------------------------------------------------------------------------


def test_a_call_that_takes_longer_than_nearly_all_is_sent_again_and_the_quicker_reply_is_its_own():
    bench = Bench()
    assert bench.call((5, "slow"), (0.02, "quick")) == "quick"
    assert bench.outcomes == ["cancelled", "answered"]
    sent = bench.log[1][0] - bench.started
    assert USUAL < sent < USUAL * 1.05
    assert bench.took == pytest.approx(sent + 0.02)
    assert bench.codes == [("hedge", "slow")]
    assert bench.record.decisions[0].endpoint == "host0"
    counts = bench.registry.snapshot()
    assert (counts["hedges/sent"], counts["hedges/won"], counts["decisions/hedge/slow"]) == (1, 1, 1)
    assert USUAL * 1e3 < counts["hedges/after_ms"] < USUAL * 1.05e3


def test_the_copy_knows_where_the_first_went_and_the_account_ends_with_the_winner():
    bench = Bench()
    assert bench.call((5, "slow"), (0.02, "quick")) == "quick"
    assert [tried for _, _, tried in bench.log] == [(), ("host0",)]
    assert (bench.record.endpoint, bench.record.attempts, bench.record.retries) == ("host1", (), 1)


def test_the_first_may_still_win_and_then_the_copy_is_cancelled():
    bench = Bench()
    assert bench.call((0.15, "first"), (5, "copy")) == "first"
    assert bench.outcomes == ["answered", "cancelled"]
    assert bench.took == pytest.approx(0.15)
    assert bench.record.endpoint == "host0"
    assert bench.registry.snapshot()["hedges/won"] == 0


class Together(Bench):
    """Once it has learnt, all copies of a call are answered in one moment, each with its number."""

    moment = None

    async def serve(self, request):
        if self.moment is None:
            return await super().serve(request)
        n = len(self.log)
        current().record.endpoint = f"host{n}"
        self.log.append((anyio.current_time(), "answered", ()))
        await self.moment.wait()
        return n

    async def come(self):
        await anyio.sleep(0.5)
        self.moment.set()

    def play(self):
        async def body(service):
            self.moment = anyio.Event()
            self.env.supervisor.start(self.come)
            try:
                return await service(SAFE)
            finally:
                await anyio.sleep(0.01)

        return self.run(body)


def test_when_both_are_answered_in_one_moment_the_copy_has_won_only_if_its_reply_is_the_calls():
    for _ in range(20):  # it is chance whose reply it is
        bench = Together()
        reply = bench.play()
        counts = bench.registry.snapshot()
        assert (counts["hedges/sent"], counts["hedges/won"]) == (1, reply)
        assert bench.record.endpoint == f"host{reply}"


def test_a_call_that_is_not_slow_is_sent_once():
    bench = Bench()
    assert bench.call((USUAL, "done")) == "done"
    assert bench.outcomes == ["answered"]
    assert bench.codes == []


def test_a_call_that_is_not_idempotent_is_sent_once_however_slow():
    bench = Bench()
    assert bench.call((5, "done"), request=Request()) == "done"
    assert bench.outcomes == ["answered"]
    assert bench.codes == []


@pytest.mark.parametrize("samples", [0, 1, ENOUGH - 1])
def test_without_enough_samples_nothing_is_sent_twice(samples):
    """Finagle hedges after 1 ms for as long as its histogram is empty."""
    bench = Bench(hedge(0.5), learn=samples)
    assert bench.call((5, "done")) == "done"
    assert bench.outcomes == ["answered"]
    assert bench.registry.snapshot()["hedges/after_ms"] == 0


def test_a_share_of_one_per_mille_needs_a_thousand_samples():
    slow = [(5, "slow"), (0.002, "quick")]
    assert Bench(hedge(0.001), learn=999, usual=0.009).call(*slow) == "slow"
    assert Bench(hedge(0.001), learn=1100, usual=0.009).call(*slow) == "quick"


def test_after_a_silence_it_learns_anew():
    bench = Bench()

    async def body(service):
        await anyio.sleep(60)
        bench.script = [(5, "slow"), (0.02, "quick")]
        return await service(SAFE)

    assert bench.run(body) == "slow"
    assert bench.outcomes == ["answered"]


def test_beyond_keeps_it_from_what_is_merely_the_slowest_of_the_usual():
    bench = Bench(hedge(0.05, beyond=3))
    assert bench.call((USUAL * 2.5, "first"), (0.02, "copy")) == "first"
    assert bench.outcomes == ["answered"]
    bench = Bench(hedge(0.05, beyond=3))
    assert bench.call((USUAL * 30, "first"), (0.02, "copy")) == "copy"
    assert USUAL * 3 < bench.took < USUAL * 3.5


def test_a_healthy_service_is_sent_nothing_twice_beyond_three_medians():
    bench = Bench(hedge(0.05, beyond=3))

    async def body(service):
        for _ in range(2000):
            bench.script = [(bench.rng.lognormvariate(-2.3, 0.15), "done")]
            assert await service(SAFE) == "done"

    bench.run(body)
    assert bench.registry.snapshot()["hedges/sent"] == 0


# --- the deadline -----------------------------------------------------------------------------------------------------


def test_no_copy_is_sent_that_could_not_answer_before_the_deadline():
    bench = Bench()
    assert bench.call((0.3, "slow"), (0.02, "quick"), left=USUAL * 1.5) == "slow"
    assert bench.outcomes == ["answered"]


def test_the_deadline_counts_when_the_copy_is_due_as_well():
    """What is usual may have become longer since the call began."""
    bench = Bench()

    async def body(service):
        bench.script = [(0.24, "slow"), (0.02, "quick")]

        async def grow():
            await anyio.sleep(USUAL / 2)
            bench.hedge._median = USUAL * 3

        async with anyio.create_task_group() as group:
            group.start_soon(grow)
            with use(current().evolve(deadline=anyio.current_time() + USUAL * 2.5)):
                return await service(SAFE)

    assert bench.run(body) == "slow"
    assert bench.codes == [("no_hedge", "deadline")]


def test_the_copy_runs_under_the_context_of_the_call():
    bench = Bench()

    async def body(service):
        bench.contexts.clear()
        bench.script = [(5, "slow"), (0.02, "quick")]
        at = anyio.current_time() + 2
        with use(current().evolve(client_id="me", deadline=at, attempt=1)) as context:
            assert await service(SAFE) == "quick"
            assert current() is context
        first, copy = bench.contexts
        assert first is context
        assert copy == context.evolve(record=copy.record)
        assert copy.record is not bench.record

    bench.run(body)


# --- the budgets ------------------------------------------------------------------------------------------------------


def test_no_more_than_the_share_is_sent_twice_however_slow_everything_becomes():
    bench = Bench(hedge(0.05), learn=100)

    async def body(service):
        async with anyio.create_task_group() as group:
            for _ in range(900):
                bench.script.append((USUAL * 3, "slow"))
                group.start_soon(service, SAFE)
                await anyio.sleep(0.01)

    bench.run(body)
    counts = bench.registry.snapshot()
    assert 0 < counts["hedges/sent"] <= 0.05 * 1000
    assert counts["decisions/no_hedge/extra_load"] > 0


def test_the_clients_budget_must_allow_it_as_well():
    bench = Bench(budget=RetryBudget(0, 0))
    assert bench.call((5, "slow"), (0.02, "quick")) == "slow"
    assert bench.codes == [("no_hedge", "budget")]
    assert "the retry budget is spent" in bench.record.decisions[0].detail


def test_a_turn_must_be_free_and_a_hedge_does_not_wait_for_one():
    budget = RetryBudget(min_concurrency=1)
    bench = Bench(budget=budget)
    budget.turns.taken = 1

    async def body(service):
        bench.script = [(5, "slow"), (0.02, "quick")]
        try:
            return await service(SAFE)
        finally:
            budget.turns.taken -= 1

    assert bench.run(body) == "slow"
    assert bench.codes == [("no_hedge", "budget")]
    assert budget.balance(1e9) == 100


def test_a_hedge_is_charged_to_both():
    bench = Bench(usual=0.01)
    assert bench.call((0.04, "slow"), (0.02, "quick")) == "quick"
    now = bench.started + bench.took
    assert bench.budget.balance(now) == RetryBudget().balance(now) - 1
    assert bench.hedge._load.balance(now) == (200 + 1) * 5 // 100 - 1


def test_a_call_that_waits_for_an_endpoint_is_not_sent_twice():
    bench = Bench()

    async def body(service):
        async def wait(request):
            await anyio.sleep(1)
            return "at last"

        waiting = bench.layer.build(bench.env, wait)
        waiting.func.__self__._latencies = bench.hedge._latencies
        return await waiting(SAFE)

    assert bench.run(body) == "at last"
    assert bench.codes == [("no_hedge", "unsent")]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_before_the_copy_is_due_comes_up_at_once():
    error = meshlib.ConnectionLost("cut")
    bench = Bench()
    assert bench.call((0.01, error)) is error
    assert bench.took == pytest.approx(0.01)
    assert bench.outcomes == ["failed"]


def test_an_error_of_the_first_waits_for_the_copy():
    bench = Bench()
    assert bench.call((0.15, meshlib.ConnectionLost("cut")), (0.2, "copy")) == "copy"
    assert bench.outcomes == ["failed", "answered"]


def test_when_both_fail_the_first_error_is_raised_and_the_account_has_both():
    first, second = meshlib.ConnectionLost("first"), meshlib.RemoteError("second")
    for one, two in ((0.15, 0.2), (0.4, 0.1)):
        bench = Bench()
        assert bench.call((one, first), (two, second)) is first
        assert {attempt.endpoint for attempt in bench.record.attempts} == {"host0", "host1"}
        assert set(bench.record.tried) == {"host0", "host1"}


def test_a_reply_that_the_classifier_calls_a_failure_does_not_win():
    def strict(request, reply, error):
        return ResponseClass.FAILURE if reply == "error" else ResponseClass.SUCCESS

    bench = Bench(classifier=strict)
    assert bench.call((0.3, "good"), (0.01, "error")) == "good"
    bench = Bench(classifier=strict)
    assert bench.call((0.15, "error"), (0.2, "good")) == "good"
    bench = Bench(classifier=strict)
    assert bench.call((0.15, "error"), (0.2, "error")) == "error"


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_failures_are_not_taken_for_quick_replies():
    bench = Bench()

    async def body(service):
        for _ in range(500):
            bench.script = [(0.001, meshlib.RemoteError("x"))]
            with pytest.raises(meshlib.RemoteError):
                await service(SAFE)
        await anyio.sleep(1)
        await service(SAFE)
        return bench.hedge._delay

    assert bench.run(body) > USUAL


def test_what_ran_out_of_time_counts_with_the_time_it_had():
    bench = Bench(hedge(0.05), learn=0)

    async def body(service):
        async def attempt():
            bench.script.append((1.0, meshlib.AttemptTimeout("late")))
            with pytest.raises(meshlib.AttemptTimeout):
                await service(SAFE)

        async def whole():
            bench.script.append((5, "slow"))
            with use(current().evolve(deadline=anyio.current_time() + 1.2)), anyio.move_on_after(1.2):
                await service(SAFE)

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(attempt)
                group.start_soon(whole)
        await anyio.sleep(1)
        await service(SAFE)
        return bench.hedge._latencies.quantiles(0.4, 0.9)

    attempts, whole = bench.run(body)
    assert 1.0 <= attempts < 1.04
    assert 1.2 <= whole < 1.25


def test_the_superseded_count_as_slow_so_that_hedging_does_not_draw_in_its_own_threshold():
    bench = Bench(hedge(0.1), learn=0)

    async def body(service):
        delays = []
        for i in range(4000):
            bench.script = [(2.0 if i % 20 == 0 else bench.rng.uniform(0.05, 0.1), "x"), (0.05, "y")]
            with use(EMPTY.evolve(record=CallRecord(anyio.current_time()))):
                await service(SAFE)
            delays.append(bench.hedge._delay)
        return delays

    delays = bench.run(body)
    assert min(delays[500:]) > 0.08
    assert max(delays[500:]) < 0.13


# --- cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.01, 0.12, 0.15])
def test_a_cancelled_call_takes_its_copy_with_it(after):
    bench = Bench()

    async def body(service):
        bench.script = [(5, "slow"), (5, "slow")]
        with anyio.move_on_after(after) as scope:
            await service(SAFE)
        await anyio.sleep(0.01)
        return scope.cancelled_caught

    assert bench.run(body)
    assert set(bench.outcomes) == {"cancelled"}
    assert len(bench.outcomes) == (1 if after < USUAL else 2)


def test_a_call_cancelled_while_it_waits_for_its_copy_after_an_error_ends_at_once():
    bench = Bench()

    async def body(service):
        bench.script = [(0.15, meshlib.ConnectionLost("cut")), (5, "slow")]
        with anyio.move_on_after(0.2) as scope:
            await service(SAFE)
        await anyio.sleep(0.01)
        return scope.cancelled_caught

    assert bench.run(body)
    assert bench.outcomes == ["failed", "cancelled"]


@pytest.mark.parametrize("seed", range(5))
def test_a_storm_leaves_nothing_behind(seed):
    bench = Bench(hedge(0.5), budget=RetryBudget(1.0, 100), seed=seed)

    async def body(service):
        rng = bench.rng

        async def one():
            bench.script.append((rng.expovariate(8), rng.choice(["x", meshlib.ConnectionLost("cut")])))
            with anyio.move_on_after(rng.expovariate(4)):
                with contextlib.suppress(meshlib.ConnectionLost):
                    await service(SAFE)

        async with anyio.create_task_group() as group:
            for _ in range(500):
                group.start_soon(one)
                await anyio.sleep(rng.expovariate(200))
        await anyio.sleep(0.01)

    bench.run(body)
    assert bench.registry.snapshot()["hedges/sent"] > 50


def test_closing_the_client_ends_copies_and_the_timer():
    bench = Bench()

    async def body(service):
        bench.script = [(0.5, meshlib.ConnectionLost("cut")), (5, "slow")]
        async with anyio.create_task_group() as group:

            async def call():
                with pytest.raises(meshlib.ConnectionLost):
                    await service(SAFE)

            group.start_soon(call)
            await anyio.sleep(0.2)
            await bench.env.supervisor.aclose()
        return bench.env.supervisor.jobs

    assert bench.run(body) == 0
    assert bench.outcomes == ["failed", "cancelled"]


def test_the_timer_ends_when_there_are_no_calls_and_comes_back_with_them():
    bench = Bench()

    async def body(service):
        busy = bench.env.supervisor.jobs
        await anyio.sleep(3)
        idle = bench.env.supervisor.jobs
        bench.script = [(5, "slow"), (0.02, "quick")]
        return busy, idle, await service(SAFE)

    assert bench.run(body) == (1, 0, "quick")


# --- in the whole stack -----------------------------------------------------------------------------------------------


def test_in_a_client_the_copy_goes_to_another_server_and_the_loser_is_discarded_on_the_wire():
    async def main():
        network = Network()
        slow, cancelled, done = set(), [], []

        def handler(address):
            async def work(request):
                try:
                    await anyio.sleep(3 if address in slow else 0.02)
                    done.append(address)
                    return Response(address.encode())
                except anyio.get_cancelled_exc_class():
                    cancelled.append(address)
                    raise

            return work

        addresses = [f"10.0.0.{i}:80" for i in range(3)]
        servers = [mux.serve(handler(address), address) for address in addresses]
        for address, server in zip(addresses, servers, strict=True):
            network.listen(server, address)
        client = network.client(",".join(addresses), hedge(0.05), seed=1)
        async with client:
            for _ in range(300):
                await client(SAFE)
            slow.add(addresses[0])
            for _ in range(60):
                started = anyio.current_time()
                reply = await client(SAFE)
                assert reply.body.decode() != addresses[0]
                assert anyio.current_time() - started < 0.1
            await anyio.sleep(0.1)
            counts = client.metrics()
        assert set(cancelled) == {addresses[0]}
        assert len(cancelled) == counts["hedges/won"] == counts["hedges/sent"] > 0
        assert counts["failures"] == 0
        assert counts["success"] == counts["requests"] == 360
        endpoint = f"endpoints/{addresses[0]}"
        assert counts[f"{endpoint}/cancelled"] == len(cancelled)
        assert counts[f"{endpoint}/failures"] == 0
        for server in servers:
            await server.aclose()

    run_virtual(main)


def test_below_a_retry_each_try_may_be_hedged_and_later_tries_avoid_all_endpoints():
    bench = Bench()

    async def body(service):
        bench.script = [(0.15, meshlib.ConnectionLost("a")), (0.1, meshlib.ConnectionLost("b")), (0.01, "done")]
        return await retry(3, wait=0).build(bench.env, service)(SAFE)

    assert bench.run(body) == "done"
    assert [tried for _, _, tried in bench.log] == [(), ("host0",), ("host0", "host1")]
    assert [attempt.endpoint for attempt in bench.record.attempts] == ["host0", "host1"]
    assert bench.codes == [("hedge", "slow"), ("retry", "lost")]


# --- composed and decorating ------------------------------------------------------------------------------------------


def test_it_decorates_a_function_and_composes_each_with_latencies_of_its_own():
    async def main():
        twice = hedge(0.05)
        calls = {"a": 0, "b": 0}

        @twice
        async def a(seconds=0.01):
            calls["a"] += 1
            await anyio.sleep(seconds if calls["a"] % 2 else 0.01)
            return calls["a"]

        async def b(request):
            calls["b"] += 1
            await anyio.sleep(0.5 if calls["b"] < 500 else 3)
            return calls["b"]

        composed = hedge(0.05) >> twice >> b
        for _ in range(200):
            await a()
        started = anyio.current_time()
        assert await a(5) == 202
        assert anyio.current_time() - started < 0.1
        assert await composed(SAFE) == 1
        return calls

    assert run_virtual(main) == {"a": 202, "b": 1}


async def test_a_decorated_function_is_hedged_on_every_event_loop():
    script = []

    @hedge(0.5)
    async def work():
        await anyio.sleep(script.pop() if script else 0.001)
        return "done"

    for _ in range(30):
        await work()
    await anyio.sleep(0.11)  # so that it looks again
    await work()
    await anyio.sleep(0.01)  # its copy may have been sent, and is gone by now
    script.append(30)
    with anyio.fail_after(5):
        assert await work() == "done"
    assert script == []


def test_a_decorated_function_may_be_called_on_one_event_loop_after_another():
    delays = []

    @hedge(0.5)
    async def work(seconds=(0.02,)):
        await anyio.sleep(seconds[0])
        seconds[:] = seconds[1:] or seconds
        return "done"

    async def main():
        for _ in range(60):
            await work([0.02])
        started = anyio.current_time()
        assert await work([10, 0.02]) == "done"
        delays.append(anyio.current_time() - started)

    for _ in range(2):
        run_virtual(main)
    assert all(delay < 10.1 for delay in delays)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"extra_load": 0}, "give a share above 0, such as 0.01 for 1 %"),
        ({"extra_load": -0.1}, "give the share of calls that may be sent twice"),
        ({"extra_load": 1.5}, "give the share of calls that may be sent twice"),
        ({"extra_load": True}, "give the share of calls that may be sent twice"),
        ({"extra_load": "1%"}, "give the share of calls that may be sent twice"),
        ({"beyond": -1}, "give how many medians a call must have taken"),
        ({"beyond": float("nan")}, "give how many medians a call must have taken"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_told_at_construction(wrong, says):
    with pytest.raises(ConfigurationError, match=says):
        hedge(**wrong)


def test_it_prints_as_it_is_typed():
    assert repr(hedge()) == "hedge(extra_load=0.01)"
    assert repr(hedge(0.02, beyond=3)) == "hedge(extra_load=0.02, beyond=3)"
    assert isinstance(hedge(), Hedge)
