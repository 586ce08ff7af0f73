"""What a request is called in metrics and spans: its method and route, of which there are few, and not its path.

The framework knows the route once it has matched: FastAPI and Starlette leave it in the scope (Litestar its
``path_template``). For others, ``Middleware(app, route=…)`` says. After `MOST` different ones the rest is ``other``, so
that no caller can make a label of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

from ..core.context import VAR
from ..core.deadlines import passed
from ..core.env import Env
from ..core.service import Filter, Service

__all__ = ["METHODS", "MOST", "RouteStats", "route_of"]

MOST: Final = 100
METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"))
"""Others are ``_OTHER``, as in OpenTelemetry's HTTP conventions."""


def route_of(scope: Any) -> str:
    """The route that the framework has matched, such as ``/users/{id}``; empty if it has not, or does not say."""
    path = scope.get("path_template")
    if path is None:
        route = scope.get("route")
        path = getattr(route, "path", None) if route is not None else None
        if isinstance(path, str):
            outer, inner = scope.get("app_root_path", ""), scope.get("root_path", "")
            if inner != outer and inner.startswith(outer):  # an app that is mounted knows only its own part
                path = inner[len(outer) :] + path
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
                (failures if failed or request.status >= 500 else success).value += 1
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
        route = request.route = self._route(request.scope)
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

    def __repr__(self) -> str:
        return "routes()"
