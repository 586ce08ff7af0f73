"""The span of a gRPC call on its server, by OpenTelemetry's RPC conventions 1.45: named for the method."""

from __future__ import annotations

from typing import Any, Final

from opentelemetry.trace import Span, Status, StatusCode

from .tracing import ServerTracing

__all__ = ["GrpcServerTracing"]

FAILED: Final = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
"""What makes a server's span an error; the rest are answers (semantic-conventions, docs/rpc/grpc.md)."""


class GrpcServerTracing(ServerTracing):
    """The span of a call, with the status that it ended with."""

    def _attributes(self, request: Any) -> tuple[str, dict[str, Any]]:
        method = request.dest.strip("/")
        facts = {"rpc.system.name": "grpc", "rpc.method": method}
        host, port = request.client
        if host:
            facts["network.peer.address"] = host
        if port:
            facts["network.peer.port"] = port
        return method, facts

    def _end(self, span: Span, error: BaseException | None, request: Any, reply: Any) -> None:
        if span.is_recording():
            name = request.status_name(error)
            span.set_attribute("rpc.status_code", name)
            if name in FAILED and not request.declared:
                span.set_attribute("error.type", name)
                # grpclib's own exceptions are, as text, a tuple.
                said = "" if error is None else getattr(error, "message", None) or str(error)
                span.set_status(Status(StatusCode.ERROR, said))
        span.end()
