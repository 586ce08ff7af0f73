"""What the gRPC server takes for granted of h2, hpack and grpclib, beyond their documented interfaces."""

from __future__ import annotations

import inspect
from typing import Any

import grpclib.server
import h2.config
import h2.connection
import h2.events
import pytest
from grpclib.config import Configuration
from grpclib.events import RecvRequest, _DispatchServerEvents, listen
from grpclib.metadata import Deadline
from h2.exceptions import FrameTooLargeError
from h2.settings import SettingCodes
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError
from hypothesis import given
from hypothesis import strategies as st

from meshlib.grpc.serving.h2 import RequestDecoder, ServerH2
from meshlib.grpc.serving.limits import Limits
from meshlib.grpc.serving.stream import ServerStream

FIELDS = (
    (":method", "POST"),
    (":path", "/pkg.Service/Method"),
    (":scheme", "http"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
    ("user-agent", "test"),
    ("grpc-timeout", "1S"),
    ("grpc-timeout", "2S"),
    ("x-long", "x" * 300),
)
LISTS = st.lists(st.sampled_from(FIELDS), max_size=12)


@given(st.lists(st.tuples(LISTS, st.sampled_from([None, 0, 100, 4096]), st.booleans()), max_size=20))
def test_the_decoder_that_remembers_says_what_hpacks_does(blocks: Any) -> None:
    encoder, plain, ours = Encoder(), Decoder(), RequestDecoder(65_536)
    for fields, size, huffman in blocks:
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode(fields, huffman=huffman)
        wanted = plain.decode(block, raw=True)
        assert ours.decode(block, raw=True) == wanted
        assert ours.decode(b"", raw=True) == []


@given(st.binary(max_size=60))
def test_of_noise_it_says_what_hpacks_does(noise: bytes) -> None:
    plain, ours = Decoder(), RequestDecoder(65_536)
    for _ in range(2):
        outcomes: list[Any] = []
        for decoder in (plain, ours):
            try:
                outcomes.append(decoder.decode(noise, raw=True))
            except (HPACKError, IndexError) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        if isinstance(outcomes[0], type):
            return  # the connection ends here


@pytest.fixture
def pair() -> tuple[Any, ServerH2]:
    """A client of h2's own, and our server, after their greetings."""
    config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
    client = h2.connection.H2Connection(config)
    client.initiate_connection()
    server = ServerH2(Limits(max_streams=7, max_headers=9000), 1 << 20, 1 << 19)
    talk(client, server)
    return client, server


def talk(client: Any, server: ServerH2) -> tuple[list[Any], list[Any]]:
    heard_by_server: list[Any] = []
    heard_by_client: list[Any] = []
    while True:
        asked, answered = client.data_to_send(), server.data_to_send()
        if not asked and not answered:
            return heard_by_client, heard_by_server
        heard_by_server += server.receive_data(asked) if asked else []
        heard_by_client += client.receive_data(answered) if answered else []


def test_the_client_is_told_our_limits(pair: tuple[Any, ServerH2]) -> None:
    client, server = pair
    assert client.remote_settings.max_concurrent_streams == 7
    assert client.remote_settings.max_header_list_size == 9000
    assert client.remote_settings.initial_window_size == 1 << 19
    assert client.outbound_flow_control_window == 1 << 20
    assert SettingCodes.ENABLE_PUSH not in server.local_settings
    assert server.inbound_flow_control_window == 1 << 20


def test_requests_are_told_as_h2_tells_them(pair: tuple[Any, ServerH2]) -> None:
    client, server = pair
    for n, end in enumerate((False, True, False)):
        client.send_headers(2 * n + 1, FIELDS[:6], end_stream=end)
        _, events = talk(client, server)
        assert isinstance(events[0], h2.events.RequestReceived)
        assert events[0].stream_id == 2 * n + 1
        assert events[0].headers == [(name.encode(), value.encode()) for name, value in FIELDS[:6]]
        assert (events[0].stream_ended is not None) is end
        assert [type(event) for event in events[1:]] == [h2.events.StreamEnded] * end
    client.send_headers(1, [("x-trailer", "1")], end_stream=True)
    _, events = talk(client, server)
    assert [type(event) for event in events] == [h2.events.TrailersReceived, h2.events.StreamEnded]


def test_streams_are_counted_elsewhere(pair: tuple[Any, ServerH2]) -> None:
    client, server = pair
    client.remote_settings.update({SettingCodes.MAX_CONCURRENT_STREAMS: 100})
    client.remote_settings.acknowledge()
    for n in range(20):
        client.send_headers(2 * n + 1, FIELDS[:6])
    talk(client, server)
    assert len(server.streams) == 20
    assert server.open_inbound_streams == 0
    server.reset_stream(1)
    assert not server.half_open(1)
    server.forget(1)
    assert 1 not in server.streams
    client.reset_stream(3)
    talk(client, server)
    assert not server.half_open(3)
    assert server.half_open(5)


def test_answers_are_read_as_they_were_meant_whatever_the_tables_do(pair: tuple[Any, ServerH2]) -> None:
    client, server = pair
    head = ((":status", "200"), ("content-type", "application/grpc+proto"))
    trailers = (("grpc-status", "0"),)
    for n in range(30):
        stream = 2 * n + 1
        client.send_headers(stream, FIELDS[:6], end_stream=True)
        talk(client, server)
        more = [("x-own", "ü".encode().hex() * n)] if n % 3 else []
        server.answer(stream, head, more, end=False)
        server.put(stream, b"message")
        server.answer(stream, trailers, [("x-last", str(n))], end=True)
        if n in (10, 20):
            client.update_settings({SettingCodes.HEADER_TABLE_SIZE: 100 if n == 10 else 4096})
        events, heard = talk(client, server)
        if any(isinstance(event, h2.events.RemoteSettingsChanged) for event in heard):
            server.table_changed()
        response = next(event for event in events if isinstance(event, h2.events.ResponseReceived))
        assert response.headers == [*head, *more]
        assert next(event.data for event in events if isinstance(event, h2.events.DataReceived)) == b"message"
        last = next(event for event in events if isinstance(event, h2.events.TrailersReceived))
        assert last.headers == [*trailers, ("x-last", str(n))]
        assert last.stream_ended is not None
        server.forget(stream)


def test_fields_that_cannot_be_sent_leave_the_tables_and_the_stream_as_they_were(pair: tuple[Any, ServerH2]) -> None:
    client, server = pair
    heads = [((":status", "200"), ("content-type", f"application/grpc+{n}")) for n in range(3)]
    for n, head in enumerate(heads):
        stream = 2 * n + 1
        client.send_headers(stream, FIELDS[:6], end_stream=True)
        talk(client, server)
        for bad in ([("x-own", "ü")], [("x-ü", "own")]):
            with pytest.raises(UnicodeEncodeError):
                server.answer(stream, head, bad, end=True)
        assert not server.unsent
        server.answer(stream, head, end=False)
        server.answer(stream, (), [("grpc-status", "13")], end=True)
        events, _ = talk(client, server)
        assert [event.headers for event in events if hasattr(event, "headers")] == [
            list(head),
            [("grpc-status", "13")],
        ]
        server.forget(stream)
    client.send_headers(7, FIELDS[:6], end_stream=True)
    talk(client, server)
    server.answer(7, heads[0], end=True)
    events, _ = talk(client, server)
    assert events[0].headers == list(heads[0])


def test_nobody_else_gives_back_the_connections_window(pair: tuple[Any, ServerH2]) -> None:
    client, server = pair
    for stream in (1, 3):
        client.send_headers(stream, FIELDS[:6])
        talk(client, server)
        server.reset_stream(stream)
        server.forget(stream)
        for _ in range(20):  # the client has not heard of it
            client.send_data(stream, bytes(16_384))
    heard, _ = talk(client, server)
    assert server.inbound_flow_control_window == (1 << 20) - 40 * 16_384
    assert not any(isinstance(event, h2.events.WindowUpdated) for event in heard)
    server.increment_flow_control_window(40 * 16_384)
    talk(client, server)
    assert client.outbound_flow_control_window == server.inbound_flow_control_window == 1 << 20


def test_fields_larger_than_a_frame_are_continued(pair: tuple[Any, ServerH2]) -> None:
    client, server = pair
    client.send_headers(1, FIELDS[:6], end_stream=True)
    talk(client, server)
    more = [(f"x-{n}", "y" * 1000) for n in range(50)]
    server.answer(1, ((":status", "200"),), more, end=True)
    events, _ = talk(client, server)
    assert events[0].headers[1:] == more


def test_half_of_anything_is_seen() -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    server = ServerH2(Limits(), 1 << 20, 1 << 20)
    assert server.half
    server.receive_data(preface)
    assert not server.half
    server.receive_data(b"\0\0\0\4\0\0\0\0")
    assert server.half
    server.receive_data(b"\0")
    assert not server.half
    server.receive_data(b"\0\0\1\1\0\0\0\0\1\x82")  # fields that go on
    assert server.half
    server = ServerH2(Limits(), 1 << 20, 1 << 20)
    with pytest.raises(FrameTooLargeError):
        server.receive_data(preface + b"\0\0\0\4\0\0\0\0\0" + b"\1\0\0\0\0\0\0\0\1")


def test_grpclib_is_as_we_know_it() -> None:
    dispatch = _DispatchServerEvents()
    assert not dispatch._listeners

    class Target:
        __dispatch__ = dispatch

    async def heard(event: RecvRequest) -> None: ...

    listen(Target(), RecvRequest, heard)  # type: ignore[arg-type]
    assert dispatch._listeners
    assert Deadline(_timestamp=5.0)._timestamp == 5.0
    config = Configuration().__for_server__()
    assert (config._keepalive_time, config._keepalive_timeout) == (7200.0, 20.0)
    assert config._keepalive_permit_without_calls is False
    assert (config.http2_connection_window_size, config.http2_stream_window_size) == (4 << 20, 4 << 20)


def test_whatever_grpclibs_stream_offers_ours_offers_too() -> None:
    def public(kind: Any) -> dict[str, Any]:
        found = inspect.getmembers(kind, callable)
        return {name: inspect.signature(each) for name, each in found if name[0] != "_"}

    theirs, ours = public(grpclib.server.Stream), public(ServerStream)
    for name, signature in theirs.items():
        assert list(ours[name].parameters) == list(signature.parameters), name
    source = inspect.getsource(grpclib.server.Stream.__init__)
    for name in ("deadline", "metadata", "user_agent", "peer"):
        assert f"self.{name}" in source
    state = [name for name in vars(grpclib.server.Stream) if name.endswith("_done") or name.startswith("_messages")]
    assert sorted(state) == [
        "_cancel_done",
        "_messages_received",
        "_messages_sent",
        "_send_initial_metadata_done",
        "_send_message_done",
        "_send_trailing_metadata_done",
    ]
    start = list(inspect.signature(grpclib.server.Server.start).parameters)
    from meshlib.grpc.serving.server import Server

    assert list(inspect.signature(Server.start).parameters) == start
