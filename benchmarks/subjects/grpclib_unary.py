"""grpclib: gRPC in pure Python on asyncio, with h2 for the HTTP/2 below it.

A codec that passes bytes as they are stands for the message library, and a hand-written mapping for generated code.
"""

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Cardinality, Handler
from grpclib.encoding.base import CodecBase
from grpclib.server import Server, Stream

from benchmarks.subjects import Call, Ready

_PATH = "/benchmarks.Echo/Echo"


class _Bytes(CodecBase):
    @property
    def __content_subtype__(self) -> str:
        return "bytes"

    def encode(self, message: bytes, message_type: object) -> bytes:
        return message

    def decode(self, data: bytes, message_type: object) -> bytes:
        return data


class _Echo:
    async def echo(self, stream: Stream[bytes, bytes]) -> None:
        request = await stream.recv_message()
        if request is not None:
            await stream.send_message(request)

    def __mapping__(self) -> Mapping[str, Handler]:
        return {_PATH: Handler(self.echo, Cardinality.UNARY_UNARY, bytes, bytes)}


async def serve(ready: Ready) -> None:
    """Echo calls until cancelled."""
    server = Server([_Echo()], codec=_Bytes())
    # The library does not tell which port it got, so it is given a socket that knows. The protocol is spelled out
    # because the library turns Nagle's algorithm off for sockets with that protocol only, as when it makes its own.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    host, port = listener.getsockname()
    await server.start(sock=listener)
    try:
        ready(f"{host}:{port}")
        await server.wait_closed()
    finally:
        server.close()


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Call]:
    """One channel, which is one connection."""
    host, _, port = address.rpartition(":")
    async with Channel(host, int(port), codec=_Bytes()) as channel:
        yield UnaryUnaryMethod[bytes, bytes](channel, _PATH, bytes, bytes)
