"""HTTP: the httpx client people already have, and any ASGI app, with the whole stack inside.

::

    async with httpx.AsyncClient(transport=meshlib.http.Transport()) as client:
        print(await client.get("http://users:8080/42"))

    app.add_middleware(meshlib.http.Middleware)
    async with meshlib.http.serve(app, "http://127.0.0.1:8000") as server: ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.lazy import part_of

if TYPE_CHECKING:
    from .asgi import Middleware
    from .for_httpx import Transport
    from .for_httpx2 import Transport as Httpx2Transport
    from .policy import connections
    from .server import HttpServer, serve
    from .service import HttpClient, client

__all__ = ["HttpClient", "HttpServer", "Httpx2Transport", "Middleware", "Transport", "client", "connections", "serve"]

_WHERE = {
    "HttpClient": (".service", "HttpClient"),
    "HttpServer": (".server", "HttpServer"),
    "Httpx2Transport": (".for_httpx2", "Transport"),
    "Middleware": (".asgi", "Middleware"),
    "Transport": (".for_httpx", "Transport"),
    "client": (".service", "client"),
    "connections": (".policy", "connections"),
    "serve": (".server", "serve"),
}


def __getattr__(name: str) -> Any:
    # Whoever has one of httpx and httpx2 needs not the other.
    def needs(guest: str) -> tuple[str, str]:
        return f"{__name__}.{name}", "httpx2" if guest in ("httpx2", "httpcore2") else "http"

    return part_of(__name__, _WHERE, name, needs)
