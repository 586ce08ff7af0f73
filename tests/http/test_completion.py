"""What a `meshlib.http.Middleware` does once a response has begun, and once it is complete and the app goes on."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

import meshlib
from meshlib.http import Middleware
from meshlib.http.completion import Early
from meshlib.telemetry import tracing

from .test_middleware import Client, answer

pytestmark = pytest.mark.anyio

SOON = [(b"finagle-ctx-com.twitter.finagle.deadline", b"1000000000 1150000000")]
"""A deadline 150 ms away."""
BEGUN = {"type": "http.response.start", "status": 200, "headers": []}


class Working:
    """Answers, and goes on until it is let go."""

    def __init__(self, status=200):
        self.status, self.left = status, []
        self.working, self.go = anyio.Event(), anyio.Event()
        self.ended = "not yet"

    async def __call__(self, scope, receive, send):
        await answer(send, self.status)
        self.left.append(meshlib.remaining())
        self.working.set()
        try:
            await self.go.wait()
            self.ended = "by itself"
        except BaseException:
            self.ended = "cancelled"
            raise


async def test_a_response_that_has_begun_in_time_may_take_its_time():
    left = []

    async def events(scope, receive, send):
        await send(BEGUN)
        for _ in range(3):
            await anyio.sleep(0.07)
            await send({"type": "http.response.body", "body": b".", "more_body": True})
        left.append(meshlib.remaining())
        await send({"type": "http.response.body", "body": b"end"})

    middleware = Middleware(events)
    reply = await Client(middleware, headers=SOON).run()
    assert (reply.status, reply.body) == (200, b"...end")
    assert left[0] <= 0  # calls that it makes are still for the caller
    numbers = middleware.metrics()
    assert (numbers["success"], numbers["routes/GET -/success"], numbers["failures"]) == (1, 1, 0)


async def test_who_leaves_a_response_after_its_deadline_has_not_let_it_pass():
    async def events(scope, receive, send):
        await send(BEGUN)
        await anyio.sleep(60)

    middleware = Middleware(events, meshlib.concurrency_limit(meshlib.adaptive()))
    client = Client(middleware, headers=SOON)
    async with anyio.create_task_group() as group:
        group.start_soon(client.run)
        await anyio.sleep(0.4)
        assert "(1 requests)" in repr(middleware)
        client.left.set()
    numbers = middleware.metrics()
    assert (numbers["disconnects"], numbers["cancelled"], numbers["requests"]) == (1, 1, 0)
    assert "failures/DeadlineExceeded" not in numbers
    assert numbers.get("routes/GET -/failures", 0) == numbers["limit/concurrency"] == 0


async def test_a_deadline_that_has_passed_is_not_lifted_by_an_answer_that_comes_too_late():
    async def late(scope, receive, send):
        try:
            await anyio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                await send(BEGUN)

    middleware = Middleware(late)
    await Client(middleware, headers=SOON).run()
    assert middleware.metrics()["failures/DeadlineExceeded"] == 1


@pytest.mark.parametrize("limit", [1, meshlib.adaptive(1, min_limit=1, max_limit=1)], ids=["fixed", "adaptive"])
async def test_what_the_app_does_after_its_response_concerns_no_layer(limit):
    app = Working()
    middleware = Middleware(app, meshlib.concurrency_limit(limit, queue=0), meshlib.timeout(0.15))
    async with anyio.create_task_group() as group:
        group.start_soon(Client(middleware, headers=SOON).run)
        await app.working.wait()
        numbers = middleware.metrics()
        assert (numbers["success"], numbers["routes/GET -/success"]) == (1, 1)
        assert (numbers["pending"], numbers["limit/concurrency"]) == (0, 0)
        await anyio.sleep(0.4)  # the deadline passes, and so does the time of the layer
        group.start_soon(Client(middleware).run)
        while len(app.left) < 2:  # noqa: ASYNC110 - there is a place for another
            await anyio.sleep(0.001)
        app.go.set()
    assert app.ended == "by itself"
    assert app.left == [None, None]  # what it does is not for the caller, nor what it calls
    numbers = middleware.metrics()
    assert (numbers["requests"], numbers["success"], numbers["failures"]) == (2, 2, 0)
    assert (numbers["pending"], numbers["limit/concurrency"], numbers["routes/GET -/requests"]) == (0, 0, 2)


async def test_the_last_of_a_response_may_be_sent_by_another_task():
    """Starlette streams in one."""
    working, go = anyio.Event(), anyio.Event()

    async def app(scope, receive, send):
        async with anyio.create_task_group() as group:
            group.start_soon(answer, send)
        working.set()
        await go.wait()

    middleware = Middleware(app, meshlib.concurrency_limit(1), meshlib.timeout(30))
    async with anyio.create_task_group() as group:
        group.start_soon(Client(middleware).run)
        await working.wait()
        assert (middleware.metrics()["success"], middleware.metrics()["limit/concurrency"]) == (1, 0)
        go.set()


async def test_a_failure_after_the_response_is_for_the_server_and_not_counted():
    async def app(scope, receive, send):
        await answer(send)
        raise ZeroDivisionError

    middleware = Middleware(app)
    with pytest.raises(ZeroDivisionError):
        await Client(middleware).run()
    numbers = middleware.metrics()
    assert (numbers["success"], numbers["failures"], numbers["routes/GET -/failures"]) == (1, 0, 0)


async def test_a_response_of_500_fails_whatever_follows_it():
    app = Working(500)
    app.go.set()
    middleware = Middleware(app)
    await Client(middleware).run()
    numbers = middleware.metrics()
    assert (numbers["failures/reply"], numbers["routes/GET -/failures"], numbers["requests"]) == (1, 1, 1)


async def test_to_drain_is_to_wait_for_it():
    app = Working()
    middleware = Middleware(app)
    async with anyio.create_task_group() as group:
        group.start_soon(Client(middleware).run)
        await app.working.wait()
        middleware.drain()
        group.start_soon(middleware.wait_idle, 30)
        await anyio.sleep(0.01)
        assert app.ended == "not yet"
        app.go.set()
    assert app.ended == "by itself"


async def test_what_outlasts_the_grace_period_is_cancelled_all_the_same():
    app = Working()
    middleware = Middleware(app)
    client = Client(middleware)
    async with anyio.create_task_group() as group:
        group.start_soon(client.run)
        await app.working.wait()
        await middleware.wait_idle(0)
    assert app.ended == "cancelled"
    assert client.status == 200
    numbers = middleware.metrics()
    assert (numbers["success"], numbers["cancelled"], numbers["disconnects"]) == (1, 0, 0)


class Spans(SpanProcessor):
    """What an application installs."""

    def __init__(self):
        self.ended = []
        self.provider = TracerProvider()
        self.provider.add_span_processor(self)

    def on_end(self, span):
        self.ended.append(span)


@pytest.fixture
def spans(monkeypatch):
    spans = Spans()
    monkeypatch.setattr(tracing, "_get_provider", lambda: spans.provider)
    return spans


async def test_the_span_ends_with_the_response_and_stays_current(spans, caplog):
    class Route:
        path = "/users/{id}"

    seen = []
    working, go = anyio.Event(), anyio.Event()

    async def app(scope, receive, send):
        scope["route"] = Route()
        await answer(send, 201)
        working.set()
        await go.wait()
        trace = meshlib.current().trace
        assert trace is not None
        seen.append((otel.get_current_span().get_span_context().span_id, trace.span))

    middleware = Middleware(app)
    async with anyio.create_task_group() as group:
        group.start_soon(Client(middleware).run)
        await working.wait()
        assert len(spans.ended) == 1
        go.set()
    (span,) = spans.ended
    assert (span.name, span.attributes["http.response.status_code"]) == ("GET /users/{id}", 201)
    assert seen == [(span.context.span_id,) * 2]
    assert not caplog.records  # OpenTelemetry warns of a span that is ended twice


async def test_the_span_of_a_response_that_somebody_left_says_so(spans):
    async def events(scope, receive, send):
        await send(BEGUN)
        await anyio.sleep(60)

    client = Client(Middleware(events), headers=SOON)
    async with anyio.create_task_group() as group:
        group.start_soon(client.run)
        await anyio.sleep(0.4)
        client.left.set()
    (span,) = spans.ended
    assert span.attributes["error.type"] in ("CancelledError", "Cancelled")


async def test_the_span_of_a_request_that_fails_has_the_error(spans, caplog):
    async def fail(scope, receive, send):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Client(Middleware(fail)).run()
    reply = await Client(Middleware(Working()), headers=[(SOON[0][0], b"1000000000 1000000000")]).run()
    assert reply.status == 504
    assert [span.attributes["error.type"] for span in spans.ended] == ["ZeroDivisionError", "DeadlineExceeded"]
    assert not caplog.records


async def test_a_layer_that_waits_cannot_be_told_early():
    @meshlib.filter
    async def waits(request, service):
        reply = await service(request)
        await anyio.lowlevel.checkpoint()
        return reply

    with pytest.raises(RuntimeError, match="cannot be told of a reply early"):
        await Client(Middleware(Working(), Early(waits))).run()
