"""What travels with a request, as gRPC metadata, both ways.

=====================  ==========================================================================================
deadline               ``grpc-timeout: 250m``: what is left of it, so that clocks need not agree
trace                  ``traceparent`` and ``tracestate`` (W3C); ``grpc-trace-bin`` (OpenCensus) is read as well
attempt                ``grpc-previous-rpc-attempts`` (gRFC A6)
local Dtab             ``dtab-local: /s/users => /s/users-v2; …``
baggage                ``baggage`` (W3C), unchanged
client id, priority    ``meshlib-client-id``, ``meshlib-priority`` (ours; the default priority is not written)
=====================  ==========================================================================================

A value that cannot be read, or is too long, is ignored and counted: metadata never fails a request. Nor does what is
sent: of more than `MOST_CARRIED` bytes the baggage stays here, then the trace's state, then the client id. A local Dtab
alone is refused when it is too long, as the request would go elsewhere without it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from grpclib.metadata import encode_bin_value, encode_metadata
from multidict import MultiDict

from ..core.context import Context, TraceId
from ..core.priority import Priority
from ..core.traceparent import write_traceparent
from ..names.carried import LONGEST, MOST_TRIES, TextReader, carried

__all__ = [
    "ContextReader", "checked_metadata", "decode_metadata", "decode_timeout", "encode_context", "encode_timeout",
    "sent_metadata",
]  # fmt: skip

TIMEOUT: Final = b"grpc-timeout"
ATTEMPTS: Final = b"grpc-previous-rpc-attempts"
TRACE_BIN: Final = b"grpc-trace-bin"
_KNOWN: Final = frozenset(
    (
        TIMEOUT, ATTEMPTS, TRACE_BIN, b"traceparent", b"tracestate", b"baggage",
        b"dtab-local", b"meshlib-client-id", b"meshlib-priority",
    )
)  # fmt: skip
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
MOST: Final = 99_999_999
"""Eight digits: the protocol allows no more."""
FINE: Final = 10.0
"""Seconds below which a timeout is written in microseconds; else in milliseconds, as long as eight digits hold them."""
MOST_CARRIED: Final = 4096
"""Bytes of Dtab, baggage, trace state, client id and priority, in all. gRPC's core begins to refuse requests with more
than 8 KiB of metadata (``grpc.max_metadata_size``; all above 16 KiB), and the user's own need their half."""
_SPECIAL: Final = frozenset(("te", "content-type", "user-agent"))
_NAME: Final = re.compile(r"[0-9a-z_.-]+")
_VALUE: Final = re.compile(r"[ -~]*")


def encode_timeout(seconds: float) -> str:
    """``grpc-timeout`` for what is left: the finest unit that fits, never more than there is, and at least 1 ns.

    grpclib rounds what is above 10 s down to whole seconds, and may write more digits than the protocol allows.
    """
    if seconds < 1e-6:
        return f"{max(1, int(seconds * 1e9))}n"
    if seconds < FINE:
        return f"{int(seconds * 1e6)}u"
    if seconds < MOST / 1e3:
        return f"{int(seconds * 1e3)}m"
    if seconds < MOST:
        return f"{int(seconds)}S"
    return f"{min(int(min(seconds, 1e15) / 3600), MOST)}H"


def decode_timeout(value: bytes) -> float:
    """The seconds that a ``grpc-timeout`` says.

    Raises:
        ValueError: It is malformed.
    """
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise ValueError("a malformed grpc-timeout")
    return int(match[1]) * _UNITS[match[2]]


def encode_context(context: Context, *, propagate: bool = True) -> list[tuple[str, str]]:
    """The metadata of a request made under ``context``, but for its deadline.

    Args:
        context: It.
        propagate: Send more than the protocol itself has a name for; not to servers that are none of yours.

    Raises:
        InvalidArgument: The local Dtab is too long.
    """
    pairs: list[tuple[str, str]] = []
    if context.attempt:
        pairs.append(("grpc-previous-rpc-attempts", str(min(context.attempt, MOST_TRIES))))
    if propagate:
        if context.trace is not None:
            pairs.append(("traceparent", write_traceparent(context.trace).decode()))
            if (
                context.trace.state
                or context.dtab
                or context.baggage
                or context.client_id
                or (context.priority is not Priority.DEFAULT)
            ):
                pairs += carried(context, MOST_CARRIED)
        else:
            pairs += carried(context, MOST_CARRIED)
    return pairs


def sent_metadata(metadata: Any) -> list[tuple[str, str]]:
    """What users send along, as it goes onto the wire: without spaces at its ends, which HTTP/2 allows to no value.

    Args:
        metadata: A mapping, or pairs.

    Raises:
        ValueError: A name or value may not be sent.
        TypeError: A value is of the wrong type.
    """
    return [(name, value.strip(" ")) for name, value in encode_metadata(metadata)]


def checked_metadata(metadata: Any) -> list[tuple[str, str]]:
    """What is on a request when it is sent, which a filter may have set: names and values as they go onto the wire.

    Args:
        metadata: A mapping, or pairs.

    Raises:
        ValueError: A name or value may not be sent.
    """
    pairs: list[tuple[str, str]] = []
    for name, value in metadata.items() if isinstance(metadata, Mapping) else metadata:
        if not isinstance(name, str) or name in _SPECIAL or name.startswith("grpc-") or not _NAME.fullmatch(name):
            raise ValueError(f"no name of metadata: {name!r}")
        if isinstance(value, bytes) and name.endswith("-bin"):
            value = encode_bin_value(value).decode("ascii")
        elif not isinstance(value, str):
            raise ValueError(f"the metadata {name!r} is {type(value).__name__}: give a text, or bytes for -bin")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"the metadata {name!r} is not ASCII; a name that ends in -bin takes bytes: {value!r}")
        if name.endswith("-bin"):
            decode_binary(value)
        pairs.append((name, value.strip(" ")))
    return pairs


def decode_metadata(headers: Iterable[tuple[str, str]]) -> Any:
    """The metadata in headers as they came, as grpclib gives it; a binary value that is none is left out."""
    metadata: MultiDict[str | bytes] = MultiDict()
    for name, value in headers:
        if not name or name[0] == ":" or name.startswith("grpc-") or name in _SPECIAL:
            continue
        if name.endswith("-bin"):
            for part in value.split(","):  # several values may come as one
                try:
                    metadata.add(name, decode_binary(part))
                except ValueError:
                    continue
        else:
            metadata.add(name, value)
    return metadata


def decode_binary(value: str) -> bytes:
    """The bytes of a ``-bin`` value, with or without padding.

    Raises:
        ValueError: It is no base64.
    """
    text = value.strip().rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"a malformed binary value: {error}") from error


class ContextReader(TextReader):
    """Reads the metadata of requests. For its parameters see `meshlib.names.carried.TextReader`."""

    __slots__ = ()

    def read(self, headers: Iterable[tuple[str, str] | tuple[bytes, bytes]]) -> Context:
        """The context in which the request is to be handled. Takes headers as they came, as text or as bytes."""
        found: dict[bytes, bytes] = {}
        for one, other in headers:
            name = one.encode("latin-1", "replace") if isinstance(one, str) else one
            if name not in _KNOWN:
                continue
            value = other.encode("latin-1", "replace") if isinstance(other, str) else other
            if len(value) > LONGEST or (name in found and name != b"baggage"):
                self._undecodable.value += 1  # said twice, it says nothing
            elif name in found:
                found[name] += b"," + value
            else:
                found[name] = value
        if not found:
            return Context()
        context = Context(
            deadline=self._deadline(found.get(TIMEOUT)),
            trace=self._trace(found),
            dtab=self._dtab(found.get(b"dtab-local")),
            attempt=self._attempt(found.get(ATTEMPTS)),
            client_id=self._text(found.get(b"meshlib-client-id")),
            baggage=self._text(found.get(b"baggage")),
            priority=self._priority(found.get(b"meshlib-priority")),
        )
        return self._believed(context)

    def _deadline(self, value: bytes | None) -> float | None:
        if value is None:
            return None
        try:
            return self._clock.now() + decode_timeout(value)
        except ValueError:
            self._undecodable.value += 1
            return None

    def _trace(self, found: dict[bytes, bytes]) -> TraceId | None:
        for reading in (self._w3c, _open_census):
            try:
                trace = reading(found)
            except ValueError:
                self._undecodable.value += 1
                continue
            if trace is not None:
                return trace
        return None


def _open_census(found: dict[bytes, bytes]) -> TraceId | None:
    """``grpc-trace-bin``: a version of 0, then fields with a number in front: 16 bytes, 8 bytes, and a byte of flags.

    Source: census-instrumentation/opencensus-specs, encodings/BinaryEncoding.md.
    """
    value = found.get(TRACE_BIN)
    if value is None:
        return None
    data = decode_binary(value.decode("latin-1"))
    if len(data) < 27 or data[0] != 0 or data[1] != 0 or data[18] != 1 or (len(data) > 27 and data[27] != 2):
        raise ValueError("a malformed grpc-trace-bin")
    trace, span = int.from_bytes(data[2:18]), int.from_bytes(data[19:27])
    if not (trace and span):
        raise ValueError("a grpc-trace-bin without ids")
    return TraceId(trace, span, None, bool(data[28] & 1) if len(data) > 28 else False)
