"""Tracing: ids always travel; spans are made when the application listens."""

import random

import anyio
import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import meshlib
from meshlib import mux
from meshlib.core.clock import Clock
from meshlib.core.context import Context, TraceId, current, use
from meshlib.core.env import Env
from meshlib.filters.source import Source
from meshlib.telemetry import tracing
from meshlib.telemetry.tracing import LOOK_EVERY, ClientTracing, ServerTracing


class Recorder(SpanProcessor):
    """What an application installs; it counts spans that were begun and never ended."""

    def __init__(self):
        self.open = 0
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(self)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("tests")

    def on_start(self, span, parent_context=None):
        self.open += 1

    def on_end(self, span):
        self.open -= 1

    @property
    def spans(self):
        return self.exporter.get_finished_spans()

    def one(self, kind):
        (span,) = [span for span in self.spans if span.kind is kind]
        return span


@pytest.fixture
def recorder(monkeypatch):
    """An application's tracer, in the place of OpenTelemetry's global one, which can be set but once in a process."""
    recorder = Recorder()
    monkeypatch.setattr(tracing, "_get_provider", lambda: recorder.provider)
    yield recorder
    assert recorder.open == 0, "spans were begun and never ended"
    recorder.provider.shutdown()


@pytest.fixture
def silence(monkeypatch):
    monkeypatch.setattr(tracing, "_get_provider", otel.ProxyTracerProvider)


def env(**more) -> Env:
    return Env(label="shop", name="h:1,h:2", protocol="mux", rng=random.Random(1), **more)


def client(service, **more):
    return ClientTracing().build(env(**more), service)


async def inner(request):
    return current().trace


# --- nobody listens: ids travel ---------------------------------------------------------------------------------------


async def test_a_call_outside_of_any_trace_begins_one(silence):
    service = client(inner)
    first, second = await service(mux.Request()), await service(mux.Request())
    assert first.parent is None
    assert first.sampled is None
    assert 0 < first.span < 2**64
    assert 0 < first.trace < 2**128
    assert first.trace != second.trace
    assert current().trace is None


async def test_a_call_within_a_trace_is_its_child_and_keeps_what_was_decided(silence):
    above = TraceId(7, 8, None, True, True, "vendor=x")
    with use(Context(trace=above)):
        below = await client(inner)(mux.Request())
    assert (below.trace, below.parent, below.sampled, below.debug, below.state) == (7, 8, True, True, "vendor=x")
    assert below.span != 8


async def test_ids_repeat_from_a_seed(silence):
    assert await client(inner)(mux.Request()) == await client(inner)(mux.Request())


async def test_ids_reach_the_handler_and_its_own_calls(silence):
    seen = []

    async def last(request):
        seen.append(current().trace)
        return mux.Response()

    async def first(request):
        seen.append(current().trace)
        await onward(mux.Request())
        return mux.Response()

    async with (
        mux.serve(last) as end,
        mux.serve(first) as begin,
        mux.client(end.address) as onward,
        mux.client(begin.address) as caller,
    ):
        with use(Context(trace=TraceId(7 << 64 | 9, 8, None, True))):
            await caller(mux.Request())
    first_hop, second_hop = seen
    assert first_hop.trace == second_hop.trace == 7 << 64 | 9
    assert (first_hop.parent, second_hop.parent) == (8, first_hop.span)
    assert first_hop.sampled
    assert second_hop.sampled


# --- somebody listens -------------------------------------------------------------------------------------------------


async def test_a_clients_span_has_the_conventional_name_and_attributes(recorder):
    trace = await client(inner)(mux.Request(dest="/greeter/hello"))
    span = recorder.one(SpanKind.CLIENT)
    assert span.name == "greeter/hello"
    assert dict(span.attributes) == {
        "rpc.system.name": "mux",
        "rpc.method": "greeter/hello",
        "server.address": "h:1,h:2",
        "rpc.status_code": "OK",
    }
    assert (trace.trace, trace.span, trace.parent) == (span.context.trace_id, span.context.span_id, None)
    assert trace.sampled
    assert span.parent is None


async def test_a_request_without_a_path_has_a_name_all_the_same(recorder):
    await client(inner)(mux.Request())
    assert recorder.one(SpanKind.CLIENT).name == "_OTHER"


async def test_the_users_own_span_is_the_parent(recorder):
    with recorder.tracer.start_as_current_span("mine") as mine:
        trace = await client(inner)(mux.Request())
    span = recorder.one(SpanKind.CLIENT)
    assert span.parent.span_id == mine.context.span_id == trace.parent
    assert span.context.trace_id == mine.context.trace_id == trace.trace


async def test_the_users_own_span_is_nearer_than_the_trace_of_the_request_being_served(recorder):
    with use(Context(trace=TraceId(7, 8, None, True))), recorder.tracer.start_as_current_span("mine") as mine:
        await client(inner)(mux.Request())
    assert recorder.one(SpanKind.CLIENT).parent.span_id == mine.context.span_id


async def test_without_one_the_trace_of_the_request_being_served_is(recorder):
    with use(Context(trace=TraceId(7, 8, None, True, state="vendor=x"))):
        trace = await client(inner)(mux.Request())
    span = recorder.one(SpanKind.CLIENT)
    assert (span.context.trace_id, span.parent.span_id, span.parent.is_remote) == (7, 8, True)
    assert (trace.parent, trace.state) == (8, "vendor=x")


async def test_a_trace_that_is_not_recorded_travels_on_as_such(recorder):
    with use(Context(trace=TraceId(7, 8, None, False))):
        trace = await client(inner)(mux.Request())
    assert (trace.trace, trace.sampled) == (7, False)
    assert recorder.spans == ()


async def test_a_span_of_a_failed_call_says_so(recorder):
    async def fail(request):
        raise meshlib.RemoteError("broken")

    with pytest.raises(meshlib.RemoteError):
        await client(fail)(mux.Request())
    span = recorder.one(SpanKind.CLIENT)
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "broken"
    assert span.attributes["error.type"] == "RemoteError"
    assert "rpc.status_code" not in span.attributes


async def test_an_error_of_somebody_else_may_have_attempts_of_another_kind(recorder):
    class Theirs(Exception):
        attempts = 3

    async def fail(request):
        raise Theirs("x")

    with pytest.raises(Theirs):
        await client(fail)(mux.Request())
    assert recorder.one(SpanKind.CLIENT).attributes["error.type"] == "Theirs"


@pytest.mark.parametrize("layer", [ClientTracing, ServerTracing])
async def test_a_cancelled_call_ends_its_span(recorder, layer):
    async def hang(request):
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        scope.cancel()
        await layer().build(env(), hang)(mux.Request())
    (span,) = recorder.spans
    assert span.status.status_code is StatusCode.ERROR
    assert "Cancelled" in span.attributes["error.type"]


async def test_a_request_whose_time_ran_out_is_told_from_one_that_was_given_up(recorder):
    async def hang(request):
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope, use(Context(deadline=1.0)):
        scope.cancel()
        await ServerTracing().build(env(clock=Clock(now=lambda: 2.0)), hang)(mux.Request())
    assert recorder.one(SpanKind.SERVER).attributes["error.type"] == "DeadlineExceeded"


async def test_one_span_covers_every_try_and_has_an_event_for_each_that_failed(recorder):
    tries = 0

    async def unlucky_twice(request):
        nonlocal tries
        tries += 1
        current().record.endpoint = f"h:{tries}"
        if tries < 3:
            error = meshlib.ConnectError("refused")
            current().record.failed(error)
            raise error
        return current().trace

    retried = ClientTracing().build(env(), Source().build(env(), meshlib.retry(wait=0).bind(unlucky_twice)))
    trace = await retried(mux.Request(idempotent=True))
    span = recorder.one(SpanKind.CLIENT)
    assert trace.span == span.context.span_id
    assert span.status.status_code is not StatusCode.ERROR
    assert [(event.name, dict(event.attributes)) for event in span.events if event.name == "attempt"] == [
        ("attempt", {"endpoint": "h:1", "outcome": "ConnectError: refused"}),
        ("attempt", {"endpoint": "h:2", "outcome": "ConnectError: refused"}),
    ]


async def test_the_tries_of_a_call_that_failed_are_on_its_span_too(recorder):
    async def handler(request):
        raise ValueError("x")

    async with mux.serve(handler) as server, mux.client(server.address) as caller:
        with pytest.raises(meshlib.RemoteError):
            await caller(mux.Request())
    event, told = recorder.one(SpanKind.CLIENT).events
    assert (event.name, told.name) == ("attempt", "decision")
    assert event.attributes["endpoint"] == server.address
    assert event.attributes["outcome"].startswith("RemoteError: internal error")


async def test_a_call_made_by_a_filter_has_an_account_of_its_own(recorder):
    @meshlib.filter
    async def asks_another_first(request, service):
        await other(mux.Request(dest="/other"))
        return await service(request)

    async def echo(request):
        return mux.Response(request.body)

    async with (
        mux.serve(echo) as server,
        mux.client(server.address) as other,
        mux.client(server.address, asks_another_first) as caller,
    ):
        await caller(mux.Request(b"x"))
    assert all(not span.events for span in recorder.spans)
    assert len(recorder.spans) == 4


async def test_a_servers_span_is_the_child_of_its_callers_across_the_wire(recorder):
    seen = []

    async def handler(request):
        with recorder.tracer.start_as_current_span("handling"):
            seen.append(current().trace)
        return mux.Response()

    async with mux.serve(handler, label="back") as server, mux.client(server.address) as caller:
        await caller(mux.Request(dest="/x/y"))
    mine, theirs = recorder.one(SpanKind.CLIENT), recorder.one(SpanKind.SERVER)
    (inside,) = [span for span in recorder.spans if span.name == "handling"]
    assert theirs.parent.span_id == mine.context.span_id
    assert theirs.parent.is_remote
    assert theirs.context.trace_id == mine.context.trace_id
    assert theirs.name == "x/y"
    assert dict(theirs.attributes) == {"rpc.system.name": "mux", "rpc.method": "x/y", "rpc.status_code": "OK"}
    assert inside.parent.span_id == theirs.context.span_id
    assert (seen[0].span, seen[0].parent) == (theirs.context.span_id, mine.context.span_id)


async def test_a_handlers_failure_marks_the_servers_span(recorder):
    async def handler(request):
        raise ValueError("secret")

    async with mux.serve(handler) as server, mux.client(server.address) as caller:
        with pytest.raises(meshlib.RemoteError):
            await caller(mux.Request())
    span = recorder.one(SpanKind.SERVER)
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "RemoteError"


async def test_a_request_without_a_trace_is_a_root_whatever_was_current_when_the_server_began(recorder):
    service = ServerTracing().build(env(), inner)
    with recorder.tracer.start_as_current_span("starting the server"):
        trace = await service(mux.Request())
    span = recorder.one(SpanKind.SERVER)
    assert span.parent is None
    assert trace.parent is None


@pytest.mark.parametrize("layer", [ClientTracing, ServerTracing])
async def test_a_caller_that_has_not_decided_does_not_keep_us_from_recording(recorder, layer):
    """A client without a tracer sends ids and no decision; as a parent it would say "not sampled"."""
    theirs = TraceId(7 << 64, 9)
    with use(Context(trace=theirs)):
        trace = await layer().build(env(), inner)(mux.Request())
    (span,) = recorder.spans
    assert span.parent is None
    assert [link.context.span_id for link in span.links] == [theirs.span]
    assert (trace.trace, trace.parent, trace.sampled) == (span.context.trace_id, None, True)


@pytest.mark.parametrize("layer", [ClientTracing, ServerTracing])
async def test_a_caller_that_decided_against_it_is_followed(recorder, layer):
    with use(Context(trace=TraceId(7 << 64, 9, sampled=False))):
        trace = await layer().build(env(), inner)(mux.Request())
    assert recorder.spans == ()
    assert (trace.trace, trace.parent, trace.sampled) == (7 << 64, 9, False)


@pytest.mark.parametrize("layer", [ClientTracing, ServerTracing])
async def test_debug_is_recorded_and_travels_on(recorder, layer):
    with use(Context(trace=TraceId(7 << 64, 9, debug=True))):
        trace = await layer().build(env(), inner)(mux.Request())
    assert len(recorder.spans) == 1
    assert trace.debug


async def test_the_handlers_span_is_current_no_longer_than_the_request(recorder):
    async def handler(request):
        return otel.get_current_span().get_span_context().span_id

    span_id = await ServerTracing().build(env(), handler)(mux.Request())
    assert span_id == recorder.one(SpanKind.SERVER).context.span_id
    assert not otel.get_current_span().get_span_context().is_valid


@pytest.mark.parametrize("layer", [ClientTracing, ServerTracing])
async def test_a_provider_that_is_installed_later_is_found(monkeypatch, layer):
    time = 0.0
    installed = otel.ProxyTracerProvider()
    monkeypatch.setattr(tracing, "_get_provider", lambda: installed)
    service = layer().build(env(clock=Clock(now=lambda: time)), inner)
    await service(mux.Request())
    recorder = Recorder()
    installed = recorder.provider
    time += LOOK_EVERY
    await service(mux.Request())
    assert len(recorder.spans) == 1
    installed = otel.NoOpTracerProvider()
    time += LOOK_EVERY
    await service(mux.Request())
    assert (len(recorder.spans), recorder.open) == (1, 0)
    recorder.provider.shutdown()


async def test_without_a_listener_a_server_leaves_the_trace_as_it_came(silence):
    trace = TraceId(7, 8, 6, True)
    with use(Context(trace=trace)):
        assert await ServerTracing().build(env(), inner)(mux.Request()) is trace


async def test_decisions_are_events_of_the_clients_span_at_their_time(recorder):
    async def broken(request):
        raise ValueError("broken")

    async with (
        mux.serve(broken) as server,
        mux.client(server.address, meshlib.retry(2, on=meshlib.RemoteError, wait=0.05)) as client,
    ):
        with pytest.raises(meshlib.RemoteError):
            await client(mux.Request(idempotent=True))
    span = recorder.one(SpanKind.CLIENT)
    told = [event for event in span.events if event.name == "decision"]
    assert [(event.attributes["kind"], event.attributes["code"]) for event in told] == [
        ("retry", "failure"),
        ("no_retry", "attempts"),
    ]
    assert [event.attributes["endpoint"] for event in told] == [server.address] * 2
    assert told[0].attributes["detail"].startswith("try 2 of 2, 50 ms after RemoteError")
    assert span.start_time <= told[0].timestamp <= told[1].timestamp <= span.end_time + 1_000_000


async def test_what_the_layers_of_a_server_decide_is_in_its_span_and_not_in_its_handlers_calls(recorder):
    surroundings = env()

    async def refuse(request):
        surroundings.events.note("shed", "full", "10 of 10 under way")
        raise meshlib.Rejected("full")

    service = ServerTracing().build(surroundings, refuse)
    with pytest.raises(meshlib.Rejected):
        await service(mux.Request())
    (event,) = recorder.one(SpanKind.SERVER).events
    assert dict(event.attributes) == {"kind": "shed", "code": "full", "detail": "10 of 10 under way"}

    records = []

    async def record(request):
        records.append(current().record)

    async def handler(request):
        records.append(current().record)
        return await Source().build(env(), record)(request)

    await ServerTracing().build(env(), handler)(mux.Request())
    assert records[0] is not records[1]


async def test_a_span_that_is_not_recorded_is_told_nothing(recorder, monkeypatch):
    def told(*args, **kwargs):
        raise AssertionError("told")

    surroundings = env()

    async def decide(request):
        surroundings.events.note("shed", "full")

    monkeypatch.setattr(otel.NonRecordingSpan, "add_event", told)
    with use(Context(trace=TraceId(7 << 64, 9, sampled=False))):
        for layer in (ClientTracing, ServerTracing):
            await layer().build(surroundings, decide)(mux.Request())
    assert recorder.spans == ()


def test_it_prints():
    assert repr(ClientTracing()) == repr(ServerTracing()) == "trace()"
