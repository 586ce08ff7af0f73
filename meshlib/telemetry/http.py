"""Spans of HTTP, by OpenTelemetry's HTTP conventions 1.45: named for the method and the route, which are few."""

from __future__ import annotations

import functools
from collections.abc import Awaitable
from typing import Any, Final

from opentelemetry import trace as otel
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from ..core.context import VAR
from ..core.service import Service
from .tracing import ClientTracing, ServerTracing

__all__ = ["METHODS", "HttpClientTracing", "HttpServerTracing"]

METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"))
"""Others are ``_OTHER``: a method is whatever a caller says, and names of spans and metrics are to be few."""


def _method(method: str) -> tuple[str, dict[str, Any]]:
    """What a span is called for its method, and its attributes."""
    if method in METHODS:
        return method, {"http.request.method": method}
    return "HTTP", {"http.request.method": "_OTHER", "http.request.method_original": method}


class HttpClientTracing(ClientTracing):
    """The span of a logical call; its retries are events on it."""

    def _attributes(self, request: Any) -> tuple[str, dict[str, Any]]:
        name, facts = _method(request.method)
        facts["url.full"] = str(request.url.copy_with(userinfo=b"", query=None))
        return name, facts

    def _answered(self, span: Span, request: Any, reply: Any) -> None:
        if reply is not None:
            span.set_attribute("http.response.status_code", reply.status_code)
            if reply.status_code >= 400:
                span.set_attribute("error.type", str(reply.status_code))
                span.set_status(Status(StatusCode.ERROR))


class HttpServerTracing(ServerTracing):
    """The span of a request. Where an instrumentation around the app has made one already, that is it.

    It ends when the response is complete, and stays current for what the app does afterwards.
    """

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle the request under the caller's trace."""
        if self._listener() is None:
            return await super().apply(request, service)
        above: Any = otel.get_current_span()
        if above.is_recording() and getattr(above, "kind", None) is SpanKind.SERVER:
            return await service(request)
        return await super().apply(request, functools.partial(self._inside, service))

    def _inside(self, service: Service[Any, Any], request: Any) -> Awaitable[Any]:
        span, record = otel.get_current_span(), VAR.get().record

        def complete() -> None:
            if record is not None and record.decisions and span.is_recording():
                self._tell(span, record)
            self._end(span, None, request, request)

        request.on_complete(complete)
        return service(request)

    def _end(self, span: Span, error: BaseException | None, request: Any, reply: Any) -> None:
        if not span.is_recording():  # it has ended
            return
        if not request.lifted:
            super()._end(span, error, request, reply)
            return
        token = VAR.set(VAR.get().evolve(deadline=None))  # a cancellation has been for another reason
        try:
            super()._end(span, error, request, reply)
        finally:
            VAR.reset(token)

    def _attributes(self, request: Any) -> tuple[str, dict[str, Any]]:
        scope = request.scope
        name, facts = _method(request.method)
        facts |= {"url.path": request.path, "url.scheme": scope["scheme"]}
        if scope.get("http_version"):
            facts["network.protocol.version"] = scope["http_version"]
        return name, facts

    def _answered(self, span: Span, request: Any, reply: Any) -> None:
        if request.route:
            span.update_name(f"{_method(request.method)[0]} {request.route}")
            span.set_attribute("http.route", request.route)
        if request.status:
            span.set_attribute("http.response.status_code", request.status)
            if request.status >= 500:
                span.set_attribute("error.type", str(request.status))
                span.set_status(Status(StatusCode.ERROR))
