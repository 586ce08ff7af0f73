"""How long an answer is good for, which addresses SRV records come to, and in which order names are tried.

Times to live are honoured between a floor and a ceiling, and jittered upwards, since a server that caches gives the
same answer until its own copy has ended. Of SRV records the lowest priority that has addresses is used (RFC 2782), with
their weights as weights of endpoints; others are in reserve for when it has none.

Pure.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import dns.exception
import dns.name

from ..addr import Address
from .hosts import Settings

__all__ = ["CEILING", "FLOOR", "MOST", "Service", "candidates", "endpoints", "priorities", "until"]

FLOOR: Final = 5.0
"""Seconds: no name is asked for sooner again, however short its records live. Linkerd's proxy: dns_min_ttl, 5 s."""
CEILING: Final = 60.0
"""Seconds: every name is asked for again, however long its records live. A service that was moved is found in a minute
although somebody left the TTL at a day, for the price of a question a minute to a server that mostly has it cached."""
JITTER: Final = 0.1
"""Part of a wait that chance adds, so that a thousand processes started together do not stay together."""
MOST: Final = 4096
"""Addresses of one name. A DNS message of 64 KiB holds about as many A records."""


def until(ttl: float | None, rng: random.Random, floor: float = FLOOR, ceiling: float = CEILING) -> float:
    """Seconds until a name is asked for again.

    Args:
        ttl: The least time to live among its records; ``None`` if they do not say (a negative answer without SOA).
        rng: Where chance comes from.
        floor: The least.
        ceiling: The most, but for the jitter.
    """
    return min(max(ttl or 0.0, floor), ceiling) * (1 + JITTER * rng.random())


def candidates(name: dns.name.Name, settings: Settings) -> tuple[dns.name.Name, ...]:
    """The absolute names that are tried for one as written, in the system's order (resolv.conf(5))."""
    if name.is_absolute():
        return (name,)
    bare = name.concatenate(dns.name.root)
    searched: list[dns.name.Name] = []
    for domain in settings.search:
        try:
            searched.append(name.concatenate(dns.name.from_text(domain)))
        except (dns.exception.DNSException, UnicodeError):
            continue  # no name, or too long with it: the system passes over it too
    first = len(name.labels) - 1 >= settings.ndots
    return tuple(dict.fromkeys([bare, *searched] if first else [*searched, bare]))


@dataclass(frozen=True, slots=True)
class Service:
    """One SRV record."""

    priority: int
    weight: int
    port: int
    host: str


def priorities(services: Iterable[Service]) -> list[list[Service]]:
    """Records by priority, the most wanted first. Those of the target ``.`` say that there is no service."""
    groups: dict[int, list[Service]] = {}
    for service in sorted(set(services), key=lambda each: (each.priority, each.host, each.port, each.weight)):
        if service.host != "." and service.port:
            groups.setdefault(service.priority, []).append(service)
    return [groups[priority] for priority in sorted(groups)]


def endpoints(group: Iterable[Service], addresses: Mapping[str, Iterable[str]]) -> list[Address]:
    """The endpoints of one priority.

    A record's weight is shared by the addresses of its host. Records of weight 0 have a weight of 1 among them, which
    is the chance that the algorithm of RFC 2782 leaves them; where all have 0, all are equal.

    Args:
        group: Its records.
        addresses: IP addresses by host.
    """
    found = [(each, tuple(addresses.get(each.host, ()))) for each in group]
    found = [(each, hosts) for each, hosts in found if hosts]
    zeros = sum(each.weight == 0 for each, _ in found)
    weights: dict[tuple[str, int], float] = {}
    names: dict[tuple[str, int], str] = {}
    for each, hosts in found:
        share = (each.weight or 1 / zeros) / len(hosts)
        for host in hosts:
            weights[host, each.port] = weights.get((host, each.port), 0.0) + share
            names.setdefault((host, each.port), each.host.rstrip("."))
    equal = len(set(weights.values())) == 1
    return [
        Address(host, port, weight=1.0 if equal else weight, metadata=(("name", names[host, port]),))
        for (host, port), weight in weights.items()
    ]
