"""What a Mux service is given and gives back."""

from __future__ import annotations

import msgspec

from ..core.clock import Clock
from ..core.context import VAR
from ..core.errors import InvalidArgument
from .codec import Limits, encode, encode_tdispatch
from .contexts import LOW, encode_context
from .messages import Contexts, Treq

__all__ = ["Request", "Response", "encode_request"]


class Request(msgspec.Struct, frozen=True):
    """A request.

    Attributes:
        body: The payload.
        dest: The path it is meant for, such as ``/users/get``; empty for "whatever this server serves".
        contexts: Pairs that travel with this request beside those of the current context.
        idempotent: May it be processed twice without harm? Said by the caller, for its own retries; it does not travel.
    """

    body: bytes = b""
    dest: str = ""
    contexts: Contexts = ()
    idempotent: bool = False


class Response(msgspec.Struct, frozen=True):
    """A reply.

    Attributes:
        body: The payload.
        contexts: Pairs that travel back with it.
    """

    body: bytes = b""
    contexts: Contexts = ()


def encode_request(tag: int, request: Request, limits: Limits, clock: Clock, *, treq: bool = False) -> bytes:
    """The frame of ``request`` under the current context; as a Treq, for servers that know nothing newer.

    Raises:
        InvalidArgument: It is larger than ``limits`` allow. The server's are likely ours, and breaking them would end
            the session, and with it every other call.
    """
    context = VAR.get()
    if treq:
        trace = context.trace
        ids = None if trace is None else (trace.span, trace.parent or trace.span, trace.trace & LOW)
        return _fit(encode(Treq(tag, ids, None if trace is None else int(trace.debug), request.body)), limits)
    contexts = encode_context(context, clock, request.contexts, limits.max_contexts)
    if len(contexts) - 2 > limits.max_contexts:
        raise InvalidArgument(f"the contexts take {len(contexts)} bytes, over Limits.max_contexts")
    if sum(4 + len(p.encode()) + len(t.encode()) for p, t in context.dtab) > limits.max_contexts:
        raise InvalidArgument("the local Dtab is over Limits.max_contexts")
    return _fit(encode_tdispatch(tag, contexts, request.dest, context.dtab, request.body), limits)


def _fit(frame: bytes, limits: Limits) -> bytes:
    if len(frame) - 4 > limits.max_frame:
        raise InvalidArgument(f"the request takes {len(frame)} bytes, over Limits.max_frame")
    return frame
