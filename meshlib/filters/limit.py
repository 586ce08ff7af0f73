"""The concurrency limit: a server that is full says so at once, and the client goes elsewhere.

A refusal before any work is done costs next to nothing and is safe to repeat, so it becomes a nack on the wire, which
clients requeue under their budget. Finagle: ConcurrentRequestFilter (off by default there; on here, because a Python
process that takes everything it is offered first gets slow and then gets killed).
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..core.env import Env
from ..core.errors import ConfigurationError, Rejected
from ..core.service import Call, Filter, Service

__all__ = ["ConcurrencyLimit", "concurrency_limit"]

DEFAULT = 1000
"""Requests at once. One core of Python answers some 10,000 small calls a second: 1,000 at once are 100 ms of work."""


class ConcurrencyLimit(Filter[Any, Any, Any, Any]):
    """Refuses requests beyond a number at once. See `concurrency_limit`."""

    place: ClassVar[str] = "limit"

    def __init__(self, limit: int = DEFAULT, env: Env | None = None) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigurationError(f"concurrency_limit({limit!r}): give a whole number of requests, 1 or more")
        env = env or Env()
        self.limit = limit
        self.active = 0
        self._refusal = (
            f"server {env.label!r} is at its limit of {limit} requests at once"
            if env.label
            else f"over the limit of {limit} at once"
        )
        self._rejected = env.metrics.counter("limit/rejected")
        env.metrics.gauge("limit/concurrency", lambda: self.active)

    def build(self, env: Env, service: Any) -> Any:
        """Counts this server's requests."""
        return type(self)(self.limit, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Handle it if there is room.

        Raises:
            Rejected: There is none.
        """
        if self.active >= self.limit:
            self._rejected.value += 1
            refusal = Rejected(self._refusal)
            if isinstance(request, Call):
                # The call of a function was refused, which need not be the whole of the request that is being served: a
                # server must not promise its client that nothing was done.
                refusal.processed = None
            raise refusal
        self.active += 1
        try:
            return await service(request)
        finally:
            self.active -= 1

    def __repr__(self) -> str:
        return f"concurrency_limit({self.limit})"


def concurrency_limit(limit: int = DEFAULT) -> ConcurrencyLimit:
    """Refuse requests beyond ``limit`` at once, before any work is done.

    Raises:
        ConfigurationError: ``limit`` is no whole number above 0.
    """
    return ConcurrencyLimit(limit)
