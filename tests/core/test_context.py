"""What travels with a request: deadlines that only get nearer, and values that stay in the task they were set in."""

import math

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib.core.clock import Clock
from meshlib.core.context import EMPTY, CallRecord, Context, TraceId, current, deadline, remaining, use
from meshlib.core.errors import Attempt, ConfigurationError
from meshlib.testing import run_virtual


def frozen(at: float = 100.0) -> Clock:
    return Clock(now=lambda: at)


def test_there_is_an_empty_context_outside_of_any_call():
    assert current() is EMPTY
    assert remaining() is None


def test_use_lasts_as_long_as_its_body_even_when_that_fails():
    mine = Context(client_id="me")

    def fail():
        with use(mine) as used:
            assert used is mine
            assert current() is mine
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert current() is EMPTY


def test_evolve_changes_what_it_is_told_and_keeps_the_rest():
    context = Context(deadline=5.0, client_id="me", baggage="k=v", opaque=((b"x", b"y"),), attempt=2)
    assert context.evolve(attempt=3) == Context(5.0, None, (), 3, "me", "k=v", ((b"x", b"y"),))
    assert context.attempt == 2
    with pytest.raises(TypeError, match="nope"):
        context.evolve(nope=1)


def test_a_context_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        EMPTY.attempt = 1


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=6))
def test_of_nested_deadlines_the_nearest_wins(seconds):
    clock = frozen()

    def nest(left, nearest):
        if not left:
            return
        nearest = min(nearest, left[0])
        with deadline(left[0], clock) as inner:
            assert inner is current()
            assert remaining(clock) == pytest.approx(nearest)
            nest(left[1:], nearest)
            assert remaining(clock) == pytest.approx(nearest)

    nest(seconds, math.inf)
    assert remaining(clock) is None


def test_a_deadline_that_has_passed_counts_below_zero():
    async def main():
        with meshlib.deadline(1.0):
            await anyio.sleep(3)
            assert meshlib.remaining() == pytest.approx(-2)
            with meshlib.deadline(10):
                assert meshlib.remaining() == pytest.approx(-2)

    run_virtual(main)


def test_a_deadline_keeps_the_rest_of_the_context():
    with use(Context(client_id="me", attempt=1)), deadline(1, frozen()) as inner:
        assert (inner.client_id, inner.attempt) == ("me", 1)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_a_deadline_must_lie_ahead(seconds):
    with pytest.raises(ConfigurationError, match="give the seconds that are left, a number above 0"), deadline(seconds):
        pass


async def test_tasks_inherit_the_context_and_cannot_disturb_each_other():
    seen = {}

    async def work(name):
        assert current().client_id == "parent"
        with use(current().evolve(client_id=name)):
            await anyio.lowlevel.checkpoint()
            seen[name] = current().client_id
        assert current().client_id == "parent"

    with use(Context(client_id="parent")):
        async with anyio.create_task_group() as group:
            for name in "abc":
                group.start_soon(work, name)
        assert current().client_id == "parent"
    assert seen == {"a": "a", "b": "b", "c": "c"}


def test_a_trace_prints_both_ids():
    assert str(TraceId(0xAB, 0xCD)) == f"{0xAB:032x}.{0xCD:016x}"


# --- the account of a call --------------------------------------------------------------------------------------------


def test_a_failed_try_is_noted_once_with_its_endpoint_and_its_error():
    record = CallRecord(1.0)
    record.endpoint = "h:1"
    record.failed(meshlib.ConnectError("refused", endpoint="h:1"))
    record.failed(ValueError("never tried anywhere"))
    record.endpoint = "h:2"
    record.failed(ValueError())
    assert record.attempts == (Attempt("h:1", "ConnectError: refused"), Attempt("h:2", "ValueError"))
    assert record.tried == ("h:1", "h:2")
    assert record.endpoint is None


# --- what a server's own calls inherit --------------------------------------------------------------------------------


async def test_a_handlers_calls_inherit_what_travels_and_not_the_account_of_the_callers_call():
    seen = []

    async def last(request):
        seen.append(current())
        return meshlib.mux.Response()

    async def first(request):
        seen.append(current())
        async with meshlib.mux.client(end.address) as onward:
            return await onward(meshlib.mux.Request())

    async with (
        meshlib.mux.serve(last) as end,
        meshlib.mux.serve(first) as begin,
        meshlib.mux.client(begin.address) as client,
    ):
        travels = Context(client_id="me", baggage="k=v", opaque=((b"their.own", b"\x01"),), dtab=(("/s", "/t"),))
        with use(travels), deadline(20):
            await client(meshlib.mux.Request())
    assert len(seen) == 2
    for context in seen:
        assert (context.client_id, context.baggage, context.opaque) == ("me", "k=v", ((b"their.own", b"\x01"),))
        assert context.dtab == (("/s", "/t"),)
        assert context.record is None
        assert context.attempt == 0
    assert seen[0].trace.trace == seen[1].trace.trace
    assert seen[1].deadline <= seen[0].deadline + 0.1
    assert current() is EMPTY
