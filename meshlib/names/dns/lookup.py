"""From a name as it was written to IP addresses or SRV records: files, search domains, both families at once.

A name's answer is one of three: records, with the least time to live on the way to them; none, on a server's word;
or `LookupFailed`, when no server could say. They stay apart all the way up, since only the second empties a client.
"""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

import anyio
import dns.exception
import dns.message
import dns.name
import dns.rdatatype
import dns.ttl

from .exchange import Exchange, LookupFailed, ask
from .hosts import Changing, Hosts, Settings
from .place import Server, encode, is_literal
from .policy import MOST, Service, candidates

__all__ = ["FOREVER", "Answer", "Lookup", "routed"]

PATIENCE: Final = 1.0
"""Seconds that one family of addresses is waited for when the other has some: some servers never answer AAAA."""
LIFETIME: Final = 10.0
"""Seconds for one name, all its candidates and servers together."""
FOREVER: Final = float("inf")
"""The time to live of what needs no lookup."""

KINDS: Final = (dns.rdatatype.A, dns.rdatatype.AAAA)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of a name.

    Attributes:
        values: IP addresses, or `Service` records.
        ttl: Seconds that this is good for; ``None`` if nobody said.
        why: Why there are none; else empty.
        failed: What one of two questions met with while the other was answered; else empty.
        extra: IP addresses of other names that the server added.
        name: Which of the candidates has them.
    """

    values: tuple[Any, ...]
    ttl: float | None = None
    why: str = ""
    failed: str = ""
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()
    name: dns.name.Name | None = None


def read(reply: dns.message.QueryMessage, kind: dns.rdatatype.RdataType) -> Answer:
    """What a server's answer says; pure.

    Raises:
        LookupFailed: It contradicts itself.
    """
    try:
        chain = reply.resolve_chaining()
    except dns.exception.DNSException as error:
        raise LookupFailed(f"{reply.question[0].name}: the answer makes no sense: {error}") from error
    ttl = None if chain.minimum_ttl >= dns.ttl.MAX_TTL else float(chain.minimum_ttl)
    if chain.answer is None:
        what = dns.rdatatype.to_text(kind)
        exists = reply.rcode() == 0
        why = f"{chain.canonical_name} has no {what} records" if exists else f"there is no {chain.canonical_name}"
        return Answer((), ttl, why)
    if kind != dns.rdatatype.SRV:
        return Answer(tuple(each.address for each in chain.answer)[:MOST], ttl)
    services = tuple(Service(each.priority, each.weight, each.port, each.target.to_text()) for each in chain.answer)
    extra: dict[str, list[str]] = {}
    for records in reply.additional:
        if records.rdtype in KINDS:
            extra.setdefault(records.name.to_text(), []).extend(each.address for each in records)
            ttl = records.ttl if ttl is None else min(ttl, float(records.ttl))
    return Answer(services[:MOST], ttl, extra=tuple((name, tuple(found)) for name, found in extra.items()))


def routed(host: str) -> bool:
    """Does this machine have a route to the address? Nothing is sent. IPv4 is taken for granted."""
    if not isinstance(ip_address(host), IPv6Address):
        return True
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))
    except OSError:
        return False
    return True


class Lookup:
    """Looks names up.

    Args:
        hosts: What ``/etc/hosts`` says.
        settings: What ``/etc/resolv.conf`` says.
        exchange: How a question is sent.
        rng: Chance, for ``options rotate``.
    """

    def __init__(
        self, hosts: Changing[Hosts], settings: Changing[Settings], exchange: Exchange, rng: random.Random
    ) -> None:
        self._hosts, self._settings, self._exchange, self._rng = hosts, settings, exchange, rng

    async def addresses(
        self, host: str, servers: tuple[Server, ...] = (), known: dns.name.Name | None = None
    ) -> Answer:
        """The IP addresses of a host.

        Args:
            host: As the user wrote it.
            servers: Whom to ask for exactly this name; empty for what the system does.
            known: Which candidate had them last time. When nobody can say whether it still has, no other is taken for
                it: behind it there may be something else altogether.

        Raises:
            LookupFailed: Nobody could say.
        """
        if is_literal(host):
            return Answer((host,), FOREVER)
        bare = host.lower().rstrip(".")
        if bare == "localhost" or bare.endswith(".localhost"):  # RFC 6761 §6.3
            return Answer(("127.0.0.1",), FOREVER)
        if not servers:
            local = (await self._hosts.value()).get(bare)
            if local:
                return Answer(local, 0.0)
        return await self._search(host, KINDS, servers, known)

    async def services(self, name: str, servers: tuple[Server, ...] = (), known: dns.name.Name | None = None) -> Answer:
        """The SRV records of a name, and the addresses that came along. Parameters and errors as above."""
        return await self._search(name, (dns.rdatatype.SRV,), servers, known)

    async def _search(
        self,
        text: str,
        kinds: tuple[dns.rdatatype.RdataType, ...],
        servers: tuple[Server, ...],
        known: dns.name.Name | None,
    ) -> Answer:
        settings = Settings(servers) if servers else await self._settings.value()
        if settings.rotate:
            turn = self._rng.randrange(len(settings.servers))
            settings = replace(settings, servers=settings.servers[turn:] + settings.servers[:turn])
        negative, failure = Answer((), why=f"there is no {text}"), ""
        with anyio.move_on_after(LIFETIME):
            for name in candidates(encode(text), settings):
                try:
                    answer = await self._both(name, kinds, settings)
                except LookupFailed as error:
                    if name == known:
                        raise
                    failure = failure or str(error)
                    continue
                if answer.values:
                    return replace(answer, name=name)
                negative = answer
                failure = failure or answer.failed
            if failure:
                raise LookupFailed(failure)
            return negative
        raise LookupFailed(failure or f"{text}: no answer in {LIFETIME:g} s")

    async def _both(
        self, name: dns.name.Name, kinds: tuple[dns.rdatatype.RdataType, ...], settings: Settings
    ) -> Answer:
        """All kinds at once. What could not be asked is told beside what could; if nothing could, it raises."""
        answers: dict[dns.rdatatype.RdataType, Answer] = {}
        failures: dict[dns.rdatatype.RdataType, str] = {}

        async def one(kind: dns.rdatatype.RdataType) -> None:
            try:
                reply = await ask(name, kind, settings.servers, settings.timeout, settings.attempts, self._exchange)
                answers[kind] = read(reply, kind)
            except LookupFailed as error:
                failures[kind] = str(error)
            if kind in answers and answers[kind].values and len(kinds) > 1:
                group.cancel_scope.deadline = anyio.current_time() + PATIENCE

        async with anyio.create_task_group() as group:
            for kind in kinds:
                group.start_soon(one, kind)
        for kind in kinds:
            if kind not in answers and kind not in failures:
                failures[kind] = f"{name} {dns.rdatatype.to_text(kind)}: no answer {PATIENCE:g} s after the other"
        if not answers:
            raise LookupFailed("; ".join(failures.values()))
        ttls = [each.ttl for each in answers.values() if each.ttl is not None and (each.values or not _any(answers))]
        return Answer(
            tuple(value for kind in kinds if kind in answers for value in answers[kind].values),
            min(ttls, default=None),
            "; ".join(dict.fromkeys(each.why for each in answers.values() if each.why)),
            "; ".join(failures.values()),
            next(iter(answers.values())).extra,
        )


def _any(answers: dict[dns.rdatatype.RdataType, Answer]) -> bool:
    return any(each.values for each in answers.values())
