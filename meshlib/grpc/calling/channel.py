"""The channel: what stubs of grpclib's plugin and of betterproto2 take for grpclib's own, over the client stack.

::

    async with meshlib.grpc.Channel("dns://greeter.prod:50051") as channel:
        reply = await GreeterStub(channel).SayHello(HelloRequest(name="world"))

It needs no event loop to be made: connections begin with the first call. For type checkers, and whoever asks
``isinstance``, it is one of grpclib's channels; it shares nothing with them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import anyio
import grpclib.client
from grpclib.config import Configuration
from grpclib.const import Cardinality
from grpclib.encoding.proto import ProtoCodec, ProtoStatusDetailsCodec, _googleapis_available
from grpclib.events import _DispatchChannelEvents
from grpclib.metadata import Deadline

from ...client import Client
from ...core.classify import PartialClassifier, Rule
from ...core.clock import Clock
from ...core.env import Env
from ...core.errors import ConfigurationError, InvalidArgument
from ...core.service import Service
from ...core.stack import Stack
from ...core.supervisor import Supervisor
from ...filters.timeout import DEFAULT_TOTAL, TotalTimeout
from ...telemetry.grpc import GrpcClientTracing
from ..status import excess, judge, raised
from .call import Method, Request
from .connector import connector_for
from .face import Face
from .idempotency import Idempotency
from .methodconfig import beside
from .pool import Connections
from .stream import Stream

__all__ = ["MAX_MESSAGE", "CallTimeout", "Channel"]

MAX_MESSAGE: Final = 4 * 1024 * 1024
"""Bytes of a message that may come (gRPC's default in all languages)."""


class CallTimeout(TotalTimeout):
    """The default limit of a call's time, where it does not say one of its own, be it longer.

    Streams have none, since they may well last; theirs are said.
    """

    def __init__(self, seconds: float | None, env: Env | None = None) -> None:
        super().__init__(seconds, env)
        self._said = TotalTimeout(None, env)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Run the call until its time is over."""
        if isinstance(request, Request):
            if request.method.streams:
                return await service(request)
            if request.until is not None:
                return await self._said.apply(request, service)
        return await super().apply(request, service)


class Channel(Face, grpclib.client.Channel):
    """A gRPC client with the whole stack, for any stub made for grpclib.

    Args:
        target: Where to: ``host:port[,host:port…]``, ``unix:///path``, ``file:///path``, ``dns://…``, ``srv://…``,
            ``zk://…``, ``k8s://…``, or ``/logical/path``.
        layers: Each replaces the default at its place; plain filters are added, and see
            `meshlib.grpc.calling.call.Request`.
        codec: grpclib's, of messages; protobuf by default.
        status_details_codec: grpclib's, of rich status details; Google's by default, if googleapis is installed.
        ssl: ``True``, an ``ssl.SSLContext`` or ``ssl.DefaultVerifyPaths``: speak TLS.
        config: grpclib's: windows, keepalive, and whose certificate to expect. Without one, a connection's window is
            `meshlib.grpc.calling.heads.CONNECTION_WINDOW`.
        idempotent: Which methods may be called twice without harm, besides those whose protobuf says so; see
            `meshlib.grpc.calling.idempotency.Idempotency`.
        max_message: Bytes of a message that may come.
        max_request: Bytes of a message that may be sent; ``None`` for as many as the server takes.
        compression: ``"gzip"`` to send messages compressed.
        label: What the client is called in metrics, spans and errors.
        propagate: Send trace, Dtab and the rest along; ``False`` for servers that are none of yours.
        classifier: Which outcomes are failures; the default decides what it leaves open.
        stack: Changes the stack in ways that a layer alone cannot say.
        clock: What time it is; for tests.
        seed: Of the client's random choices; for tests.

    Raises:
        ConfigurationError: The target, a layer or an option makes no sense.
    """

    def __init__(
        self,
        target: str,
        *layers: Any,
        codec: Any = None,
        status_details_codec: Any = None,
        ssl: Any = None,
        config: Configuration | None = None,
        idempotent: bool | str | Iterable[str] | Callable[[str], bool | None] | None = None,
        max_message: int = MAX_MESSAGE,
        max_request: int | None = None,
        compression: str | None = None,
        label: str = "",
        propagate: bool = True,
        classifier: PartialClassifier | None = None,
        stack: Callable[[Stack], Stack] | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
    ) -> None:
        if layers and isinstance(layers[0], int):  # grpclib's form
            raise ConfigurationError(f"Channel({target!r}, {layers[0]!r}): give one target, '{target}:{layers[0]}'")
        if compression not in (None, "gzip", "identity"):
            raise ConfigurationError(f"compression={compression!r}: give 'gzip', or nothing")
        for name, size in (("max_message", max_message), ("max_request", max_request)):
            whole = isinstance(size, int) and not isinstance(size, bool)
            if not (whole and 0 < (size or 0) < 1 << 32) and not (size is None and name == "max_request"):
                raise ConfigurationError(f"{name}={size!r}: give a number of bytes, above 0")
        if codec is None:
            codec = ProtoCodec()
            if status_details_codec is None and _googleapis_available():
                status_details_codec = ProtoStatusDetailsCodec()
        self.codec, self.details_codec = codec, status_details_codec
        self.max_reply, self.max_request = max_message, max_request
        self.compressed = compression == "gzip"
        self._idempotency = Idempotency(idempotent)
        self._methods: dict[tuple[str, Any, Any], Method] = {}
        self.__dispatch__ = _DispatchChannelEvents()
        gzip = "gzip" if self.compressed else ""
        self.connector = connector_for(ssl, config, compression=gzip, propagate=propagate)
        self.client: Client[Request, Any] = Client(
            target,
            self.connector,
            Connections(),
            GrpcClientTracing(),
            CallTimeout(DEFAULT_TOTAL),
            *beside(layers),
            label=label,
            stack=stack,
            classifier=Rule(judge) if classifier is None else Rule(classifier).or_else(judge),
            clock=clock,
            seed=seed,
        )
        self.clock = self.client.env.clock
        self.label, self.name = self.client.env.label, self.client.env.name
        self._closing: Supervisor | None = None

    # --- what stubs use -----------------------------------------------------------------------------------------------

    def request(
        self,
        name: str,
        cardinality: Cardinality,
        request_type: Any,
        reply_type: Any,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Any = None,
    ) -> Any:
        """One call, a `meshlib.grpc.calling.stream.Stream`, to be used as grpclib's stubs do.

        Args:
            name: ``/pkg.Service/Method``.
            cardinality: Which sides stream.
            request_type: Of what is sent.
            reply_type: Of what comes.
            timeout: Seconds that it may take; without it, and without a deadline, a call that does not stream has 30.
            deadline: When it must be over; the nearer of the two counts.
            metadata: To send along: a mapping, or pairs.

        Raises:
            InvalidArgument: A timeout that is not a number.
        """
        method = self._methods.get((name, request_type, reply_type))
        if method is None or method.cardinality is not cardinality:
            method = self._method(name, cardinality, request_type, reply_type)
        until = None
        if deadline is not None:
            left: float = deadline.time_remaining()
            timeout = left if timeout is None else min(timeout, left)
        if timeout is not None:
            if math.isnan(timeout):
                raise raised(InvalidArgument(f"{name}: timeout={timeout!r}: give seconds"))
            until = self.clock.now() + timeout
        return Stream(self, method, metadata, until, timeout)

    def _method(self, name: str, cardinality: Cardinality, request_type: Any, reply_type: Any) -> Method:
        method = Method(
            name,
            cardinality,
            request_type,
            reply_type,
            self.codec,
            self.details_codec,
            idempotent=self._idempotency(name, request_type),
        )
        self._methods[name, request_type, reply_type] = method
        return method

    def listened(self, event: str) -> bool:
        """Does anybody listen to that event of `grpclib.events`? Without a listener it needs not be made."""
        return event not in vars(self.__dispatch__)

    def check_size(self, path: str, size: int) -> None:
        """See that a message may be sent.

        Raises:
            GRPCError: It is too large.
        """
        if self.max_request is not None and size > self.max_request:
            text = f"a message of {size} bytes to {path} is larger than the {self.max_request} that are allowed"
            raise raised(excess(text, sent=False))

    # --- its life -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close every connection, in the background. Calls under way fail; twice is the same as once."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return  # nothing of it can be running
        if self._closing is None:
            self._closing = Supervisor(f"closing of {self.label!r}")
            self._closing.start(self.client.aclose, name=f"close {self.label}")

    async def aclose(self) -> None:
        """Close every connection, and wait until that is done. Twice is the same as once."""
        await super().aclose()
        with anyio.CancelScope(shield=True):
            if self._closing is not None:
                await self._closing.join()
