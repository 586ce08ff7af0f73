"""Client throttling: what servers would refuse anyway is not sent, so that refusing does not cost them their last core.

Each client keeps, over 30 s, how many requests servers let in and how many they refused, and refuses by itself with
probability ``(requests - K · accepts) / (requests + 1)``, never more than 0.75 (Google, "Site Reliability Engineering",
ch. 21; K = 2 lets about as many refusals through as there are accepts). What it refuses counts as a request too. Only
what a server refused counts against it: failures and timeouts are the breakers' business. Nor does it count when it was
too many of this caller's (429, RESOURCE_EXHAUSTED), which says nothing of the servers' load: others are let in as ever.

A request counts from when it is sent, not from when it is answered. One under way counts as accepted until it is
refused; else a burst against slow servers that refuse nobody would be throttled.

Only the first try of a call is held back and counted as refused. Those that follow are paid for by the retry budget,
which bounds them, and one that is let in takes the refusal back: the call was served.

Three things differ from the book. The probability is capped, so that enough goes through to notice the end of an
overload (Finagle, NackAdmissionFilter: 0.75). A run of accepts ends the throttling at once, and not after a window: as
long a run as would happen once in a million times if servers still let in what they did, so 20 where that was half, as
K = 2 tolerates, and 5 where it was next to nothing; and each of them lets more of the others through. And each priority
has an account of its own, since servers refuse sheddable requests long before critical ones.
"""

from __future__ import annotations

import random
from collections import deque
from math import log
from typing import Any, ClassVar, Final

from ..core.context import VAR, CallRecord
from ..core.env import Env
from ..core.errors import ConfigurationError, Rejected
from ..core.priority import Priority
from ..core.service import Call, Filter, Service

__all__ = ["Throttle", "ThrottleFilter", "throttle"]

SLICES: Final = 10
SHORTEST_RUN: Final = 5
CHANCE: Final = -log(1e-6)
"""A run of accepts shows that servers refuse no more when it was that unlikely to come by chance."""
FEW: Final = 5
"""Requests in a second, below which nothing is refused here (Finagle, NackAdmissionFilter: 5 rps)."""


class Throttle:
    """How much of what is sent is refused. Pure: time and chance are given.

    Call `admit` before each request, and `accepted`, `refused` or `abandoned` after it.

    Args:
        k: Requests per accept from which on some are refused here.
        window: Seconds.
        cap: The highest probability.

    Attributes:
        latest: The probability when it was last needed.
        under_way: Requests that were sent and not answered.
        refusals: Requests that were refused in the window, by servers or here, in slices; ``None`` when none were.
    """

    __slots__ = (
        "_accepts",
        "_at",
        "_end",
        "_length",
        "_recent",
        "_run",
        "_sum",
        "cap",
        "k",
        "latest",
        "refusals",
        "under_way",
    )

    def __init__(self, k: float, window: float, cap: float) -> None:
        self.k, self.cap = k, cap
        self._length = window / SLICES
        self._recent: deque[float] = deque(maxlen=FEW)
        self.under_way = 0
        self.latest = 0.0
        self._run = 0
        self._end = float("-inf")
        self._at = 0
        self._accepts = [0] * SLICES
        self._sum = 0
        self.refusals: list[int] | None = None

    def _roll(self, now: float) -> None:
        if self._end == float("-inf"):
            self._end = now + self._length
            return
        passed = int((now - self._end) / self._length) + 1
        for _ in range(min(passed, SLICES)):
            self._at = (self._at + 1) % SLICES
            self._sum -= self._accepts[self._at]
            self._accepts[self._at] = 0
            if self.refusals is not None:
                self.refusals[self._at] = 0
        self._end += passed * self._length
        if self.refusals is not None and not any(self.refusals):
            self.refusals = None

    def probability(self, now: float) -> float:
        """With which a request is refused here now, from 0 to ``cap``."""
        if now >= self._end:
            self._roll(now)
        if self.refusals is None:
            return 0.0
        accepts = self._sum + self.under_way
        requests = accepts + sum(self.refusals)
        usual = max(0.0, min(self.cap, (requests - self.k * accepts) / (requests + 1)))
        # Each accept in a row lets more through, so that the next comes sooner: the run takes half the time.
        return usual * (1.0 - self._run / self._convincing()) if usual and self._run else usual

    def admit(self, now: float, rng: random.Random) -> bool:
        """May a request be sent? If so, it is under way from now on."""
        if self.refusals is not None:
            recent = self._recent
            recent.append(now)
            self.latest = self.probability(now)
            often = len(recent) == FEW and now - recent[0] <= 1.0
            if often and self.refusals is not None and rng.random() < self.latest:
                self.refusals[self._at] += 1
                return False
        self.under_way += 1
        return True

    def accepted(self, now: float) -> None:
        """A request was let in, whatever came of it."""
        if now >= self._end:
            self._roll(now)
        self.under_way -= 1
        self._accepts[self._at] += 1
        self._sum += 1
        if self.refusals is not None:
            self._run += 1
            if self._run >= self._convincing():
                self.refusals = None

    def _convincing(self) -> float:
        """How many accepts in a row are no chance, by what servers did in the window before them."""
        before = max(0, self._sum - self._run)
        requests = before + sum(self.refusals or ())
        # Of the requests, refused here or there, no less than 1 - cap were sent; of those sent K = 2 lets half in.
        share = min(0.5, before / max(1, requests) / (1 - self.cap))
        return max(SHORTEST_RUN, CHANCE / -log(share)) if share > 0 else SHORTEST_RUN

    def refused(self, now: float) -> None:
        """A server refused a request."""
        if now >= self._end:
            self._roll(now)
        self.under_way -= 1
        self._run = 0
        if self.refusals is None:
            self.refusals = [0] * SLICES
            self._recent.clear()
        self.refusals[self._at] += 1

    def mended(self) -> None:
        """What a server refused was let in elsewhere, or later."""
        refusals = self.refusals
        if refusals is not None:
            for i in range(SLICES):  # the latest first
                at = (self._at - i) % SLICES
                if refusals[at]:
                    refusals[at] -= 1
                    return

    def abandoned(self) -> None:
        """Nobody knows whether a request was let in: it was cancelled, or never reached a server."""
        self.under_way -= 1

    def __repr__(self) -> str:
        refused = 0 if self.refusals is None else sum(self.refusals)
        return f"<Throttle: {self._sum} accepted, {self.under_way} under way, {refused} refused>"


class ThrottleFilter(Filter[Any, Any, Any, Any]):
    """Sends less of what servers refuse. See `throttle`."""

    place: ClassVar[str] = "admission"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, k: float = 2.0, window: float = 30.0, cap: float = 0.75, env: Env | None = None) -> None:
        numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in (k, window, cap))
        if not (numbers and 1 < k <= 1000 and 1 <= window <= 3600 and 0 < cap <= 0.95):
            raise ConfigurationError(
                f"throttle(k={k!r}, window={window!r}, cap={cap!r}): k is above 1 (such as 2), window is 1 to 3600 "
                "seconds, cap is above 0 and at most 0.95, since some must go through to notice that servers recover"
            )
        self.k, self.window, self.cap = k, window, cap
        env = env or Env()
        self._env, self._clock, self._rng = env, env.clock, env.rng
        self._each = tuple(Throttle(k, window, cap) for _ in Priority)
        metrics = env.metrics.scope("throttle")
        self._throttled = metrics.counter("throttled")
        # As it was for the latest request: whoever looks may do so when no event loop, and so no clock, runs any more.
        metrics.gauge("probability", lambda: max((one.latest for one in self._each if one.refusals), default=0.0))

    def build(self, env: Env, service: Any) -> Any:
        """With accounts of this client's own."""
        return type(self)(self.k, self.window, self.cap, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Send it, unless servers would most likely refuse it.

        Raises:
            Rejected: They would. Nobody is to try again.
        """
        clock = self._clock
        context = VAR.get()
        one = self._each[context.priority]
        if one.refusals is None or _tried_before(context.record):
            one.under_way += 1  # what `admit` would do, for nearly every request
        elif not one.admit(clock.now(), self._rng):
            raise self._refusal(one, request)
        try:
            reply = await service(request)
        except Rejected as error:
            if error.by_peer and not error.over_rate and not _tried_before(context.record):
                one.refused(clock.now())
            else:
                one.abandoned()
            raise
        except Exception as error:
            if getattr(error, "processed", None) is False:
                one.abandoned()
            else:
                one.accepted(clock.now())
            raise
        except BaseException:
            one.abandoned()
            raise
        if one.refusals is not None and _tried_before(context.record):
            one.mended()
        one.accepted(clock.now())
        return reply

    def _refusal(self, one: Throttle, request: Any) -> Rejected:
        self._throttled.value += 1
        probability = one.latest
        error = Rejected("not sent: servers refuse most of what this client sends")
        error.finalize(f"throttled, as {probability:.0%} of requests are")
        if isinstance(request, Call):
            error.processed = None
        self._env.events.note("throttle", "refusals", f"{probability:.0%} are not sent")
        return error

    def __repr__(self) -> str:
        return f"throttle(k={self.k:g}, window={self.window:g}, cap={self.cap:g})"


def _tried_before(record: CallRecord | None) -> bool:
    return record is not None and record.retries > 0


def throttle(k: float = 2.0, *, window: float = 30.0, cap: float = 0.75) -> ThrottleFilter:
    """Send less while servers refuse most of it. On by default in clients.

    Args:
        k: Requests per accept from which on some are not sent (Google: 2, lower is stricter).
        window: Seconds over which they are counted.
        cap: The largest share that is not sent (Finagle: 0.75).

    Raises:
        ConfigurationError: One of these makes no sense.
    """
    return ThrottleFilter(k, window, cap)
