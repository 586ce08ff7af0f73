"""One question to name servers, and an answer that can be believed.

Over UDP with EDNS, over TCP when the answer was cut off, without EDNS for servers that cannot read it (RFC 6891 §7).
The sockets are ours and not dnspython's, since its timeouts follow the wall clock and its choice of an event loop is
one for the process; messages are read and written by dnspython.

Only two answers say something of the name: "here are its records" and "there are none" (NOERROR, NXDOMAIN). All others
(SERVFAIL, REFUSED, a referral, rubbish, silence) say something of the server, and the next is asked. A datagram counts
only if it comes from the server and repeats our id and question: others are passed over, as forgeries are to be
(RFC 5452 §9).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import anyio
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype

from .place import Server

__all__ = ["Exchange", "LookupFailed", "ask", "over_network"]

PAYLOAD: Final = 1232
"""Bytes of the largest datagram asked for: what passes everywhere unfragmented (DNS flag day 2020)."""

Exchange = Callable[[dns.message.QueryMessage, Server], Awaitable[dns.message.Message]]
"""Sends one question to one server, and waits for its answer; raises what went wrong. It has no timeout of its own."""


class LookupFailed(Exception):
    """No server could say whether there is such a name. The message says what each did instead."""


async def ask(
    name: dns.name.Name,
    kind: dns.rdatatype.RdataType,
    servers: Sequence[Server],
    timeout: float,
    attempts: int,
    exchange: Exchange,
) -> dns.message.QueryMessage:
    """The answer of the first server that has one.

    Args:
        name: An absolute name.
        kind: ``A``, ``AAAA`` or ``SRV``.
        servers: Whom to ask, in this order.
        timeout: Seconds for one server to answer, once.
        attempts: How often the list is gone through.
        exchange: How a question is sent.

    Raises:
        LookupFailed: No server has one.
    """
    problems: dict[Server, str] = {}
    left = list(servers)
    for _ in range(attempts):
        for server in tuple(left):
            problem = f"no answer in {timeout:g} s"
            try:
                with anyio.move_on_after(timeout):
                    reply = await _answer(name, kind, server, exchange)
                    if isinstance(reply, dns.message.QueryMessage):
                        return reply
                    problem = reply
            except OSError as error:
                problem = error.strerror or str(error) or type(error).__name__
            except (dns.exception.DNSException, anyio.EndOfStream, anyio.IncompleteRead) as error:
                problem = f"an answer that cannot be read ({type(error).__name__}: {error})"
                left.remove(server)
            problems[server] = problem
    said = "; ".join(f"{server}: {problem}" for server, problem in problems.items())
    raise LookupFailed(f"{name} {dns.rdatatype.to_text(kind)}: {said}")


async def _answer(
    name: dns.name.Name, kind: dns.rdatatype.RdataType, server: Server, exchange: Exchange
) -> dns.message.QueryMessage | str:
    """The answer, or what is wrong with it."""
    reply = await exchange(dns.message.make_query(name, kind, use_edns=0, payload=PAYLOAD), server)
    if reply.rcode() in (dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.BADVERS):
        reply = await exchange(dns.message.make_query(name, kind, use_edns=False), server)
    if not isinstance(reply, dns.message.QueryMessage) or reply.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return dns.rcode.to_text(reply.rcode())
    kinds = {each.rdtype for each in reply.authority}
    if not reply.answer and dns.rdatatype.NS in kinds and dns.rdatatype.SOA not in kinds:
        return "a referral to other servers (it does not resolve for its clients)"
    return reply


async def over_network(query: dns.message.QueryMessage, server: Server) -> dns.message.Message:
    """The answer over UDP; over TCP if that was cut off."""
    family, _, _, _, where = socket.getaddrinfo(
        server.host, server.port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    )[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        # Connected: only that server's datagrams arrive, and "port unreachable" is an error at once.
        sock.connect(where)
        sock.send(query.to_wire())
        while True:
            await anyio.wait_readable(sock)
            try:
                data = sock.recv(65535)
            except BlockingIOError:
                continue
            try:
                reply = dns.message.from_wire(data, raise_on_truncation=True, ignore_trailing=True)
            except dns.message.Truncated as cut:
                if query.is_response(cut.message()):  # type: ignore[no-untyped-call]
                    break
            except (dns.exception.DNSException, ValueError, struct.error):
                continue
            else:
                if query.is_response(reply):
                    return reply
    return await _over_tcp(query, server)


async def _over_tcp(query: dns.message.QueryMessage, server: Server) -> dns.message.Message:
    async with await anyio.connect_tcp(server.host, server.port) as stream:
        wire = query.to_wire()
        await stream.send(len(wire).to_bytes(2, "big") + wire)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            data += await stream.receive(65535)
    try:
        reply = dns.message.from_wire(data[2 : 2 + int.from_bytes(data[:2], "big")])
    except (ValueError, struct.error) as error:
        raise dns.exception.FormError(str(error)) from error  # type: ignore[no-untyped-call]
    if not query.is_response(reply):
        raise dns.exception.FormError("it answers another question")  # type: ignore[no-untyped-call]
    return reply
