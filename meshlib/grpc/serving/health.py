"""grpc.health.v1, tied to the life of the server.

======================  =========================  ====================================
service                 while the server serves    as soon as it begins to end
======================  =========================  ====================================
``""``, the server      SERVING                    NOT_SERVING, and so it stays
each of its services    SERVING, or as it was set  likewise
any other               NOT_FOUND (Watch:          likewise
                        SERVICE_UNKNOWN)
======================  =========================  ====================================

Source: grpc/doc/health-checking.md. Kubernetes' probes, Envoy and gRPC's own clients ask in this way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Final

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError

from .methods import HEALTH
from .own_protos import SERVING_STATUS, message

__all__ = ["Health", "is_bare"]

_UNKNOWN, _SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = range(len(SERVING_STATUS))
_Asked: Final = message("grpc.health.v1.HealthCheckRequest")
_Answer: Final = message("grpc.health.v1.HealthCheckResponse")
_ListAsked: Final = message("grpc.health.v1.HealthListRequest")
_ListAnswer: Final = message("grpc.health.v1.HealthListResponse")


def is_bare(mapping: Mapping[str, Handler]) -> bool:
    """Is the health among these methods grpclib's, without a check? It always says SERVING; ours knows more."""
    handler = mapping.get(f"/{HEALTH}/Check")
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    if type(owner).__module__ != "grpclib.health.service":
        return False
    return not any(getattr(owner, "_checks", {}).values())


class Health:
    """Says how the server and its services are. ``server.health.set("pkg.Service", False)`` changes one.

    Args:
        services: The names of the services, to begin with.
    """

    def __init__(self, services: Iterable[str] = ()) -> None:
        self._statuses: dict[str, int] = dict.fromkeys(("", *services), _SERVING)
        self._changed: set[asyncio.Event] = set()
        self._draining = False

    def set(self, service: str, serving: bool | None) -> None:
        """Say how a service is; once the server ends, that it is ending counts.

        Args:
            service: Its name, ``pkg.Service``; empty for the server as a whole.
            serving: Whether it serves; ``None`` for nobody knows.
        """
        self._statuses[service] = _UNKNOWN if serving is None else _SERVING if serving else _NOT_SERVING
        self._tell()

    def drain(self) -> None:
        """Nothing serves any more."""
        self._draining = True
        self._tell()

    def serving(self, service: str = "") -> bool:
        """Does it?"""
        return self._status(service) == _SERVING

    def _status(self, service: str) -> int | None:
        status = self._statuses.get(service)
        return _NOT_SERVING if self._draining and status is not None else status

    def _tell(self) -> None:
        for event in self._changed:
            event.set()

    async def _check(self, stream: Any) -> None:
        request = await stream.recv_message()
        status = self._status(request.service)
        if status is None:
            raise GRPCError(Status.NOT_FOUND, "unknown service")
        await stream.send_message(_Answer(status=status))

    async def _list(self, stream: Any) -> None:
        await stream.recv_message()
        answer = _ListAnswer()
        for name in self._statuses:
            answer.statuses.add(key=name, value=_Answer(status=self._status(name)))
        await stream.send_message(answer)

    async def _watch(self, stream: Any) -> None:
        request = await stream.recv_message()
        changed = asyncio.Event()
        self._changed.add(changed)
        told = None
        try:
            while True:
                changed.clear()
                status = self._status(request.service)
                if status is None:
                    status = _SERVICE_UNKNOWN
                if status != told:
                    told = status
                    await stream.send_message(_Answer(status=status))
                await changed.wait()
        finally:
            self._changed.discard(changed)

    def __mapping__(self) -> dict[str, Handler]:
        return {
            f"/{HEALTH}/Check": Handler(self._check, Cardinality.UNARY_UNARY, _Asked, _Answer),
            f"/{HEALTH}/List": Handler(self._list, Cardinality.UNARY_UNARY, _ListAsked, _ListAnswer),
            f"/{HEALTH}/Watch": Handler(self._watch, Cardinality.UNARY_STREAM, _Asked, _Answer),
        }

    def __repr__(self) -> str:
        states = {name or "(server)": SERVING_STATUS[self._status(name) or 0] for name in self._statuses}
        return f"<Health: {states}>"
