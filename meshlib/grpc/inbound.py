"""The messages of a request, from DATA frames as they come: bounded before they are held, given back as they are read.

A message is five bytes, a flag and a length, and then so many bytes. A length over the limit fails the call before
anything of the message is waited for. Flow control: what a message that is being read has taken is given back at once,
what nobody reads yet is not, so a peer can have a window's worth of unread bytes here and no more; updates are sent
for half a window at a time. Source: grpc/doc/PROTOCOL-HTTP2.md, grpc/doc/compression.md.
"""

from __future__ import annotations

import zlib
from typing import Final

from grpclib.const import Status
from grpclib.exceptions import GRPCError

__all__ = ["PREFIX", "Inbound", "framed", "gunzip"]

PREFIX: Final = 5
_GZIP: Final = 16 + zlib.MAX_WBITS


class Inbound:
    """The bytes of one request, and the messages in them.

    Args:
        most: Bytes of a message.
        encoding: ``gzip`` if compressed messages may come.

    Attributes:
        held: Bytes of the windows that nobody has read.
        owed: Bytes that have been read, and not been given back to the stream yet.
        ended: No more will come.
        messages: How many have been taken.
    """

    __slots__ = ("_bytes", "_encoding", "_most", "ended", "held", "messages", "owed")

    def __init__(self, most: int, encoding: str) -> None:
        self._bytes = bytearray()
        self._most, self._encoding = most, encoding
        self.held = self.owed = 0
        self.ended = False
        self.messages = 0

    def add(self, data: bytes, flow: int) -> None:
        """Take the bytes of a DATA frame, which takes ``flow`` bytes of the window."""
        self._bytes += data
        self.held += flow

    def take(self) -> bytes | None:
        """The next message; ``None`` if it is not here yet. At the end of the request, see `at_end`.

        Raises:
            GRPCError: What came is none, or too large.
        """
        buffer = self._bytes
        if len(buffer) < PREFIX:
            return None
        size = int.from_bytes(buffer[1:PREFIX])
        if size > self._most:
            raise GRPCError(
                Status.RESOURCE_EXHAUSTED, f"a message of {size} bytes, more than the {self._most} that are allowed"
            )
        flag = buffer[0]
        if flag > 1 or (flag and not self._encoding):
            raise GRPCError(
                Status.INTERNAL,
                "a compressed message without grpc-encoding" if flag == 1 else f"a message with the flag {flag}",
            )
        end = PREFIX + size
        if len(buffer) < end:
            return None
        message = bytes(memoryview(buffer)[PREFIX:end])
        del buffer[:end]
        self.messages += 1
        return gunzip(message, self._most) if flag else message

    @property
    def begun(self) -> bool:
        """Has something come that has not been taken?"""
        return bool(self._bytes)

    def at_end(self) -> None:
        """Check that a request which has ended did so between two messages.

        Raises:
            GRPCError: It did not.
        """
        if self._bytes:
            raise GRPCError(Status.INTERNAL, "the request ended in the middle of a message")

    def to_give_back(self) -> int:
        """How much of the window the unread bytes do not need: all, while they are part of one message."""
        buffer = self._bytes
        if len(buffer) < PREFIX or len(buffer) < PREFIX + int.from_bytes(buffer[1:PREFIX]):
            return self.held
        return max(0, self.held - len(buffer))


def gunzip(data: bytes, most: int) -> bytes:
    """What ``data`` is uncompressed, if that is no more than ``most`` bytes.

    Raises:
        GRPCError: It is more, or ``data`` is not gzip.
    """
    reader = zlib.decompressobj(_GZIP)
    try:
        plain = reader.decompress(data, most + 1)
    except zlib.error:
        raise GRPCError(Status.INTERNAL, "a message that is said to be gzip, and is not") from None
    if len(plain) > most:
        raise GRPCError(
            Status.RESOURCE_EXHAUSTED, f"a message of more than the {most} bytes that are allowed, uncompressed"
        )
    if not reader.eof or reader.unused_data:
        raise GRPCError(Status.INTERNAL, "a message that is said to be gzip, and is cut short, or more than that")
    return plain


def framed(message: bytes, *, gzip: bool = False) -> bytes:
    """A message as it goes into DATA frames."""
    if gzip:
        writer = zlib.compressobj(wbits=_GZIP)
        message = writer.compress(message) + writer.flush()
    return (b"\1" if gzip else b"\0") + len(message).to_bytes(4) + message
