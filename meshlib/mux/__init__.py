"""Mux, Finagle's own protocol: many requests at once over one connection, with contexts, discards, drains and nacks.

::

    async def echo(request: mux.Request) -> mux.Response:
        return mux.Response(request.body)

    async with mux.serve(echo, "127.0.0.1:0") as server, mux.client(server.address) as client:
        reply = await client(mux.Request(b"hello", dest="/echo"))
"""

from .client import client
from .codec import Limits, MuxError
from .request import Request, Response
from .server import serve

__all__ = ["Limits", "MuxError", "Request", "Response", "client", "serve"]
