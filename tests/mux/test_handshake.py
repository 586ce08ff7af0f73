from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.mux.codec import Limits, MuxError, encode
from meshlib.mux.handshake import FRAGMENT, PROBE, ClientHandshake, Negotiated, ServerHandshake
from meshlib.mux.messages import (
    Message,
    Rdispatch,
    ReplyStatus,
    Rerr,
    Rinit,
    Rping,
    Tdispatch,
    Tinit,
    Tping,
    Treq,
    Unknown,
)

from .strategies import messages

LIMITS = Limits(max_frame=1000)
OURS = ((b"mux-framer", struct.pack(">i", 996)), (b"tls", b"off"))
THEIRS = ((b"mux-framer", b"\x7f\xff\xff\xff"), (b"tls", b"off"))


def probed_client() -> ClientHandshake:
    handshake = ClientHandshake(LIMITS)
    handshake.start()
    handshake.receive(PROBE)
    return handshake


def probed_server() -> ServerHandshake:
    handshake = ServerHandshake(LIMITS)
    handshake.receive(PROBE)
    return handshake


def test_the_probe_is_finagles_to_the_byte() -> None:
    assert encode(ClientHandshake(LIMITS).start()).hex() == "0000000f7f000001" + b"tinit check".hex()


# --- the client's side ------------------------------------------------------------------------------------------------


def test_a_client_offers_after_the_echo_and_is_done_after_the_answer() -> None:
    handshake = ClientHandshake(LIMITS)
    assert handshake.start() == PROBE
    assert handshake.receive(PROBE) == Tinit(1, 1, OURS)
    assert handshake.result is None
    assert handshake.receive(Rinit(1, 1, THEIRS)) is None
    assert handshake.result == Negotiated(1, None, THEIRS)


def test_the_offer_announces_the_largest_fragment_that_the_limit_lets_in() -> None:
    """The announced size does not count a frame's header, and the limit does."""
    offer = ClientHandshake(Limits(max_frame=5000))
    offer.start()
    assert dict(offer.receive(PROBE).headers)[b"mux-framer"] == struct.pack(">i", 4996)


@pytest.mark.parametrize(
    "answer",
    [Rerr(1, "unexpected message"), Rping(1), Tping(1), Rdispatch(1, ReplyStatus.OK), Unknown(1, -100), Rinit(1, 1)],
    ids=lambda message: type(message).__name__,
)
def test_a_server_that_does_not_echo_is_spoken_to_without_negotiation(answer: Message) -> None:
    handshake = ClientHandshake(LIMITS)
    handshake.start()
    assert handshake.receive(answer) is None
    assert handshake.result == Negotiated()


def test_a_server_of_another_version_is_refused() -> None:
    with pytest.raises(MuxError, match="speaks Mux version 2, we speak 1") as caught:
        probed_client().receive(Rinit(1, 2, THEIRS))
    assert caught.value.kind == "negotiation"


def test_a_server_that_refuses_is_quoted() -> None:
    with pytest.raises(MuxError, match="the server refused the session: no such version") as caught:
        probed_client().receive(Rerr(1, "no such version"))
    assert caught.value.kind == "negotiation"


def test_a_server_that_answers_an_offer_with_something_else_is_refused() -> None:
    with pytest.raises(MuxError, match="it answered with Tping"):
        probed_client().receive(Tping(1))


@pytest.mark.parametrize(("size", "fragment"), [(2**31 - 1, None), (1, 1), (65_536, 65_536)])
def test_the_servers_fragment_size_is_kept(size: int, fragment: int | None) -> None:
    handshake = probed_client()
    handshake.receive(Rinit(1, 1, ((b"mux-framer", struct.pack(">i", size)),)))
    assert handshake.result.fragment == fragment


@pytest.mark.parametrize("value", [b"", b"\0\0\0", struct.pack(">i", 0), struct.pack(">i", -1), bytes(8)])
def test_a_fragment_size_that_is_none_is_refused_by_both_sides(value: bytes) -> None:
    headers = ((b"mux-framer", value),)
    for handshake, message in ((probed_client(), Rinit(1, 1, headers)), (probed_server(), Tinit(1, 1, headers))):
        with pytest.raises(MuxError, match="mux-framer") as caught:
            handshake.receive(message)
        assert caught.value.kind == "negotiation"


def test_headers_that_nobody_here_knows_are_kept_and_harmless() -> None:
    headers = ((b"accept-compress", b"desired:lz4;desired:lz4"), (b"", b""))
    client, server = probed_client(), probed_server()
    client.receive(Rinit(1, 1, headers))
    server.receive(Tinit(1, 1, headers))
    assert client.result == server.result == Negotiated(1, None, headers)


# --- TLS inside a session, which is off here --------------------------------------------------------------------------


@pytest.mark.parametrize("level", [b"off", b"desired"])
def test_a_peer_that_can_do_without_tls_is_spoken_to_without(level: bytes) -> None:
    client, server = probed_client(), probed_server()
    client.receive(Rinit(1, 1, ((b"tls", level),)))
    answer = server.receive(Tinit(1, 1, ((b"tls", level),)))
    assert client.result.version == server.result.version == 1
    assert dict(answer.headers)[b"tls"] == b"off"


def test_a_peer_that_requires_tls_is_refused_in_words() -> None:
    headers = ((b"tls", b"required"),)
    for handshake, message in ((probed_client(), Rinit(1, 1, headers)), (probed_server(), Tinit(1, 1, headers))):
        with pytest.raises(MuxError, match="requires TLS inside the Mux session, which is off here") as caught:
            handshake.receive(message)
        assert caught.value.kind == "negotiation"
        assert handshake.result is None


# --- the server's side ------------------------------------------------------------------------------------------------


def test_a_server_echoes_the_probe_and_answers_the_offer() -> None:
    handshake = ServerHandshake(LIMITS)
    assert handshake.receive(PROBE) == PROBE
    assert handshake.result is None
    assert handshake.receive(Tinit(1, 1, THEIRS)) == Rinit(1, 1, OURS)
    assert handshake.result == Negotiated(1, None, THEIRS)


def test_the_answer_bears_the_tag_of_the_offer() -> None:
    assert probed_server().receive(Tinit(7, 1)) == Rinit(7, 1, OURS)


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize(
    "message", [Tdispatch(2, body=b"x"), Treq(2, body=b"x"), Tping(1), Rerr(1, "something else")], ids=repr
)
def test_a_server_starts_at_once_when_something_else_comes(message: Message, *, probed: bool) -> None:
    handshake = probed_server() if probed else ServerHandshake(LIMITS)
    assert handshake.receive(message) is None
    assert handshake.result == Negotiated(request=message)


def test_an_offer_without_a_probe_is_no_negotiation() -> None:
    """Finagle: the session is un-negotiated, and answers that the type is unexpected."""
    handshake = ServerHandshake(LIMITS)
    handshake.receive(Tinit(1, 1, THEIRS))
    assert handshake.result == Negotiated(request=Tinit(1, 1, THEIRS))


@pytest.mark.parametrize("version", [0, 2, -1])
def test_a_client_of_another_version_is_refused(version: int) -> None:
    handshake = probed_server()
    with pytest.raises(MuxError, match=f"unsupported Mux version {version}, this server speaks 1") as caught:
        handshake.receive(Tinit(1, version))
    assert caught.value.kind == "negotiation"
    assert handshake.result is None


@given(messages, messages)
def test_whatever_comes_a_handshake_ends_or_says_why_not(first: Message, second: Message) -> None:
    for handshake in (ClientHandshake(LIMITS), ServerHandshake(LIMITS), probed_client(), probed_server()):
        try:
            handshake.receive(first)
            if handshake.result is None:
                handshake.receive(second)
        except MuxError as error:
            assert error.kind == "negotiation"  # noqa: PT017 - it may end well, too
        else:
            assert handshake.result is not None


@given(st.integers(8, 2**31 - 1), st.integers(8, 2**31 - 1))
def test_our_two_sides_agree(client_frame: int, server_frame: int) -> None:
    client, server = ClientHandshake(Limits(max_frame=client_frame)), ServerHandshake(Limits(max_frame=server_frame))
    message: Message | None = client.start()
    while message is not None:
        answer = server.receive(message)
        message = client.receive(answer) if answer is not None else None
    assert client.result.version == server.result.version == 1
    assert client.result.fragment == min(server_frame - 4, FRAGMENT)
    assert server.result.fragment == min(client_frame - 4, FRAGMENT)
