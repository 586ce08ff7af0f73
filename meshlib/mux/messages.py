"""Mux's vocabulary: every message, its code, and the flags and contexts that have a name.

All integers are big-endian; a frame is ``size:4 type:1 tag:3 body``. A T-message asks and its R-message, of the negated
code, answers. Finagle's implementation still *sends* the legacy codes of Rerr and Tdiscarded and reads both forms; so
do we. Source: finagle-mux, mux/transport/Message.scala and mux/package.scala.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

import msgspec

__all__ = [
    "CONTROL_TAG",
    "FRAGMENT_BIT",
    "MARKER_TAG",
    "MAX_TAG",
    "MIN_TAG",
    "Code",
    "Contexts",
    "Dtab",
    "Message",
    "MuxFailure",
    "Rdiscarded",
    "Rdispatch",
    "Rdrain",
    "ReplyStatus",
    "Rerr",
    "Rinit",
    "Rping",
    "Rreq",
    "Tdiscarded",
    "Tdispatch",
    "Tdrain",
    "Tinit",
    "Tlease",
    "Tping",
    "Treq",
    "Unknown",
]

Contexts = tuple[tuple[bytes, bytes], ...]
Dtab = tuple[tuple[str, str], ...]

MARKER_TAG: Final = 0
"""On messages that nobody answers: Tdiscarded, Tlease."""
CONTROL_TAG: Final = 1
"""On session messages: pings, drains, the handshake. Finagle reserves it, so requests begin at 2."""
MIN_TAG: Final = 2
MAX_TAG: Final = (1 << 23) - 1
FRAGMENT_BIT: Final = 1 << 23
"""In the tag field: more fragments of this message follow."""


class Code(IntEnum):
    """The type byte."""

    TREQ = 1
    RREQ = -1
    TDISPATCH = 2
    RDISPATCH = -2
    TDRAIN = 64
    RDRAIN = -64
    TPING = 65
    RPING = -65
    TDISCARDED = 66
    RDISCARDED = -66
    TLEASE = 67
    TINIT = 68
    RINIT = -68
    RERR = -128
    BAD_TDISCARDED = -62
    """What Finagle sends for Tdiscarded: an early sign error that compatibility has kept."""
    BAD_RERR = 127
    """What Finagle sends for Rerr, likewise."""


class ReplyStatus(IntEnum):
    """The first byte of an Rreq or Rdispatch."""

    OK = 0
    ERROR = 1
    NACK = 2


class MuxFailure(IntFlag):
    """The value of the ``MuxFailure`` response context (mux/transport/MuxFailure.scala)."""

    RETRYABLE = 1
    """Restartable: the request was not processed."""
    REJECTED = 2
    """The server refused work."""
    NON_RETRYABLE = 4
    """Nobody further up should try again."""


class _Body(msgspec.Struct, frozen=True, gc=False):
    """Messages are plain values. None of them can be part of a reference cycle, so the collector need not look."""

    tag: int


class Treq(_Body, frozen=True, gc=False):
    """The oldest form of a request; a fallback for peers that know no Tdispatch."""

    trace: tuple[int, int, int] | None = None
    """(span, parent, trace)"""
    flags: int | None = None
    body: bytes = b""


class Rreq(_Body, frozen=True, gc=False):
    """Answers Treq."""

    status: ReplyStatus
    body: bytes = b""


class Tdispatch(_Body, frozen=True, gc=False):
    """A request."""

    contexts: Contexts = ()
    dest: str = ""
    dtab: Dtab = ()
    body: bytes = b""


class Rdispatch(_Body, frozen=True, gc=False):
    """Answers Tdispatch; the body is the reply, or a reason in UTF-8."""

    status: ReplyStatus
    contexts: Contexts = ()
    body: bytes = b""


class Tdrain(_Body, frozen=True, gc=False):
    """Stop sending requests: this session ends once those under way are answered."""


class Rdrain(_Body, frozen=True, gc=False):
    """Understood; no request follows."""


class Tping(_Body, frozen=True, gc=False):
    """Are you there?"""


class Rping(_Body, frozen=True, gc=False):
    """Yes."""


class Tdiscarded(_Body, frozen=True, gc=False):
    """The answer to ``which`` is no longer wanted."""

    which: int
    why: str = ""


class Rdiscarded(_Body, frozen=True, gc=False):
    """The request of this tag was given up."""


class Tlease(_Body, frozen=True, gc=False):
    """Requests are welcome for ``howmuch`` (unit 0: milliseconds)."""

    unit: int
    howmuch: int


class Tinit(_Body, frozen=True, gc=False):
    """The client's half of the negotiation."""

    version: int
    headers: Contexts = ()


class Rinit(_Body, frozen=True, gc=False):
    """The server's half of the negotiation."""

    version: int
    headers: Contexts = ()


class Rerr(_Body, frozen=True, gc=False):
    """The request of this tag could not be understood or handled at all."""

    why: str = ""


class Unknown(_Body, frozen=True, gc=False):
    """A message of a type that is not in the table."""

    code: int
    body: bytes = b""


Message = (
    Treq
    | Rreq
    | Tdispatch
    | Rdispatch
    | Tdrain
    | Rdrain
    | Tping
    | Rping
    | Tdiscarded
    | Rdiscarded
    | Tlease
    | Tinit
    | Rinit
    | Rerr
    | Unknown
)
