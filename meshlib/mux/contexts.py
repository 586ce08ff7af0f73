"""The contexts that travel with a request: their ids, their bytes, and the `Context` they stand for.

Trace ids go out twice: as Finagle's TraceContext, and as W3C ``traceparent``. Coming in, Finagle's decides which span
the caller is: a Finagle in between renews its own context and passes on what it does not know, so ``traceparent`` may
be a hop behind. The W3C form then adds what the other cannot say: the ``tracestate``, and the high 64 bits of the id.

A deadline leaves as (now, now + what is left) on this host's wall clock and is read as a difference, less what the
request has waited on its way (`Transit`), so that clocks need not agree (Finagle compares wall clocks). A known context
that cannot be decoded is ignored and counted; contexts that nobody here knows are kept and sent on unchanged. Layouts:
finagle-core, context/Deadline.scala, tracing/TraceId.scala, context/Requeues.scala. A priority other than the default
one is a word of ours, which Finagle passes on; a word that is not known here stands for the default, so that there can
be others one day.
"""

from __future__ import annotations

import struct
from typing import Final

from ..core.clock import Clock
from ..core.context import Context, TraceId
from ..core.env import Counter, NoMetrics
from ..core.priority import Priority
from ..core.traceparent import read_traceparent
from .codec import DEFAULT_LIMITS, encode_contexts
from .messages import Contexts, Dtab
from .transit import Transit

__all__ = ["ContextReader", "encode_context"]

DEADLINE: Final = b"com.twitter.finagle.Deadline"
TRACE: Final = b"com.twitter.finagle.tracing.TraceContext"
RETRIES: Final = b"com.twitter.finagle.Retries"
CLIENT_ID: Final = b"com.twitter.finagle.thrift.ClientIdContext"
TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"
BAGGAGE: Final = b"baggage"
PRIORITY: Final = b"meshlib.Priority"

LOW: Final = (1 << 64) - 1
FURTHEST: Final = (1 << 63) - 1
MOST_TRIES: Final = (1 << 31) - 1
DEBUG, SAMPLING_KNOWN, SAMPLED = 1, 2, 4


def _prefix(key: bytes, size: int) -> bytes:
    return struct.pack(">H", len(key)) + key + struct.pack(">H", size)


# What never changes of the three contexts that nearly every request carries.
_DEADLINE: Final = _prefix(DEADLINE, 16)
_TRACE: Final = _prefix(TRACE, 40)
_TRACEPARENT: Final = _prefix(TRACEPARENT, 55)
_pack_deadline: Final = struct.Struct(">qq").pack
_pack_trace: Final = struct.Struct(">QQQQQ").pack
_pack_count: Final = struct.Struct(">h").pack
_KNOWN: Final = frozenset((DEADLINE, TRACE, RETRIES, CLIENT_ID, TRACEPARENT, TRACESTATE, BAGGAGE, PRIORITY))
_FOLDED: Final = {key.lower(): key for key in _KNOWN}
"""Ids are compared without regard to case, as Finagle does; everybody writes them in the same case all the same."""
_WORDS: Final = {priority: priority.name.lower().encode() for priority in Priority}
_PRIORITIES: Final = {word: priority for priority, word in _WORDS.items()}


def encode_context(
    context: Context, clock: Clock, extra: Contexts = (), limit: int = DEFAULT_LIMITS.max_contexts
) -> bytes:
    """The context section for a request made under ``context``; ``extra`` pairs go at its end.

    What came with the request that is being served, and only travels through, must not make ours too large for the
    peer: those pairs go in as long as they fit into ``limit`` bytes, and the rest stay here.
    """
    parts = [b""]
    n = 0
    if context.deadline is not None:
        n = 1
        epoch = clock.epoch_ns()
        # A deadline may lie further off than 8 bytes of nanoseconds can say, or be infinite.
        left = int(max(0.0, min((context.deadline - clock.now()) * 1e9, FURTHEST - epoch)))
        parts.append(_DEADLINE + _pack_deadline(epoch, epoch + left))
    trace = context.trace
    if trace is not None:
        n += 2
        low, span = trace.trace & LOW, trace.span
        flags = (trace.debug and DEBUG) | (0 if trace.sampled is None else SAMPLING_KNOWN | (trace.sampled and SAMPLED))
        parent = span if trace.parent is None else trace.parent
        parts.append(_TRACE + _pack_trace(span, parent, low, flags, trace.trace >> 64))
        parts.append(_TRACEPARENT + b"00-%032x-%016x-%02x" % (trace.trace, span, bool(trace.sampled or trace.debug)))
    ours: list[tuple[bytes, bytes]] = []
    if context.attempt:
        ours.append((RETRIES, struct.pack(">i", min(context.attempt, MOST_TRIES))))
    if context.client_id:
        ours.append((CLIENT_ID, context.client_id.encode()))
    if context.priority is not Priority.DEFAULT:
        ours.append((PRIORITY, _WORDS[context.priority]))
    through: list[tuple[bytes, bytes]] = []
    if trace is not None and trace.state:
        through.append((TRACESTATE, trace.state.encode()))
    if context.baggage:
        through.append((BAGGAGE, context.baggage.encode()))
    through += context.opaque
    if through:
        left = limit - sum(map(len, parts)) - sum(4 + len(k) + len(v) for k, v in (*ours, *extra))
        for pair in through:
            left -= 4 + len(pair[0]) + len(pair[1])
            if left >= 0:
                ours.append(pair)
            else:
                left += 4 + len(pair[0]) + len(pair[1])
    ours += extra
    if ours:
        n += len(ours)
        parts.append(encode_contexts(ours)[2:])
    parts[0] = _pack_count(n)
    return b"".join(parts)


class ContextReader:
    """Reads the contexts of requests.

    Args:
        clock: What a remaining time is added to.
        trust: Is the caller believed? Without it, all is dropped that `meshlib.core.context.Context.distrusted` drops.
        undecodable: Counts known contexts that could not be decoded, and were ignored.

    Attributes:
        transit: How long requests wait before they are read.
    """

    __slots__ = ("_clock", "_trust", "_undecodable", "transit")

    def __init__(self, clock: Clock, *, trust: bool = True, undecodable: Counter | None = None) -> None:
        self.transit = Transit()
        self._clock = clock
        self._trust = trust
        self._undecodable = undecodable or NoMetrics().counter("")

    def read(self, contexts: Contexts, dtab: Dtab = ()) -> Context:
        """The context in which the request is to be handled."""
        deadline: float | None = None
        waited = 0.0
        finagle: TraceId | None = None
        w3c: TraceId | None = None
        state = baggage = client_id = ""
        attempt = 0
        priority = Priority.DEFAULT
        opaque: list[tuple[bytes, bytes]] = []
        for pair in contexts:
            key, value = pair
            if key not in _KNOWN:
                key = _FOLDED.get(key.lower(), key)
            try:
                if key == DEADLINE:
                    sent, due = struct.unpack(">qq", value)
                    now = self._clock.now()
                    waited = self.transit.waited(sent, self._clock.epoch_ns(), now)
                    deadline = now + max(0, due - sent) / 1e9 - waited
                elif key == TRACE:
                    finagle = read_trace(value)
                elif key == TRACEPARENT:
                    w3c = read_traceparent(value)
                elif key == TRACESTATE:
                    state = value.decode("ascii")
                elif key == RETRIES:
                    (attempt,) = struct.unpack(">i", value)
                    attempt = max(0, attempt)
                elif key == CLIENT_ID:
                    client_id = value.decode()
                elif key == BAGGAGE:
                    baggage = value.decode()
                elif key == PRIORITY:
                    priority = _PRIORITIES.get(value, Priority.DEFAULT)
                else:
                    opaque.append(pair)
            except (struct.error, ValueError):
                self._undecodable.value += 1
        context = Context(
            deadline,
            _merge(finagle, w3c, state),
            dtab,
            attempt,
            client_id,
            baggage,
            tuple(opaque),
            priority=priority,
            waited=waited,
        )
        return context if self._trust else context.distrusted()


def _merge(finagle: TraceId | None, w3c: TraceId | None, state: str) -> TraceId | None:
    if finagle is None:
        return w3c if w3c is None or not state else TraceId(w3c.trace, w3c.span, None, w3c.sampled, False, state)
    if w3c is None or w3c.trace & LOW != finagle.trace & LOW:
        return finagle
    # W3C has no word for "undecided": its 0 beside a Finagle context that says just that is no decision.
    sampled = (w3c.sampled or None) if finagle.sampled is None else finagle.sampled
    return TraceId(w3c.trace, finagle.span, finagle.parent, sampled, finagle.debug, state)


def read_trace(value: bytes) -> TraceId:
    """Finagle's TraceContext: 32 bytes, or 40 with the high half of a 128-bit trace id.

    Raises:
        ValueError: It has another size, or ids of 0, which W3C does not allow.
    """
    if len(value) == 40:
        span, parent, trace, flags, high = struct.unpack(">QQQQQ", value)
    elif len(value) == 32:
        span, parent, trace, flags = struct.unpack(">QQQQ", value)
        high = 0
    else:
        raise ValueError(f"a TraceContext of {len(value)} bytes")
    if not (span and (trace or high)):
        raise ValueError("a TraceContext without ids")
    sampled = bool(flags & SAMPLED) if flags & SAMPLING_KNOWN else None
    return TraceId(high << 64 | trace, span, None if parent == span else parent, sampled, bool(flags & DEBUG))
