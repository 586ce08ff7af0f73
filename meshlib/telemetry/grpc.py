"""Spans of gRPC clients: OpenTelemetry's RPC conventions 1.45, with gRPC's names of statuses.

A stream's span lasts until the stream is over, and has the status that it ended with. What an error's status is, the
request says (``request.status_name``).
"""

from __future__ import annotations

from typing import Any

from opentelemetry.trace import Span

from ..core.context import VAR
from ..core.deadlines import passed
from .tracing import ClientTracing

__all__ = ["GrpcClientTracing"]


class GrpcClientTracing(ClientTracing):
    """The span of a logical call; its retries are events on it."""

    def _end(self, span: Span, error: BaseException | None, request: Any, reply: Any) -> None:
        later = getattr(reply, "on_end", None)
        if error is None and later is not None:
            later(lambda _: self._finally(span, reply.failure(), request))
        else:
            self._finally(span, error, request)

    def _finally(self, span: Span, error: BaseException | None, request: Any) -> None:
        if span.is_recording():
            expired = (
                error is not None and not isinstance(error, Exception) and passed(VAR.get().deadline, self.env.clock)
            )
            span.set_attribute("rpc.status_code", "DEADLINE_EXCEEDED" if expired else request.status_name(error))
        super()._end(span, error, request, None)
