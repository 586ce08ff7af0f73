"""An endpoint as a balancer sees it. Finagle: loadbalancer/NodeT, LeastLoaded.scala."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ..core.env import Env
from ..core.health import Health
from ..core.service import Status
from ..names.addr import Address

__all__ = ["Node"]


class Node:
    """One endpoint.

    Attributes:
        address: Where it is.
        load: Requests under way to it: what least-loaded balancing compares.
        removed: It is no longer in the name's set; it finishes what it has.
    """

    __slots__ = ("_env", "address", "health", "load", "removed", "service")

    def __init__(self, address: Address, service: Callable[[Any], Awaitable[Any]], env: Env) -> None:
        self.address = address
        self.service = service
        self.health: Health = env.health
        self.load = 0
        self.removed = False
        self._env = env

    @property
    def status(self) -> Status:
        """Closed once removed, else what its layers say."""
        return Status.CLOSED if self.removed else self.health.status

    def close(self) -> None:
        """Let every layer below free what it holds; connections end once they are idle."""
        for closer in self._env.closers:
            closer()

    def __str__(self) -> str:
        return str(self.address)

    def __repr__(self) -> str:
        reason = f": {self.health.reason}" if self.health.reason else ""
        return f"<{self.address} {self.status.name.lower()}{reason}, load {self.load}>"
