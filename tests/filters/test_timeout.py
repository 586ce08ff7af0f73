"""Time limits: whose they are, which is nearer, and that nothing is taken for one that is none."""

import inspect
import math

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshlib
from meshlib.client import Client
from meshlib.core.context import CallRecord, Context, current, deadline, remaining, use
from meshlib.core.deadlines import kept
from meshlib.core.env import Env
from meshlib.core.errors import AttemptTimeout, ConfigurationError, DeadlineExceeded
from meshlib.core.service import Filter
from meshlib.core.stack import Stack
from meshlib.filters.timeout import AttemptLimit, ServerDeadline, TotalTimeout, timeout
from meshlib.mux.client import MuxConnector
from meshlib.telemetry.metrics import Registry
from meshlib.testing import duplex, run_virtual


async def sleeper(seconds):
    await anyio.sleep(seconds)
    return f"slept {seconds}"


async def elapsed_of(function, *args):
    """What ``function`` gave or raised, and how long that took."""
    started = anyio.current_time()
    try:
        outcome = await function(*args)
    except Exception as error:
        outcome = error
    return outcome, anyio.current_time() - started


def outcome_of(service, *args, left=None):
    """The same in virtual time, under an inherited deadline if ``left`` is given."""

    async def main():
        if left is None:
            return await elapsed_of(service, *args)
        with deadline(left):
            return await elapsed_of(service, *args)

    return run_virtual(main)


# --- the total --------------------------------------------------------------------------------------------------------


def test_a_reply_in_time_passes():
    assert outcome_of(timeout(2) >> sleeper, 1) == ("slept 1", pytest.approx(1))


def test_a_reply_too_late_is_cut_off_at_the_timeout():
    error, elapsed = outcome_of(timeout(2) >> sleeper, 5)
    assert type(error) is DeadlineExceeded
    assert isinstance(error, TimeoutError)
    assert error.message == "no reply within the timeout of 2 s"
    assert elapsed == pytest.approx(2)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.01, 100))
def test_of_the_timeout_and_the_inherited_deadline_the_nearer_one_counts(own, inherited, needed):
    outcome, elapsed = outcome_of(timeout(own) >> sleeper, needed, left=inherited)
    nearest = min(own, inherited)
    if needed < nearest - 1e-6:
        assert (outcome, elapsed) == (f"slept {needed}", pytest.approx(needed))
    elif needed > nearest + 1e-6:
        assert isinstance(outcome, DeadlineExceeded)
        assert elapsed == pytest.approx(nearest)
        whose = "the inherited deadline passed" if inherited <= own else "no reply within the timeout"
        assert outcome.message.startswith(whose)


def test_the_deadline_below_is_the_nearer_one_and_ends_with_the_call():
    async def left(request):
        return remaining()

    async def main():
        assert await (timeout(5) >> left)(None) == pytest.approx(5)
        with deadline(3):
            assert await (timeout(5) >> left)(None) == pytest.approx(3)
            assert await (timeout(2) >> left)(None) == pytest.approx(2)
            assert await (timeout(None) >> left)(None) == pytest.approx(3)
            assert remaining() == pytest.approx(3)
        assert await (timeout(None) >> left)(None) is None
        assert remaining() is None

    run_virtual(main)


def test_without_a_limit_only_the_inherited_deadline_counts():
    assert outcome_of(timeout(None) >> sleeper, 1e6)[0] == "slept 1000000.0"
    error, elapsed = outcome_of(timeout(None) >> sleeper, 5, left=3)
    assert isinstance(error, DeadlineExceeded)
    assert elapsed == pytest.approx(3)


def test_a_call_that_is_too_late_already_is_not_made():
    called = []

    async def service(request):
        called.append(request)

    async def main():
        with deadline(1):
            await anyio.sleep(1)
            with pytest.raises(DeadlineExceeded, match="had passed before the call was made") as caught:
                await (timeout(5) >> service)("x")
            assert caught.value.processed is False

    run_virtual(main)
    assert called == []


async def test_a_timeout_error_from_inside_passes_untouched():
    mine = TimeoutError("the database's own")

    async def service(request):
        raise mine

    with pytest.raises(TimeoutError) as caught:
        await (timeout(50, attempt=50) >> service)("x")
    assert caught.value is mine


async def test_a_timeout_of_an_inner_scope_is_not_taken_for_ours():
    async def service(request):
        with anyio.fail_after(0):
            await anyio.sleep_forever()

    with pytest.raises(TimeoutError) as caught:
        await (timeout(50) >> service)("x")
    assert not isinstance(caught.value, meshlib.MeshError)


@pytest.mark.parametrize(
    "limit", [timeout(50), timeout(attempt=50), timeout(50, attempt=50), ServerDeadline()], ids=repr
)
async def test_a_cancellation_from_outside_stays_a_cancellation(limit):
    entered, after = anyio.Event(), []

    async def service(request):
        entered.set()
        await anyio.sleep_forever()

    async def call():
        try:
            with deadline(50):
                await (limit >> service)("x")
        except Exception as error:
            after.append(error)
        after.append("went on")

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await entered.wait()
        group.cancel_scope.cancel()
    assert after == []


def test_a_cancellation_at_the_very_moment_of_expiry_is_not_lost():
    after = []

    async def main():
        with anyio.move_on_after(2) as outer:
            try:
                await (timeout(2) >> sleeper)(5)
            except DeadlineExceeded:
                after.append("expired")
                await anyio.sleep(1)
                after.append("went on")
        assert outer.cancelled_caught

    run_virtual(main)
    assert "went on" not in after


def test_what_a_service_says_while_it_is_cut_off_is_not_hidden():
    async def service(request):
        try:
            await anyio.sleep(5)
        finally:
            raise ValueError("could not clean up")

    error, elapsed = outcome_of(timeout(2) >> service, "x")
    assert isinstance(error, ValueError)
    assert elapsed == pytest.approx(2)


def test_a_reply_that_comes_from_cleaning_up_counts():
    async def service(request):
        try:
            await anyio.sleep(5)
        except BaseException:
            return "half of it"

    assert outcome_of(timeout(2) >> service, "x")[0] == "half of it"


def test_nested_timeouts_tell_which_of_them_it_was():
    @timeout(3)
    async def outer():
        return await inner()

    @timeout(1)
    async def inner():
        await anyio.sleep(5)

    error, elapsed = outcome_of(outer)
    assert error.message == "no reply within the timeout of 1 s"
    assert elapsed == pytest.approx(1)


# --- as layers that need no scope because all below keep the deadline -------------------------------------------------


def keeping(service):
    return TotalTimeout(2).build(Env(deadline_kept=True), service)


def test_whoever_keeps_the_deadline_below_is_told_whose_it_was():
    async def keeps(request):
        await anyio.sleep(remaining())
        raise kept()

    error, elapsed = outcome_of(keeping(keeps), "x")
    assert error.message == "no reply within the timeout of 2 s"
    assert elapsed == pytest.approx(2)
    error, elapsed = outcome_of(keeping(keeps), "x", left=1)
    assert error.message == "the inherited deadline passed, 1.000 s after the call was made"
    assert elapsed == pytest.approx(1)


def test_what_was_waited_for_is_told_as_well_when_it_was_not_the_reply():
    async def keeps(request):
        await anyio.sleep(remaining())
        raise kept("no endpoint is ready")

    error, _ = outcome_of(keeping(keeps), "x")
    assert error.message == "no reply within the timeout of 2 s: no endpoint is ready"


def test_a_server_that_was_quicker_to_tell_says_the_same():
    async def server(request):
        await anyio.sleep(remaining())
        raise DeadlineExceeded("the deadline passed while the request was handled")

    assert outcome_of(keeping(server), "x")[0].message == "no reply within the timeout of 2 s"


def test_a_deadline_of_a_server_that_is_nearer_than_ours_keeps_its_own_words():
    async def server(request):
        raise DeadlineExceeded("the server's own limit")

    assert outcome_of(keeping(server), "x")[0].message == "the server's own limit"


@pytest.mark.parametrize("slow", [0, 10])
def test_the_deadline_of_another_clients_call_keeps_its_own_words(slow):
    async def another(request):
        error = kept("no reply from the other")
        error.label = "other"
        with anyio.CancelScope(shield=True):
            await anyio.sleep(slow)
        raise error

    error, _ = outcome_of(TotalTimeout(2).build(Env(), another), "x")
    assert error.message == "the deadline passed: no reply from the other"


# --- each attempt -----------------------------------------------------------------------------------------------------


def test_an_attempt_that_takes_too_long_may_be_followed_by_another():
    error, elapsed = outcome_of(timeout(attempt=2) >> sleeper, 5)
    assert type(error) is AttemptTimeout
    assert isinstance(error, DeadlineExceeded)
    assert error.retryable
    assert error.processed is None
    assert error.message == "no reply within the attempt timeout of 2 s"
    assert elapsed == pytest.approx(2)


@pytest.mark.parametrize("last", [True, False])
def test_the_last_try_has_all_the_time_that_the_call_has(last):
    record = CallRecord(0.0)
    record.last_try = last

    async def main():
        with use(current().evolve(record=record)):
            return await elapsed_of(timeout(attempt=2) >> sleeper, 5)

    outcome, elapsed = run_virtual(main)
    assert elapsed == pytest.approx(5 if last else 2)
    assert isinstance(outcome, AttemptTimeout) is not last


def test_with_a_total_and_an_attempt_the_nearer_one_counts():
    error, elapsed = outcome_of(timeout(3, attempt=1) >> sleeper, 5)
    assert type(error) is AttemptTimeout
    assert elapsed == pytest.approx(1)
    error, elapsed = outcome_of(timeout(1, attempt=3) >> sleeper, 5)
    assert type(error) is DeadlineExceeded
    assert elapsed == pytest.approx(1)


def test_a_call_of_slow_tries_ends_with_the_last_ones_reply():
    tries = []

    async def slow_twice(request):
        tries.append(anyio.current_time())
        await anyio.sleep(10 if len(tries) < 3 else 3)
        return "done"

    async def main():
        with use(current().evolve(record=CallRecord(0.0))):
            service = timeout(10) >> meshlib.retry(3, wait=0.5) >> timeout(attempt=1) >> slow_twice
            return await elapsed_of(service, meshlib.mux.Request(idempotent=True))

    outcome, elapsed = run_virtual(main)
    assert outcome == "done"
    assert elapsed == pytest.approx(1 + 0.5 + 1 + 0.5 + 3)


# --- composed, decorating, in a stack ---------------------------------------------------------------------------------


def test_it_decorates_functions_and_methods():
    class Shop:
        @timeout(1)
        async def buy(self, item: str, *, count: int = 1) -> str:
            await anyio.sleep(count)
            return f"{count} {item}"

    assert outcome_of(lambda: Shop().buy("tea", count=0))[0] == "0 tea"
    assert outcome_of(lambda: Shop().buy("tea", count=0))[0] == "0 tea"
    error, elapsed = outcome_of(lambda: Shop().buy("tea", count=5))
    assert isinstance(error, DeadlineExceeded)
    assert elapsed == pytest.approx(1)
    assert list(inspect.signature(Shop().buy).parameters) == ["item", "count"]


def test_both_limits_decorate_at_once():
    @timeout(3, attempt=1)
    async def function():
        await anyio.sleep(5)

    error, elapsed = outcome_of(function)
    assert isinstance(error, DeadlineExceeded)
    assert elapsed == pytest.approx(1)


def test_both_limits_are_two_layers_of_a_stack_and_one_filter_when_composed():
    both = timeout(1, attempt=0.25)
    assert isinstance(both, Filter)
    stack = Stack(("timeout", "filters", "attempt_timeout")).with_layers(both)
    assert [(layer.place, layer.seconds) for layer in stack] == [("timeout", 1), ("attempt_timeout", 0.25)]
    assert repr(both) == "timeout(total=1 s) + timeout(attempt=0.25 s)"

    async def main():
        return await both.apply(0.1, sleeper)

    assert run_virtual(main) == "slept 0.1"


def test_what_is_not_given_leaves_its_place_as_it_is():
    assert [type(timeout(1)), type(timeout(attempt=1)), type(timeout(None))] == [
        TotalTimeout,
        AttemptLimit,
        TotalTimeout,
    ]
    assert repr(timeout(None)) == "timeout(total=none)"


def test_no_attempt_limit_is_no_layer_at_all():
    assert AttemptLimit(None).build(Env(), sleeper) is sleeper
    assert outcome_of(timeout(attempt=None) >> sleeper, 5)[0] == "slept 5"


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, 1e9, "1", True])
@pytest.mark.parametrize("which", ["total", "attempt"])
def test_what_is_no_time_is_told_at_construction(which, wrong):
    with pytest.raises(ConfigurationError, match=rf"timeout\({which}=.*give seconds, a number above 0, or None"):
        timeout(**{which: wrong})


def test_a_timeout_without_any_time_is_told():
    with pytest.raises(ConfigurationError, match="give total=, attempt=, or both"):
        timeout()


# --- on a server ------------------------------------------------------------------------------------------------------


def served(handler, registry=None):
    return ServerDeadline().build(Env(kind="server", metrics=registry or Registry()), handler)


def test_a_request_without_a_deadline_is_handled_for_as_long_as_it_takes():
    assert outcome_of(served(sleeper), 1000)[0] == "slept 1000"


def test_expired_work_is_refused_before_it_begins():
    called, registry = [], Registry()

    async def handler(request):
        called.append(request)

    async def main():
        with use(Context(deadline=anyio.current_time() - 1)):
            return await elapsed_of(served(handler, registry), "x")

    error, _ = run_virtual(main)
    assert isinstance(error, DeadlineExceeded)
    assert error.processed is False
    assert called == []
    assert registry.snapshot()["deadline/expired"] == 1


def test_a_handler_whose_time_has_run_out_is_cancelled():
    ended = []

    async def handler(request):
        try:
            await anyio.sleep(5)
        finally:
            ended.append(anyio.current_time())

    error, elapsed = outcome_of(served(handler), "x", left=2)
    assert isinstance(error, DeadlineExceeded)
    assert error.processed is True
    assert elapsed == pytest.approx(2)
    assert ended == [pytest.approx(2)]


def test_a_handlers_own_timeout_error_passes_untouched():
    mine = TimeoutError("mine")

    async def handler(request):
        raise mine

    assert outcome_of(served(handler), "x", left=2)[0] is mine


class Wire(MuxConnector):
    """Connects to one server without a network."""

    def __init__(self, server):
        super().__init__()
        self.server = server

    async def open(self, address):
        ours, theirs = duplex()
        self.server.env.supervisor.start(self.server.serve_stream, theirs)
        return ours


def test_a_callers_deadline_ends_the_handler_across_the_wire():
    ended, left = [], []

    async def handler(request):
        left.append(remaining())
        try:
            await anyio.sleep(60)
        finally:
            ended.append(anyio.current_time())

    async def main():
        server = meshlib.mux.serve(handler)
        async with Client("h:1", Wire(server), timeout(30)) as client:
            with deadline(2), pytest.raises(DeadlineExceeded, match=r"the inherited deadline passed, 2\.000 s after"):
                await client(meshlib.mux.Request())
            assert anyio.current_time() == pytest.approx(2, abs=0.05)
            await anyio.sleep(1)
        numbers = server.metrics()
        assert (numbers["requests"], numbers["failures/DeadlineExceeded"], numbers["cancelled"]) == (1, 1, 0)
        await server.aclose()

    run_virtual(main)
    assert left == [pytest.approx(2, abs=0.01)]
    assert ended == [pytest.approx(2, abs=0.05)]


def test_a_caller_that_gives_up_cancels_the_handler_and_that_is_no_failure():
    ended = []

    async def handler(request):
        try:
            await anyio.sleep(60)
        finally:
            ended.append(anyio.current_time())

    async def main():
        server = meshlib.mux.serve(handler)
        async with Client("h:1", Wire(server)) as client:
            with anyio.move_on_after(2):
                await client(meshlib.mux.Request())
            await anyio.sleep(1)
            assert client.metrics()["cancelled"] == 1
        numbers = server.metrics()
        assert (numbers["failures"], numbers["cancelled"]) == (0, 1)
        await server.aclose()

    run_virtual(main)
    assert ended == [pytest.approx(2, abs=0.05)]


def test_they_print_with_their_parameters():
    assert repr(timeout(1.5)) == "timeout(total=1.5 s)"
    assert repr(timeout(attempt=0.3)) == "timeout(attempt=0.3 s)"
    assert repr(ServerDeadline()) == "deadline()"
