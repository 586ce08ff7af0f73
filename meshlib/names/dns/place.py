"""What a ``dns://`` or ``srv://`` target says: which names, which ports, whom to ask.

::

    dns://host:port[,host:port…][?server=ip[:port][,ip[:port]…]]
    srv://_service._protocol.domain[?server=ip[:port][,ip[:port]…]]

Without ``server=`` a name means what the system makes of it: ``/etc/hosts`` first, then the servers and search domains
of ``/etc/resolv.conf``; a dot at its end keeps the search domains out. With ``server=`` those servers are asked for
exactly that name, whatever the two files say (Consul on port 8600, say). Names may be international (IDNA 2008).

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

import dns.exception
import dns.name

from ...core.errors import ConfigurationError
from ..addr import parse_hostport
from ..target import Target

__all__ = ["Place", "Server", "encode", "is_literal"]

PORT: Final = 53
"""Where name servers listen (RFC 1035 §4.2)."""
MOST: Final = 256
"""Hosts in one target."""


@dataclass(frozen=True, slots=True)
class Server:
    """A name server: an IP address and a port."""

    host: str
    port: int = PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_literal(host: str) -> bool:
    """Is it an IP address, and no name?"""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def encode(host: str) -> dns.name.Name:
    """The name on the wire; relative unless it ends in a dot.

    Raises:
        ConfigurationError: It is no DNS name.
    """
    try:
        name = dns.name.from_text(host, origin=None, idna_codec=dns.name.IDNA_2008_Practical)
        name.concatenate(dns.name.root) if not name.is_absolute() else name  # is there room for the root?
    except (dns.exception.DNSException, UnicodeError) as error:
        raise ConfigurationError(f"host {host!r} is no DNS name: {error}") from error
    if any(byte <= 32 or byte == 127 for label in name.labels for byte in label):
        raise ConfigurationError(f"host {host!r} is no DNS name: it has a space or a control character in it")
    return name


@dataclass(frozen=True, slots=True)
class Place:
    """A target, read.

    Attributes:
        hosts: Names (or IP addresses) with their ports; for ``srv`` one name, and port 0.
        servers: Whom to ask; empty for whom the system asks.
    """

    hosts: tuple[tuple[str, int], ...]
    servers: tuple[Server, ...] = ()

    @classmethod
    def parse(cls, target: Target) -> Place:
        """Read a target of either scheme.

        Raises:
            ConfigurationError: It is malformed; says where and what would be right.
        """
        try:
            rest, question, settings = target.rest.partition("?")
            servers = _servers(settings) if question else ()
            hosts = _service(rest) if target.scheme == "srv" else _hosts(rest)
        except ConfigurationError as error:
            raise ConfigurationError(f"target {target.text!r}: {error}") from error
        return cls(hosts, servers)


def _hosts(text: str) -> tuple[tuple[str, int], ...]:
    found: dict[tuple[str, int], None] = {}
    for part in text.split(","):
        if not part.strip():
            raise ConfigurationError("a host is missing; expected dns://host:port[,host:port…]")
        host, port = parse_hostport(part, "host")
        if not host:
            raise ConfigurationError(f"host {part!r}: the name is missing; expected host:port")
        if port == 0:
            raise ConfigurationError(f"host {part!r}: expected a port above 0")
        if not is_literal(host):
            encode(host)
        found[host, port] = None
    if len(found) > MOST:
        raise ConfigurationError(f"{len(found)} hosts; the limit is {MOST}")
    return tuple(found)


def _service(text: str) -> tuple[tuple[str, int], ...]:
    name = text.strip()
    labels = name.rstrip(".").split(".")
    # RFC 2782: _Service._Proto.Name. Search domains may supply the rest, so that two labels will do.
    if len(labels) < 2 or not all(len(label) > 1 and label.startswith("_") for label in labels[:2]):
        raise ConfigurationError("expected srv://_service._protocol.domain, such as srv://_grpc._tcp.users.prod")
    if ":" in name or "," in name:
        raise ConfigurationError("the ports of an SRV target are in its records; expected one name and no port")
    encode(name)
    return ((name, 0),)


def _servers(text: str) -> tuple[Server, ...]:
    servers: list[Server] = []
    for setting in text.split("&"):
        key, equals, value = setting.partition("=")
        if key != "server" or not equals:
            raise ConfigurationError(f"unknown setting {setting!r}; expected server=ip[:port][,ip[:port]…]")
        servers.extend(_server(part.strip()) for part in value.split(","))
    return tuple(dict.fromkeys(servers))


def _server(text: str) -> Server:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if is_literal(bare):
        return Server(bare)
    host, port = parse_hostport(text, "server")
    if not is_literal(host) or port == 0:
        raise ConfigurationError(f"server {text!r}: expected an IP address, and a port above 0 if any")
    return Server(host, port)
