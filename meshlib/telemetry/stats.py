"""The golden metrics of whatever is below: requests, success, failures by kind, latency, how many are under way.

The same layer stands in three places: at the top of a client (logical calls), above each endpoint (attempts), and at
the top of a server. Finagle: StatsFilter, whose names these are; unlike it, a client counts logical calls at the top,
so that its success rate is what its callers saw.

A reply that lasts beyond the call (`Lasting`: a stream, a body) is a request with the latency of its beginning, and a
success or a failure when it ends; until then it is neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from ..core.classify import ResponseClass, classify
from ..core.context import VAR
from ..core.deadlines import passed
from ..core.env import Env
from ..core.service import Filter, Lasting, Service

__all__ = ["EndpointStats", "Stats"]


class Stats(Filter[Any, Any, Any, Any]):
    """Counts requests, success, failures and cancellations, and measures latency in milliseconds."""

    place: ClassVar[str] = "stats"

    def __init__(self, env: Env | None = None) -> None:
        env = env or Env()
        metrics = env.metrics
        self.pending = 0
        self._metrics = metrics
        self._now = env.clock
        self._classify = None if env.classifier is classify else env.classifier
        self._lasting: Callable[[Any], Lasting | None] | None = env.params.get(Lasting)
        self._requests = metrics.counter("requests")
        self._success = metrics.counter("success")
        self._failures = metrics.counter("failures")
        self._cancelled = metrics.counter("cancelled")
        self._latency = metrics.histogram("request_latency_ms")
        metrics.gauge("pending", lambda: self.pending)

    def build(self, env: Env, service: Any) -> Any:
        """These counters belong to one client, server or endpoint."""
        return type(self)(self.scoped(env)).bind(service)

    def scoped(self, env: Env) -> Env:
        """Where the numbers go."""
        return env

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Count and time one request."""
        now = self._now.now
        started = now()
        self.pending += 1
        try:
            reply = await service(request)
        except Exception as error:
            verdict = (self._classify or classify)(request, None, error)
            if verdict is not ResponseClass.IGNORABLE:
                self._requests.value += 1
                self._latency.record((now() - started) * 1e3)
            if verdict is ResponseClass.SUCCESS:
                self._success.value += 1
            elif verdict is not ResponseClass.IGNORABLE:
                self._failed(type(error).__name__)
            raise
        except BaseException:
            if passed(VAR.get().deadline, self._now):
                # Its time ran out, and whoever keeps the deadline cancelled it: a failure, not a change of mind.
                self._requests.value += 1
                self._latency.record((now() - started) * 1e3)
                self._failed("DeadlineExceeded")
            else:
                self._cancelled.value += 1
            raise
        finally:
            self.pending -= 1
        verdict = ResponseClass.SUCCESS if self._classify is None else self._classify(request, reply, None)
        if verdict is ResponseClass.IGNORABLE:
            return reply
        self._requests.value += 1
        self._latency.record((now() - started) * 1e3)
        if verdict is not ResponseClass.SUCCESS:
            self._failed("reply")
        elif self._lasting is not None and (lasting := self._lasting(reply)) is not None:
            lasting.on_end(functools.partial(self._ended, request))
        else:
            self._success.value += 1
        return reply

    def _ended(self, request: Any, error: Exception | None) -> None:
        """The end of a reply that has begun well."""
        verdict = ResponseClass.SUCCESS if error is None else (self._classify or classify)(request, None, error)
        if verdict is ResponseClass.SUCCESS:
            self._success.value += 1
        elif verdict is not ResponseClass.IGNORABLE:
            self._failed(type(error).__name__)

    def __repr__(self) -> str:
        return f"{self.place}()"

    def _failed(self, kind: str) -> None:
        self._failures.value += 1
        self._metrics.counter(f"failures/{kind}").value += 1


class EndpointStats(Stats):
    """The same for one endpoint: every attempt counts, and the numbers leave with the endpoint."""

    place: ClassVar[str] = "endpoint_stats"
    keeps_deadline: ClassVar[bool] = True

    def scoped(self, env: Env) -> Env:
        """Below ``endpoints/<address>``."""
        metrics = env.metrics.scope("endpoints", str(env.address))
        env.closers.append(metrics.drop)
        return env.evolve(metrics=metrics)
