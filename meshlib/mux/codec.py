"""Between messages and bytes: pure functions over one table, no I/O.

`encode` makes a whole frame, size included; `decode` takes a frame without its size, as the framer cuts it. Whatever
bytes it is given, `decode` raises `MuxError` and nothing else, and it allocates no more than the frame it was given.

Lengths of 2 bytes are read as *signed* by Finagle, so 32,767 is the most a key, value, destination or Dtab part may
hold, though its documents say unsigned. Source: finagle-mux, mux/transport/Message.scala.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import ConfigurationError, InvalidArgument, ProtocolError
from .messages import (
    FRAGMENT_BIT,
    Code,
    Contexts,
    Dtab,
    Message,
    Rdiscarded,
    Rdispatch,
    Rdrain,
    ReplyStatus,
    Rerr,
    Rinit,
    Rping,
    Rreq,
    Tdiscarded,
    Tdispatch,
    Tdrain,
    Tinit,
    Tlease,
    Tping,
    Treq,
    Unknown,
)

__all__ = [
    "DEFAULT_LIMITS",
    "HEADER",
    "Limits",
    "MuxError",
    "decode",
    "encode",
    "encode_contexts",
    "encode_rdispatch",
    "encode_tdispatch",
]

HEADER: Final = 4
"""Bytes of type and tag, which a frame's size counts."""
MAX_SHORT: Final = 0x7FFF

_u16 = struct.Struct(">h")
_u32 = struct.Struct(">i")
_head = struct.Struct(">ibBH").pack
"""size:4 type:1 tag:3, the tag as its high byte and low two."""
_h = _u16.unpack_from
_i = _u32.unpack_from
_pack_h = _u16.pack


class MuxError(ProtocolError):
    """The peer broke the protocol, or a limit. Its connection is closed; nothing else is touched.

    Attributes:
        kind: A short name for the counter: ``malformed``, ``frame_too_large``, ``contexts_too_large``,
            ``too_many_in_flight``, ``duplicate_tag``, ``negotiation``.
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one connection may ask of us. Each is checked before memory is taken; breaking one ends the connection.

    Attributes:
        max_frame: Bytes of one frame or one reassembled message. Fragments that wait for the rest of their messages
            may take four times as much in all.
        max_contexts: Bytes of one message's context section.
        max_in_flight: Requests that one connection may have under way. The concurrency limit of the server refuses
            work politely long before; this one stops a peer that does not listen.
    """

    max_frame: int = 16 * 1024 * 1024
    max_contexts: int = 64 * 1024
    max_in_flight: int = 65_536

    def __post_init__(self) -> None:
        for name in ("max_frame", "max_contexts", "max_in_flight"):
            value = getattr(self, name)
            if not (isinstance(value, int) and 0 < value <= 0x7FFFFFFF):
                raise ConfigurationError(f"Limits({name}={value!r}): give a whole number from 1 to 2,147,483,647")


DEFAULT_LIMITS: Final = Limits()


def _frame(code: int, tag: int, body: bytes) -> bytes:
    return _head(HEADER + len(body), code, tag >> 16, tag & 0xFFFF) + body


def _short(data: bytes, what: str) -> bytes:
    if len(data) > MAX_SHORT:
        raise InvalidArgument(f"{what} takes {len(data)} bytes, and Mux has room for {MAX_SHORT}")
    return _pack_h(len(data)) + data


def encode_contexts(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A context section: the number of pairs, then each key and value with its length."""
    parts = [b""]
    for key, value in pairs:
        parts += (_short(key, "a context key"), _short(value, f"context {key!r}"))
    n = len(parts) // 2
    if n > MAX_SHORT:
        raise InvalidArgument(f"a request carries {n} contexts, and Mux has room for {MAX_SHORT}")
    parts[0] = _pack_h(n)
    return b"".join(parts)


NO_PAIRS: Final = b"\0\0"


def encode_tdispatch(tag: int, contexts: bytes, dest: str, dtab: Dtab, body: bytes) -> bytes:
    """A Tdispatch frame around a context section that is already encoded."""
    where = dest.encode()
    rules = encode_contexts((p.encode(), t.encode()) for p, t in dtab) if dtab else NO_PAIRS
    if len(where) > MAX_SHORT:
        raise InvalidArgument(f"the destination takes {len(where)} bytes, and Mux has room for {MAX_SHORT}")
    size = HEADER + len(contexts) + 2 + len(where) + len(rules) + len(body)
    return b"".join((_head(size, 2, tag >> 16, tag & 0xFFFF), contexts, _pack_h(len(where)), where, rules, body))


def encode_rdispatch(tag: int, status: int, contexts: bytes, body: bytes) -> bytes:
    """An Rdispatch frame around a context section that is already encoded."""
    size = HEADER + 1 + len(contexts) + len(body)
    return b"".join((_head(size, -2, tag >> 16, tag & 0xFFFF), _STATUS[status], contexts, body))


_STATUS: Final = (b"\0", b"\1", b"\2")


def _encode_treq(m: Treq) -> bytes:
    keys = []
    if m.trace is not None:
        keys.append(b"\x01\x18" + struct.pack(">QQQ", *m.trace))
    if m.flags is not None:
        keys.append(b"\x02\x01" + bytes((m.flags,)))
    return _frame(Code.TREQ, m.tag, bytes((len(keys),)) + b"".join(keys) + m.body)


def _encode_init(code: Code) -> Callable[[Any], bytes]:
    def encode_init(m: Tinit | Rinit) -> bytes:
        pairs = (struct.pack(">i", len(k)) + k + struct.pack(">i", len(v)) + v for k, v in m.headers)
        return _frame(code, m.tag, _pack_h(m.version) + b"".join(pairs))

    return encode_init


def _empty(code: Code) -> Callable[[Any], bytes]:
    return lambda m: _frame(code, m.tag, b"")


_ENCODERS: Final[dict[type, Callable[[Any], bytes]]] = {
    Treq: _encode_treq,
    Rreq: lambda m: _frame(Code.RREQ, m.tag, _STATUS[m.status] + m.body),
    Tdispatch: lambda m: encode_tdispatch(m.tag, encode_contexts(m.contexts), m.dest, m.dtab, m.body),
    Rdispatch: lambda m: encode_rdispatch(m.tag, m.status, encode_contexts(m.contexts), m.body),
    Tdrain: _empty(Code.TDRAIN),
    Rdrain: _empty(Code.RDRAIN),
    Tping: _empty(Code.TPING),
    Rping: _empty(Code.RPING),
    Rdiscarded: _empty(Code.RDISCARDED),
    # The two legacy codes, which every Finagle reads and some read alone.
    Tdiscarded: lambda m: _frame(Code.BAD_TDISCARDED, m.tag, m.which.to_bytes(3, "big") + m.why.encode()),
    Rerr: lambda m: _frame(Code.BAD_RERR, m.tag, m.why.encode()),
    Tlease: lambda m: _frame(Code.TLEASE, m.tag, struct.pack(">BQ", m.unit, m.howmuch)),
    Tinit: _encode_init(Code.TINIT),
    Rinit: _encode_init(Code.RINIT),
    Unknown: lambda m: _frame(m.code, m.tag, m.body),
}


def encode(message: Message) -> bytes:
    """The whole frame of ``message``, its size first.

    Raises:
        InvalidArgument: A part is longer than the protocol has room for.
    """
    return _ENCODERS[type(message)](message)


# --- decoding ---------------------------------------------------------------------------------------------------------


def _pairs(frame: bytes, at: int, limit: int) -> tuple[Contexts, int]:
    (n,) = _h(frame, at)
    at += 2
    if n == 0:
        return (), at
    # Each pair takes 4 bytes at least, so a count that cannot fit is refused before anything is made of it.
    if n < 0 or n * 4 > len(frame) - at:
        raise MuxError(f"a section of {n} pairs in {len(frame) - at} bytes")
    end = at + limit
    pairs = []
    for _ in range(n):
        (size,) = _h(frame, at)
        middle = at + 2 + size
        (size2,) = _h(frame, middle)
        stop = middle + 2 + size2
        if size < 0 or size2 < 0 or stop > len(frame):
            raise MuxError(f"a pair of {size} and {size2} bytes in a frame of {len(frame)}")
        if stop > end:
            raise MuxError(f"a context section of more than {limit} bytes (Limits.max_contexts)", "contexts_too_large")
        pairs.append((frame[at + 2 : middle], frame[middle + 2 : stop]))
        at = stop
    return tuple(pairs), at


def _decode_tdispatch(tag: int, frame: bytes, limit: int) -> Tdispatch:
    contexts, at = _pairs(frame, HEADER, limit)
    (size,) = _h(frame, at)
    stop = at + 2 + size
    if size < 0 or stop > len(frame):
        raise MuxError(f"a destination of {size} bytes in a frame of {len(frame)}")
    dest = frame[at + 2 : stop].decode()
    rules, at = _pairs(frame, stop, limit)
    dtab = tuple((p.decode(), t.decode()) for p, t in rules) if rules else ()
    return Tdispatch(tag, contexts, dest, dtab, frame[at:])


def _status(frame: bytes) -> ReplyStatus:
    if len(frame) <= HEADER:
        raise MuxError("a reply without a status")
    return ReplyStatus(frame[HEADER])


def _decode_rdispatch(tag: int, frame: bytes, limit: int) -> Rdispatch:
    status = _status(frame)
    contexts, at = _pairs(frame, HEADER + 1, limit)
    return Rdispatch(tag, status, contexts, frame[at:])


def _decode_rreq(tag: int, frame: bytes, limit: int) -> Rreq:
    return Rreq(tag, _status(frame), frame[HEADER + 1 :])


def _decode_treq(tag: int, frame: bytes, limit: int) -> Treq:
    if len(frame) <= HEADER:
        raise MuxError("a Treq without a number of keys")
    trace = None
    flags = None
    at = HEADER + 1
    for _ in range(frame[HEADER]):
        key, size = struct.unpack_from(">BB", frame, at)
        value = frame[at + 2 : at + 2 + size]
        if len(value) != size:
            raise MuxError(f"a Treq key of {size} bytes in a frame of {len(frame)}")
        if key == 1:
            trace = struct.unpack(">QQQ", value)
        elif key == 2:
            (flags,) = struct.unpack(">B", value)
        at += 2 + size
    return Treq(tag, trace, flags, frame[at:])


def _decode_init(make: type[Tinit | Rinit]) -> Callable[[int, bytes, int], Tinit | Rinit]:
    def decode_init(tag: int, frame: bytes, limit: int) -> Tinit | Rinit:
        (version,) = _h(frame, HEADER)
        if len(frame) - HEADER - 2 > limit:
            raise MuxError(f"headers of more than {limit} bytes (Limits.max_contexts)", "contexts_too_large")
        parts: list[bytes] = []
        at = HEADER + 2
        while at < len(frame):
            (size,) = _i(frame, at)
            at += 4 + size
            if size < 0 or at > len(frame):
                raise MuxError(f"a header of {size} bytes in a frame of {len(frame)}")
            parts.append(frame[at - size : at])
        if len(parts) % 2:
            raise MuxError("a header without a value")
        return make(tag, version, tuple(zip(parts[::2], parts[1::2], strict=True)))

    return decode_init


def _decode_tdiscarded(tag: int, frame: bytes, limit: int) -> Tdiscarded:
    if len(frame) < HEADER + 3:
        raise MuxError("a Tdiscarded without the tag it discards")
    # The reason is for people: bytes that are not UTF-8 must not keep the discard from taking effect.
    return Tdiscarded(tag, int.from_bytes(frame[4:7], "big"), frame[7:].decode(errors="replace"))


def _decode_rerr(tag: int, frame: bytes, limit: int) -> Rerr:
    return Rerr(tag, frame[HEADER:].decode(errors="replace"))


def _decode_tlease(tag: int, frame: bytes, limit: int) -> Tlease:
    unit, howmuch = struct.unpack_from(">BQ", frame, HEADER)
    return Tlease(tag, unit, howmuch)


def _bare(make: Callable[[int], Message]) -> Callable[[int, bytes, int], Message]:
    return lambda tag, frame, limit: make(tag)


_DECODERS: Final[dict[int, Callable[[int, bytes, int], Message]]] = {
    Code.TREQ: _decode_treq,
    Code.RREQ: _decode_rreq,
    Code.TDISPATCH: _decode_tdispatch,
    Code.RDISPATCH: _decode_rdispatch,
    Code.TDRAIN: _bare(Tdrain),
    Code.RDRAIN: _bare(Rdrain),
    Code.TPING: _bare(Tping),
    Code.RPING: _bare(Rping),
    Code.TDISCARDED: _decode_tdiscarded,
    Code.BAD_TDISCARDED: _decode_tdiscarded,
    Code.RDISCARDED: _bare(Rdiscarded),
    Code.TLEASE: _decode_tlease,
    Code.TINIT: _decode_init(Tinit),
    Code.RINIT: _decode_init(Rinit),
    Code.RERR: _decode_rerr,
    Code.BAD_RERR: _decode_rerr,
}


def decode(frame: bytes, max_contexts: int = DEFAULT_LIMITS.max_contexts) -> Message:
    """The message in ``frame``, a whole one without its size; fragments must have been joined before.

    Raises:
        MuxError: The bytes are no message, or break a limit. Never anything else.
    """
    if len(frame) < HEADER:
        raise MuxError(f"a frame of {len(frame)} bytes; a type and a tag take {HEADER}")
    code = frame[0]
    if code > 127:
        code -= 256
    tag = int.from_bytes(frame[1:4], "big")
    if tag & FRAGMENT_BIT:
        raise MuxError(f"a fragment of message type {code}")
    decoder = _DECODERS.get(code)
    if decoder is None:
        return Unknown(tag, code, frame[HEADER:])
    try:
        return decoder(tag, frame, max_contexts)
    except (struct.error, ValueError) as error:  # too short for a number; not UTF-8; no such status
        raise MuxError(f"malformed {Code(code).name}: {error}") from error
