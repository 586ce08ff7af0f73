"""The transport for ``httpx2``."""

from __future__ import annotations

from typing import Any

import httpx2

from .transport import MeshTransport

__all__ = ["Transport"]


class Transport(MeshTransport, httpx2.AsyncBaseTransport):
    """Sends the requests of an ``httpx2.AsyncClient`` through the client stack.

    ``httpx2.AsyncClient(transport=meshlib.http.Httpx2Transport())`` takes names from each request's host;
    ``Transport("k8s://shop/users:http")`` sends all of them there. For the options see `MeshTransport`.
    """

    def __init__(self, target: str | None = None, *layers: Any, **options: Any) -> None:
        super().__init__(httpx2, target, *layers, **options)
