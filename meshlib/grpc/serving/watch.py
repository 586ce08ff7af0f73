"""When a connection has been silent, idle or alive for too long. Pure: whoever asks brings the time.

=====================================  ==================================================
no SETTINGS, or half a frame           it is broken off after ``Limits.handshake``
it does not read what it asked for     … after the keepalive's timeout
silent                                 a PING after the keepalive's time, and then likewise
no calls, or old (``Limits``)          it is drained
still there long after                 its calls end with UNAVAILABLE
=====================================  ==================================================

The keepalive is grpclib's ``Configuration``: 2 hours and 20 s on servers, and only while there are calls.
"""

from __future__ import annotations

import random
from enum import Enum
from typing import Final

from grpclib.config import Configuration

from .limits import Limits

__all__ = ["Verdict", "Watch"]

JITTER: Final = 0.1
"""Of the greatest age, either way: connections that began together must not end together (gRFC A9)."""


class Verdict(Enum):
    """What is to be done with a connection."""

    FINE = "nothing"
    PING = "see whether it is alive"
    DRAIN = "end it gracefully"
    ABORT = "end what it still does"
    BREAK = "break it off"


class Watch:
    """What is known of one connection's times, all on the event loop's clock.

    Args:
        limits: See `Limits`.
        config: See ``grpclib.config.Configuration``.
        now: When it began.
        rng: For its age.

    Attributes:
        heard_at: When something came last.
        idle_since: When its last call ended.
        deaf_since: Since when we read nothing from it, as it reads nothing.
    """

    __slots__ = (
        "_began",
        "_config",
        "_ends_at",
        "_half_since",
        "_limits",
        "_pinged",
        "deaf_since",
        "heard_at",
        "idle_since",
    )

    def __init__(self, limits: Limits, config: Configuration, now: float, rng: random.Random) -> None:
        self._limits, self._config = limits, config
        self._began = self.heard_at = self.idle_since = now
        self._half_since: float | None = None
        self._pinged: float | None = None
        self.deaf_since: float | None = None
        age = limits.max_age
        self._ends_at = None if age is None else now + age * rng.uniform(1 - JITTER, 1 + JITTER)

    @property
    def young(self) -> bool:
        """Did what came last come within the time for greetings?"""
        return self.heard_at - self._began < self._limits.handshake

    def heard(self, now: float, half: bool, whole: bool) -> None:
        """Something has come.

        Args:
            now: When.
            half: It ends in the middle of a frame, or of a request's fields.
            whole: There was something whole in it.
        """
        self.heard_at = now
        self._pinged = None
        if not half:
            self._half_since = None
        elif whole or self._half_since is None:
            self._half_since = now

    def verdict(self, now: float, established: bool, draining: bool, calls: int) -> tuple[Verdict, str]:
        """What is to be done, and why.

        Args:
            now: When it is asked.
            established: The client has greeted.
            draining: The connection is being drained.
            calls: Calls under way.
        """
        limits, patience = self._limits, self._config._keepalive_timeout
        if not established and now - self._began > limits.handshake:
            return Verdict.BREAK, f"no HTTP/2 preface and SETTINGS within {limits.handshake:g} s"
        if self._half_since is not None and now - self._half_since > limits.handshake:
            return Verdict.BREAK, f"half a frame, and no more within {limits.handshake:g} s"
        if self.deaf_since is not None and now - self.deaf_since > patience:
            return Verdict.BREAK, "it does not read what it has asked for"
        if self._pinged is not None and now - self._pinged > patience:
            return Verdict.BREAK, f"no answer to a PING within {patience:g} s"
        old = self._ends_at is not None and now > self._ends_at
        if draining:
            late = old and now > (self._ends_at or 0.0) + limits.max_age_grace
            return (Verdict.ABORT, "its grace is over") if late else (Verdict.FINE, "")
        if old:
            return Verdict.DRAIN, "it is old enough"
        if limits.max_idle is not None and not calls and now - self.idle_since > limits.max_idle:
            return Verdict.DRAIN, "it is idle"
        after = self._config._keepalive_time
        wanted = bool(calls or self._config._keepalive_permit_without_calls)
        if wanted and after is not None and self._pinged is None and now - self.heard_at > after:
            self._pinged = now
            return Verdict.PING, "it is silent"
        return Verdict.FINE, ""
