"""How a session begins: the "tinit check", version and headers. Pure: a frame in, frames out, and a verdict.

A client first sends an Rerr that says "tinit check". A server that can negotiate echoes it, one that cannot answers
with something else, and then both go on with the defaults. After the echo, Tinit and Rinit exchange the version and
headers. A server whose first message is anything else starts at once, without negotiation.

==============  =======================  ==================================  ==================
client          receives                 sends                               becomes
==============  =======================  ==================================  ==================
PROBING         the echo                 Tinit(1, headers)                   OFFERING
PROBING         anything else            (that reply is dropped)             DONE, not negotiated
OFFERING        Rinit, version 1                                             DONE, negotiated
OFFERING        Rerr, or another version                                     MuxError
server
LISTENING       the probe                the probe                           PROBED
LISTENING       anything else                                                DONE, not negotiated; it is a request
PROBED          Tinit, version 1         Rinit(1, headers)                   DONE, negotiated
PROBED          Tinit, another version   Rerr                                MuxError
PROBED          anything else                                                DONE, not negotiated; it is a request
==============  =======================  ==================================  ==================

Headers: ``mux-framer``, the largest fragment this side will receive, and ``tls``. TLS inside a session is off here:
a peer that requires it is refused in words, one that only desires it goes on without. Source: finagle-mux,
Handshake.scala, pushsession/MuxClientNegotiatingSession.scala, MuxServerNegotiator.scala.
"""

from __future__ import annotations

import struct
from enum import Enum, auto
from typing import Final

import msgspec

from ..core.errors import shown
from .codec import HEADER, Limits, MuxError
from .messages import CONTROL_TAG, Contexts, Message, Rerr, Rinit, Tinit

__all__ = ["PROBE", "VERSION", "ClientHandshake", "Negotiated", "ServerHandshake"]

VERSION: Final = 1
PROBE: Final = Rerr(CONTROL_TAG, "tinit check")
UNLIMITED: Final = 0x7FFFFFFF
FRAGMENT: Final = 256 * 1024
"""Bytes of payload that we ask peers to send at once. Finagle asks for no limit, and then one large reply holds up all
the small ones behind it, and the answers to pings."""
FRAMER: Final = b"mux-framer"
TLS: Final = b"tls"


class Negotiated(msgspec.Struct, frozen=True):
    """What a handshake came to.

    Attributes:
        version: The common version; ``None`` when the peer does not negotiate.
        fragment: The most bytes a fragment sent to the peer may carry; ``None`` when it takes any size.
        headers: The peer's headers, as they came.
        request: On a server, the first message when it was a request already.
    """

    version: int | None = None
    fragment: int | None = None
    headers: Contexts = ()
    request: Message | None = None


class _State(Enum):
    PROBING = auto()
    OFFERING = auto()
    LISTENING = auto()
    PROBED = auto()
    DONE = auto()


def our_headers(limits: Limits) -> Contexts:
    """What this side offers."""
    return ((FRAMER, struct.pack(">i", max(1, min(limits.max_frame - HEADER, FRAGMENT)))), (TLS, b"off"))


def agree(headers: Contexts) -> Negotiated:
    """What the peer's headers mean for us.

    Raises:
        MuxError: It requires TLS inside the session, or announces a fragment size that is none.
    """
    fragment = None
    for key, value in headers:
        if key == FRAMER:
            if len(value) != 4 or (size := struct.unpack(">i", value)[0]) <= 0:
                raise MuxError(f"a mux-framer header of {value[:8]!r}: a size is 4 bytes, above 0", "negotiation")
            fragment = None if size == UNLIMITED else size
        elif key == TLS and value == b"required":
            raise MuxError("the peer requires TLS inside the Mux session, which is off here", "negotiation")
    return Negotiated(VERSION, fragment, headers)


class ClientHandshake:
    """The client's side."""

    def __init__(self, limits: Limits) -> None:
        self._state = _State.PROBING
        self._limits = limits
        self.result: Negotiated | None = None

    def start(self) -> Message:
        """The first message to send."""
        return PROBE

    def receive(self, message: Message) -> Message | None:
        """Take what came; give what to send, if anything. Done when `result` is set.

        Raises:
            MuxError: Nothing can be agreed on.
        """
        if self._state is _State.PROBING:
            if isinstance(message, Rerr) and message.why == PROBE.why:
                self._state = _State.OFFERING
                return Tinit(CONTROL_TAG, VERSION, our_headers(self._limits))
            self._state = _State.DONE
            self.result = Negotiated()
            return None
        if isinstance(message, Rinit):
            if message.version != VERSION:
                raise MuxError(f"the server speaks Mux version {message.version}, we speak {VERSION}", "negotiation")
            self._state = _State.DONE
            self.result = agree(message.headers)
            return None
        why = message.why if isinstance(message, Rerr) else f"it answered with {type(message).__name__}"
        raise MuxError(f"the server refused the session: {shown(why)}", "negotiation")


class ServerHandshake:
    """The server's side."""

    def __init__(self, limits: Limits) -> None:
        self._state = _State.LISTENING
        self._limits = limits
        self.result: Negotiated | None = None

    def receive(self, message: Message) -> Message | None:
        """Take what came; give what to send, if anything. Done when `result` is set.

        Raises:
            MuxError: Nothing can be agreed on. Its text belongs in an Rerr to the client.
        """
        if self._state is _State.LISTENING and message == PROBE:
            self._state = _State.PROBED
            return message
        if self._state is _State.PROBED and isinstance(message, Tinit):
            if message.version != VERSION:
                raise MuxError(
                    f"unsupported Mux version {message.version}, this server speaks {VERSION}", "negotiation"
                )
            self.result = agree(message.headers)
            self._state = _State.DONE
            return Rinit(message.tag, VERSION, our_headers(self._limits))
        self._state = _State.DONE
        self.result = Negotiated(request=message)
        return None
