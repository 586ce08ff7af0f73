"""The headers of requests: what a channel says of all of them, what a method adds, and what is of one call alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ...core.clock import Clock
from ...core.context import Context
from ...core.errors import InvalidArgument
from ..h2 import HeaderBlocks, literal
from ..metadata import checked_metadata, encode_context, encode_timeout
from .call import Request

__all__ = ["CONNECTION_WINDOW", "Heads", "Options", "connection_window"]

CONNECTION_WINDOW: Final = 16 * 1024 * 1024
"""Bytes, unless the user says otherwise. It is given back as data arrives (`Incoming`), so no stream waits in it for
another's reader; it only has to cover what is on its way: 1 Gbit/s over 100 ms are 12.5 MB."""
_FIELD: Final = 32
"""Bytes of a header field besides its name and value, as peers count them (RFC 9113 6.5.2)."""


def connection_window(config: Any) -> int:
    """The window of whole connections, for a `grpclib.config.Configuration` of the user's, or ``None``."""
    return CONNECTION_WINDOW if config is None else int(config.__for_client__().http2_connection_window_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What all connections of a channel have in common.

    Attributes:
        scheme: ``http`` or ``https``.
        connection_window: Bytes that a server may have on its way to us.
        stream_window: The same, on one stream.
        max_headers: Bytes of metadata at once.
        compression: ``gzip``, or nothing.
        propagate: Send more along than the deadline and the number of tries.
        user_agent: Who we are.
    """

    scheme: str
    connection_window: int
    stream_window: int
    max_headers: int
    compression: str
    propagate: bool
    user_agent: str


class Heads:
    """Makes the header blocks of one connection.

    Args:
        options: The channel's.
        authority: What to call the server.
        clock: What deadlines are measured on.
        encoder: The connection's.
        told: The server's settings, as they are.
    """

    __slots__ = ("_authority", "_blocks", "_clock", "_fixed", "_options", "_told")

    def __init__(self, options: Options, authority: str, clock: Clock, encoder: Any, told: Any) -> None:
        self._options, self._authority, self._clock = options, authority, clock
        self._blocks = HeaderBlocks(encoder)
        self._told = told
        self._fixed = sum(_FIELD + len(name) + len(value) for name, value in self._head("", ""))

    def block(self, request: Request, context: Context) -> bytes:
        """The block of a request made under ``context``. Must be sent, and in order.

        Raises:
            InvalidArgument: It cannot be sent, and nothing has been changed.
        """
        method = request.method
        more = encode_context(context, propagate=self._options.propagate)
        if context.deadline is not None:
            more.append(("grpc-timeout", encode_timeout(max(0.0, context.deadline - self._clock.now()))))
        if request.metadata:
            more = self._with_users(more, request)
        literals, size = b"", self._fixed + len(method.path) + len(method.content_type)
        for name, value in more:
            size += _FIELD + len(name) + len(value)
            literals += literal(name.encode("ascii"), value.encode("ascii"))
        most = self._told.max_header_list_size
        if most is not None and size > most:
            raise InvalidArgument(
                f"the metadata of {method.path} have {size} bytes, and the server takes no more than {most}"
            )
        # Last of all: it may change the table that both sides keep, and what has changed it must be sent.
        return self._blocks.block(method, self._head(method.path, method.content_type)) + literals

    def _with_users(self, ours: list[tuple[str, str]], request: Request) -> list[tuple[str, str]]:
        """The user's own metadata beside ours, and in the place of those of ours that have the same name."""
        try:
            users = checked_metadata(request.metadata)
        except ValueError as error:
            raise InvalidArgument(f"{request.method.path}: {error}") from error
        names = {name for name, _ in users}
        if "traceparent" in names:
            names.add("tracestate")  # it belongs to the other
        return [pair for pair in ours if pair[0] not in names] + users

    def _head(self, path: str, content_type: str) -> list[tuple[str, str]]:
        options = self._options
        head = [
            (":method", "POST"),
            (":scheme", options.scheme),
            (":path", path),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", content_type),
            ("user-agent", options.user_agent),
            ("grpc-accept-encoding", "identity,gzip"),
        ]
        if options.compression:
            head.append(("grpc-encoding", options.compression))
        return head

    def reset(self) -> None:
        """The server has changed the size of its table of headers."""
        self._blocks.reset()
