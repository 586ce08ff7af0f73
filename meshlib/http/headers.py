"""What travels with a request, as headers, both ways.

=====================  ==============================================================================================
deadline               ``Finagle-Ctx-com.twitter.finagle.Deadline: <sent ns> <due ns>``; what counts is the difference,
                       so that clocks need not agree
trace                  ``traceparent`` and ``tracestate`` (W3C); B3, in one header or several, is read as well
attempt                ``Finagle-Ctx-com.twitter.finagle.Retries``
local Dtab             ``Dtab-Local: /s/users => /s/users-v2; …``
baggage                ``baggage`` (W3C), unchanged
client id, priority    ``Meshlib-Client-Id``, ``Meshlib-Priority`` (ours; the default priority is not written)
=====================  ==============================================================================================

A value that cannot be read, or is longer than `LONGEST`, is ignored and counted: a header never fails a request.
Sources: finagle-base-http (the Finagle-Ctx, Dtab-Local and X-B3 headers), openzipkin/b3-propagation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from ..core.clock import Clock
from ..core.context import Context, TraceId
from ..core.traceparent import write_traceparent
from ..names.carried import LONGEST, MOST_TRIES, TextReader, carried

__all__ = ["LONGEST", "HeaderReader", "encode_headers"]

FURTHEST: Final = (1 << 63) - 1

DEADLINE: Final = b"finagle-ctx-com.twitter.finagle.deadline"
RETRIES: Final = b"finagle-ctx-com.twitter.finagle.retries"
DTAB: Final = b"dtab-local"
CLIENT_ID: Final = b"meshlib-client-id"
PRIORITY: Final = b"meshlib-priority"
_B3: Final = {b"x-b3-traceid": 0, b"x-b3-spanid": 1, b"x-b3-sampled": 2, b"x-b3-parentspanid": 3, b"x-b3-flags": 4}
_OURS: Final = frozenset(
    (DEADLINE, RETRIES, DTAB, CLIENT_ID, PRIORITY, b"traceparent", b"tracestate", b"baggage", b"b3")
)
_TWO_NUMBERS: Final = re.compile(rb"([0-9]{1,19}) ([0-9]{1,19})")
_HEX: Final = re.compile(rb"[0-9a-fA-F]{16}|[0-9a-fA-F]{32}")


def encode_headers(context: Context, clock: Clock) -> list[tuple[bytes, bytes]]:
    """The headers of a request made under ``context``. What does not fit into a header stays here, but for the Dtab.

    Raises:
        InvalidArgument: The local Dtab is too long, or not printable.
    """
    headers: list[tuple[bytes, bytes]] = []
    if context.trace is not None:
        headers.append((b"traceparent", write_traceparent(context.trace)))
    if context.deadline is not None:
        sent = clock.epoch_ns()
        left = int(max(0.0, min((context.deadline - clock.now()) * 1e9, FURTHEST - sent)))
        headers.append((DEADLINE, b"%d %d" % (sent, sent + left)))
    if context.attempt:
        headers.append((RETRIES, b"%d" % min(context.attempt, MOST_TRIES)))
    headers += [(name.encode(), value.encode("ascii")) for name, value in carried(context)]
    return headers


class HeaderReader(TextReader):
    """Reads the headers of requests. For its parameters see `meshlib.names.carried.TextReader`."""

    __slots__ = ()

    def read(self, headers: Iterable[tuple[bytes, bytes]]) -> Context:
        """The context in which the request is to be handled. Names are lower case, as ASGI has them."""
        found: dict[bytes, bytes] = {}
        b3: list[bytes] = []
        for name, value in headers:
            if name not in _OURS:
                if name not in _B3:
                    continue
                b3 = b3 or [b""] * 5
            if len(value) > LONGEST or (name in found and name != b"baggage"):
                self._undecodable.value += 1  # said twice, it says nothing
            elif name in _B3:
                b3[_B3[name]] = value
            elif name in found:
                found[name] += b"," + value
            else:
                found[name] = value
        if not found and not b3:
            return Context()
        context = Context(
            deadline=self._deadline(found.get(DEADLINE)),
            trace=self._trace(found, b3),
            dtab=self._dtab(found.get(DTAB)),
            attempt=self._attempt(found.get(RETRIES)),
            client_id=self._text(found.get(CLIENT_ID)),
            baggage=self._text(found.get(b"baggage")),
            priority=self._priority(found.get(PRIORITY)),
        )
        return self._believed(context)

    def _deadline(self, value: bytes | None) -> float | None:
        if value is None:
            return None
        match = _TWO_NUMBERS.fullmatch(value.strip())
        if match is None:
            self._undecodable.value += 1
            return None
        return self._clock.now() + max(0, int(match[2]) - int(match[1])) / 1e9

    def _trace(self, found: dict[bytes, bytes], b3: list[bytes]) -> TraceId | None:
        for reading in (self._w3c, self._b3_single):
            try:
                trace = reading(found)
            except ValueError:
                self._undecodable.value += 1
                continue
            if trace is not None:
                return trace
        try:
            return _read_b3(*b3) if b3 and (b3[0] or b3[1]) else None
        except ValueError:
            self._undecodable.value += 1
            return None

    def _b3_single(self, found: dict[bytes, bytes]) -> TraceId | None:
        value = found.get(b"b3")
        if value is None or value in (b"0", b"1", b"d"):
            return None
        parts = value.split(b"-")
        if not 2 <= len(parts) <= 4:
            raise ValueError("a malformed b3")
        sampled = parts[2] if len(parts) > 2 else b""
        flags = b"1" if sampled == b"d" else b""
        return _read_b3(parts[0], parts[1], b"" if flags else sampled, parts[3] if len(parts) > 3 else b"", flags)


def _read_b3(trace: bytes, span: bytes, sampled: bytes, parent: bytes, flags: bytes) -> TraceId:
    if not _HEX.fullmatch(trace) or not _HEX.fullmatch(span) or len(span) != 16:
        raise ValueError("malformed B3 ids")
    if sampled not in (b"", b"0", b"1", b"true", b"false") or (
        parent and (len(parent) != 16 or not _HEX.fullmatch(parent))
    ):
        raise ValueError("a malformed B3 decision or parent")
    ids = int(trace, 16), int(span, 16)
    if not all(ids):
        raise ValueError("B3 ids of 0")
    debug = flags == b"1"
    decided = True if debug else None if not sampled else sampled in (b"1", b"true")
    return TraceId(*ids, int(parent, 16) if parent else None, decided, debug)
