"""``@rpc`` services over gRPC: paths and bytes, as they are over Mux, under gRPC's statuses.

=================  ====================================================================================================
path               ``/<service>/<method>``
messages           ``application/grpc+msgpack``: the arguments as a map by name, the result
declared           UNKNOWN, with the trailing metadata ``meshlib-raised: <name>`` and ``meshlib-raised-bin: <body>``
exceptions
=================  ====================================================================================================

What is inside is for meshlib's own clients, but it is gRPC all the same: balancers, meshes and health probes see calls,
deadlines and statuses.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, ClassVar, Final

from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase

from ...core.errors import RemoteError, shown
from ...core.service import as_service
from .server import Server
from .stream import ServerStream

__all__ = ["MSGPACK", "RAISED", "BytesCodec", "RpcRequest", "serve_rpc"]

MSGPACK: Final = "msgpack"
RAISED: Final = b"meshlib.raised"
"""The response context that says which declared exception the body is."""
LARGEST_RAISED: Final = 8192
"""Bytes of a declared exception: they travel in trailers, of which clients take 16 KiB, base64 and all."""


class BytesCodec(CodecBase):
    """Messages that somebody else encodes."""

    __content_subtype__ = MSGPACK  # pyright: ignore  # as grpclib's own codec does, over an abstract property

    def encode(self, message: Any, message_type: Any) -> bytes:
        """As they are."""
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> bytes:
        """As they are."""
        return data


class RpcRequest:
    """What the service is given.

    Attributes:
        body: The message.
        dest: The path.
        idempotent: ``False``: nobody here sends it again.
    """

    __slots__ = ("body", "dest")
    idempotent: ClassVar[bool] = False
    contexts: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()

    def __init__(self, body: bytes, dest: str) -> None:
        self.body, self.dest = body, dest


class _Handlers:
    def __init__(self, service: Callable[[Any], Awaitable[Any]], names: Mapping[str, Iterable[str]]) -> None:
        self._service = as_service(service)
        self._names = names

    def __mapping__(self) -> dict[str, Handler]:
        kinds = Cardinality.UNARY_UNARY, bytes, bytes
        paths = [f"/{service}/{method}" for service, methods in self._names.items() for method in methods]
        return {path: Handler(self._handler(path), *kinds) for path in paths}

    def _handler(self, path: str) -> Callable[[ServerStream], Awaitable[None]]:
        service = self._service

        async def handle(stream: ServerStream) -> None:
            body = await stream.recv_message()
            response = await service(RpcRequest(body, path))
            for key, value in response.contexts:
                if key == RAISED:
                    await _tell(stream, value.decode(), response.body)
                    return
            await stream.send_message(response.body)

        return handle


async def _tell(stream: ServerStream, name: str, body: bytes) -> None:
    if len(body) > LARGEST_RAISED:
        raise RemoteError(f"the handler raised {shown(name)}, whose {len(body)} bytes are too many to be told")
    stream.declared = True
    metadata: dict[str, str | bytes] = {"meshlib-raised": name, "meshlib-raised-bin": body}
    await stream.finish(Status.UNKNOWN, f"the handler raised {name}", metadata=metadata)


def serve_rpc(
    service: Callable[[Any], Awaitable[Any]],
    names: Mapping[str, Iterable[str]],
    address: str = "127.0.0.1:0",
    *layers: Any,
    **options: Any,
) -> Server:
    """Serve a service of paths and bytes over gRPC; `meshlib.serve` does so for ``grpc://`` addresses.

    Args:
        service: An async callable from a request (``body``, ``dest``) to a response (``body``, ``contexts``).
        names: The names of its methods, by those of its services. Others are UNIMPLEMENTED.
        address: ``host:port`` (port 0 takes a free one) or ``unix:///path``.
        layers: See `Server`.
        options: See `Server`, but for ``codec``.

    Raises:
        ConfigurationError: The address, a layer or an option makes no sense.
    """
    return Server([_Handlers(service, names)], *layers, address=address, codec=BytesCodec(), **options)
