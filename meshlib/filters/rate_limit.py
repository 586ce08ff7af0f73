"""The rate limit: so many requests a second, with bursts, for all or for each key.

The generic cell rate algorithm (ITU-T I.371): a token bucket whose whole state is one instant, the time at which the
bucket would be full again. Nothing has to run to refill it, and how long until the next token is a subtraction, so a
refusal says exactly when to come back. `Gcra` is pure.

Who is willing to wait does so in order. The first in line sleeps until its token is there, the others until it is their
turn to be first; so whoever leaves early costs nobody anything, and nothing is taken before it is used.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar, Final

import anyio

from ..core.context import VAR
from ..core.env import Env
from ..core.errors import ConfigurationError, Rejected
from ..core.service import Call, Filter, Service

__all__ = ["Gcra", "RateLimit", "rate_limit"]

KEYS: Final = 10_000
"""Keys whose rate is known at a time: 5 MB. The one that was longest without a request is forgotten first."""
_HAIR: Final = 1e-9
"""Seconds. Sums of floats may miss a token by less."""


class Gcra:
    """A token bucket. Pure: time is given.

    Args:
        rate: Tokens a second.
        burst: Tokens in a full bucket.
    """

    __slots__ = ("_every", "_full_at", "_tolerance", "line")

    def __init__(self, rate: float, burst: int) -> None:
        self._every = 1.0 / rate
        self._tolerance = (burst - 1) * self._every
        self._full_at = float("-inf")
        self.line: deque[anyio.Event] = deque()
        """Those who wait for a token, in order; each is woken when it is the first."""

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 if there is one."""
        left = self._full_at - self._tolerance - now
        return self._checked(left) if left > _HAIR else 0.0

    def take(self, now: float) -> float:
        """Take a token if there is one.

        Returns:
            0 if there was, else the seconds until there is.
        """
        left = self._full_at - self._tolerance - now
        if left > _HAIR and (left := self._checked(left)):
            return left
        self._full_at = max(self._full_at, now) + self._every
        return 0.0

    def _checked(self, left: float) -> float:
        # No token is ever further away than the next one. If it seems so, ``now`` is of the clock of another event
        # loop than before: a decorated function outlives the loop that it was first called on.
        if left > self._every + _HAIR:
            self._full_at = float("-inf")
            return 0.0
        return left

    def wait_behind(self, now: float) -> float:
        """Seconds until somebody who comes now has a token, at most, when all in line before take one."""
        return self.wait(now) + len(self.line) * self._every


class RateLimit(Filter[Any, Any, Any, Any]):
    """Refuses, or delays, requests over a rate. See `rate_limit`."""

    place: ClassVar[str] = "rate_limit"
    keeps_deadline: ClassVar[bool] = True

    def __init__(
        self,
        rate: float,
        burst: int | None = None,
        *,
        wait: float = 0.0,
        key: Callable[[Any], Any] | None = None,
        keys: int = KEYS,
        env: Env | None = None,
    ) -> None:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e9:
            raise ConfigurationError(f"rate_limit({rate!r}): give requests a second, a number above 0")
        if burst is not None and (isinstance(burst, bool) or not isinstance(burst, int) or burst < 1):
            raise ConfigurationError(f"rate_limit(burst={burst!r}): give a whole number of requests, 1 or more")
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait < 1e9:
            raise ConfigurationError(f"rate_limit(wait={wait!r}): give seconds that a request may wait, 0 or more")
        if key is not None and not callable(key):
            raise ConfigurationError(f"rate_limit(key={key!r}): give a function from a request to what is limited")
        if isinstance(keys, bool) or not isinstance(keys, int) or keys < 1:
            raise ConfigurationError(f"rate_limit(keys={keys!r}): give how many keys to know at a time, 1 or more")
        env = env or Env()
        self.rate, self.burst, self.patience = rate, max(1, round(rate)) if burst is None else burst, wait
        self._given = burst
        self._key, self._keys = key, keys
        self._env, self._clock = env, env.clock
        self._one = Gcra(rate, self.burst)
        self._each: OrderedDict[Any, Gcra] = OrderedDict()
        metrics = env.metrics.scope("rate_limit")
        self._rejected, self._waited = metrics.counter("rejected"), metrics.counter("waited")
        if key is not None:
            metrics.gauge("keys", lambda: len(self._each))

    def build(self, env: Env, service: Any) -> Any:
        """Counts the requests of this client or server."""
        built = type(self)(self.rate, self._given, wait=self.patience, key=self._key, keys=self._keys, env=env)
        return built.bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Let it through at the rate.

        Raises:
            Rejected: There is no token for it, nor will there be within the time it may wait. ``retry_after`` tells
                when there is.
        """
        bucket = self._one if self._key is None else self._of(self._key(request))
        now = self._clock.now()
        if bucket.line or bucket.take(now):
            await self._wait(bucket, now, request)
        return await service(request)

    def _of(self, key: Any) -> Gcra:
        each = self._each
        bucket = each.get(key)
        if bucket is None:
            bucket = each[key] = Gcra(self.rate, self.burst)
            for _ in range(2):  # one that somebody waits for stays, so at times there is one more to forget
                if len(each) > self._keys:
                    oldest, unused = each.popitem(last=False)
                    if unused.line:
                        each[oldest] = unused
        else:
            each.move_to_end(key)
        return bucket

    async def _wait(self, bucket: Gcra, now: float, request: Any) -> None:
        wait = bucket.wait_behind(now)
        deadline = VAR.get().deadline
        if wait > self.patience:
            raise self._refusal(request, "rate", wait)
        if deadline is not None and now + wait >= deadline:
            raise self._refusal(request, "deadline", wait)
        self._waited.value += 1
        turn = anyio.Event()
        bucket.line.append(turn)
        try:
            if bucket.line[0] is not turn:
                await turn.wait()
            left = bucket.take(self._clock.now())
            while left:
                await anyio.sleep(left)
                left = bucket.take(self._clock.now())
        finally:
            first = bucket.line[0] is turn
            bucket.line.remove(turn)
            if first and bucket.line:
                bucket.line[0].set()

    def _refusal(self, request: Any, code: str, wait: float) -> Rejected:
        self._rejected.value += 1
        over = "the deadline would pass before there is room" if code == "deadline" else "come back"
        refusal = Rejected(f"over the rate of {self.rate:g} a second: {over} in {wait:.3f} s")
        refusal.retry_after, refusal.over_rate = wait, True
        self._env.events.note("rate_limit", code, refusal.message)
        if isinstance(request, Call):
            refusal.processed = None  # see `ConcurrencyLimit`: a part was refused, not the request that is being served
        return refusal

    def __repr__(self) -> str:
        parts = [f"{self.rate:g}", f"burst={self.burst}"]
        if self.patience:
            parts.append(f"wait={self.patience:g}")
        if self._key is not None:
            parts.append(f"key={getattr(self._key, '__name__', self._key)}")
            if self._keys != KEYS:
                parts.append(f"keys={self._keys}")
        return f"rate_limit({', '.join(parts)})"


def rate_limit(
    rate: float,
    burst: int | None = None,
    *,
    wait: float = 0.0,
    key: Callable[[Any], Any] | None = None,
    keys: int = KEYS,
) -> RateLimit:
    """Let so many requests through a second, and no more.

    Args:
        rate: Requests a second.
        burst: Requests that may come at once after a pause; by default what a second brings.
        wait: Seconds that a request may wait for its turn, in order and within its deadline; 0 refuses at once.
        key: What is limited: a function from a request (for a decorated function, its `Call`) to anything hashable,
            such as the caller's name. By default all requests count together.
        keys: How many keys are known at a time.

    Raises:
        ConfigurationError: One of these makes no sense.
    """
    return RateLimit(rate, burst, wait=wait, key=key, keys=keys)
