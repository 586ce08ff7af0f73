"""When to ping, so that a dead connection is found out, and no server takes it for an attack. Pure.

Servers bound pings: gRPC's core forgives two that come within five minutes without any data of its own in between, and
ends the connection with the one after, ENHANCE_YOUR_CALM and ``too_many_pings``. So, unless grpclib's `Configuration`
says otherwise: a ping goes out only while calls are under way and nothing at all has come for the interval of
`meshlib.client.Liveness`; two of them without data from the server, then one in five minutes. A server that complains
all the same gets half as many from the whole channel (gRFC A8). For what pings do not cover there is `silent_since`: a
call whose time ran out, and nothing came meanwhile, sends later calls to a new connection.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from h2.errors import ErrorCodes

from ...core.errors import ConnectionLost, MeshError

__all__ = ["Keepalive", "Policy"]

FREE: Final = 2
"""Pings without data from the server, as gRPC's core allows itself (``max_pings_without_data``)."""
SPACING: Final = 300.0
"""Seconds between those beyond them (grpc/doc/keepalive.md: what servers permit without being asked)."""
LOOKS: Final = 4
"""How often to look, within the time that an answer may take."""
LEAST: Final = 0.01


class Policy:
    """What all connections of a channel hold to.

    Args:
        interval: Seconds of silence before a ping.
        timeout: Seconds of silence after it, before the connection is given up.
        idle: Ping while no call is under way.
        free: Pings without data from the server; 0 for as many as come.
        spacing: Seconds between those beyond them.
    """

    __slots__ = ("free", "idle", "interval", "spacing", "timeout")

    def __init__(
        self, interval: float, timeout: float, *, idle: bool = False, free: int = FREE, spacing: float = SPACING
    ) -> None:
        self.interval, self.timeout, self.idle = interval, timeout, idle
        self.free, self.spacing = free, spacing

    @classmethod
    def of_configuration(cls, config: Any) -> Policy | None:
        """As a `grpclib.config.Configuration` says; ``None`` if it says nothing."""
        if config._keepalive_time is None:
            return None
        return cls(
            config._keepalive_time,
            config._keepalive_timeout,
            idle=config._keepalive_permit_without_calls,
            free=config._http2_max_pings_without_data,
            spacing=config._http2_min_sent_ping_interval_without_data,
        )

    def __repr__(self) -> str:
        return f"keepalive(ping after {self.interval:g} s of silence, answer within {self.timeout:g} s)"


class Keepalive:
    """One connection's pings.

    Args:
        policy: The channel's.
        now: When the connection was made.
    """

    __slots__ = ("_heard", "_last", "_number", "_pings", "_policy", "_waiting_since")

    def __init__(self, policy: Policy, now: float) -> None:
        self._policy = policy
        self._heard = now
        self._last = float("-inf")
        self._pings = 0
        self._number = 0
        self._waiting_since: float | None = None

    def heard(self, now: float, data: bool) -> None:
        """Something came; ``data`` if it was more than the answer to a ping."""
        self._heard = now
        self._waiting_since = None
        if data:
            self._pings = 0

    def told(self, code: int, debug: str) -> None:
        """GOAWAY came, with that reason."""
        if code == ErrorCodes.ENHANCE_YOUR_CALM and debug == "too_many_pings":
            self._policy.interval *= 2

    def pause(self, now: float) -> float:
        """Seconds until it is time to ask `due`."""
        policy = self._policy
        if self._waiting_since is not None:
            return max(LEAST, policy.timeout / LOOKS)
        left = max(self._heard, self._last) + policy.interval - now
        # Without a call to ping for, or within the five minutes: look now and then, and not as often as there is time.
        return left if left > LEAST else max(LEAST, min(policy.interval, policy.timeout) / LOOKS)

    def due(self, now: float, calls: int) -> bytes | MeshError | None:
        """What is to be done: send a ping with these eight bytes, give up because of an error, or nothing."""
        policy = self._policy
        if self._waiting_since is not None:
            if now - self._waiting_since < policy.timeout:
                return None
            return ConnectionLost(f"no answer to a ping within {policy.timeout:g} s")
        if now - max(self._heard, self._last) < policy.interval - LEAST or not (calls or policy.idle):
            return None
        if policy.free and self._pings >= policy.free and now - self._last < policy.spacing:
            return None
        self._pings += 1
        self._number += 1
        self._last = self._waiting_since = now
        return struct.pack(">Q", self._number)

    def silent_since(self, at: float, now: float) -> bool:
        """Has nothing come since ``at``, and for longer than a ping and its answer would take?"""
        return self._heard < at and now - self._heard >= self._policy.interval + self._policy.timeout

    def __repr__(self) -> str:
        return f"<Keepalive: {self._pings} pings, {self._policy!r}>"
