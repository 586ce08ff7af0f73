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

import typing

from . import mux
from .balancing.accrual import failure_accrual
from .balancing.aperture import aperture
from .balancing.balance import balance
from .balancing.choose import p2c
from .balancing.failfast import failfast
from .balancing.load import least_loaded, peak_ewma
from .balancing.outlier import outlier_detection
from .balancing.rotation import heap, round_robin
from .core.classify import (
    ResponseClass,
    classifier,
    classify,
    retry_connection_losses,
    retry_server_errors,
    retry_timeouts,
)
from .core.clock import Clock
from .core.context import Context, TraceId, current, remaining, use
from .core.errors import (
    Attempt,
    AttemptTimeout,
    CircuitOpen,
    ConfigurationError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DtabError,
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
from .filters.adaptive import adaptive
from .filters.breaker import circuit_breaker
from .filters.budget import retry_budget
from .filters.deadline import deadline
from .filters.fault import fault
from .filters.hedge import hedge
from .filters.limit import concurrency_limit
from .filters.priority import priority
from .filters.rate_limit import rate_limit
from .filters.retry import retry
from .filters.shadow import shadow
from .filters.throttle import throttle
from .filters.timeout import timeout
from .names.announce import announce
from .names.bind import base_dtab
from .names.dtab import Dtab
from .names.explain import delegate
from .names.local import dtab
from .names.resolve import resolve
from .typed.client import TypedClient, client
from .typed.contract import rpc
from .typed.server import asgi, serve

if typing.TYPE_CHECKING:
    from . import grpc, http

__version__ = "0.1.0"

__all__ = [
    "Attempt",
    "AttemptTimeout",
    "Call",
    "CircuitOpen",
    "Clock",
    "ConfigurationError",
    "ConnectError",
    "ConnectionLost",
    "Context",
    "DeadlineExceeded",
    "Dtab",
    "DtabError",
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
    "ResponseClass",
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
    "adaptive",
    "announce",
    "aperture",
    "asgi",
    "balance",
    "base_dtab",
    "circuit_breaker",
    "classifier",
    "classify",
    "client",
    "concurrency_limit",
    "current",
    "deadline",
    "delegate",
    "dtab",
    "failfast",
    "failure_accrual",
    "fault",
    "filter",
    "grpc",
    "heap",
    "hedge",
    "http",
    "least_loaded",
    "mux",
    "outlier_detection",
    "p2c",
    "peak_ewma",
    "priority",
    "rate_limit",
    "remaining",
    "resolve",
    "retry",
    "retry_budget",
    "retry_connection_losses",
    "retry_server_errors",
    "retry_timeouts",
    "round_robin",
    "rpc",
    "serve",
    "shadow",
    "throttle",
    "timeout",
    "use",
]


def __getattr__(name: str) -> typing.Any:
    # What needs a package of its own is loaded when it is first touched.
    if name in ("http", "grpc"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
