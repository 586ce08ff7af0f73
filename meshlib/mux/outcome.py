"""What a reply, or the end of a connection, means to the caller who waits."""

from __future__ import annotations

import anyio

from ..core.errors import ConnectionLost, DeadlineExceeded, MeshError, RemoteError, shown
from .codec import MuxError
from .failure import from_wire
from .messages import Message, Rdispatch, ReplyStatus, Rerr, Rreq
from .request import Response

__all__ = ["lost", "outcome"]


def outcome(reply: Message | MeshError | None, endpoint: str) -> Response:
    """The response that ``reply`` is.

    Raises:
        MeshError: It is none: a refusal, a failure, or the error that the session ended with.
    """
    if isinstance(reply, Rdispatch | Rreq):
        contexts = reply.contexts if isinstance(reply, Rdispatch) else ()
        if reply.status is ReplyStatus.OK:
            return Response(reply.body, contexts)
        error = from_wire(reply.status, contexts, reply.body)
    elif isinstance(reply, DeadlineExceeded):
        error = reply
    elif isinstance(reply, MeshError):
        # All who waited share the one error: each gets its own, to be told apart by what is written onto it.
        error = type(reply)(reply.message)
        error.__cause__ = reply.__cause__
    elif isinstance(reply, Rerr):
        error = RemoteError(f"the server could not handle the request: {shown(reply.why)}")
    else:
        error = RemoteError(f"the server answered with {type(reply).__name__}")
    error.endpoint = endpoint
    raise error


def lost(cause: Exception) -> MeshError:
    """The error of a session that ended because of ``cause``."""
    if isinstance(cause, ConnectionLost):
        return cause
    if isinstance(cause, MuxError):
        error = ConnectionLost(f"the server broke the protocol: {cause.message}")
    elif isinstance(cause, anyio.EndOfStream):
        error = ConnectionLost("the server closed the connection")
    else:
        error = ConnectionLost(f"the connection broke: {cause.__cause__ or cause!r}")
    error.__cause__ = cause
    return error
