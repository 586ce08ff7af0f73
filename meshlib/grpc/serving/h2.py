"""h2 on a server's side: what its interface does not say, or would do at the wrong price.

h2 ends a connection whose client opens one stream too many, and counts its streams anew for each. Here whoever accepts
streams counts them, refuses those beyond the limit one by one, and says when one can be forgotten. `ServerH2.half` says
whether a frame, or the fields of a request, have begun and not ended: what a peer that only wants to hold a place would
leave.

A third of a small call's time on a server is HPACK and the frames around it. Most requests of a connection begin with
the same fields, and most answers are the same two blocks, so both are kept, for as long as the tables do not change.

What is used of h2 and hpack beyond their documented interface is used here and in ``h2.py`` alone, and held by
tests/grpc/test_server_h2.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, cast

from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, ConnectionInputs, _decode_headers
from h2.errors import ErrorCodes
from h2.events import Event, RequestReceived, StreamEnded
from h2.exceptions import FrameTooLargeError
from h2.settings import SettingCodes
from h2.stream import StreamInputs
from h2.windows import WindowManager
from hpack import Decoder, HeaderTuple
from hyperframe.frame import Frame, HeadersFrame

from ..h2 import DrainableConnection, HeaderBlocks, literal
from ..h2 import _frame as frame_of
from .limits import HARD_HEADERS, Limits

if TYPE_CHECKING:
    from h2._typing import Buffer

__all__ = ["CONFIG", "RequestDecoder", "ServerH2"]

Fields = Iterable[tuple[str, str]]
Fixed = tuple[tuple[str, str], ...]

CONFIG: Final = H2Configuration(
    client_side=False,
    header_encoding=None,  # bytes: a value that is no text must not end the connection
    validate_inbound_headers=False,  # `head.read_head` does, and fails the one stream
    validate_outbound_headers=False,
    normalize_inbound_headers=False,
    normalize_outbound_headers=False,
)
WINDOW: Final = 65_535
"""Bytes of every window before any setting (RFC 9113 6.9.2)."""
LONGEST_PREFIX: Final = 32
MOST_PREFIXES: Final = 32
LARGEST_PREFIX: Final = 16_384
_HEADERS, _CONTINUATION = 1, 9
_END_STREAM, _END_HEADERS = 1, 4


class RequestDecoder(Decoder):
    """An HPACK decoder that remembers what the indexed fields at the beginning of a block are.

    They change nothing in the table, so they mean the same until something is added to it, or its size changes.
    """

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._known: dict[bytes, list[HeaderTuple]] = {}
        self._first: Any = None
        self._size = self.header_table.maxsize

    def decode(self, data: bytes, raw: bool = False) -> list[HeaderTuple]:
        """The fields of a block, as bytes if ``raw``. Whoever gets them must not change them."""
        entries, size = self.header_table.dynamic_entries, self.header_table.maxsize
        first = entries[0] if entries else None
        if first is not self._first or size != self._size:
            self._known.clear()
            self._first, self._size = first, size
        prefix = 0
        for byte in data[:LONGEST_PREFIX]:
            if not 0x80 < byte < 0xFF:  # an indexed field in one byte (RFC 7541 6.1)
                break
            prefix += 1
        resized = prefix < len(data) and data[prefix] & 0xE0 == 0x20  # which is an error there
        if not raw or prefix < 2 or resized:
            return list(super().decode(data, raw))
        start = data[:prefix]
        known = self._known.get(start)
        if known is None:
            known = list(super().decode(start, True))
            if sum(len(name) + len(value) for name, value in known) <= LARGEST_PREFIX:
                if len(self._known) >= MOST_PREFIXES:
                    self._known.clear()
                self._known[start] = known
        return known if prefix == len(data) else [*known, *super().decode(data[prefix:], True)]


class _Window(WindowManager):
    """The connection's window, of which nobody but `Sending.grant` gives anything back.

    h2 gives back what comes on streams that have ended, and would do so a second time.
    """

    def process_bytes(self, size: int) -> None:
        """Give back nothing."""


class ServerH2(DrainableConnection):
    """An HTTP/2 connection's state, on the server.

    Args:
        limits: What to advertise.
        connection_window: Bytes that the client may send before they are read, on all streams together.
        stream_window: … and on each.

    Attributes:
        spoken: Fields or messages were sent since somebody last set this to ``False``.
    """

    _data_to_send: bytearray

    def __init__(self, limits: Limits, connection_window: int, stream_window: int) -> None:
        super().__init__(CONFIG, header_list=limits.max_headers, max_streams=limits.max_streams, window=stream_window)
        self.local_settings.pop(SettingCodes.ENABLE_PUSH, None)  # servers do not send it (RFC 9113 6.5.2)
        self.decoder = RequestDecoder(HARD_HEADERS)
        self._blocks = HeaderBlocks(self.encoder)
        self._inbound_flow_control_window_manager = _Window(WINDOW)
        self.spoken = False
        self.initiate_connection()
        if connection_window > WINDOW:
            self.increment_flow_control_window(connection_window - WINDOW)

    # --- what a client sends ------------------------------------------------------------------------------------------

    @property
    def open_inbound_streams(self) -> int:
        """None, as far as h2 is concerned: whoever accepts them counts."""
        return 0

    @property
    def half(self) -> bool:
        """Has something begun that has not ended: the preface, a frame, the fields of a request?"""
        buffer = self.incoming_buffer
        return bool(buffer._preamble_len or buffer._data or buffer._headers_buffer)

    def receive_data(self, data: Buffer) -> list[Event]:
        """As in h2, but a frame that is too large is seen by its head, and not when all of it has been kept."""
        events = super().receive_data(data)
        begun = self.incoming_buffer._data
        if len(begun) >= 9 and int.from_bytes(begun[:3]) > self.max_inbound_frame_size:
            self._terminate_connection(ErrorCodes.FRAME_SIZE_ERROR)
            raise FrameTooLargeError(f"a frame of {int.from_bytes(begun[:3])} bytes")
        return events

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[Event]]:
        """A request: the same as in h2, but for checks of its fields, which are made later and fail the one stream."""
        if frame.stream_id <= self.highest_inbound_stream_id or "PRIORITY" in frame.flags:
            return super()._receive_headers_frame(frame)
        self.state_machine.process_input(ConnectionInputs.RECV_HEADERS)
        fields = _decode_headers(self.decoder, frame.data)
        machine = self._begin_new_stream(frame.stream_id, AllowedStreamIDs.ODD).state_machine
        events = machine.process_input(StreamInputs.RECV_HEADERS)
        request = cast(RequestReceived, events[0])
        request.headers = cast(Any, fields)
        if "END_STREAM" in frame.flags:
            ended = machine.process_input(StreamInputs.RECV_END_STREAM)
            request.stream_ended = cast(StreamEnded, ended[0])
            events += ended
        return [], events

    def table_changed(self) -> None:
        """The client has changed the size of HPACK's table."""
        self._blocks.reset()

    # --- what a server sends ------------------------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """Bytes to be sent."""
        return len(self._data_to_send)

    def refuse(self, stream_id: int, code: ErrorCodes) -> None:
        """Reset a stream, unless it is closed already: h2 has read ahead of whoever is told of a request."""
        if self.half_open(stream_id):
            self.reset_stream(stream_id, code)

    def queue(self, data: bytes) -> None:
        """Send frames of our own making behind the others."""
        self._data_to_send += data

    def answer(self, stream_id: int, fixed: Fixed, more: Fields = (), *, end: bool) -> None:
        """Send the fields of an answer, or its trailers.

        Args:
            stream_id: The stream, which must be open.
            fixed: Fields that many answers have, in the same order.
            more: Others, after those.
            end: Nothing follows.

        Raises:
            ProtocolError: The stream is not open for it.
            UnicodeError: One of the others is not ASCII. Nothing has been sent, and the stream is as it was.
        """
        stream = self.streams[stream_id]
        # What may fail comes first: `fixed` may change the table, and then nothing may keep it from being sent.
        rest = b"".join([literal(name.encode("ascii"), value.encode("ascii")) for name, value in more])
        if end:
            stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        block = self._blocks.block(fixed, fixed) + rest if fixed else rest
        self.spoken = True
        flags = _END_STREAM if end else 0
        most = self.max_outbound_frame_size
        if len(block) <= most:
            self._data_to_send += frame_of(_HEADERS, flags | _END_HEADERS, stream_id, block)
            return
        parts = [block[i : i + most] for i in range(0, len(block), most)]
        self._data_to_send += frame_of(_HEADERS, flags, stream_id, parts[0])
        for part in parts[1:-1]:
            self._data_to_send += frame_of(_CONTINUATION, 0, stream_id, part)
        self._data_to_send += frame_of(_CONTINUATION, _END_HEADERS, stream_id, parts[-1])
