"""Spans of gRPC clients: OpenTelemetry's RPC conventions 1.45, with gRPC's names of statuses.

A stream's span lasts until the stream is over. What an error's status is, the error itself says (``error.status``).
"""

from __future__ import annotations

from typing import Any

from opentelemetry.trace import Span

from .tracing import ClientTracing

__all__ = ["GrpcClientTracing"]


class GrpcClientTracing(ClientTracing):
    """The span of a logical call; its retries are events on it."""

    def _end(self, span: Span, error: BaseException | None, request: Any, reply: Any) -> None:
        later = getattr(reply, "on_end", None)
        if error is None and later is not None and not reply.over:
            later(lambda failed: self._finally(span, failed, request, reply))
        else:
            self._finally(span, error, request, reply)

    def _finally(self, span: Span, error: BaseException | None, request: Any, reply: Any) -> None:
        status = getattr(getattr(error, "status", None), "name", None)
        if status is not None and span.is_recording():
            span.set_attribute("rpc.status_code", status)
        super()._end(span, error, request, reply)
