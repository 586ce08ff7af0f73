"""Whatever bytes come: the server's readers say what they are, or what is wrong with them, and nothing else happens."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import struct
from typing import Any

import pytest
from grpclib.config import Configuration
from grpclib.exceptions import GRPCError
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.grpc.inbound import Inbound, framed
from meshlib.grpc.serving.connection import DRAIN_PING, LOOK_AGAIN
from meshlib.grpc.serving.head import Head, Malformed, Refused, read_head
from meshlib.grpc.serving.limits import Limits
from meshlib.grpc.serving.server import Server
from meshlib.grpc.serving.watch import Verdict, Watch

from .raw import wait_until
from .server_worker import interop_handler

NAMES = st.sampled_from(
    [b":method", b":path", b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"x-a", b"x-a-bin", b"user-agent"]
)
VALUES = st.sampled_from([b"POST", b"/a.B/C", b"trailers", b"application/grpc", b"1S", b"gzip", b"AAAA", b"AA==,AA"])


@given(st.lists(st.tuples(NAMES | st.binary(max_size=8), VALUES | st.binary(max_size=20)), max_size=12))
def test_fields_are_a_request_or_say_why_not(fields: Any) -> None:
    outcome: Any
    try:
        outcome = read_head(fields, 1000)
    except (Malformed, Refused) as error:
        outcome = error
    if isinstance(outcome, Head):
        assert all(isinstance(value, bytes) == key.endswith("-bin") for key, value in outcome.metadata.items())
    else:
        assert str(outcome)
        assert isinstance(outcome, Malformed) or outcome.http in (200, 400, 405, 415)


@given(st.lists(st.tuples(st.binary(max_size=50), st.booleans()), max_size=8), st.randoms(use_true_random=False))
def test_messages_are_the_same_however_they_are_cut(sent: Any, rng: random.Random) -> None:
    data = b"".join(framed(message, gzip=packed) for message, packed in sent)
    inbound, found, given_back = Inbound(1000, "gzip"), [], 0
    while data:
        size = rng.randint(1, len(data))
        inbound.add(data[:size], size)
        data = data[size:]
        while (message := inbound.take()) is not None:
            found.append(message)
        free = inbound.to_give_back()
        assert 0 <= free <= inbound.held
        inbound.held -= free
        given_back += free
    assert found == [message for message, _ in sent]
    inbound.at_end()
    assert inbound.held == 0
    assert given_back == sum(len(framed(message, gzip=packed)) for message, packed in sent)


@given(st.binary(max_size=80))
def test_bytes_that_are_no_messages_say_why(noise: bytes) -> None:
    inbound = Inbound(50, "gzip")
    inbound.add(noise, len(noise))
    with contextlib.suppress(GRPCError):
        while (message := inbound.take()) is not None:
            assert len(message) <= 50
        inbound.at_end()


def test_a_bomb_is_not_unpacked() -> None:
    inbound = Inbound(1 << 20, "gzip")
    packed = gzip.compress(bytes(64 << 20))
    assert len(packed) < 1 << 20
    inbound.add(b"\1" + len(packed).to_bytes(4) + packed, 0)
    with pytest.raises(GRPCError, match="more than the 1048576"):
        inbound.take()


# --- a whole connection -----------------------------------------------------------------------------------------------


class Transport:
    """Takes what is written, and is asked no more."""

    def __init__(self) -> None:
        self.closing = False
        self.unsent = 0

    def write(self, data: bytes) -> None:
        assert not self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def can_write_eof(self) -> bool:
        return False


FIELDS = bytes.fromhex("8386") + b"".join(
    b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value
    for name, value in (
        (b":path", b"/meshlib.grpctest.Interop/FullDuplex"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)
IDS = st.sampled_from([0, 1, 2, 3, 5, 7])
BODIES = st.binary(max_size=20)


def made(kind: Any, stream: int, flags: Any = (), **facts: Any) -> bytes:
    """A frame, as bytes; none where hyperframe will not make it."""
    try:
        return kind(stream, flags=flags, **facts).serialize()
    except (HyperframeError, struct.error):
        return b""


HEAD_FLAGS = st.sampled_from([["END_HEADERS"], ["END_HEADERS"], ["END_HEADERS", "END_STREAM"], []])
SETTINGS = st.dictionaries(st.integers(1, 9), st.integers(0, 1 << 24), max_size=3)
FRAMES = st.one_of(
    st.builds(lambda i, d, e: made(HeadersFrame, i, e, data=d), IDS, st.just(FIELDS) | BODIES, HEAD_FLAGS),
    st.builds(lambda i, d, e: made(DataFrame, i, ["END_STREAM"] * e, data=d), IDS, BODIES, st.booleans()),
    st.builds(lambda i, c: made(RstStreamFrame, i, error_code=c), IDS, st.integers(0, 20)),
    st.builds(lambda i, n: made(WindowUpdateFrame, i, window_increment=n), IDS, st.integers(1, (1 << 31) - 1)),
    st.builds(lambda s: made(SettingsFrame, 0, settings=s), SETTINGS),
    st.builds(lambda a: made(PingFrame, 0, ["ACK"] * a, opaque_data=bytes(8)), st.booleans()),
    st.builds(lambda i, d: made(PriorityFrame, i, depends_on=d), IDS, IDS),
    st.builds(lambda c: made(GoAwayFrame, 0, last_stream_id=0, error_code=c), st.integers(0, 20)),
    st.builds(lambda i, d: made(ContinuationFrame, i, ["END_HEADERS"], data=d), IDS, BODIES),
)


@settings(max_examples=150)
@given(st.lists(FRAMES | BODIES, max_size=15), st.integers(1, 200))
def test_no_frames_make_a_connection_fail_otherwise_than_it_should(frames: Any, cut: int) -> None:
    data = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    data += b"".join(frames)

    async def run() -> None:
        failures: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
        server = Server([interop_handler()], limits=Limits(max_streams=2))
        connection, transport = server._connection(), Transport()
        connection.connection_made(transport)  # type: ignore[arg-type]
        for at in range(0, len(data), cut):
            connection.data_received(data[at : at + cut])
            await asyncio.sleep(0)
            connection.tick(asyncio.get_running_loop().time())
        connection.drain()
        await asyncio.sleep(0)
        connection.abort()
        connection.connection_lost(None)
        await server.env.supervisor.join()
        assert not failures
        assert connection.calls == {}
        assert connection.busy == 0
        assert not connection._ending
        assert server.connections == ()

    asyncio.run(run())


async def test_a_slow_reader_has_its_last_answers_before_the_connection_closes() -> None:
    server = Server([interop_handler()])
    connection, transport = server._connection(), Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.data_received(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    transport.unsent = 1
    connection.drain()
    connection.data_received(made(PingFrame, 0, ["ACK"], opaque_data=DRAIN_PING))
    await asyncio.sleep(3 * LOOK_AGAIN)
    assert not transport.closing
    transport.unsent = 0
    await wait_until(lambda: transport.closing)
    connection.connection_lost(None)


# --- when it has been too long ----------------------------------------------------------------------------------------


def watch(limits: Limits | None = None, **config: Any) -> Watch:
    made = Configuration(_keepalive_time=60, _keepalive_timeout=5, **config).__for_server__()
    return Watch(limits or Limits(), made, 0.0, random.Random(1))


def test_a_connection_is_watched_from_its_first_second_to_its_last() -> None:
    one = watch()
    assert one.verdict(9, False, False, 0)[0] is Verdict.FINE
    assert one.verdict(11, False, False, 0)[0] is Verdict.BREAK
    one.heard(20, half=True, whole=True)
    one.heard(25, half=True, whole=False)  # still the same frame
    assert one.verdict(29, True, False, 1)[0] is Verdict.FINE
    assert one.verdict(31, True, False, 1)[0] is Verdict.BREAK
    one.heard(32, half=True, whole=True)  # that one ended, and another has begun
    assert one.verdict(41, True, False, 1)[0] is Verdict.FINE
    one.heard(42, half=False, whole=True)
    assert one.verdict(103, True, False, 0)[0] is Verdict.FINE, "no calls, no PING"
    assert one.verdict(103, True, False, 1)[0] is Verdict.PING
    assert one.verdict(107, True, False, 1)[0] is Verdict.FINE
    assert one.verdict(109, True, False, 1)[0] is Verdict.BREAK
    one.heard(110, half=False, whole=True)
    one.deaf_since = 111
    assert one.verdict(117, True, False, 1)[0] is Verdict.BREAK


def test_age_has_jitter_and_grace() -> None:
    ages = set()
    for seed in range(20):
        config = Configuration().__for_server__()
        one = Watch(Limits(max_age=100, max_age_grace=10), config, 0.0, random.Random(seed))
        age = next(t for t in range(200) if one.verdict(t, True, False, 1)[0] is Verdict.DRAIN)
        assert 90 <= age <= 111
        assert one.verdict(age + 9, True, True, 1)[0] is Verdict.FINE
        assert one.verdict(age + 11, True, True, 1)[0] is Verdict.ABORT
        ages.add(age)
    assert len(ages) > 5
    idle = watch(Limits(max_idle=30))
    idle.idle_since = 50
    assert idle.verdict(79, True, False, 0)[0] is Verdict.FINE
    assert idle.verdict(81, True, False, 1)[0] is not Verdict.DRAIN
    assert idle.verdict(81, True, False, 0)[0] is Verdict.DRAIN
