"""``@rpc`` over gRPC: MessagePack in gRPC's messages, between peers that both are meshlib's.

``application/grpc+msgpack`` says that a message is the bytes which Mux would have carried as they are; a method is
``/Contract/method``. An exception that the method has declared comes as a status of UNKNOWN with its name in the
trailing metadata ``meshlib-raised`` and its fields in ``meshlib-raised-bin``, so that peers without the contract see a
plain failure. The rest of a failure is what `status` makes of it.

`RpcClient` has what `meshlib.typed.client` asks of a client of bytes: it takes whatever has ``dest``, ``body`` and
``idempotent``, as Mux's requests do, and gives a `RawReply`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from grpclib.config import Configuration
from grpclib.const import Cardinality
from grpclib.const import Status as GrpcStatus
from grpclib.encoding.base import CodecBase

from ...client import Client
from ...core.classify import PartialClassifier, ResponseClass, Rule
from ...core.clock import Clock
from ...core.errors import RemoteError
from ...core.stack import Stack
from ...telemetry.grpc import GrpcClientTracing
from ..inbound import framed
from ..status import judge, status_of
from .call import Method, Reply, Request
from .connector import connector_for
from .face import Face
from .methodconfig import beside
from .pool import Connections

__all__ = ["RAISED_CONTEXT", "RawCodec", "RawReply", "RpcClient", "rpc_client"]

RAISED_CONTEXT: Final = b"meshlib.raised"
"""The response context that names a declared exception, as over Mux."""
MAX_MESSAGE: Final = 4 * 1024 * 1024
MOST_METHODS: Final = 4096
"""Methods whose headers are remembered; a peer of many more would be one whose paths come from somewhere else."""


class RawCodec(CodecBase):
    """Messages that are bytes already."""

    @property
    def __content_subtype__(self) -> str:
        return "msgpack"

    def encode(self, message: Any, message_type: Any) -> bytes:
        """As it is."""
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> bytes:
        """As it is."""
        return data


class _Raw(Protocol):
    """What is asked of a request; Mux's has it."""

    @property
    def dest(self) -> str: ...
    @property
    def body(self) -> bytes: ...
    @property
    def idempotent(self) -> bool: ...


class RawReply(NamedTuple):
    """What a call came to.

    Attributes:
        body: The result, or the fields of the exception that ``contexts`` names.
        contexts: Pairs of key and value.
    """

    body: bytes
    contexts: tuple[tuple[bytes, bytes], ...] = ()


class RpcClient(Face):
    """A client of bytes. See `rpc_client`."""

    def __init__(self, client: Client[Request, Any], max_reply: int) -> None:
        self.client = client
        self._max_reply = max_reply
        self._codec = RawCodec()
        self._methods: dict[tuple[str, bool], Method] = {}

    async def __call__(self, request: _Raw) -> RawReply:
        """Make one call.

        Raises:
            MeshError: It failed; the error says where, how often and why.
        """
        method = self._methods.get((request.dest, request.idempotent)) or self._method(request)
        reply: Reply = await self.client(
            Request(method, request.body, framed(request.body), True, None, self._max_reply)
        )
        if not isinstance(reply.message, bytes):
            raise RemoteError(f"a filter gave {type(reply.message).__name__} where bytes were expected")
        contexts = ((RAISED_CONTEXT, reply.raised.encode()),) if reply.raised else ()
        return RawReply(reply.message, contexts)

    def _method(self, request: _Raw) -> Method:
        if len(self._methods) >= MOST_METHODS:
            self._methods.clear()
        path = request.dest if request.dest.startswith("/") else f"/{request.dest}"
        method = Method(
            path, Cardinality.UNARY_UNARY, bytes, bytes, self._codec, idempotent=request.idempotent, declares=True
        )
        self._methods[request.dest, request.idempotent] = method
        return method


def judge_rpc(request: Any, reply: Any, error: BaseException | None) -> ResponseClass | None:
    """As `judge`, but for UNKNOWN: between meshlib's own peers that is a handler which failed, and would again.

    So is it over Mux. A stub's server may be of any kind, and there one bad instance among good ones says it.
    """
    if isinstance(error, RemoteError) and status_of(error) is GrpcStatus.UNKNOWN:
        return ResponseClass.FAILURE
    return judge(request, reply, error)


def rpc_client(
    target: str,
    *layers: Any,
    ssl: Any = None,
    config: Configuration | None = None,
    max_message: int = MAX_MESSAGE,
    label: str = "",
    classifier: PartialClassifier | None = None,
    stack: Callable[[Stack], Stack] | None = None,
    clock: Clock | None = None,
    seed: int | None = None,
) -> RpcClient:
    """A client of the ``@rpc`` services behind ``target``, for `meshlib.typed.client` to call.

    Args:
        target: Where: see `meshlib.grpc.Channel`.
        layers: Each replaces the default at its place; plain filters are added, and see
            `meshlib.grpc.calling.call.Request`.
        ssl: ``True``, an ``ssl.SSLContext`` or ``ssl.DefaultVerifyPaths``: speak TLS.
        config: grpclib's: windows, keepalive, and whose certificate to expect.
        max_message: Bytes of a message that may come.
        label: What the client is called in metrics, spans and errors.
        classifier: Which outcomes are failures; the default decides what it leaves open.
        stack: Changes the stack in ways that a layer alone cannot say.
        clock: What time it is; for tests.
        seed: Of the client's random choices; for tests.

    Raises:
        ConfigurationError: The target, a layer or an option makes no sense.
    """
    client: Client[Request, Any] = Client(
        target,
        connector_for(ssl, config),
        Connections(),
        GrpcClientTracing(),
        *beside(layers),
        label=label,
        stack=stack,
        classifier=Rule(judge_rpc) if classifier is None else Rule(classifier).or_else(judge_rpc),
        clock=clock,
        seed=seed,
    )
    return RpcClient(client, max_message)
