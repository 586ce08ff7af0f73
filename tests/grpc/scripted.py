"""A server that says exactly what a test tells it to, well or badly, frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from grpclib.client import UnaryUnaryMethod
from grpclib.encoding.base import CodecBase
from hyperframe.frame import DataFrame, HeadersFrame, RstStreamFrame

import meshlib.grpc
from meshlib.grpc.h2 import goaway

__all__ = ["OK", "Bytes", "Peer", "answering", "channel", "message", "scripted", "unary"]

HEAD = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]


def message(payload: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(payload).to_bytes(4) + payload


class Peer:
    """One connection, from the server's side."""

    def __init__(self, reader: Any, writer: Any, settings: dict[Any, int]) -> None:
        self.reader, self.writer = reader, writer
        config = h2.config.H2Configuration(client_side=False, validate_outbound_headers=False, header_encoding="ascii")
        self.h2 = h2.connection.H2Connection(config)
        if settings:
            self.h2.local_settings = h2.settings.Settings(client=False, initial_values=settings)
        self.requests: list[int] = []
        self.heads: dict[int, dict[str, str]] = {}
        self.resets: list[tuple[int, int]] = []
        self.pings = 0
        self.data: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.terminated: list[Any] = []

    def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            self.writer.write(data)

    async def pump(self) -> bool:
        """Take what has come; ``False`` at the end."""
        data = await self.reader.read(65536)
        if not data:
            return False
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self.requests.append(event.stream_id)
                self.heads[event.stream_id] = dict(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                self.data[event.stream_id] = self.data.get(event.stream_id, b"") + event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self.resets.append((event.stream_id, int(event.error_code)))
            elif isinstance(event, h2.events.StreamEnded):
                self.ended.add(event.stream_id)
            elif isinstance(event, h2.events.PingReceived):
                self.pings += 1
            elif isinstance(event, h2.events.ConnectionTerminated):
                self.terminated.append(event.error_code)
        self.flush()
        return True

    async def until(self, condition: Callable[[], Any]) -> bool:
        while not condition():
            if not await self.pump():
                return False
        return True

    async def request(self, n: int = 1) -> int:
        """Wait for the n-th request; gives its stream."""
        if not await self.until(lambda: len(self.requests) >= n):
            raise ConnectionResetError("the client has gone")
        return self.requests[n - 1]

    def answer(self, stream: int, payload: bytes = b"", trailers: Any = OK, head: Any = HEAD) -> None:
        """A whole reply."""
        self.h2.send_headers(stream, head)
        self.h2.send_data(stream, message(payload))
        self.h2.send_headers(stream, trailers, end_stream=True)
        self.flush()

    def headers(self, stream: int, headers: Any, *, end: bool = False) -> None:
        self.h2.send_headers(stream, headers, end_stream=end)
        self.flush()

    def raw(self, data: bytes) -> None:
        self.flush()
        self.writer.write(data)

    def raw_headers(self, stream: int, headers: Any, *flags: str) -> None:
        frame = HeadersFrame(stream, self.h2.encoder.encode(headers))
        for flag in flags or ("END_HEADERS",):
            frame.flags.add(flag)
        self.raw(frame.serialize())

    def raw_data(self, stream: int, data: bytes, *flags: str) -> None:
        frame = DataFrame(stream, data)
        for flag in flags:
            frame.flags.add(flag)
        self.raw(frame.serialize())

    def reset(self, stream: int, code: int) -> None:
        self.raw(RstStreamFrame(stream, code).serialize())

    def goaway(self, last: int, code: int = 0, debug: bytes = b"") -> None:
        self.raw(goaway(last, code, debug))


@contextlib.asynccontextmanager
async def scripted(
    script: Callable[[Peer], Awaitable[Any]],
    *,
    settings: dict[Any, int] | None = None,
    hello: bool = True,
    peers: list[Peer] | None = None,
) -> AsyncIterator[tuple[str, list[Peer]]]:
    """Serve ``script`` on each connection, which is then read to its end. Gives the address, and the connections."""
    peers = [] if peers is None else peers
    tasks: set[Any] = set()

    async def serve(reader: Any, writer: Any) -> None:
        tasks.add(asyncio.current_task())
        peer = Peer(reader, writer, settings or {})
        peers.append(peer)
        try:
            if hello:
                peer.h2.initiate_connection()
                peer.flush()
            await script(peer)
            while await peer.pump():
                pass
        except (ConnectionError, h2.exceptions.ProtocolError):
            pass
        finally:
            tasks.discard(asyncio.current_task())
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}", peers
    finally:
        server.close()
        await asyncio.sleep(0.01)  # for tasks of connections that have been accepted in this moment
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Bytes(CodecBase):
    """Messages are bytes; those that say ``bad`` are none."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return message

    def decode(self, data: bytes, message_type: Any) -> bytes:
        if data == b"bad":
            raise ValueError("no message at all")
        return data


def channel(address: str, *layers: Any, **options: Any) -> Any:
    """A channel of bytes."""
    return meshlib.grpc.Channel(address, *layers, codec=Bytes(), **options)


def unary(each: Any, path: str = "/x.Y/Z") -> Any:
    """A unary method of bytes, as a stub has it."""
    return UnaryUnaryMethod(each, path, bytes, bytes)


def answering(*steps: Callable[[Peer, int], Any]) -> Callable[[Peer], Awaitable[None]]:
    """A script that treats each request with ``steps``."""

    async def script(peer: Peer) -> None:
        n = 0
        while True:
            n += 1
            stream = await peer.request(n)
            if all(given_up != stream for given_up, _ in peer.resets):
                for step in steps:
                    step(peer, stream)

    return script
