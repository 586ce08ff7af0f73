"""Errors that say which client, which name, which endpoints, how often and how long.

The layer opens the account of the logical call (`CallRecord`), unless the tracing above it has begun one. The layers
below fill it in, and it is written onto whatever error comes up. Finagle: ExceptionSourceFilter and
ExceptionRemoteInfoFactory.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..core.context import VAR, CallRecord
from ..core.env import Env
from ..core.errors import Attempt, MeshError
from ..core.service import Filter, Service

__all__ = ["Source"]


class Source(Filter[Any, Any, Any, Any]):
    """Tells errors where they come from."""

    place: ClassVar[str] = "source"

    def __init__(self, env: Env | None = None) -> None:
        self._env = env or Env()
        self._now = self._env.clock

    def build(self, env: Env, service: Any) -> Any:
        """With the client's label and name."""
        return type(self)(env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Make the call, and sign its error."""
        context = VAR.get()
        # The attempt number belongs to the request that is being served. Our own call starts at 0, and remembers.
        record = context.record
        if record is None or record.opened:
            record = CallRecord(self._now.now(), context.attempt > 0)
        record.opened = True
        token = VAR.set(context.evolve(record=record, attempt=0))
        try:
            return await service(request)
        except MeshError as error:
            if not error.label:
                env = self._env
                error.label = env.label
                error.name = env.name
                error.elapsed = self._now.now() - record.started
                if record.endpoint is not None:  # a try that time ran out on, or that something above gave up
                    record.attempts += (Attempt(str(record.endpoint), "no reply by then"),)
                error.attempts = record.attempts
                error.decisions = record.decisions
                if error.attempts and not error.endpoint:
                    error.endpoint = error.attempts[-1].endpoint
            raise
        except Exception as error:
            tries = "; ".join(map(str, record.attempts))
            error.add_note(f"meshlib: client {self._env.label!r}, name {self._env.name}{', ' + tries if tries else ''}")
            raise
        finally:
            VAR.reset(token)

    def __repr__(self) -> str:
        return "source()"
