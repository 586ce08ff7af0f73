"""What a handler is given: grpclib's stream, on our own connection.

It is a ``grpclib.server.Stream`` to whoever asks, and does what that does for its users: the same methods, the same
events, the same errors for a handler that breaks the protocol. Below them nothing is shared. What a unary handler sends
leaves in one write; messages are bounded and may be compressed; whoever waits is woken by what happens to the stream
and not by a cancellation of its task.

=========================  =========================================================================================
a request that is none     `GRPCError` from `recv_message`: INTERNAL, UNIMPLEMENTED (too few messages) or
                           RESOURCE_EXHAUSTED, as grpc/doc/statuscodes.md has it
a client that is gone      the handler is cancelled; if it goes on all the same, ``StreamTerminatedError``
=========================  =========================================================================================
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import unquote_to_bytes

from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.metadata import Deadline, _MetadataLike, encode_bin_value, encode_grpc_message
from grpclib.server import Stream
from h2.errors import ErrorCodes
from multidict import MultiDict

from ..inbound import Inbound, framed
from ..metadata import sent_metadata

if TYPE_CHECKING:
    from .call import Handling
    from .connection import ServerConnection
    from .head import Head
    from .methods import Method

__all__ = ["ServerStream", "status_text"]

OK_TRAILERS = (("grpc-status", "0"),)
LONGEST_MESSAGE: Final = 4096
"""Bytes of a status message, as sent; clients take 8 KiB of metadata and more, and would lose the status with the
rest."""
LEAST_TRAILERS: Final = 8192
"""Bytes of trailers that all clients take. gRPC's core takes them for certain up to half of what it advertises."""
UNSAID_TRAILERS: Final = 16_384
"""Bytes of trailers up to which rich details go to clients that advertise nothing: gRPC's hard limit."""
FIELD: Final = 32
"""Bytes that each field counts besides its own (RFC 9113 6.5.2)."""
DETAILS: Final = "grpc-status-details-bin"

Pairs = list[tuple[str, str]]


def status_text(message: str) -> tuple[str, str]:
    """A status message as it is sent, of `LONGEST_MESSAGE` bytes at most and of whole characters; and as it is read."""
    message = message[:LONGEST_MESSAGE].encode("utf-8", "replace").decode()  # it may have half a surrogate pair
    text = _encoded(message)
    if len(text) <= LONGEST_MESSAGE:
        return text, message
    text = text[:LONGEST_MESSAGE]
    escape = text.rfind("%", -2)
    message = unquote_to_bytes(text if escape < 0 else text[:escape]).decode("utf-8", "ignore")
    return _encoded(message), message


def _encoded(message: str) -> str:
    """As gRPC says, and a space at either end likewise: HTTP/2 allows none there, and clients refuse the connection."""
    text: str = encode_grpc_message(message)
    if text[:1] == " ":
        text = "%20" + text[1:]
    return f"{text[:-1]}%20" if text[-1:] == " " else text


def size_of(fields: Iterable[tuple[str, str]]) -> int:
    """Bytes of a header list, as RFC 9113 6.5.2 counts them."""
    return sum(len(name) + len(value) + FIELD for name, value in fields)


class ServerStream(Stream[Any, Any]):
    """One call, as its handler sees it.

    Args:
        connection: Where it came from.
        stream_id: Its HTTP/2 stream.
        head: Its fields.
        method: What it calls.
        handling: What all calls of the server share.
        ends_at: When its deadline passes, on ``time.monotonic``.

    Attributes:
        id: Its HTTP/2 stream.
        inbound: What the client has sent.
        sent_status: What its trailers said; ``None`` while they have not been sent.
        declared: A status other than OK is an answer all the same: an exception that the method declares.
        terminated: Why nothing can be sent any more; empty while something can.
        senders: Tasks in `Sending.send_data`, which take turns.
        turn: Whose it is.
    """

    def __init__(
        self,
        connection: ServerConnection,
        stream_id: int,
        head: Head,
        method: Method,
        handling: Handling,
        ends_at: float | None,
    ) -> None:
        # grpclib's own __init__ wants its own connection.
        self.id = stream_id
        self._method_name = method.dest
        self._cardinality = method.cardinality
        self._recv_type, self._send_type = method.request_type, method.reply_type
        self._codec = method.codec
        self._status_details_codec = handling.details_codec
        self._dispatch = handling.dispatch
        self._events = handling.listened
        self.metadata = head.metadata
        self.user_agent = head.user_agent
        self.content_type = head.content_type
        self._connection = connection
        self._serving = connection.serving
        self._streaming = method.cardinality.server_streaming
        self._gzip = handling.gzip and head.accepts_gzip
        self._content = method.gzip_headers if self._gzip else method.plain_headers
        self._ends_at = ends_at
        self.inbound = Inbound(handling.limits.max_message, head.encoding)
        self.sent_status: Status | None = None
        self.declared = False
        self.terminated = ""
        self._readable: asyncio.Event | None = None
        self.senders = 0

    @functools.cached_property
    def turn(self) -> asyncio.Lock:
        """See the class. Most streams never need it."""
        return asyncio.Lock()

    @property
    def deadline(self) -> Deadline | None:  # type: ignore[override]  # an attribute there, which few look at
        """When the caller gives up."""
        return None if self._ends_at is None else Deadline(_timestamp=self._ends_at)

    @property
    def peer(self) -> Any:  # type: ignore[override]  # likewise
        """The client's address and certificate, as ``grpclib.protocol.Peer``."""
        return self._connection.peer

    # --- what comes ---------------------------------------------------------------------------------------------------

    async def recv_message(self) -> Any:
        """The next message; ``None`` at the end of the request.

        Raises:
            GRPCError: What came is no message, or larger than is allowed.
            StreamTerminatedError: The client is gone.
        """
        inbound = self.inbound
        while True:
            data = inbound.take()
            if data is not None:
                break
            if self.terminated:
                raise StreamTerminatedError(self.terminated)
            if inbound.ended:
                inbound.at_end()
                if inbound.messages == 0 and not self._cardinality.client_streaming:
                    raise GRPCError(Status.UNIMPLEMENTED, "the method takes one message, and the request has none")
                return None
            self._connection.consumed(self, inbound.to_give_back())
            if self._readable is None:
                self._readable = asyncio.Event()
            self._readable.clear()
            await self._readable.wait()
        if inbound.held:
            self._connection.consumed(self, inbound.to_give_back())
        try:
            message = self._codec.decode(data, self._recv_type)
        except Exception as error:
            raise GRPCError(
                Status.INTERNAL, f"the request message cannot be read: {type(error).__name__}: {error}"
            ) from None
        if self._events:
            (message,) = await self._dispatch.recv_message(message)
        self._messages_received += 1
        return message

    def received(self, data: bytes, flow: int) -> None:
        """Bytes have come."""
        self.inbound.add(data, flow)
        if self._readable is not None:
            self._readable.set()

    def ended(self) -> None:
        """No more will come."""
        self.inbound.ended = True
        if self._readable is not None:
            self._readable.set()

    def lost(self, reason: str) -> None:
        """The client is gone, or wants no answer."""
        if not self.terminated:
            self.terminated = reason
        if self._readable is not None:
            self._readable.set()

    # --- what goes ----------------------------------------------------------------------------------------------------

    async def send_initial_metadata(self, *, metadata: _MetadataLike | None = None) -> None:
        """Send the initial metadata; the first message does, if nobody has.

        Raises:
            ProtocolError: It has been sent.
            StreamTerminatedError: The client is gone.
        """
        if self._send_initial_metadata_done:
            raise ProtocolError("Initial metadata was already sent")
        more: Any = ()
        if metadata or self._events:
            pairs: Any = MultiDict(metadata or ())
            if self._events:
                (pairs,) = await self._dispatch.send_initial_metadata(pairs)
            more = sent_metadata(pairs)
        self._connection.send_headers(self, self._content, more)
        self._send_initial_metadata_done = True

    async def send_message(self, message: Any) -> None:
        """Send a message, once the client has room for it.

        Raises:
            ProtocolError: A unary method has sent its one.
            StreamTerminatedError: The client is gone.
        """
        self._check_open()
        if not self._send_initial_metadata_done:
            await self.send_initial_metadata()
        if self._send_message_done and not self._streaming:
            raise ProtocolError("Message was already sent")
        if self._events:
            (message,) = await self._dispatch.send_message(message)
        data = framed(self._codec.encode(message, self._send_type), gzip=self._gzip)
        if not self._connection.send_at_once(self, data):
            await self._connection.send_data(self, data)
        self._send_message_done = True
        self._messages_sent += 1

    def _check_open(self) -> None:
        if self._send_trailing_metadata_done:
            if self.terminated:  # by whoever has ended the call over the handler's head
                raise StreamTerminatedError(self.terminated)
            raise ProtocolError("Trailing metadata was already sent")

    async def send_trailing_metadata(
        self,
        *,
        status: Status = Status.OK,
        status_message: str | None = None,
        status_details: Any = None,
        metadata: _MetadataLike | None = None,
    ) -> None:
        """End the call with a status; the end of the handler does, if nobody has.

        Raises:
            ProtocolError: It has been sent, or an OK without the one message of a unary method.
            StreamTerminatedError: The client is gone.
        """
        self._check_open()
        if not self._streaming and not self._send_message_done and status is Status.OK:
            raise ProtocolError("Unary response with OK status requires a single message to be sent")
        await self.finish(status, status_message, status_details, metadata)

    async def finish(
        self,
        status: Status,
        message: str | None = None,
        details: Any = None,
        metadata: _MetadataLike | None = None,
        extra: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Send the trailers.

        Args:
            status: See `send_trailing_metadata`.
            message: Likewise.
            details: Likewise.
            metadata: Likewise.
            extra: Fields of the protocol's own, which users cannot send.
        """
        pairs: Any = ()
        if self._events:
            (pairs,) = await self._dispatch.send_trailing_metadata(
                MultiDict(metadata or ()), status=status, status_message=message, status_details=details
            )
            if self._send_trailing_metadata_done or self.terminated:
                return  # meanwhile
        elif metadata:
            pairs = MultiDict(metadata)
        self.finish_now(status, message, details, [*sent_metadata(pairs), *extra] if pairs or extra else ())

    def finish_now(
        self, status: Status, message: str | None = None, details: Any = None, fields: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Send the trailers without asking anybody.

        Raises:
            StreamTerminatedError: The client is gone.
        """
        fixed = () if self._send_initial_metadata_done else self._content
        more: Pairs = []
        if status is Status.OK and self._send_initial_metadata_done:
            fixed = OK_TRAILERS
        else:
            more.append(("grpc-status", str(status.value)))
        if message is not None:
            text, message = status_text(message)
            more.append(("grpc-message", text))
        if details is not None and self._status_details_codec is not None:
            packed = self._status_details_codec.encode(status, message, details)
            more.append((DETAILS, encode_bin_value(packed).decode("ascii")))
        own = len(more)
        more.extend(fields)
        if details is not None or len(more) > own:
            more = self._fitting(fixed, more)
        self._send_trailing_metadata_done = True
        self._connection.send_headers(self, fixed, more, end=True)
        self.sent_status = status

    def _fitting(self, fixed: Iterable[tuple[str, str]], more: Pairs) -> Pairs:
        """As much as the client takes: one that gets more takes nothing at all, and so not the status either.

        Rich details go first. What else a handler sends goes only if the client has said that it will not take it; the
        protocol's own fields stay.
        """
        advertised = self._connection.h2.remote_settings.max_header_list_size
        size = size_of(fixed) + size_of(more)
        most = UNSAID_TRAILERS if advertised is None else max(LEAST_TRAILERS, advertised // 2)
        if size <= most:
            return more
        kept = [field for field in more if field[0] != DETAILS]
        if len(kept) < len(more):
            self._serving.left_out(self._method_name, "the status details", size, most)
        most = max(LEAST_TRAILERS, advertised or 0)
        size = size_of(fixed) + size_of(kept)
        if advertised is not None and size > most:
            self._serving.left_out(self._method_name, "trailing metadata", size, most)
            kept = [field for field in kept if field[0].startswith(("grpc-", "meshlib-"))]
        return kept

    def fail(self) -> None:
        """What there was to say cannot be said: say that."""
        if not self.terminated and self.sent_status is None:
            self.finish_now(Status.INTERNAL, "internal error: the status cannot be sent")

    async def cancel(self) -> None:
        """Reset the stream: the client is told that nothing will come.

        Raises:
            ProtocolError: It has been cancelled.
        """
        if self._cancel_done:
            raise ProtocolError("Stream was already cancelled")
        self._cancel_done = True
        self._connection.reset(self, ErrorCodes.NO_ERROR)

    @property
    def over(self) -> bool:
        """Is there nothing left to say?"""
        return self._send_trailing_metadata_done or self._cancel_done or bool(self.terminated)

    @property
    def unanswered(self) -> bool:
        """Is there still to be a message, without which the call cannot end well?"""
        return not (self._streaming or self._send_message_done)

    def check_answered(self) -> None:
        """A handler has returned; has it done what its method must?

        Raises:
            ProtocolError: It has not.
        """
        if self.unanswered and not self.over:
            raise ProtocolError(
                f"Unary response with OK status requires a single message to be sent: {self._method_name!r}"
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    def __repr__(self) -> str:
        return f"<stream {self.id} of {self._method_name}>"
