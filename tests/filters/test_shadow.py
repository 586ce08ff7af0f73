"""Shadowing: the caller never notices, copies are bounded, and what differs is told."""

import math
import random

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshlib
from meshlib import mux, shadow
from meshlib.core.context import CallRecord, Context, TraceId, current, use
from meshlib.core.env import Env
from meshlib.core.errors import ConfigurationError
from meshlib.core.events import Decisions
from meshlib.core.priority import Priority
from meshlib.telemetry.metrics import Registry
from meshlib.testing import run_virtual, scripted

NOTHING = {"sent": 0, "dropped": 0, "same": 0, "different": 0, "failed": 0}


class Bench:
    """A shadow over a service, inside an environment that the test can look into."""

    def __init__(self, layer, service, seed=1):
        self.registry = Registry()
        self.env = Env(rng=random.Random(seed), metrics=self.registry)
        self.env = self.env.evolve(events=Decisions(self.env.clock, self.registry))
        self.told = []
        self.env.events.listen(lambda decision: self.told.append(str(decision)))
        self.service = layer.build(self.env, service)

    @property
    def numbers(self):
        return {name.split("/")[1]: v for name, v in self.registry.snapshot().items() if name.startswith("shadow/")}

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.env.supervisor.aclose()

    async def settled(self):
        await self.env.supervisor.join()
        return self.numbers


async def double(request):
    return 2 * request


async def broken(request):
    raise ValueError("broken")


# --- what is compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "counted"),
    [
        (double, double, {"sent": 1, "same": 1}),
        (broken, broken, {"sent": 1, "same": 1, "failed": 1}),
        (double, broken, {"sent": 1, "different": 1, "failed": 1}),
        (broken, double, {"sent": 1, "different": 1}),
    ],
    ids=["replies", "errors", "copy failed", "first failed"],
)
async def test_two_outcomes_are_compared_and_counted(first, second, counted):
    async with Bench(shadow(second, 1), first) as bench:
        if first is broken:
            with pytest.raises(ValueError, match="broken"):
                await bench.service(3)
        else:
            assert await bench.service(3) == 6
        assert await bench.settled() == NOTHING | counted


async def test_a_difference_is_told_with_both_outcomes_and_cut_to_a_line():
    async def other(request):
        return "y\n" * 1000

    async with Bench(shadow(other, 1), double) as bench:
        await bench.service(3)
        await bench.settled()
    (told,) = bench.told
    assert told.startswith("shadow (different: request 3; reply 6; shadow 'y\\n")
    assert len(told) < 250
    assert "\n" not in told


async def test_a_comparison_of_ones_own_sees_request_and_both_outcomes():
    seen = []

    def compare(request, first, second):
        seen.append((request, first, str(second)))
        return True

    async with Bench(shadow(broken, 1, compare=compare), double) as bench:
        await bench.service(3)
        assert await bench.settled() == NOTHING | {"sent": 1, "same": 1, "failed": 1}
    assert seen == [(3, 6, "broken")]


async def test_a_comparison_or_predicate_that_fails_harms_nobody_and_is_told():
    def fails(*_):
        raise KeyError("mine")

    for layer, sent in ((shadow(double, 1, compare=fails), 1), (shadow(double, 1, when=fails), 0)):
        async with Bench(layer, double) as bench:
            assert await bench.service(3) == 6
            assert await bench.settled() == NOTHING | {"sent": sent}
        assert ["shadow (broken:" in told for told in bench.told] == [True]


async def test_a_reply_that_cannot_be_printed_is_told_all_the_same():
    class Mute:
        def __repr__(self):
            raise RuntimeError("no")

    async def mute(request):
        return Mute()

    async with Bench(shadow(mute, 1), double) as bench:
        await bench.service(3)
        await bench.settled()
    assert "a Mute whose repr fails: RuntimeError" in bench.told[0]


# --- how many -------------------------------------------------------------------------------------------------------


async def test_a_share_of_the_requests_is_copied_and_a_seed_repeats_which():
    copied = []

    async def note(request):
        copied.append(request)
        return 2 * request

    for _ in range(2):
        async with Bench(shadow(note, 0.25, limit=1000), double, seed=5) as bench:
            for i in range(800):
                await bench.service(i)
            numbers = await bench.settled()
        assert abs(numbers["sent"] - 200) < 4 * math.sqrt(800 * 0.25 * 0.75)
        assert numbers["same"] == numbers["sent"]
    half = len(copied) // 2
    assert sorted(copied[:half]) == sorted(copied[half:])


async def test_only_what_the_predicate_names_is_copied():
    async with Bench(shadow(double, 1, when=lambda request: request > 1), double) as bench:
        for i in range(4):
            await bench.service(i)
        assert await bench.settled() == NOTHING | {"sent": 2, "same": 2}


async def test_beyond_the_limit_copies_are_dropped_and_come_again_when_there_is_room():
    to, script = scripted()
    async with script, Bench(shadow(to, 1, limit=2), double) as bench:
        for i in range(5):
            assert await bench.service(i) == 2 * i
        assert bench.numbers == NOTHING | {"sent": 2, "dropped": 3}
        for _ in range(2):
            copy = await script.next_request()
            copy.respond(2 * copy.request)
        await bench.settled()
        await bench.service(7)
        (await script.next_request()).respond(0)
        assert await bench.settled() == NOTHING | {"sent": 3, "dropped": 3, "same": 2, "different": 1}


# --- the caller never notices ---------------------------------------------------------------------------------------


async def test_the_caller_does_not_wait_for_the_copy():
    to, script = scripted()
    async with script, Bench(shadow(to, 1), double) as bench:
        assert await bench.service(3) == 6
        (await script.next_request()).respond(6)
        assert await bench.settled() == NOTHING | {"sent": 1, "same": 1}


async def test_the_copy_waits_for_the_caller_to_be_answered_first():
    service, script = scripted()
    async with script, Bench(shadow(double, 1), service) as bench, anyio.create_task_group() as group:
        group.start_soon(bench.service, 3)
        first = await script.next_request()
        await anyio.wait_all_tasks_blocked()
        assert bench.numbers == NOTHING | {"sent": 1}
        first.respond(6)
        assert await bench.settled() == NOTHING | {"sent": 1, "same": 1}


async def test_a_caller_that_gives_up_is_compared_with_nothing():
    service, script = scripted()
    async with script, Bench(shadow(double, 1), service) as bench:
        async with anyio.create_task_group() as group:
            group.start_soon(bench.service, 3)
            await script.next_request()
            group.cancel_scope.cancel()
        assert await bench.settled() == NOTHING | {"sent": 1}


def test_a_copy_has_its_own_time_and_none_of_the_callers_account():
    seen = []

    async def note(request):
        seen.append(current())

    async def main():
        ids = TraceId(1, 2)
        mine = Context(
            deadline=anyio.current_time() + 0.1,
            trace=ids,
            attempt=1,
            record=CallRecord(0.0),
            priority=Priority.CRITICAL,
            client_id="shop",
        )
        async with Bench(shadow(note, 1, timeout=7), double) as bench:
            with use(mine):
                await bench.service(3)
            await bench.settled()
        return mine.evolve(deadline=anyio.current_time() + 7, record=None, priority=Priority.SHEDDABLE)

    assert run_virtual(main) == seen[0]


def test_a_copy_ends_by_its_timeout():
    async def main():
        async with Bench(shadow(lambda request: anyio.sleep(60), 1, timeout=2), double) as bench:
            started = anyio.current_time()
            assert await bench.service(3) == 6
            numbers = await bench.settled()
            return numbers, anyio.current_time() - started, bench.told

    numbers, took, told = run_virtual(main)
    assert numbers == NOTHING | {"sent": 1, "failed": 1, "different": 1}
    assert took == pytest.approx(2)
    assert "no reply from the shadow within 2 s" in told[0]


async def test_copies_end_with_the_client():
    to, script = scripted()

    async def handler(request):
        return mux.Response(request.body)

    async with mux.serve(handler) as server:
        client = mux.client(server.address, shadow(to, 1))
        assert (await client(mux.Request(b"x"))).body == b"x"
        copy = await script.next_request()
        await client.aclose()
        assert copy.cancelled
        assert client.metrics()["shadow/sent"] == 1


async def test_one_that_is_closing_sends_no_more_copies():
    async with Bench(shadow(double, 1), double) as bench:
        await bench.env.supervisor.aclose()
        assert await bench.service(3) == 6
        assert bench.numbers == NOTHING


async def test_a_server_mirrors_to_another_server_over_the_wire():
    async def old(request):
        return mux.Response(request.body)

    async def new(request):
        return mux.Response(request.body.upper())

    async with (
        mux.serve(new) as second,
        mux.client(second.address, label="second") as to,
        mux.serve(old, "127.0.0.1:0", shadow(to, 1)) as first,
        mux.client(first.address) as client,
    ):
        for body in (b"a", b"B"):
            assert (await client(mux.Request(body))).body == body
        with anyio.fail_after(5):
            while first.metrics()["shadow/same"] + first.metrics()["shadow/different"] < 2:  # noqa: ASYNC110
                await anyio.sleep(0.001)
        assert first.metrics()["shadow/different"] == 1


async def test_as_a_decorator_it_copies_to_a_function_of_the_same_arguments():
    seen = []

    async def new_price(article, *, amount=1):
        seen.append((article, amount))

    @shadow(new_price, 1)
    async def price(article, *, amount=1):
        return 5 * amount

    assert await price("tea", amount=2) == 10
    await anyio.wait_all_tasks_blocked()
    assert seen == [("tea", 2)]


def test_a_decorated_function_may_be_called_on_one_event_loop_after_another():
    to, script = scripted()
    function = shadow(to, 1, limit=1)(double)

    async def main():
        assert await function(3) == 6
        await anyio.wait_all_tasks_blocked()

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(main, backend=backend)
    # Each copy was cut off with its loop, and none holds the one place that there is.
    assert [item.cancelled for item in script._arrived] == [True] * 3


# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"to": "host:80"}, "give a service"),
        ({"share": 0}, "above 0, up to 1"),
        ({"share": 1.1}, "above 0, up to 1"),
        ({"share": True}, "above 0, up to 1"),
        ({"share": math.nan}, "above 0, up to 1"),
        ({"compare": 1}, "a function of"),
        ({"limit": 0}, "a whole number of copies above 0"),
        ({"limit": 1.5}, "a whole number of copies above 0"),
        ({"timeout": 0}, "give seconds, a number above 0"),
        ({"timeout": math.inf}, "give seconds, a number above 0"),
        ({"when": 1}, "a function of the request"),
    ],
)
def test_what_makes_no_sense_is_told_at_construction(wrong, right):
    with pytest.raises(ConfigurationError, match=right):
        shadow(**{"to": double} | wrong)


def test_it_prints_as_it_was_typed():
    assert repr(shadow(double)) == "shadow(double, share=0.1, limit=100, timeout=10)"
    shown = "shadow(<client 'new'>, share=0.5, compare=double, limit=3, timeout=1.5, when=double)"
    client = meshlib.mux.client("127.0.0.1:1", label="new")
    assert repr(shadow(client, 0.5, compare=double, limit=3, timeout=1.5, when=double)) == shown


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_a_storm_of_calls_is_bounded_counted_and_unharmed(seed):
    """Callers that give up, services that fail, copies that hang: every copy is counted once, and none stays."""
    rng = random.Random(seed)
    under_way = most = given_up = 0

    async def first(request):
        await anyio.sleep(request[1])
        if request[2]:
            raise ValueError(request[0])
        return request[0]

    async def second(request):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await anyio.sleep(rng.choice((0.0, 0.1, 1.0, 60.0)))
            if rng.random() < 0.2:
                raise ValueError
            return request[0]
        finally:
            under_way -= 1

    async def call(bench, request, patience):
        nonlocal given_up
        with anyio.move_on_after(patience) as scope:
            try:
                assert await bench.service(request) == request[0]
                assert not request[2]
            except ValueError:
                assert request[2]
        given_up += scope.cancelled_caught

    async def main():
        async with Bench(shadow(second, 0.5, limit=5, timeout=3), first, seed) as bench:
            async with anyio.create_task_group() as group:
                for i in range(100):
                    request = (i, rng.choice((0.0, 0.2, 2.0)), rng.random() < 0.2)
                    group.start_soon(call, bench, request, rng.choice((0.11, 10.0)))
                    await anyio.sleep(rng.choice((0.0, 0.05, 0.3)))
            numbers = await bench.settled()
            return numbers, bench.service.func.__self__.active

    numbers, active = run_virtual(main, seed=seed)
    assert under_way == active == 0
    assert most <= 5
    assert numbers["sent"] > 0
    assert numbers["sent"] + numbers["dropped"] <= 100
    uncompared = numbers["sent"] - numbers["same"] - numbers["different"]
    assert 0 <= uncompared <= given_up
