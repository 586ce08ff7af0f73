"""The retry budget: retries may add a fifth to the load, and ten a second beside, and no more.

A token bucket over a sliding window. Each request deposits 1,000; each retry withdraws 1,000/share, and may do so
while the window's sum and a standing reserve cover it. With the defaults an idle client can make 100 retries at once.
The scale of 1,000 keeps the arithmetic in whole numbers without the truncation that gives Tower's budget 33 % where
30 % was asked. Pure: the time is given. Source: Finagle, service/RetryBudget.scala, util WindowedAdder.
"""

from __future__ import annotations

from ..core.errors import ConfigurationError

__all__ = ["RetryBudget"]

SCALE = 1000
SLICES = 10


class RetryBudget:
    """How many retries are affordable.

    Args:
        share: Retries per request over the window, such as 0.2.
        min_per_second: Retries a second that are affordable whatever the traffic.
        ttl: The window, in seconds: 1 to 60.
    """

    __slots__ = (
        "_at",
        "_cost",
        "_reserve",
        "_slice",
        "_slice_end",
        "_sum",
        "_window",
        "min_per_second",
        "share",
        "ttl",
    )

    def __init__(self, share: float = 0.2, min_per_second: float = 10.0, ttl: float = 10.0) -> None:
        if not (0 <= share <= 1000 and min_per_second >= 0 and 1 <= ttl <= 60):
            raise ConfigurationError(
                f"RetryBudget(share={share!r}, min_per_second={min_per_second!r}, ttl={ttl!r}): share is a number from "
                "0 (such as 0.2 for 20 %), min_per_second is 0 or more, ttl is 1 to 60 seconds"
            )
        self.share, self.min_per_second, self.ttl = share, min_per_second, ttl
        self._cost = round(SCALE / share) if share > 0 else 1
        self._reserve = round(min_per_second * ttl * self._cost)
        self._slice = ttl / SLICES
        self._window = [0] * SLICES
        self._at = 0
        self._sum = 0
        self._slice_end = float("-inf")

    def _roll(self, now: float) -> None:
        if self._slice_end == float("-inf"):
            self._slice_end = now + self._slice
            return
        passed = int((now - self._slice_end) / self._slice) + 1
        for _ in range(min(passed, SLICES)):
            self._at = (self._at + 1) % SLICES
            self._sum -= self._window[self._at]
            self._window[self._at] = 0
        self._slice_end += passed * self._slice

    def deposit(self, now: float) -> None:
        """One request was made."""
        if now >= self._slice_end:
            self._roll(now)
        if self.share:
            self._window[self._at] += SCALE
            self._sum += SCALE

    def try_withdraw(self, now: float) -> bool:
        """Pay for one retry. ``False``: it is not affordable, and nothing was taken."""
        if now >= self._slice_end:
            self._roll(now)
        if self._reserve + self._sum < self._cost:
            return False
        self._window[self._at] -= self._cost
        self._sum -= self._cost
        return True

    def balance(self, now: float) -> int:
        """How many retries are affordable now."""
        if now >= self._slice_end:
            self._roll(now)
        return max(0, (self._reserve + self._sum) // self._cost)

    def __repr__(self) -> str:
        return f"budget({self.share:.0%} + {self.min_per_second:g}/s)"
