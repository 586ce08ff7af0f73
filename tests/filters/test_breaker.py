"""The circuit breaker: refuses calls to what fails, lets one through to see, and is fooled by nothing."""

import contextlib
import gc

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

import meshlib
from meshlib import CircuitOpen, Clock, ConfigurationError, Rejected, circuit_breaker, deadline
from meshlib.core.backoff import Exponential
from meshlib.core.classify import ResponseClass
from meshlib.core.env import Env
from meshlib.core.events import Decisions
from meshlib.filters.breaker import CircuitBreaker
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual
from tests import breaking
from tests.breaking import Model


class Bench:
    """A breaker around a service that does as it is told, on a clock that is set by hand."""

    def __init__(self, breaker=None, **env):
        self.now, self.outcome, self.gate, self.served = 100.0, None, None, 0
        self.registry = Registry()
        clock = Clock(now=lambda: self.now)
        events = Decisions(clock, self.registry)
        self.told = []
        events.listen(lambda decision: self.told.append((decision.kind, decision.code)))
        self.service = (breaker or circuit_breaker()).build(
            Env(clock=clock, metrics=self.registry, events=events, **env), self.serve
        )

    async def serve(self, request):
        self.served += 1
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
        except CircuitOpen:
            raise
        except Exception as error:
            return error

    async def fail(self, times=5):
        for _ in range(times):
            await self.call(ValueError("wrong"))

    def numbers(self):
        names = ("opened", "closed", "probes", "refused", "open")
        return tuple(self.registry.snapshot()[f"circuit_breaker/{name}"] for name in names)


async def test_it_opens_refuses_probes_and_closes():
    bench = Bench()
    await bench.fail(5)
    bench.now += 1
    with pytest.raises(CircuitOpen) as refused:
        await bench.call("reply")
    assert refused.value.message == (
        "the circuit is open: 5 failures in a row: ValueError: wrong; the next call may pass in 4.0 s; "
        "last failures: ValueError: wrong (5 times)"
    )
    assert refused.value.retry_after == pytest.approx(4)
    assert (refused.value.processed, refused.value.retryable, refused.value.requeueable) == (False, False, False)
    assert isinstance(refused.value, Rejected)
    assert bench.served == 5
    assert bench.numbers() == (1, 0, 0, 1, 1)
    bench.now += 4
    assert await bench.call("reply") == "reply"
    await bench.fail(4)
    assert await bench.call("reply") == "reply", "it has forgotten what was before"
    assert bench.numbers() == (1, 1, 1, 1, 0)
    assert bench.told == [("break", "failures"), ("break", "refused"), ("break", "half_open"), ("break", "closed")]


async def test_exactly_one_probe_is_let_through():
    bench = Bench()
    await bench.fail()
    bench.now += 5
    bench.gate, bench.outcome = anyio.Event(), "probe"
    async with anyio.create_task_group() as group:
        group.start_soon(bench.service, "request")
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            with pytest.raises(CircuitOpen, match="one call is under way to see") as refused:
                await bench.call()
        assert refused.value.retry_after is None
        bench.gate.set()
    assert bench.served == 6
    assert await bench.call("reply") == "reply"


async def test_a_cancelled_probe_decides_nothing():
    bench = Bench()
    await bench.fail()
    bench.now += 5
    bench.gate = anyio.Event()
    for _ in range(3):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(bench.service, "request")
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
    assert bench.served == 8, "each was the probe: the circuit neither closed nor opened"
    bench.gate = None
    await bench.fail(1)
    with pytest.raises(CircuitOpen, match="the probe failed"):
        await bench.call()


async def test_a_probe_whose_deadline_passes_has_failed():
    async def main():
        breaker = circuit_breaker(failures=1)

        @breaker
        async def hang():
            await anyio.sleep_forever()

        with deadline(1), anyio.move_on_after(1):
            await hang()
        with pytest.raises(CircuitOpen, match="no reply before the deadline"):
            await hang()
        await anyio.sleep(5)
        with anyio.move_on_after(1):
            await hang()
        assert breaker.state == "probe due", "cancelled without a deadline: it decides nothing"

    await anyio.to_thread.run_sync(run_virtual, main)


async def test_it_is_not_blind_to_calls_that_do_not_end():
    bench = Bench()
    bench.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(bench.call, "much too late")
        await anyio.wait_all_tasks_blocked()
        bench.now += 29
        bench.gate, gate = None, bench.gate
        assert await bench.call("reply") == "reply"
        bench.now += 2
        with pytest.raises(CircuitOpen, match="no end within 30 s"):
            await bench.call()
        gate.set()
    with pytest.raises(CircuitOpen):
        await bench.call()
    assert bench.numbers()[0] == 1


async def test_a_probe_that_does_not_end_has_failed():
    bench = Bench()
    await bench.fail()
    bench.now += 5
    bench.outcome = "much too late"
    bench.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(bench.service, "request")
        await anyio.wait_all_tasks_blocked()
        bench.now += 30
        with pytest.raises(CircuitOpen, match="the probe failed: no end within 30 s; the next call"):
            await bench.call()
        bench.gate.set()
    with pytest.raises(CircuitOpen):
        await bench.call()


async def test_which_exceptions_are_failures_can_be_said():
    bench = Bench(circuit_breaker(failures=2, on=ConnectionError))
    await bench.fail(20)
    assert bench.served == 20
    for _ in range(2):
        await bench.call(ConnectionResetError())
    with pytest.raises(CircuitOpen):
        await bench.call()

    bench = Bench(circuit_breaker(failures=2, on=lambda error: "bad" in str(error)))
    await bench.fail(20)
    for _ in range(2):
        await bench.call(ValueError("bad"))
    with pytest.raises(CircuitOpen):
        await bench.call()

    bench = Bench(circuit_breaker(failures=2, on=Rejected))
    for _ in range(2):
        await bench.call(Rejected("never left"))
    with pytest.raises(CircuitOpen):
        await bench.call()


async def test_a_predicate_that_fails_hides_no_error_and_leaves_no_probe_hanging(caplog):
    def broken(error):
        raise KeyError("oops")

    bench = Bench(circuit_breaker(failures=1, on=broken))
    wrong = ValueError("wrong")
    for _ in range(2):
        assert await bench.call(wrong) is wrong
        with pytest.raises(CircuitOpen):
            await bench.call()
        bench.now += 20
    assert "oops" in caplog.text


async def test_replies_that_the_classifier_calls_failures_count():
    bench = Bench(
        classifier=lambda request, reply, error: ResponseClass.FAILURE if reply == 500 else ResponseClass.SUCCESS
    )
    for _ in range(5):
        assert await bench.call(500) == 500
    with pytest.raises(CircuitOpen, match="a reply that is a failure"):
        await bench.call(200)
    bench.now += 5
    assert await bench.call(200) == 200
    assert await bench.call(200) == 200


async def test_a_breaker_within_does_not_open_the_one_around_it():
    outer = circuit_breaker()

    @outer
    @circuit_breaker(failures=1)
    async def fails():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await fails()
    for _ in range(50):
        with pytest.raises(CircuitOpen):
            await fails()
    assert outer.state == "closed"


# --- names ------------------------------------------------------------------------------------------------------------


async def test_breakers_of_one_name_are_one_circuit_and_others_are_private():
    @circuit_breaker("payments", failures=2)
    async def pay():
        raise OSError("down")

    @circuit_breaker("payments")
    async def refund():
        return "done"

    @circuit_breaker(failures=2)
    async def other():
        return "done"

    for _ in range(2):
        with pytest.raises(OSError, match="down"):
            await pay()
    with pytest.raises(CircuitOpen, match="circuit 'payments' is open: 2 failures in a row: OSError: down") as refused:
        await refund()
    assert refused.value.processed is None, "the rest of the request that is served may have done much"
    assert await other() == "done"
    with pytest.raises(ConfigurationError, match="one of that name is in use with failures=2"):
        circuit_breaker("payments", failures=3)


async def test_a_name_is_kept_as_long_as_it_is_in_use():
    breaker = circuit_breaker("short-lived", failures=2)
    assert circuit_breaker("short-lived", failures=2).state == breaker.state
    del breaker
    gc.collect()
    circuit_breaker("short-lived", failures=3)


async def test_an_unnamed_layer_is_each_clients_own():
    layer = circuit_breaker(failures=1)
    one, two = Bench(layer), Bench(layer)
    await one.fail(1)
    with pytest.raises(CircuitOpen):
        await one.call()
    assert await two.call("reply") == "reply"
    named = circuit_breaker("both", failures=1)
    one, two = Bench(named), Bench(named)
    await one.fail(1)
    with pytest.raises(CircuitOpen):
        await two.call()
    assert one.registry.snapshot()["circuit_breaker/both/open"] == 1


async def test_in_a_client_and_in_a_server():
    async def serve(request):
        if request.body == b"bad":
            raise ValueError("bad")
        return meshlib.mux.Response(request.body)

    async with meshlib.mux.serve(serve, "127.0.0.1:0") as server:
        client = meshlib.mux.client(server.address, circuit_breaker(failures=3))
        async with client:
            for _ in range(3):
                with pytest.raises(meshlib.RemoteError):
                    await client(meshlib.mux.Request(b"bad"))
            with pytest.raises(CircuitOpen, match="3 failures in a row: RemoteError"):
                await client(meshlib.mux.Request(b"good"))
        assert server.metrics()["requests"] == 3


async def test_in_a_server_what_it_refuses_is_not_sent_again():
    async def serve(request):
        raise ValueError("bad")

    layer = circuit_breaker(failures=3)
    async with meshlib.mux.serve(serve, "127.0.0.1:0", layer) as server, meshlib.mux.client(server.address) as client:
        for _ in range(3):
            with pytest.raises(meshlib.RemoteError):
                await client(meshlib.mux.Request(b"bad"))
        with pytest.raises(Rejected, match="the circuit is open") as refused:
            await client(meshlib.mux.Request(b"good"))
        assert not refused.value.retryable
        assert server.metrics()["requests"] == 4


# --- against the model ------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Calls that begin and end in any order, in time that passes in any steps."""

    calls = Bundle("calls")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.model = Model()
        breaker = circuit_breaker(
            failures=breaking.FAILURES,
            success_rate=breaking.RATE,
            window=breaking.WINDOW,
            min_requests=breaking.AT_LEAST,
            open_for=Exponential(5, 40),
        )
        self.breaker = CircuitBreaker(None, breaker._guarded, None, Env(clock=Clock(now=lambda: self.now)))
        self.under_way = 0

    class Pause:
        def __await__(self):
            error = yield
            if error is not None:
                raise error
            return "reply"

    @rule(target=calls)
    def begin(self):
        async def service(request):
            return await self.Pause()

        call = self.breaker.apply("request", service)
        told = self.model.begin(self.now)
        try:
            call.send(None)
        except CircuitOpen:
            assert told is None
            return None, None
        assert told is not None
        self.under_way += 1
        return call, told

    @rule(call=consumes(calls), outcome=st.sampled_from(list(breaking.OUTCOMES)))
    def end(self, call, outcome):
        coroutine, told = call
        if coroutine is not None:
            with contextlib.suppress(StopIteration, ValueError, meshlib.MeshError):
                coroutine.send(breaking.OUTCOMES[outcome]())
            self.model.end(told, outcome, self.now)
            self.under_way -= 1

    @rule(call=consumes(calls))
    def cancel(self, call):
        coroutine, told = call
        if coroutine is not None:
            coroutine.close()
            self.model.end(told, "nothing", self.now)
            self.under_way -= 1

    @rule(seconds=st.sampled_from([1.0, 5.0, 20.0]))
    def advance(self, seconds):
        self.now += seconds

    @invariant()
    def the_states_agree(self):
        state = self.breaker.state
        if state == "open" and self.breaker._guarded.circuit.until <= self.now:
            state = "probe due"
        self.model.look(self.now)
        assert state == self.model.state
        assert len(self.breaker._guarded.begun) == self.under_way


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
TestMachine = Machine.TestCase


# --- construction -----------------------------------------------------------------------------------------------------


def test_how_it_is_shown():
    text = "failures=5, success_rate=0.8, window=30, min_requests=5, open_for=(5, 300)"
    assert repr(circuit_breaker()) == f"circuit_breaker({text})"
    shown = repr(circuit_breaker("shown", on=(OSError, ValueError)))
    assert shown == f"circuit_breaker('shown', {text}, on=(OSError, ValueError))"
    assert repr(circuit_breaker(on=OSError)) == f"circuit_breaker({text}, on=OSError)"


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"name": ""}, "give a name"),
        ({"name": len}, "give a name"),
        ({"failures": -1}, "1 or more"),
        ({"open_for": 5}, "open_for="),
        ({"on": ()}, "exception types"),
        ({"on": (OSError, 5)}, "exception types"),
        ({"on": "OSError"}, "exception types"),
        ({"on": int}, "exception types"),
    ],
)
def test_wrong_parameters_are_told_at_construction(given, right):
    with pytest.raises(ConfigurationError, match=right):
        circuit_breaker(**given)
