"""A gRPC client that says exactly what a test wants, well-formed or not: h2 on a bare socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import anyio
import h2.config
import h2.events

from meshlib.grpc.h2 import DrainableConnection

__all__ = ["Answer", "Peer", "wait_until"]


async def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until it does."""
    with anyio.fail_after(10):
        while not holds():  # noqa: ASYNC110 - the other side tells nobody
            await anyio.sleep(0.002)


class Answer:
    """What came back on a stream."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.data = b""
        self.reset: int | None = None
        self.ended = asyncio.Event()

    @property
    def messages(self) -> list[bytes]:
        """The messages in the data."""
        found, rest = [], self.data
        while rest:
            size = int.from_bytes(rest[1:5])
            found.append(rest[5 : 5 + size])
            rest = rest[5 + size :]
        return found


class Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, greet: bool = True) -> None:
        self.reader, self.writer = reader, writer
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="latin-1",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
        )
        self.h2 = DrainableConnection(config, header_list=1 << 20)
        self.answers: dict[int, Answer] = {}
        self.goaways: list[tuple[int, int]] = []
        self.pings = 0
        self.closed = asyncio.Event()
        self._task: Any = None
        if greet:
            self.h2.initiate_connection()
            self.flush()

    @classmethod
    @asynccontextmanager
    async def to(cls, address: str, *, greet: bool = True) -> AsyncIterator[Self]:
        """A connection to ``host:port``."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        peer = cls(reader, writer, greet)
        peer._task = asyncio.create_task(peer._read())
        try:
            yield peer
        finally:
            peer._task.cancel()
            await asyncio.wait([peer._task])
            writer.transport.abort()
            await asyncio.sleep(0)

    def flush(self) -> None:
        """Send what h2 has to send."""
        self.writer.write(self.h2.data_to_send())

    def send(self, data: bytes) -> None:
        """Send these bytes."""
        self.writer.write(data)

    def fields(
        self, path: str, *more: tuple[str, str], content_type: str = "application/grpc"
    ) -> list[tuple[str, str]]:
        """The fields of a request."""
        return [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "test"),
            ("te", "trailers"),
            ("content-type", content_type),
            *more,
        ]

    def open(self, fields: Any, *, end: bool = False, flush: bool = True) -> int:
        """Open a stream with these fields."""
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, fields, end_stream=end)
        if flush:
            self.flush()
        return stream

    def request(self, path: str, *more: tuple[str, str], end: bool = False, **options: Any) -> int:
        """Open a stream for a call."""
        return self.open(self.fields(path, *more, **options), end=end)

    def message(self, stream: int, body: bytes, *, end: bool = False, flag: int = 0, size: int | None = None) -> None:
        """Send a message, or what looks like one."""
        data = bytes((flag,)) + (len(body) if size is None else size).to_bytes(4) + body
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    async def answer(self, stream: int) -> Answer:
        """Wait for the end of a stream."""
        answer = self.answers[stream]
        await asyncio.wait_for(answer.ended.wait(), 10)
        return answer

    async def wait_closed(self, seconds: float = 10) -> None:
        """Wait until the server has closed the connection."""
        await asyncio.wait_for(self.closed.wait(), seconds)

    async def _read(self) -> None:
        try:
            while data := await self.reader.read(65_536):
                for event in self.h2.receive_data(data):
                    self._heard(event)
                self.flush()
        except ConnectionError:
            pass
        finally:
            self.closed.set()
            for answer in self.answers.values():
                answer.ended.set()

    def _heard(self, event: Any) -> None:
        answer = self.answers.get(getattr(event, "stream_id", 0) or 0)
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived) and answer is not None:
            answer.fields |= dict(event.headers)
        elif isinstance(event, h2.events.DataReceived) and answer is not None:
            answer.data += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded) and answer is not None:
            answer.ended.set()
        elif isinstance(event, h2.events.StreamReset) and answer is not None:
            answer.reset = int(event.error_code)
            answer.ended.set()
        elif isinstance(event, h2.events.PingReceived):
            self.pings += 1
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaways.append((event.last_stream_id, int(event.error_code)))
