"""What a request is called in metrics and spans: its method and route, of which there are few, and not its path.

The framework knows the route once it has matched: FastAPI and Starlette leave it in the scope (Litestar its
``path_template``). For others, ``Middleware(app, route=…)`` says; where that fails, as for a request that matched
nothing, there is no route. After `MOST` different ones the rest is ``other``, so that no caller can make a label of its
own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar, Final

from ..core.context import VAR
from ..core.deadlines import passed
from ..core.env import Env
from ..core.service import Filter, Service
from ..telemetry.http import METHODS

__all__ = ["MOST", "RouteStats", "route_of"]

logger = logging.getLogger("meshlib.server")

MOST: Final = 100


def route_of(scope: Any) -> str:
    """The route that the framework has matched, such as ``/users/{id}``; empty if it has not, or does not say."""
    path = scope.get("path_template")
    if path is None:
        route = scope.get("route")
        if route is None:
            return ""
        path = getattr(route, "path", None)
        of_fastapi = scope.get("fastapi")
        if isinstance(of_fastapi, dict):  # newer ones leave the route as its router has it, without the router's prefix
            whole = of_fastapi.get("effective_route_context")
            if getattr(whole, "original_route", None) is route:
                path = getattr(whole, "path", path)
        if isinstance(path, str):
            inner = scope.get("root_path", "")
            outer = scope.get("app_root_path", inner)  # there since the first mount, if there was one
            if inner != outer and inner.startswith(outer):  # an app that is mounted knows only its own part
                is_mount = hasattr(route, "app") and not hasattr(route, "endpoint")  # whose path is there already
                path = inner[len(outer) :] + ("" if is_mount else path)
    return path if isinstance(path, str) else ""


class RouteStats(Filter[Any, Any, Any, Any]):
    """Counts and times requests by route, below ``routes/<METHOD> <route>``.

    Args:
        route: What a request's route is, given its ASGI scope.
        env: Whose numbers these are.
    """

    place: ClassVar[str] = "stats"

    def __init__(self, route: Callable[[Any], str] = route_of, env: Env | None = None) -> None:
        self._route = route
        env = env or Env()
        self._metrics, self._clock = env.metrics, env.clock
        self._known: dict[tuple[str, str], tuple[Any, Any, Any, Any]] = {}
        self._failed = False

    def build(self, env: Env, service: Any) -> Any:
        """These numbers belong to one server."""
        return type(self)(self._route, env).bind(service)

    async def apply(self, request: Any, service: Service[Any, Any]) -> Any:
        """Count one request, once its response is complete."""
        started = self._clock.now()
        counted = False

        def count(failed: bool = False) -> None:
            nonlocal counted
            if not counted:
                counted = True
                requests, success, failures, latency = self._of(request)
                requests.value += 1
                (failures if failed or request.failed else success).value += 1
                latency.record((self._clock.now() - started) * 1e3)

        request.on_complete(count)
        try:
            reply = await service(request)
        except Exception:
            count(failed=True)
            raise
        except BaseException:
            if passed(VAR.get().deadline, self._clock):
                count(failed=True)
            elif not counted:
                counted = True
                self._of(request)  # spans say the route
            raise
        count()
        return reply

    def _of(self, request: Any) -> tuple[Any, Any, Any, Any]:
        route = request.route = self._route_of(request.scope)
        method = request.method if request.method in METHODS else "_OTHER"
        found = self._known.get((method, route))
        if found is None:
            label = f"{method} {route or '-'}"
            if len(self._known) >= MOST:
                method = route = label = "other"
                found = self._known.get((method, route))
            if found is None:
                scope = self._metrics.scope("routes", label)
                found = self._known[method, route] = (
                    scope.counter("requests"),
                    scope.counter("success"),
                    scope.counter("failures"),
                    scope.histogram("request_latency_ms"),
                )
        return found

    def _route_of(self, scope: Any) -> str:
        try:
            route: Any = self._route(scope)
        except Exception as error:  # a label is not worth a request
            if not self._failed:
                self._failed = True
                logger.warning("route=%r failed, here and perhaps again: %r", self._route, error)
            return ""
        return route if isinstance(route, str) else ""

    def __repr__(self) -> str:
        return "routes()"
