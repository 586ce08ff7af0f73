"""gRPC: the stubs that people already have, and the handlers, with the whole stack inside.

::

    GreeterStub(meshlib.grpc.Channel("dns://greeter.prod:50051"))
    async with meshlib.grpc.serve([GreeterHandler()], "127.0.0.1:50051") as server: ...

It stands upon grpclib, and runs on asyncio alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.lazy import part_of

if TYPE_CHECKING:
    from .calling.channel import Channel
    from .calling.methodconfig import service_config
    from .calling.pool import connections
    from .calling.rpc import rpc_client as rpc_client
    from .serving.limits import Limits
    from .serving.rpc import serve_rpc as serve_rpc
    from .serving.server import Server, serve

__all__ = ["Channel", "Limits", "Server", "connections", "serve", "service_config"]

_WHERE = {
    "Channel": (".calling.channel", "Channel"),
    "Limits": (".serving.limits", "Limits"),
    "Server": (".serving.server", "Server"),
    "connections": (".calling.pool", "connections"),
    "rpc_client": (".calling.rpc", "rpc_client"),
    "serve": (".serving.server", "serve"),
    "serve_rpc": (".serving.rpc", "serve_rpc"),
    "service_config": (".calling.methodconfig", "service_config"),
}


def __getattr__(name: str) -> Any:
    # Whoever has a client needs no server.
    return part_of(__name__, _WHERE, name, lambda _: (__name__, "grpc"))
