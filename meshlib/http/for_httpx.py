"""The transport for ``httpx``."""

from __future__ import annotations

from typing import Any

import httpx

from .transport import MeshTransport

__all__ = ["Transport"]


class Transport(MeshTransport, httpx.AsyncBaseTransport):
    """Sends the requests of an ``httpx.AsyncClient`` through the client stack.

    ``httpx.AsyncClient(transport=meshlib.http.Transport())`` takes names from each request's host;
    ``Transport("k8s://shop/users:http")`` sends all of them there. For the options see `MeshTransport`.
    """

    def __init__(self, target: str | None = None, *layers: Any, **options: Any) -> None:
        super().__init__(httpx, target, *layers, **options)
