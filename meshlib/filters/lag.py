"""Event-loop lag: how late the loop is. A Python server saturates its one core long before anything else.

When it does, requests queue in sockets and in the event loop, before any layer sees them, and a handler that never
waits shows no latency at all. What shows is that a task which asked to be woken in 50 ms is woken later, if the
requests of one turn keep the loop that long, and that requests had waited when they were read. A sample is late by the
worse of the two. One late sample is a blip (a collection, one long computation); when three in a row are late, the loop
is overloaded. Then sheddable requests are refused, and all but critical ones that have waited for 50 ms, or once the
next sample is 50 ms overdue: what is refused costs a fiftieth of what is served, so the backlog soon ends. That needs
no controller to learn a probability: what fits is served. (PIE, RFC 8033, oscillates here, because its samples come as
late as the loop is.)

`LagGate` is pure. `LoopLag` is the shell: one task for each server, which runs only while requests come.
"""

from __future__ import annotations

import math
from typing import Final

import anyio

from ..core.clock import Clock
from ..core.env import Env
from ..core.priority import Priority

__all__ = ["LagGate", "LoopLag"]

TARGET: Final = 0.05
"""Seconds. Nobody notices 50 ms; a saturated loop passes it within a second."""
LATE: Final = TARGET / 2
"""Seconds that a sample must be late to count: under control, turns end between this and the target."""
EVERY: Final = 0.05
"""Seconds from one sample to the next, when the loop is on time: 20 wake-ups a second cost 0.1 % of a core."""
BLIP: Final = 3
"""Samples that must all be late. Together they last at least 150 ms, as PIE's burst allowance (RFC 8033, 4.2)."""
LONGEST: Final = 10.0
"""Seconds; a client that says more of its request, or of its clock, does not count for more."""
QUIET: Final = 20
"""Samples without a request, a second's worth, after which nobody measures until the next one comes."""


class LagGate:
    """Who is let in, by how late the event loop is.

    Attributes:
        lag: Seconds that the loop has been late, at least, over the last samples.
        overloaded: It has been late each time.
        due: When the next sample is due.
    """

    __slots__ = ("_arrived", "_recent", "_waited", "due", "lag", "overloaded")

    def __init__(self) -> None:
        self.due = math.inf
        self._recent: tuple[float, ...] = ()
        self._arrived, self._waited = 0, 0.0
        self.lag = 0.0
        self.overloaded = False

    def arrived(self, waited: float) -> None:
        """A request has come that had waited for so many seconds when it was read."""
        self._arrived += 1
        self._waited += min(LONGEST, waited)

    def record(self, now: float) -> None:
        """The sample that was due has come."""
        waited = self._waited / self._arrived if self._arrived else 0.0
        self._arrived, self._waited = 0, 0.0
        self._recent = (*self._recent, max(0.0, now - self.due, waited))[-BLIP:]
        self.lag = min(self._recent) if len(self._recent) == BLIP else 0.0
        self.overloaded = self.lag > LATE
        self.due = now + EVERY

    def admits(self, priority: Priority, now: float, waited: float = 0.0) -> bool:
        """Is a request of ``priority`` let in that had waited for so many seconds when it was read?"""
        if not self.overloaded or priority is Priority.CRITICAL:
            return True
        return priority is not Priority.SHEDDABLE and now - self.due <= TARGET and waited <= TARGET

    def rest(self) -> None:
        """Forget all: nobody is going to measure for a while."""
        self._recent = ()
        self._arrived, self._waited = 0, 0.0
        self.lag = 0.0
        self.overloaded = False
        self.due = math.inf

    def __repr__(self) -> str:
        return f"<LagGate: {self.lag * 1e3:.0f} ms late{', overloaded' if self.overloaded else ''}>"


class LoopLag:
    """Measures the lag of the event loop that a server runs on, from its first request on.

    Attributes:
        gate: What the lag means.
        running: Somebody measures. Set ``busy`` with each request, and `start` it when nobody does.
        busy: A request came since the last sample.
    """

    __slots__ = ("_clock", "_supervisor", "busy", "gate", "running")

    def __init__(self, env: Env) -> None:
        self.gate = LagGate()
        self.running = False
        self.busy = False
        self._clock: Clock = env.clock
        self._supervisor = env.supervisor
        env.metrics.gauge("loop_lag_ms", lambda: self.gate.lag * 1e3)

    def start(self) -> None:
        """Begin to measure. A server that is being closed measures no more."""
        if not self._supervisor.closed:
            self.running = True
            self._supervisor.start(self._run, name="loop lag")

    async def _run(self) -> None:
        quiet = 0
        gate = self.gate
        try:
            gate.due = self._clock.now() + EVERY
            while quiet < QUIET:
                await anyio.sleep(EVERY)
                gate.record(self._clock.now())
                quiet = 0 if self.busy else quiet + 1
                self.busy = False
        finally:
            self.running = False
            gate.rest()

    def __repr__(self) -> str:
        return f"<LoopLag: {self.gate!r}{'' if self.running else ', at rest'}>"
