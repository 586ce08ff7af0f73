"""Additions at once, removals when they have lasted: what keeps an unsteady registry from emptying its clients.

A member's node is ephemeral: it vanishes when the member withdraws or dies, and also when ZooKeeper has lost a session
while the member serves on. Only time tells these apart. Finagle lets each removal wait for one to two epochs of 10 s
(Stabilizer.scala), and believes an empty serverset at once, which is the worst of all news to believe.

Here the wait depends on how much vanishes:

* Members that are the smaller part of those in use leave after `BRIEF`. That is a restart or a scale-down, and a member
  that registers again within this time never left.
* When more are missing than are still listed, the last one included, all of them wait for `HOLD`, Finagle's epoch.
  That is a path deleted by mistake, or an ensemble that expired its sessions: those who live will be back.
* They come back one by one. When so many have that the rest are the smaller part, each of these has `BRIEF` from the
  last return on, and `HOLD` in all.

Time counts from the listing that lacks them, and begins again when the connection was lost in between: nothing is
removed because of what a registry said before it failed. What stays wrongly costs a connect: a dead endpoint is marked
by failfast and its requests go elsewhere. What goes wrongly costs load on the others, or all there is.

Pure: it is told the time.
"""

from __future__ import annotations

from typing import Final

from ..addr import Address

__all__ = ["BRIEF", "HOLD", "Smoothing"]

BRIEF: Final = 1.0
"""Seconds that a few missing members stay. Ours: so that addresses are true 2 s after a change."""
HOLD: Final = 10.0
"""Seconds that the greater part stays: Finagle's epoch (Zk2Resolver.scala)."""


class Smoothing:
    """Addresses as they are used, from addresses as they are listed.

    Args:
        brief: Seconds that a few missing members stay.
        hold: Seconds that they stay when they are the greater part.

    Attributes:
        addresses: Those in use.
        doubted: The connection was lost, and nothing has been listed since.
    """

    def __init__(self, brief: float = BRIEF, hold: float = HOLD) -> None:
        self.addresses: tuple[Address, ...] = ()
        self._brief = brief
        self._hold = hold
        self._listed: dict[Address, Address] = {}
        self._missing: dict[Address, tuple[Address, float]] = {}
        self._returned_at = float("-inf")
        self.doubted = False

    def see(self, listed: dict[Address, Address], now: float) -> None:
        """A new listing; keys and values are the same addresses, of which the values have the newest weights."""
        if not listed.keys().isdisjoint(self._missing):
            self._returned_at = now
        missing = {}
        for old in self.addresses:
            if old not in listed:
                known = self._missing.get(old)
                missing[old] = (old, now) if known is None or self.doubted else known
        self.doubted = False
        self._listed, self._missing = listed, missing
        self.settle(now)

    def doubt(self) -> None:
        """The connection was lost. What is missing by the next listing is missing from then on."""
        self.doubted = True

    def settle(self, now: float) -> None:
        """Let those go whose time is over. While the last listing is in doubt it is not."""
        if self.doubted:
            return
        end = self._end
        self._missing = {a: (a, since) for a, since in self._missing.values() if now < end(since)}
        self.addresses = (*self._listed.values(), *self._missing)

    @property
    def deadline(self) -> float | None:
        """When `settle` will next have something to do."""
        if self.doubted:
            return None
        first = min((since for _, since in self._missing.values()), default=None)
        return None if first is None else self._end(first)

    def _end(self, since: float) -> float:
        """Until when one that is missing since then stays."""
        if len(self._missing) > len(self._listed):
            return since + self._hold
        return min(since + self._hold, max(since, self._returned_at) + self._brief)
