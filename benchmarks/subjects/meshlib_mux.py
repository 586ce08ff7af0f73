"""meshlib's Mux protocol with bytes in and bytes out, with the whole default stack of either side."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.subjects import Call, Ready
from meshlib import mux


async def _echo(request: mux.Request) -> mux.Response:
    return mux.Response(request.body)


async def serve(ready: Ready) -> None:
    """Echo requests until cancelled."""
    async with mux.serve(_echo, "127.0.0.1:0") as server:
        ready(server.address)
        await server.wait_closed()


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Call]:
    """A client with every default, as an application would open it."""

    async def call(body: bytes) -> bytes:
        return (await client(mux.Request(body, dest="/echo"))).body

    async with mux.client(address) as client:
        yield call
