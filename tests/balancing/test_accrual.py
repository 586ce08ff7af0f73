"""Failure accrual: an endpoint that keeps failing is out, one request asks it again, and nothing is ever refused."""

import contextlib

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshlib
from meshlib import Call, Status, deadline, failure_accrual
from meshlib.balancing.accrual import FailureAccrual
from meshlib.core.backoff import Exponential
from meshlib.core.classify import ResponseClass
from meshlib.core.errors import ConfigurationError, ConnectionLost, Rejected
from meshlib.core.events import Decisions
from meshlib.testing import run_virtual
from tests import breaking
from tests.balancing.fakes import make_env
from tests.breaking import Model


class Endpoint:
    """One endpoint with failure accrual; ``outcome`` is what its calls end with, at once or when ``gate`` opens."""

    def __init__(self, layer=None, **env):
        self.env = make_env(**env)
        self.env = self.env.evolve(events=Decisions(self.env.clock, self.env.metrics))
        self.told = []
        self.env.events.listen(lambda decision: self.told.append((decision.kind, decision.code)))
        self.outcome, self.gate, self.calls = None, None, 0
        self.service = (layer or failure_accrual()).build(self.env, self.serve)

    async def serve(self, request):
        self.calls += 1
        outcome, gate = self.outcome, self.gate
        if gate is not None:
            await gate.wait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def call(self, outcome=None):
        self.outcome = outcome
        try:
            return await self.service("request")
        except Exception as error:
            if error is not outcome:
                raise
            return None

    async def fail(self, times, error=None):
        for _ in range(times):
            await self.call(error or ValueError("wrong"))

    def numbers(self):
        names = ("removals", "revivals", "probes", "removed_for_ms")
        return tuple(self.env.metrics.snapshot()[f"failure_accrual/{name}"] for name in names)

    @property
    def health(self):
        return self.env.health

    async def close(self):
        for closer in self.env.closers:
            closer()
        await anyio.lowlevel.checkpoint()
        with anyio.fail_after(1):
            await self.env.supervisor.join()
        assert self.env.supervisor.jobs == 0


def virtual(test):
    """Run an async test of one endpoint in virtual time, and see that no timer outlives it."""

    def around(*layer, **env):
        async def main():
            endpoint = Endpoint(*layer, **env)
            await test(endpoint)
            await endpoint.close()

        run_virtual(main)

    return around


def test_five_failures_in_a_row_take_it_out_and_a_probe_brings_it_back():
    @virtual
    async def check(endpoint):
        await endpoint.fail(4)
        await endpoint.call("reply")
        await endpoint.fail(1)
        assert endpoint.health.status is Status.BUSY, "5 of 6 failed"
        assert endpoint.health.reason == (
            "accrual: 1 of 6 succeeded within 30 s, below 80 %: ValueError: wrong; next probe in 5.0 s"
        )
        assert endpoint.health.serves
        await anyio.sleep(4.9)
        assert endpoint.health.status is Status.BUSY
        await anyio.sleep(0.2)
        assert endpoint.health.status is Status.OPEN
        assert await endpoint.call("reply") == "reply"
        assert endpoint.health.status is Status.OPEN
        assert endpoint.numbers() == (1, 1, 1, 5100)
        assert endpoint.told == [("eject", "success_rate"), ("probe", "accrual"), ("revive", "accrual")]

    check()


def test_by_failures_in_a_row_alone():
    @virtual
    async def check(endpoint):
        for _ in range(10):
            await endpoint.fail(2)
            await endpoint.call("reply")
        assert endpoint.health.status is Status.OPEN
        await endpoint.fail(3)
        assert endpoint.health.reason == "accrual: 3 failures in a row: ValueError: wrong; next probe in 7.0 s"

    check(failure_accrual(failures=3, success_rate=None, out_for=(7, 70)))


def test_exactly_one_request_is_the_probe_and_the_others_are_served_without_being_counted():
    @virtual
    async def check(endpoint):
        await endpoint.fail(5)
        await anyio.sleep(6)
        endpoint.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(endpoint.call, "probe")
            await anyio.wait_all_tasks_blocked()
            assert endpoint.health.status is Status.BUSY, "from the moment it was taken"
            assert endpoint.health.reason.endswith("a probe is under way")
            assert endpoint.health.serves
            gate, endpoint.gate = endpoint.gate, None
            await endpoint.fail(20)
            assert await endpoint.call("served") == "served"
            assert endpoint.health.status is Status.BUSY, "nothing but the probe decides"
            gate.set()
        assert endpoint.health.status is Status.OPEN
        assert endpoint.numbers()[:3] == (1, 1, 1)

    check()


def test_a_probe_that_fails_means_a_longer_wait():
    @virtual
    async def check(endpoint):
        await endpoint.fail(5)
        out = []
        for _ in range(4):
            before = anyio.current_time()
            while endpoint.health.status is Status.BUSY:  # noqa: ASYNC110
                await anyio.sleep(0.1)
            out.append(round(anyio.current_time() - before))
            await endpoint.fail(1)
            assert "the probe failed: ValueError: wrong" in endpoint.health.reason
        assert out == [5, 10, 20, 40]
        assert endpoint.numbers()[:3] == (1, 0, 4)
        assert endpoint.told.count(("eject", "probe")) == 4

    check(failure_accrual(out_for=Exponential(5, 40)))


@pytest.mark.parametrize("outcome", [Rejected("never left"), None], ids=["never left", "cancelled"])
def test_a_probe_that_says_nothing_decides_nothing(outcome):
    @virtual
    async def check(endpoint):
        await endpoint.fail(5)
        await anyio.sleep(6)
        if outcome is None:
            endpoint.gate = anyio.Event()
            with anyio.move_on_after(1):
                await endpoint.service("request")
            endpoint.gate = None
        else:
            await endpoint.call(outcome)
        assert endpoint.health.status is Status.OPEN, "the next request is the probe"
        assert endpoint.numbers()[:3] == (1, 0, 1)
        await endpoint.fail(1)
        assert endpoint.health.status is Status.BUSY
        assert endpoint.numbers()[:3] == (1, 0, 2)

    check()


def test_a_refused_probe_has_failed():
    @virtual
    async def check(endpoint):
        await endpoint.fail(5)
        await anyio.sleep(6)
        await endpoint.call(breaking.too_busy())
        assert endpoint.health.status is Status.BUSY

    check()


def test_stragglers_change_nothing():
    @virtual
    async def check(endpoint):
        endpoint.gate = gate = anyio.Event()
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(endpoint.call, "late success")
            await anyio.wait_all_tasks_blocked()
            endpoint.gate = None
            await endpoint.fail(5)
            gate.set()
        assert endpoint.health.status is Status.BUSY, "a success of before does not revive"
        endpoint.gate = gate = anyio.Event()
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(endpoint.call, ValueError("sent while it was out"))
            await anyio.wait_all_tasks_blocked()
            endpoint.gate = None
            await anyio.sleep(6)
            await endpoint.call("probe")
            gate.set()
        assert endpoint.health.status is Status.OPEN, "and a failure of before does not count"

    check()


def test_a_deadline_that_passes_is_a_failure_and_a_change_of_mind_is_none():
    @virtual
    async def check(endpoint):
        endpoint.gate = anyio.Event()
        for _ in range(50):
            with anyio.move_on_after(1):
                await endpoint.service("request")
        assert endpoint.health.status is Status.OPEN
        for _ in range(5):
            with deadline(1), anyio.move_on_after(1):
                await endpoint.service("request")
        assert endpoint.health.status is Status.BUSY
        assert "no reply before the deadline" in endpoint.health.reason

    check()


def test_one_lost_connection_is_one_failure_for_all_who_were_on_it():
    @virtual
    async def check(endpoint):
        for _ in range(100):
            await endpoint.call("reply")
        endpoint.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(endpoint.call, ConnectionLost("reset"))
            await anyio.wait_all_tasks_blocked()
            endpoint.gate.set()
        assert endpoint.health.status is Status.OPEN

    check()


def test_replies_that_the_classifier_calls_failures_count():
    @virtual
    async def check(endpoint):
        for _ in range(5):
            await endpoint.call("500")
        assert "a reply that is a failure" in endpoint.health.reason
        await anyio.sleep(6)
        await endpoint.call("200")
        assert endpoint.health.status is Status.OPEN

    check(classifier=lambda request, reply, error: ResponseClass.FAILURE if reply == "500" else ResponseClass.SUCCESS)


def test_who_asks_to_be_left_alone_is_probed_no_sooner():
    @virtual
    async def check(endpoint):
        refusal = breaking.too_busy()
        refusal.retry_after = 60.0
        await endpoint.fail(5, refusal)
        await anyio.sleep(59)
        assert endpoint.health.status is Status.BUSY
        await anyio.sleep(2)
        assert endpoint.health.status is Status.OPEN

    check()


def test_an_endpoint_that_is_removed_while_it_is_out_leaves_no_timer():
    async def main():
        endpoint = Endpoint()
        await endpoint.fail(5)
        assert endpoint.env.supervisor.jobs == 1
        await endpoint.close()
        await endpoint.fail(50)
        assert endpoint.env.supervisor.jobs == 0, "its last requests start none either"

    run_virtual(main)


def test_a_request_that_comes_when_the_wait_is_over_and_before_its_timer_is_the_probe():
    @virtual
    async def check(endpoint):
        layer = FailureAccrual(failure_accrual().thresholds, failure_accrual().backoff, endpoint.env)
        service = layer.bind(endpoint.serve)
        endpoint.outcome = ValueError("wrong")
        for _ in range(5):
            with pytest.raises(ValueError, match="wrong"):
                await service("request")
        layer.circuit.until -= 1
        await anyio.sleep(4.5)
        endpoint.outcome = "reply"
        assert await service("request") == "reply"
        assert endpoint.health.status is Status.OPEN
        await anyio.wait_all_tasks_blocked()
        assert endpoint.env.supervisor.jobs == 0, "the timer has nothing more to wait for"
        await anyio.sleep(10)
        assert layer.circuit.state.value == "closed"

    check()


STEPS = st.lists(
    st.one_of(
        st.just("begin"),
        st.tuples(st.integers(0, 20), st.sampled_from([*breaking.OUTCOMES, "cancel"])),
        st.sampled_from([1.0, 5.0, 20.0]),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(STEPS)
def test_it_does_as_the_model_does_and_refuses_nothing(steps):
    layer = failure_accrual(
        failures=breaking.FAILURES,
        success_rate=breaking.RATE,
        window=breaking.WINDOW,
        min_requests=breaking.AT_LEAST,
        out_for=Exponential(5, 40),
    )

    async def main():
        endpoint, model, calls, served = Endpoint(layer), Model(), [], 0
        started = anyio.current_time()

        async def one(call):
            with call["scope"]:
                await endpoint.service(call)

        async def serve(call):
            nonlocal served
            served += 1
            await call["end"].wait()
            error = breaking.OUTCOMES[call["outcome"]]()
            if error is not None:
                raise error

        endpoint.service = layer.build(endpoint.env, serve)

        async def guarded(call):
            with contextlib.suppress(ValueError, meshlib.MeshError):
                await one(call)

        async with anyio.create_task_group() as group:
            for step in [*steps, *[(0, "success")] * len(steps)]:
                now = anyio.current_time() - started
                if step == "begin":
                    call = {"end": anyio.Event(), "scope": anyio.CancelScope(), "told": model.begin(now)}
                    calls.append(call)
                    group.start_soon(guarded, call)
                elif isinstance(step, float):
                    await anyio.sleep(step)
                    now += step
                elif calls:
                    call = calls.pop(step[0] % len(calls))
                    if step[1] == "cancel":
                        call["scope"].cancel()
                        model.end(call["told"], "nothing", now)
                    else:
                        call["outcome"] = step[1]
                        call["end"].set()
                        model.end(call["told"], step[1], now)
                await anyio.wait_all_tasks_blocked()
                model.look(now)
                ready = model.state in ("closed", "probe due")
                assert endpoint.health.status is (Status.OPEN if ready else Status.BUSY), (model.state, step)
                assert endpoint.health.serves
        assert served == sum(step == "begin" for step in steps)
        await endpoint.close()

    run_virtual(main)


# --- forms ------------------------------------------------------------------------------------------------------------


async def test_composed_or_decorating_it_counts_and_refuses_nothing():
    accrual, seen = failure_accrual(failures=2), []

    @accrual
    async def divide(a, b):
        return a / b

    for _ in range(20):
        with pytest.raises(ZeroDivisionError):
            await divide(1, 0)
    assert accrual.circuit.state.value == "open"
    assert await divide(4, 2) == 2

    async def serve(request):
        seen.append(request)
        return "reply"

    assert await (failure_accrual() >> serve)("x") == "reply"
    assert seen == ["x"]
    assert Call.idempotent


def test_how_it_is_shown_and_what_is_wrong():
    assert repr(failure_accrual()) == (
        "failure_accrual(failures=5, success_rate=0.8, window=30, min_requests=5, out_for=(5, 300))"
    )
    assert eval(repr(failure_accrual(success_rate=None)), vars(meshlib)).thresholds.success_rate is None
    with pytest.raises(ConfigurationError, match="out_for="):
        failure_accrual(out_for=(10, 1))
    with pytest.raises(ConfigurationError, match="failures="):
        failure_accrual(failures=0)


def test_every_client_has_it():
    assert repr(failure_accrual()) in repr(meshlib.mux.client("h:1"))
