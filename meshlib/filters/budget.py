"""The retry budget: retries may add a fifth to the load, and ten a second beside, and no more.

A token bucket over a sliding window. Each request deposits 1,000; each retry withdraws 1,000/share, and may do so
while the window's sum and a standing reserve cover it. With the defaults an idle client can make 100 retries at once.
The scale of 1,000 keeps the arithmetic in whole numbers without the truncation that gives Tower's budget 33 % where
30 % was asked. Pure: the time is given. Source: Finagle, service/RetryBudget.scala, util WindowedAdder.

Beside the tokens stands a bound on how many retries are under way at once (`Turns`); a retry needs both.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..core.env import Env
from ..core.errors import ConfigurationError
from .turns import Turns

__all__ = ["BudgetLayer", "RetryBudget", "budget_of", "retry_budget"]

SCALE = 1000
SLICES = 10


class RetryBudget:
    """How many retries are affordable.

    Args:
        share: Retries per request over the window, such as 0.2.
        min_per_second: Retries a second that are affordable whatever the traffic.
        ttl: The window, in seconds: 1 to 60.
        min_concurrency: Retries that may be under way at once whatever the traffic; else the share of the calls.

    Attributes:
        turns: The second form of the budget: how many are under way.
        fed: Somebody counts calls and pays in for those that succeed.
    """

    __slots__ = (
        "_at",
        "_cost",
        "_reserve",
        "_slice",
        "_slice_end",
        "_sum",
        "_window",
        "fed",
        "min_per_second",
        "share",
        "ttl",
        "turns",
    )

    def __init__(
        self, share: float = 0.2, min_per_second: float = 10.0, ttl: float = 10.0, min_concurrency: int = 10
    ) -> None:
        numbers = (share, min_per_second, ttl, min_concurrency)
        if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers) or not (
            0 <= share <= 1000 and 0 <= min_per_second <= 1e6 and 1 <= ttl <= 60 and 1 <= min_concurrency <= 1e9
        ):
            raise ConfigurationError(
                f"retry_budget({share!r}, min_per_second={min_per_second!r}, ttl={ttl!r}, "
                f"min_concurrency={min_concurrency!r}): share is a number from 0 (such as 0.2 for 20 %), "
                "min_per_second is 0 or more, ttl is 1 to 60 seconds, min_concurrency is 1 or more"
            )
        self.share, self.min_per_second, self.ttl = share, min_per_second, ttl
        self.turns = Turns(share, int(min_concurrency))
        self.fed = False
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

    def deposit(self, now: float, requests: int = 1) -> None:
        """So many requests were made."""
        if now >= self._slice_end:
            self._roll(now)
        if self.share:
            paid = SCALE * requests
            self._window[self._at] += paid
            self._sum += paid

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


def budget_of(env: Env) -> RetryBudget:
    """The one budget of a client, which requeues, retries and hedges share."""

    def make() -> RetryBudget:
        return _shown(RetryBudget(), env)

    return env.shared(RetryBudget, make)


def _shown(budget: RetryBudget, env: Env) -> RetryBudget:
    env.metrics.gauge("retries/budget", lambda: budget.balance(env.clock.now()))
    env.metrics.gauge("retries/under_way", lambda: budget.turns.taken)
    env.metrics.gauge("retries/waiting", lambda: budget.turns.waiting)
    return budget


class BudgetLayer:
    """Gives a client or server its retry budget. See `retry_budget` for the parameters."""

    place: ClassVar[str] = "budget"
    keeps_deadline: ClassVar[bool] = True

    def __init__(self, share: float, min_per_second: float, ttl: float, min_concurrency: int) -> None:
        self._terms = (share, min_per_second, ttl, min_concurrency)
        self._like = RetryBudget(*self._terms)

    def build(self, env: Env, below: Any) -> Any:
        """Whoever asks for the budget finds this one; each client has its own."""
        env.params[RetryBudget] = _shown(RetryBudget(*self._terms), env)
        return below

    def __repr__(self) -> str:
        share, rate, ttl, least = self._terms
        return f"retry_budget({share:g}, min_per_second={rate:g}, ttl={ttl:g}, min_concurrency={least})"


def retry_budget(
    share: float = 0.2, *, min_per_second: float = 10.0, ttl: float = 10.0, min_concurrency: int = 10
) -> BudgetLayer:
    """How many tries a client may make beyond the first: requeues that cost a server something, retries, and hedges.

    Args:
        share: Extra tries for each call that succeeded within ``ttl``, and for each first try under way.
        min_per_second: Extra tries a second that are affordable whatever the traffic.
        ttl: The window, in seconds: 1 to 60.
        min_concurrency: Extra tries that may be under way at once whatever the traffic, 1 or more.

    Raises:
        ConfigurationError: A parameter is wrong; says what would be right.
    """
    return BudgetLayer(share, min_per_second, ttl, min_concurrency)
