"""What goes down the client stack, and what comes up: a `Request`, and a `Reply` or, for a stream, an open `Exchange`.

A `Method` is what is the same for all calls of one; a channel keeps them by path. Filters read ``request.dest`` (the
path), ``request.message``, ``request.metadata`` and ``request.idempotent``, and may set the last.
"""

from __future__ import annotations

from typing import Any

from grpclib.const import Cardinality
from grpclib.encoding.base import GRPC_CONTENT_TYPE

from ..status import status_of

__all__ = ["Method", "Reply", "Request"]


class Method:
    """One method, as a channel calls it.

    Attributes:
        path: ``/pkg.Service/Method``.
        cardinality: Which sides stream.
        streams: Does either side?
        idempotent: May a call be made twice without harm?
        codec: grpclib's, of the messages.
        details_codec: grpclib's, of rich status details, if there is one.
        content_type: ``application/grpc``, perhaps with the codec's name.
        reply_type: What replies are decoded as.
        request_type: What messages are encoded as.
        declares: A failure may be an exception that the method has declared (``@rpc``), which is an answer.
    """

    __slots__ = (
        "cardinality",
        "codec",
        "content_type",
        "declares",
        "details_codec",
        "idempotent",
        "path",
        "reply_type",
        "request_type",
        "streams",
    )

    def __init__(
        self,
        path: str,
        cardinality: Cardinality,
        request_type: Any,
        reply_type: Any,
        codec: Any,
        details_codec: Any = None,
        *,
        idempotent: bool = False,
        declares: bool = False,
    ) -> None:
        self.declares = declares
        self.path, self.cardinality = path, cardinality
        self.streams: bool = cardinality.client_streaming or cardinality.server_streaming
        self.idempotent = idempotent
        self.codec, self.details_codec = codec, details_codec
        subtype = codec.__content_subtype__
        self.content_type = GRPC_CONTENT_TYPE if subtype == "proto" else f"{GRPC_CONTENT_TYPE}+{subtype}"
        self.request_type, self.reply_type = request_type, reply_type

    def __repr__(self) -> str:
        return f"<Method {self.path}, {self.cardinality.name.lower()}>"


class Request:
    """One call.

    Attributes:
        method: See `Method`.
        dest: The method's path.
        idempotent: May it be made twice without harm? Never so for a client's stream, which cannot be sent again.
        message: The message, where there is one; the first, of a client's stream.
        data: The messages to begin with, encoded, each with its length in front; empty for none.
        end: Nothing follows ``data``.
        metadata: The user's own, as pairs of texts that may go onto the wire as they are.
        max_reply: Bytes of a message that may come.
        max_request: Bytes of a message that may be sent, where a service config says it.
        until: When the call itself says that its time is over, on the channel's clock; the context has it as well.
        opened: Streams that were opened for it. All but the one that comes up are closed by whoever made the call.
    """

    __slots__ = (
        "data",
        "dest",
        "end",
        "idempotent",
        "max_reply",
        "max_request",
        "message",
        "metadata",
        "method",
        "opened",
        "until",
    )

    def __init__(
        self,
        method: Method,
        message: Any = None,
        data: bytes = b"",
        end: bool = True,
        metadata: list[tuple[str, str]] | None = None,
        max_reply: int = 4 * 1024 * 1024,
    ) -> None:
        self.method, self.dest = method, method.path
        self.idempotent = method.idempotent and not method.cardinality.client_streaming
        self.message, self.data, self.end = message, data, end
        self.metadata = metadata
        self.max_reply = max_reply
        self.opened: list[Any] = []
        self.max_request: int | None = None
        self.until: float | None = None

    @staticmethod
    def status_name(error: BaseException | None) -> str:
        """The status of the call, if it ends with ``error``."""
        if error is not None and not isinstance(error, Exception):
            return "CANCELLED"
        return status_of(error).name

    def __repr__(self) -> str:
        return f"<Request {self.dest}, {len(self.data)} bytes>"


class Reply:
    """The answer to a unary call.

    Attributes:
        message: Decoded.
        initial: The headers that came first, as pairs of texts.
        trailers: Those that came last, likewise; the same ones if the server sent but one block.
        peer: grpclib's; where it came from.
        raised: The name of the declared exception that the message is; empty for a result.
    """

    __slots__ = ("initial", "message", "peer", "raised", "trailers")

    def __init__(
        self,
        message: Any,
        initial: list[tuple[str, str]],
        trailers: list[tuple[str, str]],
        peer: Any = None,
        raised: str = "",
    ) -> None:
        self.raised = raised
        self.message, self.initial, self.trailers, self.peer = message, initial, trailers, peer

    def __repr__(self) -> str:
        return f"<Reply {self.message!r}>"
