"""Errors are signed: which client, which name, which endpoints, how often, how long."""

import pytest

import meshlib
from meshlib.core.clock import Clock
from meshlib.core.context import CallRecord, Context, current, use
from meshlib.core.env import Env
from meshlib.core.errors import Attempt
from meshlib.filters.source import Source


class Bench:
    def __init__(self, handler):
        self.time = 10.0
        env = Env(label="shop", name="a:1,b:2", clock=Clock(now=lambda: self.time))
        self.service = Source().build(env, handler)


async def test_an_error_tells_client_name_tries_and_time():
    async def serve(request):
        for endpoint in ("a:1", "b:2"):
            current().record.endpoint = endpoint
            current().record.failed(meshlib.ConnectError("refused"))
        bench.time += 1.5
        raise meshlib.ConnectError("refused")

    bench = Bench(serve)
    with pytest.raises(meshlib.ConnectError) as caught:
        await bench.service("x")
    error = caught.value
    assert (error.label, error.name, error.elapsed, error.endpoint) == ("shop", "a:1,b:2", 1.5, "b:2")
    assert error.attempts == (Attempt("a:1", "ConnectError: refused"), Attempt("b:2", "ConnectError: refused"))
    assert current() == Context()


async def test_a_try_that_was_given_up_is_told_as_one():
    async def serve(request):
        current().record.endpoint = "a:1"
        raise meshlib.DeadlineExceeded("late")

    with pytest.raises(meshlib.DeadlineExceeded) as caught:
        await Bench(serve).service("x")
    assert caught.value.attempts == (Attempt("a:1", "no reply by then"),)
    assert caught.value.endpoint == "a:1"


async def test_an_endpoint_that_is_known_is_not_changed():
    async def serve(request):
        current().record.endpoint = "a:1"
        error = meshlib.ConnectionLost("cut", endpoint="a:1 (through a tunnel)")
        current().record.failed(error)
        raise error

    with pytest.raises(meshlib.ConnectionLost) as caught:
        await Bench(serve).service("x")
    assert caught.value.endpoint == "a:1 (through a tunnel)"


async def test_the_error_of_another_client_keeps_its_signature():
    async def serve(request):
        error = meshlib.RemoteError("broken")
        error.label = "another"
        raise error

    with pytest.raises(meshlib.RemoteError) as caught:
        await Bench(serve).service("x")
    assert (caught.value.label, caught.value.name, caught.value.elapsed) == ("another", "", None)


async def test_an_error_of_somebody_else_gets_a_note():
    async def serve(request):
        current().record.endpoint = "a:1"
        error = ValueError("broken")
        current().record.failed(error)
        raise error

    with pytest.raises(ValueError, match="broken") as caught:
        await Bench(serve).service("x")
    assert caught.value.__notes__ == ["meshlib: client 'shop', name a:1,b:2, a:1: ValueError: broken"]


@pytest.mark.parametrize(("attempt", "chained"), [(0, False), (1, True), (3, True)])
async def test_a_call_made_while_a_retry_is_served_begins_at_0_and_remembers(attempt, chained):
    async def serve(request):
        return current()

    with use(Context(attempt=attempt)):
        inside = await Bench(serve).service("x")
        assert current().attempt == attempt
    assert (inside.attempt, inside.record.chained, inside.record.started) == (0, chained, 10.0)


async def test_a_call_within_a_call_has_an_account_of_its_own():
    records = []

    async def inner(request):
        records.append(current().record)

    async def outer(request):
        records.append(current().record)
        await Bench(inner).service(request)
        assert current().record is records[0]

    await Bench(outer).service("x")
    assert records[0] is not records[1]


async def test_an_account_that_was_begun_above_is_kept_once():
    async def serve(request):
        return current().record

    begun = CallRecord(5.0)
    with use(Context(record=begun)):
        assert await Bench(serve).service("x") is begun
        assert await Bench(serve).service("x") is not begun


def test_it_prints():
    assert repr(Source()) == "source()"
