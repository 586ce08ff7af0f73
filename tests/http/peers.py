"""Servers that speak HTTP/2 as a test tells them to, and clients for them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.abc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import httpx

from meshlib import http

__all__ = ["OK", "Peer", "Server", "answering", "asked", "client_of", "listening", "only", "until"]

OK = [(b":status", b"200")]


class Peer:
    """A server's end: h2, a stream, and what has come."""

    def __init__(self, stream: anyio.abc.ByteStream, settings: dict[Any, int]) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=settings)
        self.seen: list[Any] = []

    async def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            await self.stream.send(data)

    async def answer(self, number: int, body: bytes = b"ok", end: bool = True) -> None:
        self.h2.send_headers(number, OK)
        self.h2.send_data(number, body, end_stream=end)
        await self.flush()


class Server:
    """Calls ``handle(peer, event)`` for whatever comes."""

    def __init__(self, handle: Callable[[Peer, Any], Awaitable[None]], **settings: int) -> None:
        self.handle, self.peers = handle, []
        self.settings = {getattr(h2.settings.SettingCodes, name.upper()): value for name, value in settings.items()}

    async def serve(self, stream: anyio.abc.ByteStream) -> None:
        peer = Peer(stream, self.settings)
        self.peers.append(peer)
        async with stream:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                peer.h2.initiate_connection()
                await peer.flush()
                while True:
                    for event in peer.h2.receive_data(await stream.receive()):
                        peer.seen.append(event)
                        # An answer may cross with the client's word that it waits no more.
                        with contextlib.suppress(h2.exceptions.StreamClosedError):
                            await self.handle(peer, event)
                    await peer.flush()


@contextlib.asynccontextmanager
async def listening(serve: Callable[[Any], Awaitable[None]]) -> AsyncIterator[str]:
    """Gives the address."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        yield f"127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        group.cancel_scope.cancel()


def client_of(target: str, *layers: Any) -> httpx.AsyncClient:
    """One that speaks HTTP/2 at once."""
    return httpx.AsyncClient(
        transport=http.Transport(target, *layers, http1=False, http2=True), base_url="http://users"
    )


@contextlib.asynccontextmanager
async def asked(handle: Any, *layers: Any, settings: dict[str, int] | None = None) -> AsyncIterator[Any]:
    """A server, and a client for it."""
    server = Server(handle, **(settings or {}))
    async with listening(server.serve) as target, client_of(target, *layers) as client:
        yield server, client


def only(client: Any) -> Any:
    [below] = client._transport.clients
    return below


async def until(holds: Callable[[], Any]) -> None:
    with anyio.fail_after(10):
        while not holds():  # noqa: ASYNC110 - it tells nobody
            await anyio.sleep(0.005)


async def answering(peer: Peer, event: Any) -> None:
    if isinstance(event, h2.events.RequestReceived):
        await peer.answer(event.stream_id)
