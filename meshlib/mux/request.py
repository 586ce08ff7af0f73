"""What a Mux service is given and gives back."""

from __future__ import annotations

import msgspec

from .messages import Contexts

__all__ = ["Request", "Response"]


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
