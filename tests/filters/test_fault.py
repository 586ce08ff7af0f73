"""Faults: they strike as often as they are told to, look real to every layer above, and leave nothing behind."""

import inspect
import math
import random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib import fault, mux
from meshlib.core.context import CallRecord, Context, deadline, use
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError, ConnectionLost, DeadlineExceeded, Rejected
from meshlib.core.events import Decisions
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual


async def echo(request):
    return request


class Bench:
    """A fault over an echo, in an environment that is seeded and listened to."""

    def __init__(self, layer, seed=1, address=None):
        registry = Registry()
        env = Env(rng=random.Random(seed), metrics=registry, address=address)
        env = env.evolve(events=Decisions(env.clock, registry))
        self.told = []
        env.events.listen(lambda decision: self.told.append((decision.kind, decision.code)))
        self.service = layer.build(env, echo)
        self.events = env.events
        self.numbers = registry.snapshot

    async def outcomes(self, n):
        """How each of ``n`` requests ended, and how long it took."""
        ends = []
        for i in range(n):
            started = anyio.current_time()
            try:
                await self.service(i)
                end = ""
            except Exception as error:
                end = type(error).__name__
            ends.append((end, round(anyio.current_time() - started, 6)))
        return ends


# --- what strikes ---------------------------------------------------------------------------------------------------


async def test_an_error_is_a_class_an_exception_or_made_from_the_request():
    with pytest.raises(KeyError, match="injected fault"):
        await (fault(error=KeyError) >> echo)("x")
    with pytest.raises(Rejected, match="busy"):
        await (fault(error=Rejected("busy")) >> echo)("x")
    with pytest.raises(LookupError, match="no x"):
        await (fault(error=lambda request: LookupError(f"no {request}")) >> echo)("x")


async def test_each_request_gets_an_error_of_its_own():
    given_error = Rejected("busy", processed=False)
    given_error.retry_after = 2.0
    service = fault(error=given_error) >> echo
    caught = []
    for _ in range(2):
        with pytest.raises(Rejected) as raised:
            await service("x")
        caught.append(raised.value)
    assert caught[0] is not caught[1]
    assert given_error not in caught
    assert given_error.__traceback__ is None
    assert [error.retry_after for error in caught] == [2.0, 2.0]


async def test_an_abort_is_a_lost_connection_to_the_endpoint_and_may_be_retried():
    bench = Bench(fault(abort=True), address="10.0.0.1:80")
    with pytest.raises(ConnectionLost) as caught:
        await bench.service("x")
    assert isinstance(caught.value, ConnectionError)
    assert (caught.value.endpoint, caught.value.retryable, caught.value.processed) == ("10.0.0.1:80", True, None)


async def test_a_factory_that_gives_no_exception_is_told_so():
    with pytest.raises(TypeError, match="gave 'oops', which is no exception"):
        await (fault(error=lambda request: "oops") >> echo)("x")


def test_a_delay_is_waited_before_the_request_goes_on():
    assert run_virtual(Bench(fault(delay=0.2)).outcomes, 3) == [("", 0.2)] * 3


def test_a_delay_may_be_drawn_and_is_never_negative():
    ends = run_virtual(Bench(fault(delay=lambda rng: rng.uniform(-1, 1))).outcomes, 50)
    waits = [wait for _, wait in ends]
    assert min(waits) == 0
    assert 0.9 < max(waits) < 1
    assert waits == [wait for _, wait in run_virtual(Bench(fault(delay=lambda r: r.uniform(-1, 1))).outcomes, 50)]


def test_a_delayed_request_may_fail_as_well_and_an_abort_comes_before_an_error():
    layer = fault(delay=0.1, error=KeyError, abort=True)
    bench = Bench(layer)
    assert run_virtual(bench.outcomes, 1) == [("ConnectionLost", 0.1)]
    assert bench.told == [("fault", "delay"), ("fault", "abort")]


# --- how often ------------------------------------------------------------------------------------------------------


def test_the_dice_are_independent():
    """Of 4,000 requests, each kind strikes its share, and both together the product of theirs."""
    layer = fault(delay=0.1, error=KeyError, probability={"delay": 0.3, "error": 0.2})
    ends = run_virtual(Bench(layer, seed=7).outcomes, 4000)
    delayed, failed = [wait > 0 for _, wait in ends], [end == "KeyError" for end, _ in ends]
    both = sum(a and b for a, b in zip(delayed, failed, strict=True))
    for count, share in ((sum(delayed), 0.3), (sum(failed), 0.2), (both, 0.06)):
        assert abs(count / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_a_seed_repeats_them_and_zero_and_one_are_never_and_always(seed, share):
    layer = fault(error=KeyError, abort=True, probability={"error": share, "abort": 1 - share})
    first, second = (run_virtual(Bench(layer, seed).outcomes, 30) for _ in range(2))
    assert first == second
    ends = {end for end, _ in first}
    if share in (0.0, 1.0):
        assert ends == {"KeyError" if share else "ConnectionLost"}


def test_one_kind_more_does_not_shift_the_others_luck():
    """That the error's die says yes does not depend on what the abort's said."""
    both = fault(error=KeyError, abort=True, probability={"error": 0.5, "abort": 0.0})
    other = fault(error=KeyError, abort=True, probability={"error": 0.5, "abort": 0.4})
    plain, with_aborts = (run_virtual(Bench(layer).outcomes, 200) for layer in (both, other))
    assert [a for a, b in zip(plain, with_aborts, strict=True) if b[0] != "ConnectionLost"] == [
        b for b in with_aborts if b[0] != "ConnectionLost"
    ]
    assert sum(b[0] == "ConnectionLost" for b in with_aborts) > 50


async def test_only_those_that_the_predicate_names_suffer():
    bench = Bench(fault(error=KeyError, when=lambda request: request % 2 == 0))
    assert [end for end, _ in await bench.outcomes(6)] == ["KeyError", ""] * 3


async def test_no_more_than_the_cap_suffer_at_once_and_the_others_pass():
    layer = fault(delay=0.2, error=KeyError, max_concurrent=2)
    benches = [Bench(layer), Bench(layer)]  # two clients: the cap is the value's
    ends = []

    async def call(bench):
        ends.extend(await bench.outcomes(1))

    async with anyio.create_task_group() as group:
        for i in range(5):
            group.start_soon(call, benches[i % 2])
        await anyio.wait_all_tasks_blocked()
        assert layer.active == 2
        assert [end for end, _ in ends] == ["", "", ""]
    assert sorted(end for end, _ in ends) == ["", "", "", "KeyError", "KeyError"]
    assert layer.active == 0
    told = [decision for bench in benches for decision in bench.told]
    assert told.count(("no_fault", "max_concurrent")) == 3
    assert told.count(("fault", "delay")) == told.count(("fault", "error")) == 2


@given(st.integers(0, 2**32))
def test_who_gives_up_while_suffering_leaves_a_place_for_the_next(seed):
    rng = random.Random(seed)
    layer = fault(delay=lambda _: rng.choice((0.0, 1.0, math.inf)), error=KeyError, probability=0.5, max_concurrent=4)
    bench = Bench(layer, seed)
    most = 0

    async def call(patience):
        nonlocal most
        with anyio.move_on_after(patience):
            await bench.outcomes(1)
        most = max(most, layer.active)

    async def main():
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(call, rng.choice((0.0, 0.5, 5.0)))
                await anyio.sleep(rng.choice((0.0, 0.2)))

    run_virtual(main, seed=seed)
    assert layer.active == 0
    assert most <= 4


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [5.0, math.inf])
def test_a_delay_ends_with_the_deadline(seconds):
    async def main():
        started = anyio.current_time()
        with deadline(0.5), pytest.raises(DeadlineExceeded) as caught:
            await (fault(delay=seconds) >> echo)("x")
        return anyio.current_time() - started, caught.value.message

    took, message = run_virtual(main)
    assert took == pytest.approx(0.5)
    assert "injected delay" in message


def test_an_endless_delay_lasts_until_the_caller_gives_up_and_is_then_forgotten():
    layer = fault(delay=math.inf, max_concurrent=1)

    async def main():
        with anyio.move_on_after(3600) as scope:
            await (layer >> echo)("x")
        return scope.cancelled_caught

    assert run_virtual(main)
    assert layer.active == 0


def test_under_a_clients_timeout_a_delay_is_the_clients_timeout():
    """The client pays no cancel scope for it: the layer keeps the deadline, and the client says whose it was."""

    async def main():
        async with mux.client("127.0.0.1:1", fault(delay=60), meshlib.timeout(1.0)) as client:
            assert all(getattr(layer, "keeps_deadline", False) for layer in client.stack.split("timeout")[1])
        service = meshlib.timeout(1.0).build(Env(deadline_kept=True), fault(delay=60) >> echo)
        with pytest.raises(DeadlineExceeded, match=r"no reply within the timeout of 1 s: an injected delay of 60 s"):
            await service("x")

    run_virtual(main)


# --- the switch -----------------------------------------------------------------------------------------------------


async def test_it_is_switched_for_everybody_who_was_given_it():
    layer = fault(error=KeyError, enabled=False)
    one, two = Bench(layer), Bench(layer)

    async def ends():
        return [(await bench.outcomes(1))[0][0] for bench in (one, two)]

    assert await ends() == ["", ""]
    layer.enabled = True
    assert await ends() == ["KeyError", "KeyError"]
    layer.enabled = False
    assert await ends() == ["", ""]
    with layer:
        with layer:
            assert await ends() == ["KeyError", "KeyError"]
        assert layer.enabled
        assert await ends() == ["KeyError", "KeyError"]
    assert not layer.enabled
    assert await ends() == ["", ""]


async def test_a_block_that_fails_switches_it_off_again():
    layer = fault(error=KeyError, enabled=False)
    with pytest.raises(KeyError), layer:
        await (layer >> echo)("x")
    assert not layer.enabled


# --- in its places --------------------------------------------------------------------------------------------------


async def test_a_client_takes_it_for_real_retries_it_and_tells_it():
    layer = fault(abort=True, max_concurrent=None, enabled=True, probability=0.5)

    async def handler(request):
        return mux.Response(request.body)

    async with mux.serve(handler) as server, mux.client(server.address, layer, seed=3) as client:
        told = []
        client.events.listen(lambda decision: told.append((decision.kind, decision.code, decision.endpoint)))
        for i in range(20):
            body = str(i).encode()
            assert (await client(mux.Request(body, idempotent=True))).body == body
        numbers = client.metrics()
        assert numbers["retries/retries"] > 0
        assert numbers["success"] == 20
        assert numbers["decisions/fault/abort"] == told.count(("fault", "abort", server.address))
        assert ("fault", "abort", server.address) in told
        layer.enabled = False
        before = client.metrics()["decisions/fault/abort"]
        for _ in range(20):
            await client(mux.Request())
        assert client.metrics()["decisions/fault/abort"] == before


async def test_it_stands_innermost_on_a_client_and_its_decision_is_in_the_error():
    async with mux.client("127.0.0.1:1", fault(error=Rejected("full"), when=lambda r: True)) as client:
        layers = list(client.stack)
        at = next(i for i, layer in enumerate(layers) if layer.place == "fault")
        assert [layer.place for layer in layers[at + 1 :]] == ["pool", "liveness", "transport"]
    record = CallRecord(0.0)
    with use(Context(record=record)), pytest.raises(KeyError):
        await Bench(fault(error=KeyError)).service("x")
    assert [str(decision) for decision in record.decisions] == ["fault (error: KeyError)"]


async def test_a_server_nacks_what_is_rejected_before_the_handler_has_seen_it():
    seen = []

    async def handler(request):
        seen.append(request.body)
        return mux.Response()

    layer = fault(error=Rejected, when=lambda request: request.body == b"no")
    async with (
        mux.serve(handler, "127.0.0.1:0", layer) as server,
        mux.client(server.address, stack=lambda stack: stack.remove("requeue")) as client,
    ):
        await client(mux.Request(b"yes"))
        with pytest.raises(Rejected) as caught:
            await client(mux.Request(b"no"))
    assert caught.value.by_peer
    assert seen == [b"yes"]
    assert server.metrics()["decisions/fault/error"] == 1


# --- construction ---------------------------------------------------------------------------------------------------


class Odd(Exception):
    def __init__(self, *, code):
        super().__init__(code)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({}, "give what to inject"),
        ({"delay": -1}, "give seconds, 0 or more"),
        ({"delay": math.nan}, "give seconds, 0 or more"),
        ({"delay": True}, "give seconds, 0 or more"),
        ({"delay": "1"}, "give seconds, 0 or more"),
        ({"error": "busy"}, "give an exception"),
        ({"error": BaseException()}, "give an exception"),
        ({"error": KeyboardInterrupt}, "give a class of exceptions"),
        ({"error": int}, "give a class of exceptions"),
        ({"error": Odd}, "give a function that makes it"),
        ({"error": Odd(code=1)}, "give a function that makes it"),
        ({"abort": 1}, "give True or False"),
        ({"abort": True, "probability": 1.5}, "numbers from 0 to 1"),
        ({"abort": True, "probability": math.nan}, "numbers from 0 to 1"),
        ({"abort": True, "probability": True}, "numbers from 0 to 1"),
        ({"abort": True, "probability": {"error": 0.1}}, "one for each of abort, and no other"),
        ({"abort": True, "probability": {}}, "one for each of abort, and no other"),
        ({"abort": True, "when": 1}, "a function of the request"),
        ({"abort": True, "max_concurrent": 0}, "a whole number of requests above 0"),
        ({"abort": True, "max_concurrent": True}, "a whole number of requests above 0"),
        ({"abort": True, "enabled": None}, "give True or False"),
    ],
)
def test_what_makes_no_sense_is_told_at_construction(wrong, right):
    with pytest.raises(ConfigurationError, match=right):
        fault(**wrong)


def named(request):
    return True


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        (fault(delay=0.2), "fault(delay=0.2)"),
        (fault(delay=math.inf, enabled=False), "fault(delay=inf, enabled=False)"),
        (
            fault(error=Rejected("x"), probability=0.01, max_concurrent=3),
            "fault(error=Rejected('x'), probability=0.01, max_concurrent=3)",
        ),
        (fault(error=KeyError, abort=True, when=named), "fault(error=KeyError, abort=True, when=named)"),
        (
            fault(delay=1, abort=True, probability={"delay": 0.5, "abort": 0.1}),
            "fault(delay=1, abort=True, probability={'delay': 0.5, 'abort': 0.1})",
        ),
    ],
)
def test_it_prints_as_it_was_typed(layer, shown):
    assert repr(layer) == shown


async def test_a_decorated_function_stays_what_it_was():
    @fault(error=KeyError, when=lambda call: call.kwargs.get("fail", False))
    async def price(article, fail=False):
        """The price."""
        return article

    assert inspect.iscoroutinefunction(price)
    assert price.__doc__ == "The price."
    assert await price("tea") == "tea"
    with pytest.raises(KeyError):
        await price("tea", fail=True)
