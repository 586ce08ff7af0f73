"""The Service form: ``httpx.Request`` in, ``httpx.Response`` out, for those who compose filters by hand."""

from __future__ import annotations

from types import ModuleType, TracebackType
from typing import Any, Self

import anyio

from .transport import MeshTransport

__all__ = ["HttpClient", "client"]


class HttpClient:
    """A service: give it a request, and it gives the response, read to its end. See `client`."""

    def __init__(self, transport: MeshTransport) -> None:
        transport.body_limit = transport.total  # a call ends with its body here
        self.transport = transport

    async def __call__(self, request: Any) -> Any:
        """Send one request, and read the whole answer, both within the total timeout.

        Raises:
            httpx.TransportError: It failed; also a `MeshError`, which says where, how often and why.
        """
        response = await self.transport.handle_async_request(request)
        response.request = request
        try:
            await response.aread()
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()
        return response

    def metrics(self) -> dict[str, float]:
        """Every number this client keeps, by name."""
        return self.transport.metrics()

    async def aclose(self) -> None:
        """Close every connection. Twice is the same as once."""
        await self.transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return repr(self.transport)


def client(target: str | None = None, *layers: Any, module: ModuleType | str = "httpx", **options: Any) -> HttpClient:
    """An HTTP client as a service, to be called with an ``httpx.Request``; the total timeout is for the body as well.

    Args:
        target: Where requests go; ``None`` to go by each request's host.
        layers: Each replaces the default at its place; plain filters are added, and see ``Request`` and ``Response``.
        module: ``httpx`` or ``httpx2``: whose requests it takes.
        options: See `meshlib.http.transport.MeshTransport`.

    Raises:
        ConfigurationError: The target, a layer or an option makes no sense.
    """
    return HttpClient(MeshTransport(module, target, *layers, **options))
