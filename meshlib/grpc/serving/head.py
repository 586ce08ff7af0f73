"""The head of a gRPC request: header fields as a hostile peer may have sent them, read into what a call needs.

===========================  ======================  =============================================================
what is wrong                HTTP status             gRPC status
===========================  ======================  =============================================================
pseudo-header fields          —                      none: the stream is reset with PROTOCOL_ERROR (RFC 9113 8.1.1)
``:method`` not POST         405
``content-type`` not gRPC    415                     UNKNOWN
no ``te: trailers``          400                     UNKNOWN: a proxy in between would lose the status
``grpc-timeout``             200                     INTERNAL
metadata                     200                     INTERNAL (base64), RESOURCE_EXHAUSTED (size)
``grpc-encoding``            200                     UNIMPLEMENTED, with ``grpc-accept-encoding``
===========================  ======================  =============================================================

Source: grpc/doc/PROTOCOL-HTTP2.md, grpc/doc/compression.md. Pure: bytes in, values out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, cast

from grpclib.const import Status
from grpclib.metadata import _Metadata
from multidict import MultiDict

from ...core.errors import shown
from ..metadata import decode_binary, decode_timeout

__all__ = ["ACCEPTED", "Head", "Malformed", "Refused", "read_head"]

Headers = Iterable[tuple[bytes, bytes]]

ACCEPTED: Final = "identity,gzip"
"""The encodings of messages that can be read."""
_ENCODINGS: Final = {b"": "", b"identity": "", b"gzip": "gzip"}
_NAME: Final = re.compile(rb"[0-9a-z_.\-]+")
_KNOWN: Final = frozenset(
    (
        b":method",
        b":path",
        b":scheme",
        b":authority",
        b"content-type",
        b"te",
        b"user-agent",
        b"grpc-timeout",
        b"grpc-encoding",
        b"grpc-accept-encoding",
    )
)
_PLAIN: Final = b"application/grpc"
_PROTO: Final = b"application/grpc+proto"


class Malformed(Exception):
    """Not a request at all: the stream is reset."""


class Refused(Exception):
    """A request that cannot be handled.

    Attributes:
        http: The HTTP status to answer with.
        status: The gRPC status, if one goes with it.
        text: Why, for the client.
    """

    def __init__(self, http: int, status: Status | None, text: str) -> None:
        super().__init__(text)
        self.http, self.status, self.text = http, status, text


class Head:
    """What a request's header fields say.

    Attributes:
        raw_path: ``/pkg.Service/Method``, as bytes.
        content_type: As it was sent.
        subtype: The encoding of the messages that it names: ``proto`` by default.
        encoding: ``gzip`` if compressed messages are.
        accepts_gzip: May the reply be?
        user_agent: The client's.
        metadata: The user's own fields; binary ones decoded.
    """

    __slots__ = ("accepts_gzip", "content_type", "encoding", "metadata", "raw_path", "subtype", "user_agent")

    def __init__(self) -> None:
        self.raw_path = b""
        self.content_type = ""
        self.subtype = ""
        self.encoding = ""
        self.accepts_gzip = False
        self.user_agent: str | None = None
        self.metadata: _Metadata = cast(_Metadata, MultiDict())


def read_head(headers: Headers, most: int) -> Head:
    """Read the fields of a request.

    Args:
        headers: As bytes, in their order.
        most: Bytes that all fields may have, each counted with 32 more (RFC 9113 6.5.2).

    Raises:
        Malformed: They are no request.
        Refused: It cannot be handled.
    """
    known: dict[bytes, bytes] = {}
    others: list[tuple[bytes, bytes]] = []
    size = 0
    for name, value in headers:
        size += len(name) + len(value) + 32
        if name not in _KNOWN:
            if name[:1] == b":":
                raise Malformed(f"the pseudo-header field {shown(name.decode('latin-1'))}")
            others.append((name, value))
        elif name in known:
            if name[:1] == b":":
                raise Malformed(f"two of {name.decode('latin-1')}")
            if name == b"grpc-timeout":
                raise Refused(200, Status.INTERNAL, "two grpc-timeout fields")
            known[name] += b"," + value
        else:
            known[name] = value
    if b":method" not in known or b":path" not in known:
        raise Malformed("a request without :method or :path")
    if size > most:
        raise Refused(200, Status.RESOURCE_EXHAUSTED, f"the metadata takes {size} bytes, and {most} are allowed")
    return _checked(known, others)


def _checked(known: dict[bytes, bytes], others: list[tuple[bytes, bytes]]) -> Head:
    if known[b":method"] != b"POST":
        raise Refused(405, None, "gRPC requests are POST")
    content_type = known.get(b"content-type")
    if content_type is None:
        raise Refused(415, Status.UNKNOWN, "Missing content-type header")
    subtype = _subtype(content_type)
    if subtype is None:
        raise Refused(415, Status.UNKNOWN, f"Unacceptable content-type header: {_text(content_type)}")
    if known.get(b"te") != b"trailers":
        raise Refused(400, Status.UNKNOWN, 'Required "te: trailers" header is missing')
    head = Head()
    head.subtype = subtype
    head.raw_path = known[b":path"]
    head.content_type = content_type.decode("latin-1")
    agent = known.get(b"user-agent")
    head.user_agent = None if agent is None else agent.decode("latin-1")
    timeout = known.get(b"grpc-timeout")
    if timeout is not None:
        try:
            decode_timeout(timeout)  # its value is read with the rest of the context
        except ValueError:
            raise Refused(200, Status.INTERNAL, f"Invalid grpc-timeout header: {_text(timeout)}") from None
    encoding = _ENCODINGS.get(known.get(b"grpc-encoding", b""))
    if encoding is None:
        what = _text(known[b"grpc-encoding"])
        raise Refused(200, Status.UNIMPLEMENTED, f"messages of the encoding {what} cannot be read")
    head.encoding = encoding
    head.accepts_gzip = b"gzip" in known.get(b"grpc-accept-encoding", b"")
    if others:
        _read_metadata(others, head.metadata)
    return head


def _subtype(value: bytes) -> str | None:
    if value in (_PLAIN, _PROTO):
        return "proto"
    base, plus, subtype = value.partition(b";")[0].strip().partition(b"+")
    if base != _PLAIN:
        return None
    return subtype.decode("latin-1") if plus else "proto"


def _read_metadata(fields: list[tuple[bytes, bytes]], metadata: _Metadata) -> None:
    for name, value in fields:
        if name[:5] == b"grpc-":
            continue
        if not _NAME.fullmatch(name):
            raise Malformed(f"the field {shown(name.decode('latin-1'))}")
        key = name.decode("ascii")
        if name[-4:] == b"-bin":
            for part in value.split(b","):  # as HTTP joins fields of one name
                try:
                    metadata.add(key, decode_binary(part.decode("latin-1")))
                except ValueError:
                    raise Refused(200, Status.INTERNAL, f"the metadata {shown(key)} is no base64") from None
        else:
            metadata.add(key, value.decode("latin-1"))


def _text(value: bytes) -> str:
    return shown(value.decode("latin-1"), 60)
