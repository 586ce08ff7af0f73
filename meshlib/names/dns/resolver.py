"""``dns://`` and ``srv://``: names are asked for again and again, as their records' time to live says.

An answer of "no such name" is believed when it was given twice, a second apart, if there were addresses before: name
servers that restart have said it of names that exist, and it empties a client. That nobody could say is no answer: what
was known stays, for each host of a target on its own. A failed connect asks again at once (``refreshable``), since the
address may have been given to somebody else.

A name with one address is told once: all calls go to one endpoint then, and if that is a load balancer in front of
servers, long-lived connections stay with one of them.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import AsyncIterator
from typing import ClassVar, Final

import anyio

from ..addr import Addr, Address, Bound, Neg
from ..target import Target
from .exchange import Exchange, LookupFailed, over_network
from .hosts import HOSTS, RESOLV_CONF, Changing, parse_hosts, parse_resolv_conf
from .lookup import FOREVER, Answer, Lookup, routed
from .place import Place, Server, is_literal
from .policy import CEILING, FLOOR, MOST, endpoints, priorities, until

__all__ = ["DnsResolver", "SrvResolver"]

logger = logging.getLogger("meshlib.names.dns")

CONFIRM: Final = 1.0
"""Seconds until "no such name" is asked for a second time, when there were addresses before."""


class _Hosts:
    """The addresses of hosts, with what was known of each while nobody can say."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._known: dict[str, Answer] = {}

    async def ask(self, hosts: list[str], servers: tuple[Server, ...]) -> dict[str, Answer]:
        """An answer for each of ``hosts``, all asked at once.

        Raises:
            LookupFailed: Nobody could say of any, and nothing was known.
        """
        answers: dict[str, Answer] = {}
        failures: list[str] = []

        async def one(host: str) -> None:
            known = self._known.get(host)
            try:
                answer = await self._lookup.addresses(host, servers, known.name if known else None)
                if not answer.values and known is not None and known.values:
                    await anyio.sleep(CONFIRM)
                    answer = await self._lookup.addresses(host, servers, known.name)
            except LookupFailed as error:
                failures.append(str(error))
                if known is not None:
                    answers[host] = Answer(known.values, 0.0, known.why, str(error), name=known.name)
                return
            if answer.failed and known is not None:  # of one family nobody could say: it is as it was
                there = {":" in value for value in answer.values}
                kept = tuple(value for value in known.values if (":" in value) not in there)
                answer = Answer(answer.values + kept, 0.0, answer.why, answer.failed, answer.extra, answer.name)
            self._known[host] = answers[host] = answer

        async with anyio.create_task_group() as group:
            for host in dict.fromkeys(hosts):
                group.start_soon(one, host)
        if failures and not any(not answer.failed for answer in answers.values()):
            raise LookupFailed("; ".join(sorted(failures)))
        return answers


class DnsResolver:
    """Follows the A and AAAA records of hosts.

    Args:
        floor: Seconds until a name is asked for again at the earliest.
        ceiling: And at the latest.
        rng: Where chance comes from.
        exchange: How a question is sent.
        hosts: The file of local names.
        resolv_conf: The file that says whom to ask.
    """

    refreshable: ClassVar[bool] = True

    def __init__(
        self,
        *,
        floor: float = FLOOR,
        ceiling: float = CEILING,
        rng: random.Random | None = None,
        exchange: Exchange = over_network,
        hosts: str | os.PathLike[str] = HOSTS,
        resolv_conf: str | os.PathLike[str] = RESOLV_CONF,
    ) -> None:
        self._floor, self._ceiling = floor, ceiling
        self._rng = rng or random.Random()
        self._lookup = Lookup(
            Changing(hosts, parse_hosts), Changing(resolv_conf, parse_resolv_conf), exchange, self._rng
        )
        self._hosts = _Hosts(self._lookup)
        self._warned: set[str] = set()

    def check(self, target: Target) -> None:
        """Raises `ConfigurationError` for a malformed target."""
        Place.parse(target)

    async def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yields the addresses whenever they are others.

        Raises:
            LookupFailed: Nobody could say.
        """
        place = Place.parse(target)
        seen: object = None
        while True:
            addr, ttl = await self._look(place)
            if (now := _signature(addr)) != seen:
                seen = now
                self._warn(target, place, addr)
                yield addr
            if ttl == FOREVER:
                return
            await anyio.sleep(until(ttl, self._rng, self._floor, self._ceiling))

    async def _look(self, place: Place) -> tuple[Addr, float | None]:
        answers = await self._hosts.ask([host for host, _ in place.hosts], place.servers)
        found = [
            Address(value, port, metadata=() if value == host else (("name", host.rstrip(".")),))
            for host, port in place.hosts
            if host in answers
            for value in _reachable(answers[host].values)
        ]
        ttls = [answer.ttl for answer in answers.values() if answer.ttl is not None]
        if found:
            return Bound.of(found[:MOST]), min(ttls, default=None)
        return _none("; ".join(dict.fromkeys(answer.why for answer in answers.values()))), min(ttls, default=None)

    def _warn(self, target: Target, place: Place, addr: Addr) -> None:
        alone = isinstance(addr, Bound) and len(addr.addresses) == 1
        named = [host for host, _ in place.hosts if not is_literal(host) and not host.rstrip(".").endswith("localhost")]
        if alone and named and target.text not in self._warned:
            self._warned.add(target.text)
            logger.warning(
                "%s has one address, %s, so all calls go there. If servers are behind it, a load balancer or a "
                "ClusterIP service, give their own addresses: a headless service, or k8s://namespace/service:port",
                target,
                addr,
            )


class SrvResolver(DnsResolver):
    """Follows the SRV records of a service, and the addresses of their hosts. Parameters as of `DnsResolver`."""

    def __init__(
        self,
        *,
        floor: float = FLOOR,
        ceiling: float = CEILING,
        rng: random.Random | None = None,
        exchange: Exchange = over_network,
        hosts: str | os.PathLike[str] = HOSTS,
        resolv_conf: str | os.PathLike[str] = RESOLV_CONF,
    ) -> None:
        super().__init__(floor=floor, ceiling=ceiling, rng=rng, exchange=exchange, hosts=hosts, resolv_conf=resolv_conf)
        self._services: dict[str, Answer] = {}

    async def _look(self, place: Place) -> tuple[Addr, float | None]:
        name = place.hosts[0][0]
        known = self._services.get(name)
        answer = await self._lookup.services(name, place.servers, known.name if known else None)
        if not answer.values and known is not None and known.values:
            await anyio.sleep(CONFIRM)
            answer = await self._lookup.services(name, place.servers, known.name)
        self._services[name] = answer
        if not answer.values:
            return _none(answer.why), answer.ttl
        groups = priorities(answer.values)
        if not groups:
            return _none(f"{name} says that there is no such service"), answer.ttl
        extra = dict(answer.extra)
        ttl, whys = answer.ttl, list[str]()
        for group in groups:
            # The hosts of SRV records are whole names, whatever the search domains.
            unknown = [each.host for each in group if each.host not in extra]
            answers = await self._hosts.ask(unknown, place.servers) if unknown else {}
            addresses = {host: _reachable(values) for host, values in extra.items()}
            addresses |= {host: _reachable(found.values) for host, found in answers.items()}
            ttls = [each for each in (ttl, *(found.ttl for found in answers.values())) if each is not None]
            ttl = min(ttls, default=None)
            whys += [found.why for found in answers.values() if found.why]
            found_here = endpoints(group, addresses)
            if found_here:
                return Bound.of(found_here[:MOST]), _bounded(ttl)
        return _none("; ".join(dict.fromkeys(whys)) or f"the hosts of {name} have no addresses"), _bounded(ttl)


def _none(why: str) -> Neg:
    """Nothing is asked again sooner than `FLOOR` says, which is longer than any call waits."""
    return Neg(why, settled=True)


def _bounded(ttl: float | None) -> float | None:
    """Hosts may be known for ever (in ``/etc/hosts``, or literally); the records that name them are not."""
    return None if ttl == FOREVER else ttl


def _reachable(values: tuple[str, ...]) -> tuple[str, ...]:
    """Without addresses that this machine has no route to, if any others are left."""
    found = tuple(value for value in values if routed(value))
    return found or values


def _signature(addr: Addr) -> object:
    if isinstance(addr, Bound):
        return frozenset((each, each.weight, each.metadata) for each in addr.addresses)
    return type(addr)
