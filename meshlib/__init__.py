"""meshlib: Finagle's traffic layer inside a Python service.

::

    import meshlib
    from meshlib import rpc

    class Greeter:
        @rpc(idempotent=True)
        async def hello(self, name: str) -> str:
            return f"hello, {name}"

    async with meshlib.serve(Greeter(), "mux://127.0.0.1:0") as server:
        async with meshlib.client(Greeter, server.address) as greeter:
            print(await greeter.hello("world"))
"""

from . import mux
from .core.clock import Clock
from .core.context import Context, TraceId, current, deadline, remaining, use
from .core.errors import (
    Attempt,
    AttemptTimeout,
    ConfigurationError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    InvalidReply,
    MeshError,
    NoEndpoints,
    ProtocolError,
    Rejected,
    RemoteError,
    ResolutionError,
    ServiceClosed,
    UnknownMethod,
    UnknownService,
)
from .core.service import Call, Filter, Service, ServiceFactory, Session, Status, filter
from .core.stack import Layer, Stack
from .filters.limit import concurrency_limit
from .filters.retry import retry
from .filters.timeout import timeout
from .typed.client import TypedClient, client, serve
from .typed.contract import rpc

__version__ = "0.1.0"

__all__ = [
    "Attempt",
    "AttemptTimeout",
    "Call",
    "Clock",
    "ConfigurationError",
    "ConnectError",
    "ConnectionLost",
    "Context",
    "DeadlineExceeded",
    "Filter",
    "InvalidArgument",
    "InvalidReply",
    "Layer",
    "MeshError",
    "NoEndpoints",
    "ProtocolError",
    "Rejected",
    "RemoteError",
    "ResolutionError",
    "Service",
    "ServiceClosed",
    "ServiceFactory",
    "Session",
    "Stack",
    "Status",
    "TraceId",
    "TypedClient",
    "UnknownMethod",
    "UnknownService",
    "client",
    "concurrency_limit",
    "current",
    "deadline",
    "filter",
    "mux",
    "remaining",
    "retry",
    "rpc",
    "serve",
    "timeout",
    "use",
]
