"""What travels with a request as text: the parts that HTTP's headers and gRPC's metadata have in common.

A value that cannot be read, or is longer than `LONGEST`, is ignored and counted: what only travels along never fails a
request. A local Dtab is more than that: without it the request would go elsewhere, so one that cannot be sent is an
error. Names are the business of those who use this, see ``http/headers.py`` and ``grpc/metadata.py``.
"""

from __future__ import annotations

import re
from typing import Final

from ..core.clock import Clock
from ..core.context import Context, TraceId
from ..core.env import Counter, NoMetrics
from ..core.errors import ConfigurationError, InvalidArgument
from ..core.priority import Priority
from ..core.traceparent import read_traceparent
from .dtab import Dtab

__all__ = ["LONGEST", "MOST_TRIES", "TextReader", "carried"]

LONGEST: Final = 8192
"""Bytes of a value (W3C baggage 3.3.2 asks for as many)."""
MOST_TRIES: Final = (1 << 31) - 1
_PRINTABLE: Final = re.compile(r"[\x20-\x7e]*")
_PRIORITIES: Final = {priority.name.lower().encode(): priority for priority in Priority}


_DISPENSABLE: Final = ("baggage", "tracestate", "meshlib-client-id")
"""What stays here when there is too much of all, the first first."""


def carried(context: Context, most: int | None = None) -> list[tuple[str, str]]:
    """The pairs that have the same names everywhere. What does not fit into a header stays here, but for the Dtab.

    Args:
        context: Of the request.
        most: Bytes of names and values in all; ``None`` for as many as there are.

    Raises:
        InvalidArgument: The local Dtab is too long, or not printable.
    """
    pairs: list[tuple[str, str]] = []
    if context.dtab:
        _add_dtab(pairs, context.dtab, LONGEST if most is None else min(most, LONGEST))
    if context.trace is not None:
        _add(pairs, "tracestate", context.trace.state)
    _add(pairs, "baggage", context.baggage)
    _add(pairs, "meshlib-client-id", context.client_id)
    if context.priority is not Priority.DEFAULT:
        pairs.append(("meshlib-priority", context.priority.name.lower()))
    if most is not None:
        size = sum(len(name) + len(value) for name, value in pairs)
        for dispensable in _DISPENSABLE:
            if size <= most:
                break
            size -= sum(len(name) + len(value) for name, value in pairs if name == dispensable)
            pairs = [pair for pair in pairs if pair[0] != dispensable]
    return pairs


def _add_dtab(pairs: list[tuple[str, str]], dtab: tuple[tuple[str, str], ...], most: int) -> None:
    text = "; ".join(f"{prefix} => {tree}" for prefix, tree in dtab)
    if len(text) > most:
        raise InvalidArgument(
            f"the local Dtab has {len(text)} bytes, and no more than {most} can travel with a request; "
            "without it the request would go elsewhere"
        )
    if not _PRINTABLE.fullmatch(text):
        raise InvalidArgument("the local Dtab has characters that no header can carry")
    pairs.append(("dtab-local", text))


def _add(pairs: list[tuple[str, str]], name: str, value: str) -> None:
    """Only what is printable: a line break would be a header of somebody else's choice."""
    if value and len(value) <= LONGEST and _PRINTABLE.fullmatch(value):
        pairs.append((name, value))


class TextReader:
    """Reads values.

    Args:
        clock: What a remaining time is added to.
        trust: Is the caller believed? Without it, all is dropped that `meshlib.core.context.Context.distrusted` drops.
        undecodable: Counts values that could not be read, and were ignored.
    """

    __slots__ = ("_clock", "_trust", "_undecodable")

    def __init__(self, clock: Clock, *, trust: bool = True, undecodable: Counter | None = None) -> None:
        self._clock = clock
        self._trust = trust
        self._undecodable = undecodable or NoMetrics().counter("")

    def _attempt(self, value: bytes | None) -> int:
        if value is None:
            return 0
        if not (0 < len(value) <= 10 and value.isdigit()):
            self._undecodable.value += 1
            return 0
        return min(int(value), MOST_TRIES)

    def _text(self, value: bytes | None) -> str:
        if not value:
            return ""
        text = value.decode("latin-1")
        if not _PRINTABLE.fullmatch(text):
            self._undecodable.value += 1
            return ""
        return text

    def _believed(self, context: Context) -> Context:
        return context if self._trust else context.distrusted()

    def _priority(self, value: bytes | None) -> Priority:
        if value is None:
            return Priority.DEFAULT
        if value not in _PRIORITIES:
            self._undecodable.value += 1
        return _PRIORITIES.get(value, Priority.DEFAULT)

    def _dtab(self, value: bytes | None) -> tuple[tuple[str, str], ...]:
        if not value or not self._trust:
            return ()
        try:
            return Dtab(value.decode("ascii")).pairs()
        except (UnicodeDecodeError, ConfigurationError, RecursionError):
            self._undecodable.value += 1
            return ()

    def _w3c(self, found: dict[bytes, bytes]) -> TraceId | None:
        """W3C's trace.

        Raises:
            ValueError: It is malformed.
        """
        value = found.get(b"traceparent")
        if value is None:
            return None
        trace = read_traceparent(value)
        state = self._text(found.get(b"tracestate"))
        return TraceId(trace.trace, trace.span, None, trace.sampled, False, state) if state else trace
