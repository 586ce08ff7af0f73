"""meshlib's typed rpc: a class with a method is the interface, its instance the server, a proxy the client."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import meshlib
from benchmarks.subjects import Call, Ready
from meshlib import rpc


class Echo:
    """The interface and its only implementation."""

    @rpc(idempotent=True)
    async def echo(self, body: bytes) -> bytes:
        """Answer with the same bytes."""
        return body


async def serve(ready: Ready) -> None:
    """Echo calls until cancelled."""
    async with meshlib.serve(Echo(), "mux://127.0.0.1:0") as server:
        ready(server.address)
        await server.wait_closed()


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Call]:
    """A typed client with every default, as an application would open it."""
    async with meshlib.client(Echo, address) as client:
        yield client.echo
