from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from meshlib.mux.codec import Limits, MuxError, decode, encode
from meshlib.mux.connection import HIGH_WATER, READ_SIZE, Connection
from meshlib.mux.messages import Rdispatch, ReplyStatus, Rerr, Tdispatch, Tping
from meshlib.telemetry.metrics import Registry
from meshlib.testing import MemoryStream, duplex

from .peer import RawPeer, settle


class Recorder(MemoryStream):
    """Notes what each send was given."""

    def __init__(self, inner: MemoryStream) -> None:
        self.__dict__.update(inner.__dict__)
        self.sends: list[bytes] = []

    async def send(self, item: bytes) -> None:
        self.sends.append(bytes(item))
        await super().send(item)


class Rig:
    def __init__(self, capacity: int, limits: Limits) -> None:
        here, there = duplex(capacity)
        self.stream = Recorder(here)
        self.registry = Registry()
        self.connection = Connection(self.stream, limits, self.registry)
        self.peer = RawPeer(there)
        self.there = there

    @property
    def sizes(self) -> list[int]:
        return [len(data) for data in self.stream.sends]


@asynccontextmanager
async def connected(capacity: int = 1 << 24, limits: Limits = Limits()) -> AsyncIterator[Rig]:  # noqa: B008
    """A connection whose write loop runs."""
    rig = Rig(capacity, limits)
    async with anyio.create_task_group() as group:
        group.start_soon(rig.connection.write_loop)
        yield rig
        group.cancel_scope.cancel()


def request(tag: int, size: int) -> bytes:
    return encode(Tdispatch(tag, body=bytes(size)))


# --- writing ----------------------------------------------------------------------------------------------------------


async def test_what_is_written_in_one_turn_leaves_in_one_send() -> None:
    async with connected() as rig:
        await settle()
        for tag in range(2, 7):
            rig.connection.write(request(tag, 10), tag)
        assert rig.stream.sends == []
        await rig.connection.flush()
        assert rig.sizes == [5 * len(request(2, 10))]
        assert [(await rig.peer.receive()).tag for _ in range(5)] == [2, 3, 4, 5, 6]
        assert rig.connection.queued == 0


async def test_a_frame_that_has_not_left_can_be_taken_back() -> None:
    async with connected() as rig:
        await settle()
        rig.connection.write(request(2, 10), 2)
        rig.connection.write(request(3, 10), 3)
        assert rig.connection.withdraw(2) is True
        assert rig.connection.queued == len(request(3, 10))
        await rig.peer.expect(Tdispatch(3, body=bytes(10)))


async def test_a_frame_that_has_left_cannot_be_taken_back() -> None:
    async with connected() as rig:
        rig.connection.write(request(2, 10), 2)
        await rig.connection.flush()
        assert rig.connection.withdraw(2) is False
        assert rig.connection.withdraw(99) is False


async def test_a_large_message_leaves_in_fragments_between_which_small_ones_pass() -> None:
    async with connected() as rig:
        rig.connection.fragment_at(100)
        large = Tdispatch(2, body=bytes(range(250)) * 2)
        rig.connection.write(encode(large), 2)
        rig.connection.write(request(3, 300), 3)
        assert rig.connection.queued == (6 + 500) + (6 + 300)
        await settle(1)
        rig.connection.send(Tping(1))
        arrived = [await rig.peer.receive() for _ in range(3)]
        assert arrived == [Tping(1), Tdispatch(3, body=bytes(300)), large]
        assert max(len(frame) for frame in rig.peer.frames) == 104
        assert len(rig.peer.frames) == 6 + 4 + 1


async def test_only_dispatches_are_fragmented_and_only_above_the_limit() -> None:
    async with connected() as rig:
        rig.connection.fragment_at(20)
        rig.connection.send(Rerr(5, "x" * 50))
        rig.connection.send(Rdispatch(2, ReplyStatus.OK, (), bytes(17)), 2)
        rig.connection.send(Rdispatch(3, ReplyStatus.OK, (), bytes(18)), 3)
        for _ in range(3):
            await rig.peer.receive()
        assert [len(frame) - 4 for frame in rig.peer.frames if frame[0] == 0x7F] == [50]
        assert [len(frame) - 4 for frame in rig.peer.frames if frame[3] == 2] == [20]
        assert [len(frame) - 4 for frame in rig.peer.frames if frame[3] == 3] == [20, 1]


async def test_a_message_half_sent_is_not_taken_back_but_nothing_more_of_it_leaves() -> None:
    async with connected(capacity=150) as rig:
        rig.connection.fragment_at(100)
        rig.connection.write(request(2, 1000), 2)
        await settle()
        assert rig.connection.queued > 0
        assert rig.connection.withdraw(2) is False
        assert rig.connection.queued == 0
        rig.connection.send(Tping(1))
        await rig.peer.expect(Tping(1))
        assert all(frame[1] & 0x80 for frame in rig.peer.frames if frame[0] == 2), "its last fragment never came"


async def test_a_large_message_that_has_not_begun_to_leave_is_taken_back_whole() -> None:
    async with connected() as rig:
        await settle()
        rig.connection.fragment_at(100)
        rig.connection.write(request(2, 1000), 2)
        assert rig.connection.withdraw(2) is True
        rig.connection.send(Tping(1))
        await rig.peer.expect(Tping(1))
        assert len(rig.peer.frames) == 1


# --- back-pressure ----------------------------------------------------------------------------------------------------


async def test_writers_who_wait_never_queue_more_than_the_mark_and_one_message() -> None:
    size = 100_000
    async with connected(capacity=1000) as rig:
        most = 0
        async with anyio.create_task_group() as writers:

            async def write(tag: int) -> None:
                nonlocal most
                await rig.connection.writable()
                rig.connection.write(request(tag, size), tag)
                most = max(most, rig.connection.queued)

            for tag in range(2, 52):
                writers.start_soon(write, tag)
            await settle()
            assert most <= HIGH_WATER + len(request(2, size))
            assert {(await rig.peer.receive()).tag for _ in range(50)} == set(range(2, 52))
        assert most <= HIGH_WATER + len(request(2, size))
        assert not rig.connection.congested


@pytest.mark.parametrize("fragment", [None, 1000])
async def test_those_who_wait_go_on_when_what_was_in_the_way_is_taken_back(fragment: int | None) -> None:
    """Its write loop has not woken yet, and when it does there will be nothing left for it to send."""
    connection = Rig(1000, Limits()).connection
    connection.fragment_at(fragment)
    connection.write(request(2, 2 * HIGH_WATER), 2)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(connection.writable)
            group.start_soon(connection.flush)
            await settle()
            connection.withdraw(2)


async def test_a_broken_connection_releases_all_who_wait() -> None:
    rig = Rig(1000, Limits())
    async with anyio.create_task_group() as group:

        async def write_loop() -> None:
            with pytest.raises(anyio.BrokenResourceError):
                await rig.connection.write_loop()

        group.start_soon(write_loop)
        rig.connection.write(request(2, 2 * HIGH_WATER), 2)
        group.start_soon(rig.connection.flush)
        rig.connection.write(request(3, 2 * HIGH_WATER), 3)
        group.start_soon(rig.connection.writable)
        await settle()
        rig.there.cut()
    assert rig.connection.queued == 0
    rig.connection.write(request(4, 10))
    assert rig.connection.queued == 0, "nothing is kept that can never leave"


async def test_flushing_waits_until_the_last_byte_is_handed_over() -> None:
    async with connected(capacity=1000) as rig:
        await rig.connection.flush()
        rig.connection.write(request(2, 5000), 2)
        flushed = anyio.Event()
        async with anyio.create_task_group() as group:

            async def flush() -> None:
                await rig.connection.flush()
                flushed.set()

            group.start_soon(flush)
            await settle()
            assert not flushed.is_set()
            await rig.peer.receive()
            await settle()
            assert flushed.is_set()


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_messages_that_come_together_are_read_together() -> None:
    rig = Rig(1 << 20, Limits())
    await rig.there.send(encode(Tping(1)) + request(2, 5) + request(3, 5)[:7])
    assert [decode(frame) for frame in await rig.connection.read()] == [Tping(1), Tdispatch(2, body=bytes(5))]
    await rig.there.send(request(3, 5)[7:])
    assert [decode(frame) for frame in await rig.connection.read()] == [Tdispatch(3, body=bytes(5))]


async def test_messages_behind_the_handshake_are_kept_for_the_session() -> None:
    rig = Rig(1 << 20, Limits())
    await rig.there.send(b"".join(encode(Tping(tag)) for tag in (1, 2, 3)))
    assert await rig.connection.next_message() == Tping(1)
    assert [decode(frame) for frame in rig.connection.take_unread()] == [Tping(2), Tping(3)]
    assert rig.connection.take_unread() == []


async def test_the_end_of_the_stream_and_a_break_are_told_apart() -> None:
    rig = Rig(1 << 20, Limits())
    await rig.there.send(encode(Tping(1))[:5])
    await rig.there.send_eof()
    with pytest.raises(anyio.EndOfStream):
        await rig.connection.read()
    rig.there.cut()
    with pytest.raises(anyio.BrokenResourceError):
        await rig.connection.read()


async def test_no_more_is_read_at_once_than_one_buffer_holds() -> None:
    rig = Rig(4 * READ_SIZE, Limits())
    ping = encode(Tping(1))
    await rig.there.send(ping * (2 * READ_SIZE // len(ping)))
    assert len(await rig.connection.read()) == READ_SIZE // len(ping)


async def test_limits_hold_for_frames_fragments_and_contexts() -> None:
    for data, kind in (
        (b"\x7f\xff\xff\xff", "frame_too_large"),
        (encode(Tdispatch(2, ((b"k" * 50, b""),))), "contexts_too_large"),
        (b"\x00\x00\x00\x04\x02\x80\x00\x02" + b"\x00\x00\x00\x04\x02\x80\x00\x03", "too_many_in_flight"),
    ):
        rig = Rig(1 << 20, Limits(max_frame=1000, max_contexts=50, max_in_flight=1))
        await rig.there.send(data)
        with pytest.raises(MuxError) as caught, anyio.fail_after(5):
            await rig.connection.next_message()
        assert caught.value.kind == kind


# --- numbers and closing ----------------------------------------------------------------------------------------------


async def test_bytes_and_breaches_are_counted() -> None:
    async with connected() as rig:
        await rig.connection.send_now(Tping(1))
        rig.connection.write(request(2, 92))
        await rig.connection.flush()
        await rig.there.send(encode(Tping(1)))
        await rig.connection.read()
        rig.connection.violation(MuxError("x", "negotiation"))
        rig.connection.violation(MuxError("x"))
        assert rig.registry.snapshot() == {
            "received_bytes": 8,
            "sent_bytes": 8 + len(request(2, 92)),
            "violations/malformed": 1,
            "violations/negotiation": 1,
        }


@pytest.mark.parametrize(
    "error", [OSError(107, "not connected"), anyio.BrokenResourceError(), anyio.ClosedResourceError()]
)
async def test_ending_our_half_of_a_connection_that_is_gone_is_no_error(error: Exception) -> None:
    """Which of these a socket raises hangs on the event loop and on its kind; the reader finds out in any case."""

    class Gone(MemoryStream):
        async def send_eof(self) -> None:
            raise error

    stream = Gone.__new__(Gone)
    connection = Connection(stream, Limits())
    await connection.send_eof()


async def test_closing_closes_the_stream_even_when_cancelled() -> None:
    rig = Rig(1000, Limits())
    with anyio.CancelScope() as scope:
        scope.cancel()
        await rig.connection.aclose()
    assert rig.stream.closed
    with pytest.raises(anyio.EndOfStream):
        await rig.there.receive()


async def test_after_the_end_of_our_half_nothing_is_written_and_the_other_half_goes_on() -> None:
    async with connected() as rig:
        rig.connection.send(Tping(1))
        await rig.connection.flush()
        await rig.connection.send_eof()
        rig.connection.send(Tping(2))
        await settle()
        await rig.peer.expect(Tping(1))
        await rig.peer.ended()
        await rig.there.send(encode(Tping(3)))
        assert decode((await rig.connection.read())[0]) == Tping(3)
