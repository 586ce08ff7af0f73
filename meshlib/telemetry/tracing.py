"""Trace ids always travel; spans are made when the application has configured an OpenTelemetry tracer.

The client layer gives each logical call an id of its own, a child of whatever it runs under: the current OpenTelemetry
span, else the id that came with the request being handled, else none (a new trace). The server layer makes a span with
the caller's as remote parent and has it current while the handler runs. A no-op span costs 4 µs, so the tracer is asked
for only when a provider other than OpenTelemetry's placeholder is installed; that may happen at any time, and is
noticed within a second.

Span names and attributes follow OpenTelemetry's RPC conventions 1.45: the client's span covers the logical call with
all its retries (each failed attempt and each decision of a layer is an event on it), and ``server.address`` is the
logical target.
"""

from __future__ import annotations

from typing import Any, ClassVar

from opentelemetry import trace as otel
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer, TraceState

from ..core.context import VAR, CallRecord, Context, TraceId
from ..core.deadlines import passed
from ..core.env import Env
from ..core.service import Filter, Service

__all__ = ["ClientTracing", "ServerTracing"]

_get_provider = otel.get_tracer_provider

LOOK_EVERY = 1.0


class _Tracing(Filter[Any, Any, Any, Any]):
    place: ClassVar[str] = "trace"
    kind: ClassVar[SpanKind]

    def __init__(self, env: Env | None = None) -> None:
        self.env = env or Env()
        self._bits = self.env.rng.getrandbits
        self._now = self.env.clock
        self._provider: Any = None
        self._tracer: Tracer | None = None
        self._look_again = float("-inf")

    def build(self, env: Env, service: Any) -> Any:
        """Ids come from the client's or server's own generator."""
        return type(self)(env).bind(service)

    def _listener(self) -> Tracer | None:
        """The application's tracer, if it has configured one.

        Asking OpenTelemetry costs 1.3 µs while there is none (it reads an environment variable), so it is asked once in
        `LOOK_EVERY` seconds.
        """
        now = self._now.now()
        if now >= self._look_again:
            self._look_again = now + LOOK_EVERY
            provider = _get_provider()
            if provider is not self._provider:
                self._provider = provider
                # The proxy and the no-op provider record nothing: with either, nobody is listening.
                silent = isinstance(provider, otel.ProxyTracerProvider | otel.NoOpTracerProvider)
                self._tracer = None if silent else provider.get_tracer("meshlib")
        return self._tracer

    def _attributes(self, request: Any) -> tuple[str, dict[str, Any]]:
        method = (getattr(request, "dest", "") or "").strip("/") or "_OTHER"
        return method, {"rpc.system.name": self.env.protocol or "meshlib", "rpc.method": method}

    def __repr__(self) -> str:
        return "trace()"

    def _tell(self, span: Span, record: CallRecord) -> None:
        """An event for each decision, at its time."""
        now, epoch = self.env.clock.now(), self.env.clock.epoch_ns()
        for decision in record.decisions:
            facts = {"kind": decision.kind, "code": decision.code}
            if decision.detail:
                facts["detail"] = decision.detail
            if decision.endpoint:
                facts["endpoint"] = decision.endpoint
            span.add_event("decision", facts, timestamp=epoch - int((now - decision.at) * 1e9))

    def _answered(self, span: Span, request: Any, reply: Any) -> None:
        """What is known once there is a reply."""
        if reply is not None:
            span.set_attribute("rpc.status_code", "OK")

    def _end(self, span: Span, error: BaseException | None, request: Any, reply: Any) -> None:
        if span.is_recording():
            self._answered(span, request, reply)
            if error is not None:
                expired = not isinstance(error, Exception) and passed(VAR.get().deadline, self.env.clock)
                span.set_attribute("error.type", "DeadlineExceeded" if expired else type(error).__name__)
                span.set_status(Status(StatusCode.ERROR, str(error)))
        span.end()


class ClientTracing(_Tracing):
    """Gives the logical call its trace id, and its client span if anybody is listening."""

    kind = SpanKind.CLIENT

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Run the call under an id of its own."""
        context = VAR.get()
        tracer = self._listener()
        if tracer is not None:
            return await self._traced(tracer, context, request, service)
        above = context.trace
        bits = self._bits
        if above is None:
            child = TraceId(bits(128) or 1, bits(64) or 1)
        else:
            child = TraceId(above.trace, bits(64) or 1, above.span, above.sampled, above.debug, above.state)
        token = VAR.set(context.evolve(trace=child))
        try:
            return await service(request)
        finally:
            VAR.reset(token)

    async def _traced(self, tracer: Tracer, context: Context, request: Any, service: Service[Any, Any]) -> Any:
        parent = otel.get_current_span().get_span_context()
        within = None
        links: tuple[Link, ...] = ()
        if not parent.is_valid and context.trace is not None:
            parent, links = parent_of(context.trace)
            within = otel.set_span_in_context(otel.NonRecordingSpan(parent))
        name, attributes = self._attributes(request)
        attributes["server.address"] = self.env.name
        span = tracer.start_span(name, context=within, kind=self.kind, attributes=attributes, links=links)
        child = trace_id(span.get_span_context(), parent, debug=context.trace is not None and context.trace.debug)
        record = CallRecord(self.env.clock.now(), context.attempt > 0)
        token = VAR.set(context.evolve(trace=child, record=record))
        error: BaseException | None = None
        reply = None
        try:
            reply = await service(request)
            return reply
        except BaseException as e:
            error = e
            raise
        finally:
            VAR.reset(token)
            if span.is_recording():
                for attempt in record.attempts:
                    span.add_event("attempt", {"endpoint": attempt.endpoint, "outcome": attempt.outcome or ""})
                self._tell(span, record)
            self._end(span, error, request, reply)


class ServerTracing(_Tracing):
    """Makes the server span, and has it current while the request is handled."""

    kind = SpanKind.SERVER

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle the request under the caller's trace."""
        tracer = self._listener()
        context = VAR.get()
        if tracer is None:
            if context.trace is not None:
                return await service(request)
            # A caller that knows no traces; what it sets off belongs together all the same, in logs if nowhere else.
            token = VAR.set(context.evolve(trace=TraceId(self._bits(128) or 1, self._bits(64) or 1)))
            try:
                return await service(request)
            finally:
                VAR.reset(token)
        # Without a caller's trace it is a root, whatever span was current when the server was started.
        parent, links = (NOBODY, ()) if context.trace is None else parent_of(context.trace)
        within = otel.set_span_in_context(otel.NonRecordingSpan(parent))
        name, attributes = self._attributes(request)
        span = tracer.start_span(name, context=within, kind=self.kind, attributes=attributes, links=links)
        debug = context.trace is not None and context.trace.debug
        # What the server's own layers decide goes into its span. The handler's calls have accounts of their own.
        record = CallRecord(self.env.clock.now(), context.attempt > 0)
        record.opened = True
        token = VAR.set(context.evolve(trace=trace_id(span.get_span_context(), parent, debug=debug), record=record))
        error: BaseException | None = None
        reply = None
        try:
            with otel.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
                reply = await service(request)
            return reply
        except BaseException as e:
            error = e
            raise
        finally:
            VAR.reset(token)
            if record.decisions and span.is_recording():
                self._tell(span, record)
            self._end(span, error, request, reply)


NOBODY = SpanContext(0, 0, is_remote=True)


def parent_of(trace: TraceId) -> tuple[SpanContext, tuple[Link, ...]]:
    """What a span made for a request under ``trace`` is a child of, and what it is linked to.

    A caller that records nothing has not decided whether others should. As a parent it would say "not sampled", and
    samplers that follow their parent, as OpenTelemetry's default does, would never record a thing behind it. So the
    span becomes a root, by this process's own sampling, with a link to the caller.
    """
    remote = span_context(trace)
    undecided = trace.sampled is None and not trace.debug
    return (NOBODY, (Link(remote),)) if undecided else (remote, ())


def span_context(trace: TraceId) -> SpanContext:
    """The OpenTelemetry form of a trace id that came over the wire."""
    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled or trace.debug else TraceFlags.DEFAULT)
    state = TraceState.from_header([trace.state]) if trace.state else None
    return SpanContext(trace.trace, trace.span, is_remote=True, trace_flags=flags, trace_state=state)


def trace_id(span: SpanContext, parent: SpanContext, *, debug: bool = False) -> TraceId:
    """What travels for a span."""
    return TraceId(
        span.trace_id,
        span.span_id,
        parent.span_id if parent.is_valid else None,
        bool(span.trace_flags & TraceFlags.SAMPLED),
        debug,
        span.trace_state.to_header() if span.trace_state else "",
    )
