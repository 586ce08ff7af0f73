"""What is relied on in h2, hpack and grpclib beyond their documented interfaces, and what is made of it."""

import asyncio
import inspect

import grpclib.client
import grpclib.config
import grpclib.events
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, RequestReceived, StreamEnded
from h2.exceptions import ProtocolError
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from meshlib.grpc.h2 import FLUSH_AT, BatchingTransport, DrainableConnection, HeaderBlocks, goaway, literal

CLIENT = H2Configuration(client_side=True, header_encoding="latin-1")
SERVER = H2Configuration(client_side=False, header_encoding="utf-8")
FIXED = [(":method", "POST"), (":scheme", "http"), (":path", "/x.Y/Z"), (":authority", "h:1"), ("te", "trailers")]


class Pair:
    """A client of ours, and h2's own server."""

    def __init__(self, **options):
        self.client, self.server = DrainableConnection(CLIENT, **options), H2Connection(SERVER)
        self.blocks = HeaderBlocks(self.client.encoder)
        self.client.initiate_connection()
        self.server.initiate_connection()
        self.exchange()

    def exchange(self):
        """Let each hear what the other has said; gives what happened to the server, and to the client."""
        served, seen = [], []
        for _ in range(4):
            served += self.server.receive_data(self.client.data_to_send())
            seen += self.client.receive_data(self.server.data_to_send())
        return served, seen

    def open(self, data=b"", *, end=True, key="x", fixed=FIXED):
        return self.client.open_request(self.blocks.block(key, fixed), data, end=end)


def test_a_client_goes_on_after_goaway():
    pair = Pair()
    first, second = pair.open(b"one", end=False), pair.open(b"two", end=False)
    pair.exchange()
    events = pair.client.receive_data(goaway(first, ErrorCodes.NO_ERROR, b"bye"))
    assert [type(event) for event in events] == [ConnectionTerminated]
    assert (events[0].last_stream_id, events[0].error_code, events[0].additional_data) == (first, 0, b"bye")
    pair.client.put(first, b"more", end=True)
    served, _ = pair.exchange()
    assert [event.data for event in served if isinstance(event, DataReceived)] == [b"more"]
    pair.server.send_headers(first, [(":status", "200")], end_stream=True)
    _, seen = pair.exchange()
    assert any(isinstance(event, StreamEnded) for event in seen)
    assert second in pair.client.streams


def test_a_stock_connection_does_not():
    """Why there is one of our own; when this fails, it can go."""
    stock = H2Connection(CLIENT)
    stock.initiate_connection()
    stock.send_headers(1, FIXED)
    stock.receive_data(goaway(1))
    with pytest.raises(ProtocolError):
        stock.send_data(1, b"x")


def test_a_server_goes_on_after_it_has_sent_goaway():
    client, server = H2Connection(CLIENT), DrainableConnection(SERVER)
    client.initiate_connection()
    server.initiate_connection()
    client.send_headers(1, FIXED)
    server.receive_data(client.data_to_send())
    assert goaway(1)[3] == 7
    server.send_headers(1, [(":status", "200")], end_stream=True)
    assert server.data_to_send()


def test_unknown_codes_of_goaway_are_numbers():
    pair = Pair()
    (event,) = pair.client.receive_data(goaway(0, 0xDEAD))
    assert event.error_code == 0xDEAD


def test_requests_are_what_h2_itself_would_have_sent():
    pair = Pair()
    for n in range(5):
        stream = pair.open(b"hello")
        served, _ = pair.exchange()
        assert [type(event) for event in served] == [RequestReceived, DataReceived, StreamEnded]
        assert [tuple(header) for header in served[0].headers] == FIXED
        assert served[1].data == b"hello"
        assert stream == 2 * n + 1
        assert pair.client.outbound_flow_control_window == 65535 - 5 * (n + 1)
        pair.server.send_headers(stream, [(":status", "200")], end_stream=True)
        pair.exchange()
        pair.client.forget(stream)
    assert pair.client.streams == {}


def test_headers_that_fill_several_frames():
    pair = Pair()
    long = [("x-long", "y" * 40_000)]
    block = pair.blocks.block("x", FIXED) + b"".join(literal(k.encode(), v.encode()) for k, v in long)
    pair.client.open_request(block, end=True)
    served, _ = pair.exchange()
    assert [tuple(header) for header in served[0].headers] == [*FIXED, *long]


def test_room_is_the_least_of_both_windows_and_a_frame():
    pair = Pair()
    assert pair.client.new_room == 16384
    stream = pair.open(b"x" * 16384, end=False)
    assert pair.client.room(stream) == 16384
    for _ in range(3):
        pair.client.put(stream, b"x" * pair.client.room(stream))
    assert pair.client.room(stream) == 0
    assert pair.client.new_room == 0
    pair.exchange()
    pair.server.acknowledge_received_data(60_000, stream)
    pair.exchange()
    assert pair.client.room(stream) == 16384
    assert pair.client.room(99) == 0
    pair.client.reset_stream(stream)
    assert pair.client.room(stream) == 0
    assert not pair.client.half_open(stream)


def test_what_is_given_back_reaches_the_servers_window():
    pair = Pair()
    stream = pair.open()
    pair.exchange()
    pair.server.send_headers(stream, [(":status", "200")])
    for _ in range(3):
        pair.server.send_data(stream, b"x" * 16384)
    pair.exchange()
    assert pair.server.outbound_flow_control_window == 65535 - 3 * 16384
    pair.client.give_back(3 * 16384)
    pair.exchange()
    assert pair.server.outbound_flow_control_window == 65535
    assert pair.server.streams[stream].outbound_flow_control_window == 65535 - 3 * 16384
    pair.client.give_back_on(stream, 3 * 16384)
    pair.exchange()
    assert pair.server.outbound_flow_control_window == 65535
    assert pair.server.streams[stream].outbound_flow_control_window == 65535
    pair.client.reset_stream(stream)
    pair.client.give_back_on(stream, 1)
    pair.client.give_back_on(99, 1)


@given(
    st.lists(st.tuples(st.integers(0, 90), st.text("abc", max_size=200)), max_size=80), st.sampled_from((0, 100, 4096))
)
def test_blocks_are_read_as_what_they_say_whatever_came_before(calls, table):
    encoder, decoder = Encoder(), Decoder()
    blocks = HeaderBlocks(encoder)
    for n, (key, value) in enumerate(calls):
        if n == 40:
            encoder.header_table_size = table
            decoder.max_allowed_table_size = 4096
            blocks.reset()
        fixed = [*FIXED[:2], (":path", f"/method/{key}/" + "m" * key), *FIXED[3:]]
        block = blocks.block(key, fixed) + literal(b"x", value.encode())
        assert [tuple(header) for header in decoder.decode(block)] == [*fixed, ("x", value)]


@given(st.binary(max_size=30).map(bytes.hex), st.integers(0, 20_000))
def test_a_literal_of_any_length(name, size):
    value = b"v" * size
    decoded = Decoder(max_header_list_size=1 << 20).decode(literal(name.encode(), value), raw=True)
    assert [tuple(header) for header in decoded] == [(name.encode(), value)]


# --- writes -----------------------------------------------------------------------------------------------------------


class Sink:
    """A transport that notes what is written."""

    def __init__(self):
        self.written, self.closing, self.aborted = [], False, False

    def write(self, data):
        self.written.append(data)

    def close(self):
        self.closing = True

    def abort(self):
        self.closing = self.aborted = True

    def is_closing(self):
        return self.closing

    def get_write_buffer_size(self):
        return 0

    def get_extra_info(self, name, default=None):
        return default

    def set_write_buffer_limits(self, high):
        self.high = high


async def test_what_is_written_within_a_turn_leaves_together():
    sink = Sink()
    flushes = []
    transport = BatchingTransport(sink)
    transport.on_flush = lambda: flushes.append(len(sink.written))
    transport.write(b"a")
    transport.writelines([b"b", b"", bytearray(b"c")])
    assert (sink.written, transport.get_write_buffer_size()) == ([], 3)
    await asyncio.sleep(0)
    assert sink.written == [b"abc"]
    transport.write(b"d")
    await asyncio.sleep(0)
    assert sink.written == [b"abc", b"d"]
    assert flushes == [1, 2]
    transport.set_write_buffer_limits(7)
    assert sink.high == 7


async def test_much_is_written_at_once():
    sink = Sink()
    transport = BatchingTransport(sink)
    transport.write(b"a")
    transport.write(bytes(FLUSH_AT))
    assert [len(data) for data in sink.written] == [FLUSH_AT + 1]
    await asyncio.sleep(0)
    assert len(sink.written) == 1


async def test_closing_writes_first_and_aborting_does_not():
    sink = Sink()
    transport = BatchingTransport(sink)
    transport.write(b"a")
    transport.close()
    assert (sink.written, transport.is_closing()) == ([b"a"], True)
    transport.write(b"b")
    await asyncio.sleep(0)
    assert sink.written == [b"a"]
    sink = Sink()
    transport = BatchingTransport(sink)
    transport.write(b"a")
    transport.abort()
    await asyncio.sleep(0)
    assert (sink.written, sink.aborted) == ([], True)


# --- grpclib ----------------------------------------------------------------------------------------------------------


def test_what_is_used_of_grpclib():
    """Its names with an underscore may change with any version; what is used of them is here."""
    assert grpclib.client.Channel._get_default_ssl_context(None, verify_paths=None) is not None
    assert {"_keepalive_time", "_keepalive_timeout", "_keepalive_permit_without_calls"} <= set(
        inspect.signature(grpclib.config.Configuration).parameters
    )
    dispatch = grpclib.events._DispatchChannelEvents()
    names = {"send_request", "send_message", "recv_initial_metadata", "recv_message", "recv_trailing_metadata"}
    assert names == set(vars(dispatch)) - {"_listeners"}

    async def heard(event):
        pass

    dispatch.add_listener(grpclib.events.SendRequest, heard)
    assert "send_request" not in vars(dispatch)
    called = inspect.signature(grpclib.client.Channel.request)
    from meshlib.grpc.calling.channel import Channel

    assert list(called.parameters) == list(inspect.signature(Channel.request).parameters)
    stream = {name for name in vars(grpclib.client.Stream) if not name.startswith("_")}
    from meshlib.grpc.calling.stream import Stream

    there = {name for kind in Stream.__mro__ for name in vars(kind)} | {
        "initial_metadata",
        "trailing_metadata",
        "peer",
    }
    assert stream <= there
