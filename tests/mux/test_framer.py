from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.mux.codec import Limits, MuxError, decode, encode
from meshlib.mux.framer import Fragmenter, Framer, Reassembler
from meshlib.mux.messages import Message, Rdiscarded, Rdispatch, ReplyStatus, Rerr, Tdiscarded, Tdispatch, Tping, Treq

from .strategies import dispatches, messages

seeds = st.randoms(use_true_random=False)
LIMITS = Limits(max_frame=4096, max_in_flight=100)


def cut(data: bytes, rng: random.Random, most: int = 64) -> Iterator[bytes]:
    """The same bytes in reads of random sizes."""
    at = 0
    while at < len(data):
        n = rng.randint(1, rng.choice((1, 8, most)))
        yield data[at : at + n]
        at += n


def pieces(message: Message, limit: int) -> list[bytes]:
    """The frames of a dispatch, sizes included, with at most ``limit`` bytes of payload in each."""
    fragmenter = Fragmenter(encode(message), limit)
    frames = [fragmenter.take()]
    while fragmenter.left:
        frames.append(fragmenter.take())
    return frames


def receive(reads: Iterable[bytes], limits: Limits = LIMITS) -> list[Message]:
    framer, reassembler = Framer(limits.max_frame), Reassembler(limits)
    whole = (reassembler.add(frame) for data in reads for frame in framer.feed(data))
    return [decode(frame) for frame in whole if frame is not None]


def fragment(code: int, tag: int, payload: bytes, *, more: bool) -> bytes:
    """A frame without its size, with the flag that more of its message follows."""
    return struct.pack(">b", code) + (tag | (0x800000 if more else 0)).to_bytes(3, "big") + payload


# --- frames -----------------------------------------------------------------------------------------------------------


@given(st.lists(messages, max_size=8), seeds)
def test_frames_survive_any_split_into_reads(sent: list[Message], rng: random.Random) -> None:
    stream = b"".join(map(encode, sent))
    framer = Framer()
    frames = [frame for data in cut(stream, rng) for frame in framer.feed(data)]

    assert [decode(frame) for frame in frames] == sent
    assert framer.held == 0


@given(messages, messages)
def test_frames_survive_every_split_in_two(one: Message, two: Message) -> None:
    stream = encode(one) + encode(two)
    for at in range(len(stream) + 1):
        framer = Framer()
        frames = framer.feed(stream[:at]) + framer.feed(stream[at:])
        assert [decode(frame) for frame in frames] == [one, two]


def test_a_byte_at_a_time_is_enough() -> None:
    stream = encode(Tping(1)) + encode(Tdispatch(2, body=b"hello"))
    framer = Framer()
    frames = [framer.feed(stream[at : at + 1]) for at in range(len(stream))]
    assert [len(whole) for whole in frames] == [0] * 7 + [1] + [0] * 18 + [1]


def test_what_has_not_come_whole_is_held() -> None:
    framer = Framer()
    framer.feed(encode(Tping(1)) + b"\x00\x00")
    assert framer.held == 2
    framer.feed(b"\x00\x04\x41")
    assert framer.held == 5
    assert framer.feed(b"\x00\x00\x01") == [b"\x41\x00\x00\x01"]
    assert framer.held == 0


@pytest.mark.parametrize("size", [0, 3, -1, -(2**31)])
def test_a_size_that_holds_no_header_is_refused(size: int) -> None:
    with pytest.raises(MuxError) as caught:
        Framer().feed(struct.pack(">i", size))
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize("size", [101, 2**20, 2**31 - 1])
def test_a_frame_over_the_limit_is_refused_at_its_size_alone(size: int) -> None:
    """Nothing of the frame has come yet, so nothing of it takes memory."""
    framer = Framer(max_frame=100)
    with pytest.raises(MuxError, match=rf"{size} bytes; the limit here is 100 \(Limits.max_frame\)") as caught:
        framer.feed(struct.pack(">i", size))
    assert caught.value.kind == "frame_too_large"


def test_a_frame_may_be_as_large_as_the_limit() -> None:
    framer = Framer(max_frame=100)
    assert framer.feed(struct.pack(">i", 100) + bytes(100)) == [bytes(100)]


def test_a_large_frame_takes_its_own_size_however_small_the_reads_are() -> None:
    """A peer that drips must not make each drop cost what an object costs."""
    size = 400_000
    drops = struct.pack(">i", size) + bytes(size - 2)
    framer = Framer(max_frame=size)
    tracemalloc.start()
    try:
        for at in range(0, len(drops), 2):
            framer.feed(drops[at : at + 2])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert framer.held == len(drops)
    assert held < 2 * size
    assert [len(frame) for frame in framer.feed(b"\0\0")] == [size]


# --- fragments --------------------------------------------------------------------------------------------------------


@given(dispatches, st.integers(1, 900))
def test_fragments_carry_at_most_the_limit_and_join_to_the_message(message: Message, limit: int) -> None:
    frames = pieces(message, limit)
    payload = encode(message)[8:]

    for i, frame in enumerate(frames):
        size, code, high, low = struct.unpack_from(">ibBH", frame)
        more = i < len(frames) - 1
        assert size == len(frame) - 4
        assert code == (2 if isinstance(message, Tdispatch) else -2)
        assert bool(high & 0x80) is more
        assert (high & 0x7F) << 16 | low == message.tag
        assert len(frame) - 8 == (limit if more else len(payload) - limit * i)
    assert b"".join(frame[8:] for frame in frames) == payload
    assert receive(frames) == [message]


@given(st.lists(st.tuples(messages, st.integers(1, 400)), max_size=6, unique_by=lambda pair: pair[0].tag), seeds)
def test_messages_in_interleaved_fragments_arrive_whole(sent: list[tuple[Message, int]], rng: random.Random) -> None:
    lanes = [
        pieces(message, limit) if isinstance(message, Tdispatch | Rdispatch) else [encode(message)]
        for message, limit in sent
        # A discard or an error may well concern another message's tag; those have tests of their own.
        if not isinstance(message, Tdiscarded | Rdiscarded | Rerr)
    ]
    expected = [message for message, _ in sent if not isinstance(message, Tdiscarded | Rdiscarded | Rerr)]
    stream = b""
    waiting = [iter(lane) for lane in lanes]
    while waiting:
        lane = rng.choice(waiting)
        frame = next(lane, None)
        if frame is None:
            waiting.remove(lane)
        else:
            stream += frame

    arrived = receive(cut(stream, rng, 300))

    assert sorted(arrived, key=repr) == sorted(expected, key=repr)


def test_messages_come_out_in_the_order_in_which_they_end() -> None:
    first = fragment(2, 2, b"\0\0\0\0", more=True)
    last = fragment(2, 2, b"\0\0", more=False)
    reassembler = Reassembler(LIMITS)
    assert reassembler.add(first) is None
    assert reassembler.add(encode(Tping(1))[4:]) == encode(Tping(1))[4:]
    assert reassembler.add(last) == encode(Tdispatch(2))[4:]
    assert reassembler.held == 0


@pytest.mark.parametrize(
    ("code", "whole"), [(1, Treq(5, body=b"abcd")), (-2, Rdispatch(5, ReplyStatus.OK, (), b"abcd"))]
)
def test_other_requests_and_replies_are_joined_too(code: int, whole: Message) -> None:
    payload = encode(whole)[8:]
    reassembler = Reassembler(LIMITS)
    assert reassembler.add(fragment(code, 5, payload[:3], more=True)) is None
    assert decode(reassembler.add(fragment(code, 5, payload[3:], more=False))) == whole


def test_empty_fragments_are_allowed() -> None:
    reassembler = Reassembler(LIMITS)
    assert reassembler.add(fragment(2, 5, b"", more=True)) is None
    assert reassembler.add(fragment(2, 5, bytes(6), more=True)) is None
    assert decode(reassembler.add(fragment(2, 5, b"", more=False))) == Tdispatch(5)


@pytest.mark.parametrize(
    "giving_up",
    [Tdiscarded(0, 5, "gone"), Rdiscarded(5), Rerr(5, "gone")],
    ids=["Tdiscarded", "Rdiscarded", "Rerr"],
)
@pytest.mark.parametrize("new_code", [False, True])
def test_giving_a_message_up_drops_its_fragments(giving_up: Message, *, new_code: bool) -> None:
    frame = encode(giving_up)[4:]
    if new_code and frame[0] in (0xC2, 0x7F):
        frame = bytes([{0xC2: 66, 0x7F: 128}[frame[0]]]) + frame[1:]
    reassembler = Reassembler(LIMITS)
    reassembler.add(fragment(2, 5, b"half of one", more=True))
    reassembler.add(fragment(2, 6, bytes(4), more=True))
    assert reassembler.held == 15

    assert reassembler.add(frame) == frame
    assert reassembler.held == 4
    assert decode(reassembler.add(encode(Tdispatch(5, body=b"another"))[4:])) == Tdispatch(5, body=b"another")
    assert decode(reassembler.add(fragment(2, 6, bytes(2), more=False))) == Tdispatch(6)


@pytest.mark.parametrize("code", [64, -64, 65, -65, 66, -62, -66, 67, 68, -68, -128, 127, 99])
@pytest.mark.parametrize("busy", [False, True])
def test_only_requests_and_replies_come_in_fragments(code: int, *, busy: bool) -> None:
    reassembler = Reassembler(LIMITS)
    if busy:
        reassembler.add(fragment(2, 9, b"x", more=True))
    with pytest.raises(MuxError, match=f"a fragment of message type {code}$") as caught:
        reassembler.add(fragment(code, 5, b"", more=True))
    assert caught.value.kind == "malformed"


def test_a_joined_message_keeps_to_the_limit_of_a_frame() -> None:
    limits = Limits(max_frame=100)
    reassembler = Reassembler(limits)
    reassembler.add(fragment(2, 5, bytes(60), more=True))
    assert len(reassembler.add(fragment(2, 5, bytes(36), more=False))) == 100

    reassembler.add(fragment(2, 5, bytes(60), more=True))
    with pytest.raises(MuxError, match="over 100 bytes") as caught:
        reassembler.add(fragment(2, 5, bytes(37), more=False))
    assert caught.value.kind == "frame_too_large"


def test_fragments_that_wait_keep_to_four_frames_in_all() -> None:
    reassembler = Reassembler(Limits(max_frame=100))
    for tag in range(4):
        reassembler.add(fragment(2, tag, bytes(96), more=True))
    assert reassembler.held == 384
    reassembler.add(fragment(2, 4, bytes(16), more=True))
    with pytest.raises(MuxError, match=r"Limits\.max_frame") as caught:
        reassembler.add(fragment(2, 5, b"1", more=True))
    assert caught.value.kind == "frame_too_large"


def test_messages_that_wait_for_the_rest_keep_to_the_limit_of_requests() -> None:
    """Fragments without a payload weigh nothing, so their number is what must be bounded."""
    reassembler = Reassembler(Limits(max_in_flight=10))
    for tag in range(10):
        reassembler.add(fragment(2, tag, b"", more=True))
    with pytest.raises(MuxError, match=r"more than 10 incomplete messages \(Limits.max_in_flight\)") as caught:
        reassembler.add(fragment(2, 10, b"", more=True))
    assert caught.value.kind == "too_many_in_flight"


def test_many_tiny_fragments_of_one_message_take_its_own_size() -> None:
    limits = Limits(max_frame=200_000)
    reassembler = Reassembler(limits)
    drop = fragment(2, 5, b"x", more=True)
    tracemalloc.start()
    try:
        for _ in range(150_000):
            reassembler.add(drop)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reassembler.held == 150_000
    assert held < 2 * limits.max_frame
    assert peak < 3 * limits.max_frame
