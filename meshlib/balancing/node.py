"""An endpoint as a balancer sees it. Finagle: loadbalancer/NodeT, LeastLoaded.scala."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ..core.env import Env
from ..core.health import Health
from ..core.service import Status
from ..names.addr import Address
from .load import Meter

__all__ = ["Node"]

LONG_AGO = float("-inf")


class Node:
    """One endpoint.

    Attributes:
        address: Where it is.
        health: What the layers below the balancer say of it.
        meter: How loaded it is.
        share: What part of the traffic it is to have, relative to others: its weight, or what an aperture makes of it.
        warm_from: Since when it is new or revived, on `Clock.now`; long ago when it is neither.
        removed: It is no longer in the name's set; it finishes what it has.
    """

    __slots__ = ("_env", "address", "health", "meter", "removed", "serves", "service", "share", "warm_from", "was_open")

    def __init__(self, address: Address, service: Callable[[Any], Awaitable[Any]], env: Env) -> None:
        self.address = address
        self.service = service
        self.health: Health = env.health
        self.meter = Meter()
        self.share = address.weight
        self.warm_from = LONG_AGO
        self.removed = False
        self.was_open = self.serves = False  # as the balancer last looked
        self._env = env

    @property
    def load(self) -> int:
        """Requests under way to it."""
        return self.meter.pending

    @property
    def status(self) -> Status:
        """Closed once removed, else what its layers say."""
        return Status.CLOSED if self.removed else self.health.status

    @property
    def zone(self) -> str:
        """The zone that its source says it is in; empty when it does not say."""
        return next((value for key, value in self.address.metadata if key == "zone"), "")

    def close(self) -> None:
        """Let every layer below free what it holds; connections end once they are idle."""
        for closer in self._env.closers:
            closer()

    def __str__(self) -> str:
        return str(self.address)

    def __repr__(self) -> str:
        reason = f": {self.health.reason}" if self.health.reason else ""
        return f"<{self.address} {self.status.name.lower()}{reason}, load {self.load}>"
