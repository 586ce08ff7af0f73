"""Pings: finding out that a connection is dead although nobody closed it.

One ping is under way at a time. Its answer may have to wait behind a long queue of replies or one large one, so silence
counts, and not lateness: the connection is given up when nothing at all has come for the time that an answer may take.
(Finagle's ThresholdFailureDetector gives up on lateness, and with it on servers that are merely busy.)
"""

from __future__ import annotations

from typing import Final

import anyio

from ..core.clock import Clock
from ..core.env import Metrics
from ..core.errors import ConnectionLost
from .connection import Connection
from .messages import CONTROL_TAG, Tping

__all__ = ["Pinger"]

LOOKS: Final = 4
"""How often to look, within the time that an answer may take, whether anything has come: silence is noticed that much
later at most."""


class Pinger:
    """Pings one connection.

    Args:
        connection: Where pings go; its session tells of answers.
        clock: Measures the round trips.
        metrics: Where ``ping_latency_us`` and ``ping_failures`` are kept.
        interval: Seconds from one ping to the next.
        timeout: Seconds of silence after which the connection is given up.
    """

    def __init__(self, connection: Connection, clock: Clock, metrics: Metrics, interval: float, timeout: float) -> None:
        self._connection = connection
        self._clock = clock
        self._interval = interval
        self._timeout = timeout
        self._latency = metrics.histogram("ping_latency_us")
        self._failures = metrics.counter("ping_failures")
        self._pong: anyio.Event | None = None

    def answered(self) -> None:
        """A ping was answered."""
        if self._pong is not None:
            self._pong.set()

    async def run(self) -> None:
        """Ping until cancelled.

        Raises:
            ConnectionLost: Nothing came for too long.
        """
        while True:
            started = self._clock.now()
            pong = self._pong = anyio.Event()
            self._connection.send(Tping(CONTROL_TAG))
            silent = 0
            while not pong.is_set() and silent < LOOKS:
                received = self._connection.received
                with anyio.move_on_after(self._timeout / LOOKS):
                    await pong.wait()
                silent = silent + 1 if received == self._connection.received else 0
            if not pong.is_set():
                self._failures.value += 1
                raise ConnectionLost(f"no answer to a ping within {self._timeout:g} s")
            took = self._clock.now() - started
            self._latency.record(took * 1e6)
            await anyio.sleep(max(0.0, self._interval - took))
