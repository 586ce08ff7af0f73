"""W3C Trace Context: the one header that every protocol here carries, as bytes."""

from __future__ import annotations

import re

from .context import TraceId

__all__ = ["read_traceparent", "write_traceparent"]

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def write_traceparent(trace: TraceId) -> bytes:
    """The header's value: version 00."""
    return b"00-%032x-%016x-%02x" % (trace.trace, trace.span, bool(trace.sampled or trace.debug))


def read_traceparent(value: bytes) -> TraceId:
    """W3C ``traceparent`` (Trace Context, level 1); of later versions, the part that all share.

    Raises:
        ValueError: It is malformed.
    """
    match = _PARENT.match(value)
    if match is None or match[1] == b"ff" or (match[1] == b"00" and len(value) != 55):
        raise ValueError("a malformed traceparent")
    trace, span = int(match[2], 16), int(match[3], 16)
    if not (trace and span):
        raise ValueError("a traceparent without ids")
    return TraceId(trace, span, None, bool(int(match[4], 16) & 1))
