"""The methods that a server has, and their numbers: below ``methods/<pkg.Service/Method>``, by status.

Only methods that there are get numbers, so no caller can make a label of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import GRPC_CONTENT_TYPE, CodecBase
from grpclib.encoding.proto import ProtoCodec

from ...core.context import VAR
from ...core.deadlines import passed
from ...core.env import Counter, Env, Histogram
from ...core.errors import ConfigurationError, shown
from ...core.service import Filter, Service
from ..status import status_of
from .head import ACCEPTED

__all__ = ["HEALTH", "REFLECTION", "Method", "MethodStats", "mapping_of", "services_of", "unknown"]

HEALTH: Final = "grpc.health.v1.Health"
REFLECTION: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class Method:
    """A method that can be called.

    Attributes:
        dest: Its path, ``/pkg.Service/Method``.
        name: ``pkg.Service/Method``, as OpenTelemetry has it.
        service_name: ``pkg.Service``.
        function: What handles it; takes the stream.
        cardinality: How many messages go each way.
        request_type: The type of the request's messages.
        reply_type: The type of the reply's.
        service: The layers around it; takes the call.
        codec: For its messages.
        plain_headers: What its answers begin with.
        gzip_headers: … if they are compressed.
        ours: It serves the server itself, health or reflection: nobody waits for the end of its calls.
    """

    __slots__ = (
        "cardinality",
        "codec",
        "dest",
        "function",
        "gzip_headers",
        "name",
        "ours",
        "plain_headers",
        "reply_type",
        "request_type",
        "service",
        "service_name",
    )

    def __init__(self, dest: str, handler: Handler, codec: CodecBase) -> None:
        self.dest = dest
        self.name = dest.strip("/")
        self.service_name = self.name.rpartition("/")[0]
        self.function = handler.func
        self.cardinality: Cardinality = handler.cardinality
        self.request_type, self.reply_type = handler.request_type, handler.reply_type
        self.service: Any = None
        self.ours = self.service_name == HEALTH or self.service_name in REFLECTION
        self.codec: CodecBase = ProtoCodec() if self.ours else codec
        self.plain_headers = _answer_headers(self.codec)
        self.gzip_headers = (*self.plain_headers, ("grpc-encoding", "gzip"))

    def __repr__(self) -> str:
        return f"<method {self.name}>"


def _answer_headers(codec: CodecBase) -> tuple[tuple[str, str], ...]:
    return (
        (":status", "200"),
        ("content-type", f"{GRPC_CONTENT_TYPE}+{codec.__content_subtype__}"),
        ("grpc-accept-encoding", ACCEPTED),
    )


def mapping_of(handlers: Iterable[Any]) -> dict[str, Handler]:
    """The methods of grpclib handlers, by path.

    Raises:
        ConfigurationError: One is no handler.
    """
    mapping: dict[str, Handler] = {}
    if not isinstance(handlers, Iterable):
        raise ConfigurationError(f"Server({handlers!r}): give a list of handlers")
    for handler in handlers:
        methods: Any = getattr(handler, "__mapping__", None)
        if isinstance(handler, type) or not callable(methods):
            raise ConfigurationError(
                f"{handler!r} is no handler: give instances of subclasses of the …Base classes of grpclib's plugin"
            )
        made: Any = methods()
        mapping.update(made)
    return mapping


def services_of(mapping: Mapping[str, Handler]) -> list[str]:
    """The names of the services that have a method in ``mapping``."""
    return sorted({path.strip("/").rpartition("/")[0] for path in mapping})


def unknown(path: str, services: Iterable[str]) -> str:
    """What to say of a path that no method has, in the words of grpc-go."""
    service, _, method = path.strip("/").rpartition("/")
    if service in services:
        return f"unknown method {shown(method, 100)} for service {service}"
    return f"unknown service {shown(service or path, 100)}"


class _Numbers:
    __slots__ = ("_metrics", "_statuses", "latency", "requests")

    def __init__(self, metrics: Any) -> None:
        self.requests: Counter = metrics.counter("requests")
        self.latency: Histogram = metrics.histogram("request_latency_ms")
        self._metrics = metrics
        self._statuses: dict[Status, Counter] = {}

    def count(self, status: Status) -> None:
        counter = self._statuses.get(status)
        if counter is None:
            counter = self._statuses[status] = self._metrics.counter(f"status/{status.name}")
        counter.value += 1


class MethodStats(Filter[Any, Any, Any, Any]):
    """Counts and times the calls of each method. What a client gives up is CANCELLED."""

    place: ClassVar[str] = "stats"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, env: Env | None = None) -> None:
        env = env or Env()
        self._metrics, self._clock = env.metrics, env.clock
        self._known: dict[str, _Numbers] = {}

    def build(self, env: Env, service: Any) -> Any:
        """These numbers belong to one server."""
        return type(self)(env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Count one call."""
        started = self._clock.now()
        status = Status.CANCELLED
        try:
            reply = await service(request)
            # A filter that answers by itself leaves the status to what it has sent.
            status = request.status or request.stream.sent_status or Status.OK
            return reply
        except Exception as error:
            status = status_of(error)
            raise
        except BaseException:
            if passed(VAR.get().deadline, self._clock):
                status = Status.DEADLINE_EXCEEDED
            raise
        finally:
            numbers = self._known.get(request.dest)
            if numbers is None:
                name = request.dest.strip("/")
                numbers = self._known[request.dest] = _Numbers(self._metrics.scope("methods", name))
            numbers.requests.value += 1
            numbers.count(status)
            numbers.latency.record((self._clock.now() - started) * 1e3)

    def __repr__(self) -> str:
        return "methods()"
