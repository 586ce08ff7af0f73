"""Cutting a stream of bytes into frames, and messages into fragments and back. Pure: bytes in, bytes out.

Sizes are checked when they are read, before any of what they announce is kept. Only requests and replies come in
fragments: each carries the type and the tag with its top bit set on all but the last, fragments of several messages may
interleave, and the limit that a peer announces bounds a fragment's payload without that header. We send fragments of
dispatches alone, and join those of Treq too, as Finagle does. Source: finagle-mux, mux/transport/MuxFramer.scala.
"""

from __future__ import annotations

import struct
from typing import Final

from .codec import DEFAULT_LIMITS, HEADER, Limits, MuxError
from .messages import FRAGMENT_BIT, Code

__all__ = ["Fragmenter", "Framer", "Reassembler"]

_size = struct.Struct(">i").unpack_from
_head = struct.Struct(">ibBH").pack
_FRAGMENTED: Final = tuple(code & 0xFF for code in (Code.TDISPATCH, Code.RDISPATCH, Code.TREQ, Code.RREQ))
_DROPS_SUBJECT: Final = (Code.TDISCARDED & 0xFF, Code.BAD_TDISCARDED & 0xFF)
_DROPS_TAG: Final = (Code.RDISCARDED & 0xFF, Code.RERR & 0xFF, Code.BAD_RERR & 0xFF)
_SMALL: Final = 1024
"""Reads below this are gathered in one buffer: as objects of their own they would cost many times their size."""


class Framer:
    """Cuts a stream into frames, without their sizes.

    Args:
        max_frame: Bytes of the largest frame that is let in.
    """

    __slots__ = ("_chunks", "_held", "_max", "_want")

    def __init__(self, max_frame: int = DEFAULT_LIMITS.max_frame) -> None:
        self._max = max_frame
        self._chunks: list[bytes | bytearray] = []
        self._held = 0
        self._want = 4

    @property
    def held(self) -> int:
        """Bytes of a frame that has not come whole yet."""
        return self._held

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was read; give every frame that is now whole.

        Chunks of a large frame are only collected until it is whole, so a frame costs time linear in its size however
        it is split.

        Raises:
            MuxError: A size is negative, smaller than a header, or over the limit.
        """
        if self._held:
            self._keep(data)
            self._held += len(data)
            if self._held < self._want:
                return []
            data = b"".join(self._chunks)
            self._chunks.clear()
        frames = []
        at, end = 0, len(data)
        while True:
            if end - at < 4:
                self._want = 4
                break
            (size,) = _size(data, at)
            if size < HEADER or size > self._max:
                self._refuse(size)
            stop = at + 4 + size
            if stop > end:
                self._want = 4 + size
                break
            frames.append(data[at + 4 : stop])
            at = stop
        self._held = end - at
        if self._held:
            self._chunks.append(data[at:])
        return frames

    def _keep(self, data: bytes) -> None:
        last = self._chunks[-1]
        if len(data) >= _SMALL:
            self._chunks.append(data)
        elif isinstance(last, bytearray):
            last += data
        else:
            self._chunks.append(bytearray(data))

    def _refuse(self, size: int) -> None:
        if size > self._max:
            raise MuxError(
                f"a frame of {size} bytes; the limit here is {self._max} (Limits.max_frame)", "frame_too_large"
            )
        raise MuxError(f"a frame of {size} bytes; a type and a tag take {HEADER}")


class Reassembler:
    """Joins fragments. Gives whole messages back as they are.

    Args:
        limits: `Limits.max_frame` bounds each joined message, and four times that all fragments that wait together;
            `Limits.max_in_flight` bounds how many messages may be incomplete.
    """

    __slots__ = ("_forgotten", "_limits", "_partial", "held")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._partial: dict[int, bytearray] = {}
        self._forgotten: set[int] = set()
        self.held = 0

    def add(self, frame: bytes) -> bytes | None:
        """Take a frame; give the message that is whole with it, or ``None`` if more fragments follow.

        Raises:
            MuxError: A fragment of a message that must not be fragmented, or more than a limit allows.
        """
        if not (self._partial or frame[1] & 0x80):
            return frame
        tag = int.from_bytes(frame[1:4], "big")
        more = tag & FRAGMENT_BIT
        tag &= ~FRAGMENT_BIT
        if frame[0] not in _FRAGMENTED:
            if more:
                raise MuxError(f"a fragment of message type {frame[0] - 256 * (frame[0] > 127)}")
            if frame[0] in _DROPS_TAG:
                self._drop(tag)
            elif frame[0] in _DROPS_SUBJECT:
                subject = int.from_bytes(frame[4:7], "big")
                if self._drop(subject) and len(self._forgotten) < self._limits.max_in_flight:
                    self._forgotten.add(subject)
            return frame
        parts = self._partial.get(tag)
        if parts is None:
            if not more:
                return frame
            if len(self._partial) >= self._limits.max_in_flight:
                raise MuxError(
                    f"more than {self._limits.max_in_flight} incomplete messages (Limits.max_in_flight)",
                    "too_many_in_flight",
                )
            parts = self._partial[tag] = bytearray(frame[:1] + tag.to_bytes(3, "big"))
        size = len(frame) - HEADER
        limit = self._limits.max_frame
        if len(parts) + size > limit or self.held + size > 4 * limit:
            raise MuxError(f"fragments of a message over {limit} bytes (Limits.max_frame)", "frame_too_large")
        parts += memoryview(frame)[HEADER:]
        self.held += size
        if more:
            return None
        self._drop(tag)
        return bytes(parts)

    def forgot(self, tag: int) -> bool:
        """Was the message of this tag discarded by its sender before it had come whole? Says so once."""
        if tag in self._forgotten:
            self._forgotten.remove(tag)
            return True
        return False

    def _drop(self, tag: int) -> bool:
        parts = self._partial.pop(tag, None)
        if parts is not None:
            self.held -= len(parts) - HEADER
        return parts is not None


class Fragmenter:
    """Cuts an encoded Tdispatch or Rdispatch into frames whose payload is at most ``limit`` bytes.

    Args:
        frame: The whole frame, its size in front, as `encode` makes it; each piece is one too.
        limit: The most bytes of a piece, its type and tag not counted.
    """

    __slots__ = ("_at", "_code", "_frame", "_limit", "_tag")

    def __init__(self, frame: bytes, limit: int) -> None:
        self._frame = memoryview(frame)
        self._code = frame[4] - 256 * (frame[4] > 127)
        self._tag = int.from_bytes(frame[5:8], "big")
        self._limit = limit
        self._at = 8

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return len(self._frame)

    @property
    def started(self) -> bool:
        """Has a piece been taken?"""
        return self._at > 8

    @property
    def left(self) -> int:
        """Bytes of payload that have not been taken."""
        return len(self._frame) - self._at

    def take(self) -> bytes:
        """The next piece. There is one as long as anything is `left`."""
        piece = self._frame[self._at : self._at + self._limit]
        self._at += len(piece)
        high = (self._tag >> 16) | (0x80 if self.left else 0)
        return _head(HEADER + len(piece), self._code, high, self._tag & 0xFFFF) + piece
