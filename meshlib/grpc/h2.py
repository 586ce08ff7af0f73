"""HTTP/2 as gRPC needs it: connections that drain, and writes that go out together.

h2's state machine ends a connection with the first GOAWAY, in either direction, and refuses every frame after it. In
HTTP/2 a GOAWAY is the beginning of a drain: streams up to ``last_stream_id`` go on, and those above were never looked
at (RFC 9113 6.8). `DrainableConnection` tells of a GOAWAY and stays as it is; `goaway` makes the bytes of one to send.

Each small write costs a system call, 5 to 10 µs. `BatchingTransport` holds what is written within one turn of the event
loop, and writes it all at the turn's end, so that the calls of many tasks leave together.

Whatever is used of h2 beyond its documented interface is used here alone, and held by tests/grpc/test_h2.py.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from typing import Any, Final

from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, ConnectionInputs, H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, Event
from h2.exceptions import NoAvailableStreamIDError
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream, StreamInputs
from hyperframe.frame import Frame, GoAwayFrame, WindowUpdateFrame

__all__ = [
    "FLUSH_AT",
    "HEADER_LIST",
    "LAST_STREAM",
    "BatchingTransport",
    "DrainableConnection",
    "HeaderBlocks",
    "goaway",
    "literal",
]

HEADER_LIST: Final = 16384
"""Bytes of metadata that a peer may send at once (gRPC's hard limit; its soft one is 8 KiB)."""
HARD_HEADER_LIST: Final = 65536
"""Bytes of metadata that end the connection (h2's own default)."""
FLUSH_AT: Final = 65536
"""Bytes that are written at once, without waiting for the end of the turn."""
LAST_STREAM: Final = (1 << 31) - 1
"""As ``last_stream_id`` of a first GOAWAY: "no new streams soon", while those under way in the network still count."""
_DATA, _HEADERS, _CONTINUATION = 0, 1, 9
_END_STREAM, _END_HEADERS = 1, 4
_head: Final = struct.Struct(">HBBBL").pack
"""The nine bytes in front of a frame, the first one (the length's high byte) in two parts with the second."""


def _frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    size = len(body)
    return _head(size >> 8, size & 0xFF, kind, flags, stream_id) + body


class DrainableConnection(H2Connection):
    """An ``H2Connection`` that outlives GOAWAY.

    Args:
        config: h2's.
        header_list: Bytes of headers that the peer may send at once.
        max_streams: Streams that the peer may have open at once.
        window: Bytes of a stream that the peer may send before they are read.
    """

    def __init__(
        self, config: H2Configuration, *, header_list: int = HEADER_LIST, max_streams: int = 100, window: int = 65535
    ) -> None:
        super().__init__(config)
        values = {
            SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: header_list,
            SettingCodes.INITIAL_WINDOW_SIZE: window,
        }
        if config.client_side:
            values[SettingCodes.ENABLE_PUSH] = 0
        self.local_settings = Settings(client=bool(config.client_side), initial_values=values)
        # Beyond that the decoder gives up, and the connection with it; in between, a list that is too long can be
        # refused alone, by whoever it was sent to.
        self.decoder.max_header_list_size = max(header_list, HARD_HEADER_LIST)

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        """Tell of it, and change nothing: the streams that go on still have frames to send."""
        try:
            code: ErrorCodes | int = ErrorCodes(frame.error_code)
        except ValueError:
            code = frame.error_code
        event = ConnectionTerminated()
        event.error_code = code
        event.last_stream_id = frame.last_stream_id
        event.additional_data = frame.additional_data or None
        return [], [event]

    # --- what a client sends; h2 would look at every open stream first, and take frames through four objects ----------

    def open_request(self, block: bytes, data: bytes = b"", *, end: bool = False) -> int:
        """Open a stream with a header block, and with the data that goes with it; gives its number.

        Args:
            block: See `HeaderBlocks`.
            data: No more than fits into one frame and both windows.
            end: Nothing follows.

        Raises:
            NoAvailableStreamIDError: The connection has had all streams that there can be.
        """
        stream_id = self.highest_outbound_stream_id + 2 if self.highest_outbound_stream_id else 1
        if stream_id > self.HIGHEST_ALLOWED_STREAM_ID:
            raise NoAvailableStreamIDError("no stream is left")
        self.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
        stream = self._begin_new_stream(stream_id, AllowedStreamIDs.ODD)
        stream.state_machine.process_input(StreamInputs.SEND_HEADERS)
        stream.request_method = b"POST"
        most = self.max_outbound_frame_size
        ends = _END_STREAM if end and not data else 0
        if len(block) <= most:
            self._data_to_send += _frame(_HEADERS, _END_HEADERS | ends, stream_id, block)
        else:
            parts = [block[i : i + most] for i in range(0, len(block), most)]
            self._data_to_send += _frame(_HEADERS, ends, stream_id, parts[0])
            for part in parts[1:-1]:
                self._data_to_send += _frame(_CONTINUATION, 0, stream_id, part)
            self._data_to_send += _frame(_CONTINUATION, _END_HEADERS, stream_id, parts[-1])
        if ends:
            stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        elif data:
            self._put(stream, data, end)
        return stream_id

    def put(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send data that fits into one frame and both windows, see `room`; empty data only ends the stream.

        Raises:
            ProtocolError: The stream is not open for it.
        """
        self._put(self._get_stream_by_id(stream_id), data, end)

    def _put(self, stream: H2Stream, data: bytes, end: bool) -> None:
        machine = stream.state_machine
        if data:
            machine.process_input(StreamInputs.SEND_DATA)
        if end:
            machine.process_input(StreamInputs.SEND_END_STREAM)
        self._data_to_send += _frame(_DATA, _END_STREAM if end else 0, stream.stream_id, data)
        size = len(data)
        stream.outbound_flow_control_window -= size
        self.outbound_flow_control_window -= size

    @property
    def new_room(self) -> int:
        """Bytes that may be sent at once on a stream that is opened now."""
        return min(
            self.outbound_flow_control_window, self.remote_settings.initial_window_size, self.max_outbound_frame_size
        )

    def room(self, stream_id: int) -> int:
        """Bytes that may be sent at once on a stream; 0 or less if none, and for a stream that is gone."""
        stream = self.streams.get(stream_id)
        if stream is None or stream.closed:
            return 0
        return min(self.outbound_flow_control_window, stream.outbound_flow_control_window, self.max_outbound_frame_size)

    def give_back(self, size: int) -> None:
        """The connection's window has these bytes again; no stream's has."""
        increment = self._inbound_flow_control_window_manager.process_bytes(size)
        if increment:
            self._prepare_for_sending([WindowUpdateFrame(0, window_increment=increment)])

    def give_back_on(self, stream_id: int, size: int) -> None:
        """Bytes of a stream have been read: its own window has them again, and the connection's is left as it is."""
        stream = self.streams.get(stream_id)
        if stream is not None and not stream.closed:
            self._prepare_for_sending(stream.acknowledge_received_data(size))

    def forget(self, stream_id: int) -> None:
        """A stream has ended on both sides. h2 finds out by itself when it looks at all of them."""
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self._closed_streams[stream_id] = stream.closed_by

    def half_open(self, stream_id: int) -> bool:
        """May, or must, more be sent on that stream?"""
        stream = self.streams.get(stream_id)
        return stream is not None and not stream.closed


class HeaderBlocks:
    """Header blocks of requests that mostly say the same: what they share is encoded once.

    HPACK's references to its table stay valid until something is added to it, and what varies from request to request
    is never added: it goes as literals, which cost a few bytes more, and neither Huffman's code nor the table's room.

    Args:
        encoder: The connection's; nobody else may use it.
    """

    __slots__ = ("_blocks", "_encoder")

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._blocks: dict[Any, bytes] = {}

    def block(self, key: Any, fixed: Iterable[tuple[str, str]]) -> bytes:
        """The block of ``fixed``, which is always the same for ``key``. Must be sent, and in order."""
        block = self._blocks.get(key)
        if block is not None:
            return block
        before = self._table()
        encoded: bytes = self._encoder.encode(fixed)
        if self._table() is not before:
            self._blocks.clear()  # numbers in the table have moved
        elif before is not None:
            self._blocks[key] = encoded
        return encoded

    def _table(self) -> Any:
        table = self._encoder.header_table
        return None if table.resized or not table.dynamic_entries else table.dynamic_entries[0]

    def reset(self) -> None:
        """The peer has changed the size of the table."""
        self._blocks.clear()


def literal(name: bytes, value: bytes) -> bytes:
    """A header field as a literal that enters no table (RFC 7541 6.2.2)."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """A length in HPACK's form with a prefix of 7 bits, the first of which says "not Huffman's code" (RFC 7541 5.1)."""
    size = len(text)
    if size < 127:
        return bytes((size,))
    size -= 127
    parts = bytearray((127,))
    while size >= 128:
        parts.append(size & 127 | 128)
        size >>= 7
    parts.append(size)
    return bytes(parts)


def goaway(last_stream_id: int, error: ErrorCodes | int = ErrorCodes.NO_ERROR, debug: bytes = b"") -> bytes:
    """The bytes of a GOAWAY that leaves the connection's state machine as it is.

    Args:
        last_stream_id: The last stream that is, or may be, handled; `LAST_STREAM` for a first notice.
        error: Why.
        debug: In words, for the peer's log.
    """
    return GoAwayFrame(0, last_stream_id=last_stream_id, error_code=int(error), additional_data=debug).serialize()


class BatchingTransport:
    """A transport that writes once in a turn of the event loop. Stands where an ``asyncio.Transport`` does.

    ``pause_writing`` and ``resume_writing`` come to the protocol as before, from the transport below.

    Args:
        transport: Where it all goes.

    Attributes:
        on_flush: Called whenever what was held has been handed to the transport.
    """

    __slots__ = ("_held", "_loop", "_scheduled", "_size", "_transport", "on_flush")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._size = 0
        self._scheduled = False
        self.on_flush: Any = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write it by the end of this turn."""
        if not data:
            return
        self._held.append(bytes(data))
        self._size += len(data)
        if self._size >= FLUSH_AT:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn_ends)

    def writelines(self, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write them all."""
        for chunk in chunks:
            self.write(chunk)

    def _turn_ends(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Write what is held now."""
        held = self._held
        if held:
            self._held = []
            self._size = 0
            if not self._transport.is_closing():
                self._transport.write(held[0] if len(held) == 1 else b"".join(held))
                if self.on_flush is not None:
                    self.on_flush()

    def close(self) -> None:
        """Write what is held, and close once it has left."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once; what is held is lost."""
        self._held.clear()
        self._size = 0
        self._transport.abort()

    def is_closing(self) -> bool:
        """Has it been closed, here or by the peer?"""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As of the transport below."""
        return self._transport.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        """Bytes that have not left."""
        return self._size + self._transport.get_write_buffer_size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def __repr__(self) -> str:
        return f"<BatchingTransport: {self._size} bytes held, over {self._transport!r}>"
