"""One call on one HTTP/2 stream: what has come of it so far, and whoever waits for more.

An exchange is *over* when the server has said all, or when it failed in any way. The session that it belongs to feeds
it as frames come; the caller waits in one of its functions, and is woken by progress, by the end, or by the deadline,
which the session's wheel keeps. Nobody's task is ever cancelled to tell it something.

A failure that comes over the wire is given as a `MeshError`, with what its trailing metadata say, see `status`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import decode_grpc_message
from h2.errors import ErrorCodes

from ...core.classify import ResponseClass
from ...core.errors import DeadlineExceeded, MeshError, Rejected, RemoteError, shown
from ..inbound import Inbound
from ..metadata import decode_binary, decode_metadata
from ..status import answered, excess, judge, to_mesh
from .call import Reply, Request

if TYPE_CHECKING:
    from .session import GrpcSession

__all__ = ["RAISED", "RAISED_BODY", "Exchange", "cancelled", "fresh", "reset_error"]

logger = logging.getLogger("meshlib.grpc")

Headers = list[tuple[str, str]]

_HTTP: Final = {
    "400": Status.INTERNAL,
    "401": Status.UNAUTHENTICATED,
    "403": Status.PERMISSION_DENIED,
    "404": Status.UNIMPLEMENTED,
    "429": Status.UNAVAILABLE,
    "502": Status.UNAVAILABLE,
    "503": Status.UNAVAILABLE,
    "504": Status.UNAVAILABLE,
}
"""grpc/doc/http-grpc-status-mapping.md; every other is UNKNOWN."""
_RESETS: Final = {
    ErrorCodes.CANCEL: Status.CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: Status.RESOURCE_EXHAUSTED,
    ErrorCodes.INADEQUATE_SECURITY: Status.PERMISSION_DENIED,
    ErrorCodes.REFUSED_STREAM: Status.UNAVAILABLE,
}
"""grpc/doc/PROTOCOL-HTTP2.md, "HTTP2 Transport Mapping"; every other is INTERNAL."""
RAISED: Final = "meshlib-raised"
"""Trailing metadata of an exception that the method has declared: its name."""
RAISED_BODY: Final = "meshlib-raised-bin"
"""The same: its fields."""
_STATUSES: Final = {str(status.value): status for status in Status}


def reset_error(code: int, endpoint: str, *, begun: bool = False) -> MeshError:
    """The error of a stream that the server has reset.

    Args:
        code: Why.
        endpoint: Whose.
        begun: It had begun to answer, so that REFUSED_STREAM proves nothing (RFC 9113 8.7 has it mean "not processed").
    """
    try:
        name = ErrorCodes(code).name
    except ValueError:
        name = str(int(code))
    if code == ErrorCodes.REFUSED_STREAM and not begun:
        refused = Rejected("the server refused the stream: REFUSED_STREAM", endpoint=endpoint)
        refused.by_peer = True
        return answered(refused, Status.UNAVAILABLE, refused.message)
    status = _RESETS.get(ErrorCodes(code), Status.INTERNAL) if name.isidentifier() else Status.INTERNAL
    text = f"the server reset the stream: {name}"
    # Whoever ends a call so has not said that it was done: one instance that stops is no reason to give up.
    retryable = status in (Status.CANCELLED, Status.INTERNAL, Status.UNAVAILABLE)
    error: MeshError = RemoteError(text, retryable=retryable or None, endpoint=endpoint)
    error.processed = None
    return answered(error, status, text)


class Exchange:
    """See the module.

    Args:
        session: Whose stream it is on.
        stream_id: Which.
        request: What it is about.

    Attributes:
        headers: The first headers, once they have come.
        trailers: The last ones, once they have.
        error: What it failed with.
        came: Some of a message, or more, has come.
        got: The message of a unary reply.
        abandoned: Its caller has changed its mind.
        over: Nothing more will come.
        ended: This side has said all.
        rest: What has not been sent of the message that the call began with.
        sent_at: When it began, on `Clock.now`.
    """

    __slots__ = (
        "_verdict", "_waiting", "_watchers", "abandoned", "came", "ended", "error", "got", "headers", "inbound", "over",
        "request", "rest", "sent_at", "session", "stream_id", "tick", "trailers", "whole",
    )  # fmt: skip

    def __init__(self, session: GrpcSession, stream_id: int, request: Request, sent_at: float) -> None:
        self.session, self.stream_id, self.request = session, stream_id, request
        self.headers: Headers | None = None
        self.trailers: Headers | None = None
        self.inbound: Inbound | None = None
        self.error: MeshError | None = None
        self.over = False
        self.abandoned = False
        self.ended = request.end
        self.sent_at = sent_at
        self.tick: int | None = None
        self.whole: asyncio.Future[None] | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._watchers: list[Callable[[Exception | None], None]] = []
        self._verdict: tuple[MeshError | None] | None = None
        self.got: bytes | None = None
        self.came = False
        self.rest = b""

    # --- told by the session ------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something has changed: whoever waits is to look."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                if not each.done():
                    each.set_result(None)

    def finish(self) -> None:
        """It is over. Called once, by the session."""
        self.over = True
        if self._watchers:
            self.session.in_task(self._tell)  # before the caller goes on, who may look at what they count
        if self.whole is not None and not self.whole.done():
            self.whole.set_result(None)
        self.wake()

    def settle(self) -> None:
        """Whoever counts it is told now that it is over, and not only when the session comes to it."""
        if self.over and self._watchers:
            self._tell()

    def _tell(self) -> None:
        watchers, self._watchers = self._watchers, []
        error = self._told()
        for watcher in watchers:
            try:
                watcher(error)
            except Exception:  # a classifier of the user's, say; the others still have their accounts to keep
                logger.exception("%s: the end of a stream was not taken note of", self.session.endpoint)

    def _told(self) -> Exception | None:
        """What those who keep accounts of endpoints are told: an error only where the server is to blame."""
        if self.abandoned:
            return None
        error = self.failure()
        if isinstance(error, DeadlineExceeded) and self.headers is not None and not self.trailers_only:
            return None  # it was answering; a stream that lasts longer than it was wanted for is no failure
        return None if error is None or judge(self.request, None, error) is ResponseClass.SUCCESS else error

    def on_end(self, callback: Callable[[Exception | None], None]) -> None:
        """Call ``callback`` when it is over, with the error that it ended in, if the server is to blame for it."""
        if self.over:
            callback(self._told())
        else:
            self._watchers.append(callback)

    async def progress(self) -> None:
        """Wait until something has changed."""
        waiter = self.session.loop.create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            raise

    # --- what has come ------------------------------------------------------------------------------------------------

    @property
    def trailers_only(self) -> bool:
        """Did the server answer with one block of headers, which has the status?"""
        return self.headers is not None and self.trailers is None and any(k == "grpc-status" for k, _ in self.headers)

    @property
    def failed(self) -> bool:
        """Is it over, and did it fail?"""
        return self.over and self.failure() is not None

    def failure(self) -> MeshError | None:
        """Once it is over: the error that it is, or ``None``."""
        if self._verdict is None:
            try:
                self._verdict = (self._judged(),)
            except Exception as error:  # what a server made up is its own call's failure, and nobody else's
                text = f"the end of the call cannot be read: {type(error).__name__}: {shown(str(error))}"
                self._verdict = (to_mesh(Status.INTERNAL, text, endpoint=self.session.endpoint),)
        return self._verdict[0]

    def _judged(self) -> MeshError | None:
        if self.error is not None:
            return self.error
        endpoint = self.session.endpoint
        problem = self.head_problem()
        if problem is not None:
            return problem
        trailers = self.trailers if self.trailers is not None else self.headers or []
        fields = dict(trailers)
        said = fields.get("grpc-status")
        if said is None:
            lost = RemoteError("the server ended the stream without a status", retryable=True, endpoint=endpoint)
            return answered(lost, Status.UNKNOWN, lost.message)
        if said == "0":
            return self.incomplete() if self.whole is not None else None
        status = _STATUSES.get(said, Status.UNKNOWN)
        message = fields.get("grpc-message")
        if message is not None:
            message = decode_grpc_message(message)
        if said not in _STATUSES:
            message = f"the status {shown(said)}, which gRPC does not have{f': {message}' if message else ''}"
        details = self._details(status, message, fields)
        error = to_mesh(status, message, details, fields, decode_metadata(trailers), endpoint)
        if self.trailers is not None:
            vars(error)["initial_metadata"] = decode_metadata(self.headers or ())
        return error

    def incomplete(self) -> MeshError | None:
        """Once all messages have been taken: the error of one that is not whole."""
        try:
            if self.inbound is not None:
                self.inbound.at_end()
        except GRPCError:
            text = "the server ended the stream in the middle of a message"
            return to_mesh(Status.INTERNAL, text, endpoint=self.session.endpoint)
        return None

    def _details(self, status: Status, message: str | None, fields: dict[str, str]) -> Any:
        codec = self.request.method.details_codec
        value = fields.get("grpc-status-details-bin")
        if codec is None or value is None:
            return None
        try:
            return codec.decode(status, message, decode_binary(value))
        except Exception:  # whatever a codec says of bytes that a server made up: the status itself is still good
            return None

    def head_problem(self) -> MeshError | None:
        """What is wrong with the first headers."""
        headers, endpoint = self.headers, self.session.endpoint
        if headers is None:
            lost = RemoteError("the server ended the stream without an answer", retryable=True, endpoint=endpoint)
            return answered(lost, Status.INTERNAL, lost.message)
        status = content_type = None
        for name, value in headers:
            if name == ":status":
                status = value
            elif name == "content-type":
                content_type = value
            elif name == "grpc-status":
                return None  # whoever says this speaks gRPC, whatever else is odd
        if status != "200":
            said = f"the server answered with HTTP status {shown(str(status))}"
            return to_mesh(_HTTP.get(str(status), Status.UNKNOWN), said, endpoint=endpoint)
        if content_type is not None and content_type == self.request.method.content_type:
            return None
        if content_type is None:
            return to_mesh(Status.UNKNOWN, "Missing content-type header", endpoint=endpoint)
        base, _, subtype = content_type.partition(";")[0].strip().partition("+")
        if base != "application/grpc" or (subtype or "proto") != self.request.method.codec.__content_subtype__:
            return to_mesh(Status.UNKNOWN, f"Invalid content-type: {shown(content_type)!r}", endpoint=endpoint)
        return None

    def decode(self, data: bytes) -> Any:
        """A message of the server's.

        Raises:
            MeshError: It is none.
        """
        method = self.request.method
        try:
            return method.codec.decode(data, method.reply_type)
        except Exception as error:
            text = f"the reply is no {getattr(method.reply_type, '__name__', method.reply_type)}: {shown(str(error))}"
            raise to_mesh(Status.INTERNAL, text, endpoint=self.session.endpoint) from error

    def reply(self) -> Reply:
        """The answer of a unary call that is over.

        Raises:
            MeshError: It failed.
        """
        error = self.failure()
        headers = self.headers or []
        if error is not None:
            metadata = vars(error).get("trailing_metadata") if self.request.method.declares else None
            if metadata is not None and RAISED in metadata and RAISED_BODY in metadata:
                name, body = metadata[RAISED], metadata[RAISED_BODY]
                return Reply(body, headers, self.trailers or headers, self.session.peer, name)
            raise fresh(error)
        if self.got is None:
            raise to_mesh(Status.INTERNAL, "the server said OK, and sent no message", endpoint=self.session.endpoint)
        return Reply(self.decode(self.got), headers, self.trailers or headers, self.session.peer)

    def take(self) -> bytes | None:
        """The next message, if it is here.

        Raises:
            MeshError: What came is none.
        """
        if self.inbound is None:
            return None
        try:
            return self.inbound.take()
        except GRPCError as error:
            text, endpoint = f"the server sent {error.message or 'a malformed message'}", self.session.endpoint
            if error.status is Status.RESOURCE_EXHAUSTED:
                raise excess(text, endpoint) from None
            raise to_mesh(error.status, text, endpoint=endpoint) from None


def cancelled(why: str = "") -> MeshError:
    """The error of a call that this side has given up."""
    text = f"the call was cancelled by its caller{f': {why}' if why else ''}"
    return answered(RemoteError(text), Status.CANCELLED, text if why else "Cancelled by the caller")


def fresh(error: MeshError) -> MeshError:
    """An error of its own for each who is told: what layers write onto it must not meet in one object."""
    other = type(error).__new__(type(error), *error.args)
    other.args = error.args
    vars(other).update(vars(error))
    other.__cause__ = error.__cause__
    return other
