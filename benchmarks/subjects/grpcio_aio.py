"""grpcio's asyncio interface: a C core with Python at the edges.

Generic handlers without serializers pass the bytes as they are, so that no message library is measured with it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]

from benchmarks.subjects import Call, Ready

_SERVICE, _METHOD = "benchmarks.Echo", "Echo"

# Without this an http_proxy variable of the environment would be asked for the way to the local host.
_OPTIONS = (("grpc.enable_http_proxy", 0),)


async def _echo(request: bytes, _context: object) -> bytes:
    return request


async def serve(ready: Ready) -> None:
    """Echo calls until cancelled."""
    server = grpc.aio.server()
    methods = {_METHOD: grpc.unary_unary_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        ready(f"127.0.0.1:{port}")
        await server.wait_for_termination()
    finally:
        await server.stop(None)


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Call]:
    """One channel, which is one connection."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        yield channel.unary_unary(f"/{_SERVICE}/{_METHOD}")
