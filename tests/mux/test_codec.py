from __future__ import annotations

import struct
import tracemalloc
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.core.errors import ConfigurationError, InvalidArgument
from meshlib.mux.codec import Limits, MuxError, decode, encode, encode_contexts, encode_tdispatch
from meshlib.mux.messages import (
    Code,
    Message,
    Rdiscarded,
    Rdispatch,
    Rdrain,
    ReplyStatus,
    Rerr,
    Rinit,
    Rping,
    Rreq,
    Tdiscarded,
    Tdispatch,
    Tdrain,
    Tinit,
    Tlease,
    Tping,
    Treq,
    Unknown,
)

from .strategies import BY_TYPE, messages

# Written by hand from the layouts of finagle-mux (Message.scala), not by this codec.
GOLDEN: dict[str, tuple[Message, str]] = {
    "the probe of the handshake": (
        Rerr(1, "tinit check"),
        "0000000f 7f 000001 74696e697420636865636b",
    ),
    "Tping": (Tping(1), "00000004 41 000001"),
    "Rping": (Rping(1), "00000004 bf 000001"),
    "Tdrain": (Tdrain(1), "00000004 40 000001"),
    "Rdrain": (Rdrain(1), "00000004 c0 000001"),
    "Rdiscarded": (Rdiscarded(0x7FFFFF), "00000004 be 7fffff"),
    "Tdiscarded under its legacy code": (Tdiscarded(0, 0x010203, "no"), "00000009 c2 000000 010203 6e6f"),
    "Rerr under its legacy code": (Rerr(9, "é"), "00000006 7f 000009 c3a9"),
    "Tlease of 1,500 ms": (Tlease(0, 0, 1500), "0000000d 43 000000 00 00000000000005dc"),
    "Tinit": (
        Tinit(1, 1, ((b"mux-framer", b"\x7f\xff\xff\xff"), (b"tls", b"off"))),
        "0000002a 44 000001 0001 0000000a 6d75782d6672616d6572 00000004 7fffffff 00000003 746c73 00000003 6f6666",
    ),
    "Rinit": (Rinit(1, 1), "00000006 bc 000001 0001"),
    "Treq without keys": (Treq(2, body=b"hi"), "00000007 01 000002 00 6869"),
    "Treq with a trace and flags": (
        Treq(2, (10, 11, 12), 1, b"x"),
        "00000023 01 000002 02 01 18 000000000000000a 000000000000000b 000000000000000c 02 01 01 78",
    ),
    "Rreq": (Rreq(2, ReplyStatus.NACK, b"no"), "00000007 ff 000002 02 6e6f"),
    "Tdispatch": (
        Tdispatch(3, ((b"k", b"vv"),), "/a", (("/s", "/t"), ("/u", "~")), b"body"),
        "00000026 02 000003 0001 0001 6b 0002 7676 0002 2f61 0002 0002 2f73 0002 2f74 0002 2f75 0001 7e 626f6479",
    ),
    "Tdispatch of nothing": (Tdispatch(2), "0000000a 02 000002 0000 0000 0000"),
    "Rdispatch": (
        Rdispatch(3, ReplyStatus.ERROR, ((b"k", b""),), b"why"),
        "0000000f fe 000003 01 0001 0001 6b 0000 776879",
    ),
    "a type that nobody knows": (Unknown(5, 99, b"?"), "00000005 63 000005 3f"),
    "an answer that nobody knows": (Unknown(5, -99), "00000004 9d 000005"),
}


@pytest.mark.parametrize(("message", "text"), GOLDEN.values(), ids=GOLDEN)
def test_bytes_are_those_of_the_protocol(message: Message, text: str) -> None:
    frame = bytes.fromhex(text)

    assert encode(message) == frame
    assert decode(frame[4:]) == message


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ("80 000009 6e6f", Rerr(9, "no")),
        ("7f 000009 6e6f", Rerr(9, "no")),
        ("42 000000 000005 6e6f", Tdiscarded(0, 5, "no")),
        ("c2 000000 000005 6e6f", Tdiscarded(0, 5, "no")),
    ],
)
def test_new_and_legacy_codes_are_both_read(frame: str, message: Message) -> None:
    assert decode(bytes.fromhex(frame)) == message


def test_every_type_of_message_has_a_strategy() -> None:
    assert set(BY_TYPE) == set(get_args(Message))


@pytest.mark.parametrize("kind", BY_TYPE, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_decoding_what_was_encoded_is_the_identity(kind: type, data: st.DataObject) -> None:
    message = data.draw(BY_TYPE[kind])
    frame = encode(message)

    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert decode(frame[4:]) == message
    assert encode(decode(frame[4:])) == frame


@given(messages, st.data())
def test_a_frame_cut_short_is_another_message_or_an_error(message: Message, data: st.DataObject) -> None:
    frame = encode(message)[4:]
    cut = frame[: data.draw(st.integers(0, len(frame) - 1))]

    try:
        other = decode(cut)
    except MuxError:
        return
    assert decode(encode(other)[4:]) == other


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_an_error(frame: bytes) -> None:
    try:
        message = decode(frame)
    except MuxError:
        return
    assert decode(encode(message)[4:]) == message


# --- what the protocol has room for -----------------------------------------------------------------------------------

LONGEST = 0x7FFF


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Tdispatch(2, ((b"k" * n, b""),)),
        lambda n: Tdispatch(2, ((b"", b"v" * n),)),
        lambda n: Tdispatch(2, (), "d" * n),
        lambda n: Tdispatch(2, (), "", (("p" * n, ""),)),
        lambda n: Tdispatch(2, (), "", (("", "t" * n),)),
        lambda n: Rdispatch(2, ReplyStatus.OK, ((b"k" * n, b""),)),
    ],
    ids=["key", "value", "destination", "prefix", "tree", "response context"],
)
def test_a_part_may_be_32767_bytes_long_and_no_longer(make: object) -> None:
    longest = make(LONGEST)
    assert decode(encode(longest)[4:]) == longest
    with pytest.raises(InvalidArgument, match="32768 bytes"):
        encode(make(LONGEST + 1))


def test_a_destination_is_measured_in_bytes_not_in_characters() -> None:
    with pytest.raises(InvalidArgument, match="32768 bytes"):
        encode(Tdispatch(2, (), "é" * (LONGEST // 2 + 1)))


def test_a_message_carries_32767_contexts_and_no_more() -> None:
    most = ((b"", b""),) * LONGEST
    message = Tdispatch(2, most)
    assert decode(encode(message)[4:], max_contexts=1 << 20) == message
    with pytest.raises(InvalidArgument, match="32768 contexts"):
        encode_contexts((*most, (b"", b"")))


def test_the_two_encoders_of_a_dispatch_agree() -> None:
    contexts = ((b"a", b"1"), (b"b", b""))
    rules = (("/s", "/t"),)
    assert encode_tdispatch(7, encode_contexts(contexts), "/x", rules, b"!") == encode(
        Tdispatch(7, contexts, "/x", rules, b"!")
    )


# --- what must not be taken for a message -----------------------------------------------------------------------------

MALFORMED: dict[str, str] = {
    "nothing at all": "",
    "less than a header": "02 0000",
    "a fragment that nobody joined": "02 800002 0000 0000 0000",
    "a dispatch without anything": "02 000002",
    "a negative number of contexts": "02 000002 ffff 0000 0000",
    "more contexts than there are bytes": "02 000002 7fff 0000 0000",
    "a key longer than the frame": "02 000002 0001 7fff 0000 0000 0000",
    "a key of negative length": "02 000002 0001 ffff 0000 0000 0000",
    "a value of negative length": "02 000002 0001 0000 8000 0000 0000",
    "a pair without a value": "02 000002 0001 0001 6b",
    "a destination longer than the frame": "02 000002 0000 0004 2f",
    "a destination of negative length": "02 000002 0000 fffe 0000 0000",
    "a destination that is no text": "02 000002 0000 0001 ff 0000",
    "a Dtab that is no text": "02 000002 0000 0000 0001 0001 ff 0000",
    "a dispatch without a Dtab": "02 000002 0000 0000",
    "a reply without a status": "fe 000002",
    "a reply of an unknown status": "fe 000002 03 0000",
    "a reply without contexts": "fe 000002 00",
    "an old reply without a status": "ff 000002",
    "an old reply of an unknown status": "ff 000002 09",
    "an old request without a number of keys": "01 000002",
    "an old request without the key it announces": "01 000002 01",
    "an old request with half a trace": "01 000002 01 01 18 00000000",
    "an old request with a trace of 23 bytes": "01 000002 01 01 17" + "00" * 23,
    "an old request with flags of 2 bytes": "01 000002 01 02 02 0000",
    "a discard of no tag": "c2 000000 0000",
    "a lease without a length": "43 000000 00 00000000",
    "an offer without a version": "44 000001 00",
    "an offer with half a length": "44 000001 0001 0000",
    "an offer with a key of negative length": "44 000001 0001 ffffffff",
    "an offer with a key longer than the frame": "44 000001 0001 00000002 61",
    "an offer with a key without a value": "44 000001 0001 00000001 61",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_malformed_frames_are_refused(text: str) -> None:
    with pytest.raises(MuxError) as caught:
        decode(bytes.fromhex(text))
    assert caught.value.kind == "malformed"
    assert caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("41 000001 ff", Tping(1)),
        ("be 000002 ff", Rdiscarded(2)),
        ("43 000000 00 0000000000000001 ff", Tlease(0, 0, 1)),
        ("01 000002 02 09 02 aaaa 02 01 01 78", Treq(2, None, 1, b"x")),
        ("c2 000000 000005 ff", Tdiscarded(0, 5, "\ufffd")),
        ("7f 000005 ff", Rerr(5, "\ufffd")),
    ],
    ids=["ping", "discarded", "lease", "unknown Treq key", "a reason that is no text", "an error that is no text"],
)
def test_what_a_newer_or_careless_peer_may_send_is_read(text: str, message: Message) -> None:
    assert decode(bytes.fromhex(text)) == message


@pytest.mark.parametrize("code", [Code.TINIT, Code.RINIT])
def test_headers_count_against_the_limit_of_contexts(code: Code) -> None:
    frame = struct.pack(">bBHh", code, 0, 1, 1) + struct.pack(">i", 90) + b"k" * 90 + struct.pack(">i", 0)
    decode(frame, max_contexts=98)
    with pytest.raises(MuxError, match="max_contexts") as caught:
        decode(frame, max_contexts=97)
    assert caught.value.kind == "contexts_too_large"


@pytest.mark.parametrize("kind", ["contexts of a request", "Dtab", "contexts of a reply"])
def test_a_section_may_be_as_long_as_the_limit_and_no_longer(kind: str) -> None:
    pairs = ((b"k" * 10, b"v" * 10), (b"", b"w" * 2))
    size = 24 + 6
    message: Message = {
        "contexts of a request": Tdispatch(2, pairs, "/a", (), b"body"),
        "Dtab": Tdispatch(2, (), "/a", tuple((k.decode(), v.decode()) for k, v in pairs), b"body"),
        "contexts of a reply": Rdispatch(2, ReplyStatus.OK, pairs, b"body"),
    }[kind]
    frame = encode(message)[4:]

    assert decode(frame, max_contexts=size) == message
    with pytest.raises(MuxError, match=rf"more than {size - 1} bytes \(Limits.max_contexts\)") as caught:
        decode(frame, max_contexts=size - 1)
    assert caught.value.kind == "contexts_too_large"


@pytest.mark.parametrize("count", [0x7FFF, 0x4000, -1])
def test_a_number_of_pairs_takes_no_memory_before_they_are_there(count: int) -> None:
    frame = b"\x02\x00\x00\x02" + struct.pack(">h", count) + bytes(40)
    tracemalloc.start()
    try:
        with pytest.raises(MuxError):
            decode(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16_384


@pytest.mark.parametrize("field", ["max_frame", "max_contexts", "max_in_flight"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, None, "1"])
def test_limits_that_make_no_sense_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=field):
        Limits(**{field: value})


def test_limits_have_sound_defaults() -> None:
    limits = Limits()
    assert limits.max_frame == 16 * 2**20
    assert limits.max_contexts == 64 * 2**10
    assert limits.max_in_flight == 65_536
    Limits(max_frame=2**31 - 1, max_contexts=1, max_in_flight=1)
