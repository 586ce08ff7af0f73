"""How a failure crosses the wire.

Mux knows three replies: OK, ERROR with a text, and NACK, which promises that the request was not processed; and a
``MuxFailure`` context that adds flags. What our own peers need beyond that, which kind of error it was and for how long
the server asks to be left alone, travels in two more contexts that other implementations pass over.
"""

from __future__ import annotations

import math
import struct
from typing import Final

import msgspec

from ..core.errors import (
    DeadlineExceeded,
    InvalidArgument,
    MeshError,
    Rejected,
    RemoteError,
    UnknownMethod,
    UnknownService,
)
from ..core.pushback import LONGEST_WAIT, NEVER, pushback
from .messages import Contexts, MuxFailure, ReplyStatus

__all__ = ["from_wire", "to_wire"]

LONGEST: Final = 4096
"""Bytes of a reason that are worth reading; a peer may send as many as fit into a frame."""
FLAGS: Final = b"MuxFailure"
KIND: Final = b"meshlib.error"
RETRY_AFTER: Final = b"meshlib.RetryAfter"
"""Milliseconds, in ASCII digits; -1 for "not again at all"."""


class _Kind(msgspec.Struct, frozen=True, omit_defaults=True):
    kind: str
    path: str = ""


_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(_Kind).decode
_KINDS: Final[dict[str, type[MeshError]]] = {
    kind.__name__: kind for kind in (DeadlineExceeded, InvalidArgument, UnknownMethod, UnknownService)
}


def to_wire(error: MeshError) -> tuple[ReplyStatus, Contexts, bytes]:
    """The reply that stands for ``error``. Only what a server raised itself may get here: handlers' own exceptions
    have become opaque by then.
    """
    text = error.message.encode()
    if error.requeueable:
        flags = (FLAGS, _flags(MuxFailure.RETRYABLE | MuxFailure.REJECTED))
        return ReplyStatus.NACK, (flags, *_pushback(error)), text
    contexts: list[tuple[bytes, bytes]] = _pushback(error)
    if isinstance(error, Rejected):
        contexts.append((FLAGS, _flags(MuxFailure.REJECTED | MuxFailure.NON_RETRYABLE)))
    elif "retryable" in vars(error) and not error.retryable:
        # Said of this very failure, not of its kind: a budget ran dry below us, so nobody above should try again.
        contexts.append((FLAGS, _flags(MuxFailure.NON_RETRYABLE)))
    name = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), None)
    if name is not None:
        contexts.append((KIND, _encode(_Kind(name, getattr(error, "path", "")))))
    return ReplyStatus.ERROR, tuple(contexts), text


def _pushback(error: MeshError) -> list[tuple[bytes, bytes]]:
    seconds = pushback(error)
    if seconds is None:
        return []
    return [(RETRY_AFTER, b"-1" if seconds == NEVER else b"%d" % math.ceil(seconds * 1e3))]


def read_retry_after(value: bytes) -> float | None:
    """Seconds for which the server asks to be left alone, -1 for ever; ``None`` if ``value`` says neither."""
    if value == b"-1":
        return -1.0
    if not (0 < len(value) <= 16 and value.isdigit()):
        return None
    return min(int(value) / 1e3, LONGEST_WAIT)


def _flags(flags: MuxFailure) -> bytes:
    return struct.pack(">q", flags)


def from_wire(status: ReplyStatus, contexts: Contexts, body: bytes) -> MeshError:
    """The error that a reply other than OK stands for."""
    text = body[:LONGEST].decode(errors="replace")
    flags = MuxFailure(0)
    kind = None
    retry_after = None
    for key, value in contexts:
        if key == FLAGS and len(value) >= 8:
            flags = MuxFailure(struct.unpack_from(">q", value)[0] & 7)
        elif key == RETRY_AFTER:
            retry_after = read_retry_after(value)
        elif key == KIND:
            try:
                kind = _decode(value)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                kind = None
    error = _error(status, flags, kind, text, contexts)
    error.retry_after = retry_after
    return error


def _error(status: ReplyStatus, flags: MuxFailure, kind: _Kind | None, text: str, contexts: Contexts) -> MeshError:
    final = bool(flags & MuxFailure.NON_RETRYABLE)
    unprocessed = status is ReplyStatus.NACK or bool(flags & MuxFailure.RETRYABLE)
    if unprocessed or flags & MuxFailure.REJECTED:
        refusal = Rejected(text or "the server refused the request", retryable=unprocessed and not final)
        refusal.by_peer = True
        return refusal
    if kind is not None and kind.kind in _KINDS:
        error = _KINDS[kind.kind](text)
        if isinstance(error, InvalidArgument):
            error.path = kind.path
        if final:
            error.retryable = False  # said of this very failure, so that `to_wire` says it again one hop up
        return error
    return RemoteError(text or "the handler failed", retryable=False if final else None, contexts=contexts)
