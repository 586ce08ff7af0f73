"""How much one peer of a gRPC server may ask for, and for how long it may say nothing.

Every bound is checked before what it bounds is allocated. What is too much for one call ends that call alone, with a
status that names the bound; what only a broken or hostile peer does ends the connection with ENHANCE_YOUR_CALM.

=====================  ===========================================================================================
message too large      RESOURCE_EXHAUSTED, once its length has been read and before its bytes are
metadata too large     RESOURCE_EXHAUSTED; beyond `HARD_HEADERS`, the connection
too many streams       REFUSED_STREAM, which clients send elsewhere
too many resets        the connection (CVE-2023-44487, "rapid reset")
too many pings, …      the connection
too much unread        nothing more of it comes, until handlers have caught up
no preface, or half    the connection, after `Limits.handshake` seconds
a frame
=====================  ===========================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from ...core.errors import ConfigurationError

__all__ = ["CONNECTION_WINDOW", "HARD_HEADERS", "MOST_HELD", "Bucket", "Limits", "stream_window"]

HARD_HEADERS: Final = 65_536
"""Bytes of a decoded header list after which HPACK's decoder gives up, and with it the connection (h2's own default).
Between this and `Limits.max_headers` the decoder stays sound, so that only the call fails."""

MOST_HELD: Final = 64 << 20
"""Bytes that one connection may make us hold for handlers that do not read them: 16 messages of gRPC's default limit.
Not among them is the message that a handler waits for, which has its own bound: to hold that back would end nothing."""
CONNECTION_WINDOW: Final = 16 << 20
"""Bytes that may be on their way on all streams of a connection together. It is the most that gRPC's core takes for
its estimate of what a network holds; what is held back is held back by stream."""
LARGEST_STREAM_WINDOW: Final = 4 << 20
"""As grpclib's."""
SMALLEST_STREAM_WINDOW: Final = 65_535
"""What every stream has before any setting (RFC 9113 6.9.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a gRPC server grants each connection.

    Attributes:
        max_message: Bytes of an inbound message, after decompression. gRPC's default in all languages is 4 MiB.
        max_headers: Bytes of a request's header list, counted as RFC 9113 6.5.2 does. gRPC's core rejects from 16 KiB.
        max_streams: Calls under way at once; advertised, and enforced. 100 is what RFC 9113 6.5.2 recommends at least.
        handshake: Seconds for TLS, for the preface, and for each frame and header block that has begun.
        resets: Streams that a client may reset before their handler has begun: so many at once …
        reset_rate: … and so many a second. Those reset later are bounded by ``max_streams``.
        control: Frames that carry nothing (PING, SETTINGS, PRIORITY, empty DATA, refused streams): so many at once …
            A PING after something that we have sent is none of them, as in gRPC's own servers.
        control_rate: … and so many a second.
        max_idle: Seconds without calls after which a connection is drained; ``None`` for ever.
        max_age: Seconds after which a connection is drained, give or take a tenth so that not all leave at once;
            ``None`` for never. What makes clients look for new servers behind a plain balancer.
        max_age_grace: Seconds that the calls of such a connection have left.

    Raises:
        ConfigurationError: One is no number above 0.
    """

    max_message: int = 4 * 1024 * 1024
    max_headers: int = 16_384
    max_streams: int = 100
    handshake: float = 10.0
    resets: int = 1000
    reset_rate: float = 100.0
    control: int = 1000
    control_rate: float = 100.0
    max_idle: float | None = None
    max_age: float | None = None
    max_age_grace: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            whole = isinstance(field.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
                wanted = "a whole number above 0" if whole else "a number above 0"
                raise ConfigurationError(f"Limits({field.name}={value!r}): give {wanted}")
        if self.max_headers > HARD_HEADERS:
            raise ConfigurationError(f"Limits(max_headers={self.max_headers!r}): give {HARD_HEADERS} or less")


def stream_window(limits: Limits) -> int:
    """Bytes that may be unread on one stream, so that as many streams as may be open cannot fill `MOST_HELD`.

    Calls that wait for a place would otherwise hold what those that have one wait for.
    """
    share = MOST_HELD // limits.max_streams
    return max(SMALLEST_STREAM_WINDOW, min(LARGEST_STREAM_WINDOW, share))


class Bucket:
    """So many at once, and so many a second (a token bucket that holds no timer).

    Args:
        size: How many at once.
        rate: How many come back each second.
    """

    __slots__ = ("_at", "_level", "_rate", "_size")

    def __init__(self, size: float, rate: float) -> None:
        self._size, self._rate = size, rate
        self._level, self._at = 0.0, float("-inf")

    def take(self, now: float) -> bool:
        """Take one at ``now``, on any one clock; ``False`` if none is left."""
        if self._level:
            self._level = max(0.0, self._level - (now - self._at) * self._rate)
        self._at = now
        self._level += 1.0
        return self._level <= self._size
