"""The two files that say what names mean on this machine: ``/etc/hosts`` and ``/etc/resolv.conf``.

Both are read again when they have changed (a container's or a VPN's do), in a worker thread, and each lookup looks
whether they have. What cannot be understood in them is passed over, as the system's own resolver does: hosts(5),
resolv.conf(5). The order is that of ``hosts: files dns`` in nsswitch.conf(5); other orders are not known here.

The parsers are pure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

import anyio.to_thread

from ...core.errors import ConfigurationError
from .place import Server, is_literal

__all__ = ["HOSTS", "RESOLV_CONF", "Changing", "Hosts", "Settings", "parse_hosts", "parse_resolv_conf"]

HOSTS: Final = Path("/etc/hosts")
RESOLV_CONF: Final = Path("/etc/resolv.conf")

LARGEST: Final = 16 * 1024 * 1024
"""Bytes of either file that are read. Lists against advertising make megabytes of ``/etc/hosts``."""
SERVERS: Final = 3
"""Name servers that are used (``MAXNS``, resolv.conf(5))."""
SEARCHED: Final = 32
"""Search domains that are tried. The system had 6 until glibc 2.26, and has no limit since."""
TIMEOUT: Final = 2.0
"""Seconds for a server to answer where ``options timeout:`` does not say. glibc's 5 s would use up the 3 s that a first
call waits for its endpoints before the second server is asked."""

Hosts = Mapping[str, tuple[str, ...]]
"""Addresses by name, in lower case."""

T = TypeVar("T")


def parse_hosts(text: str) -> Hosts:
    """Addresses by name: ``address name [alias…] [# comment]`` a line, all lines of a name together."""
    found: dict[str, dict[str, None]] = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if names and is_literal(address):
            for name in names:
                found.setdefault(name.lower().rstrip("."), {})[address] = None
    return {name: tuple(addresses) for name, addresses in found.items()}


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``resolv.conf`` says.

    Attributes:
        servers: Whom to ask.
        search: Domains that are tried after a name without a dot at its end.
        ndots: A name with so many dots is tried as it is first, and with the search domains after.
        timeout: Seconds for one server to answer.
        attempts: How often the list of servers is gone through.
        rotate: Begin with another server each time.
    """

    servers: tuple[Server, ...] = (Server("127.0.0.1"),)
    search: tuple[str, ...] = ()
    ndots: int = 1
    timeout: float = TIMEOUT
    attempts: int = 2
    rotate: bool = False


def parse_resolv_conf(text: str, port: int = 53) -> Settings:
    """The settings in such a file; the limits of its numbers are the system's (resolv.conf(5))."""
    servers: list[Server] = []
    search: list[str] = []
    ndots, timeout, attempts, rotate = 1, TIMEOUT, 2, False
    for line in text.splitlines():
        if line.startswith(("#", ";")):
            continue
        key, *values = line.split() or [""]
        if key == "nameserver" and values and is_literal(values[0]):
            servers.append(Server(values[0], port))
        elif key in ("search", "domain"):
            search = values if key == "search" else values[:1]  # the last line wins
        elif key == "options":
            for option in values:
                name, _, number = option.partition(":")
                value = int(number) if number.isascii() and number.isdigit() and len(number) < 5 else None
                if name == "rotate":
                    rotate = True
                elif name == "ndots" and value is not None:
                    ndots = min(value, 15)
                elif name == "timeout" and value:
                    timeout = float(min(value, 30))
                elif name == "attempts" and value:
                    attempts = min(value, 5)
    known = tuple(dict.fromkeys(servers))[:SERVERS] or (Server("127.0.0.1", port),)
    return Settings(known, tuple(dict.fromkeys(search))[:SEARCHED], ndots, timeout, attempts, rotate)


class Changing(Generic[T]):
    """A file, read when it has changed.

    Args:
        path: The file. One that is not there is as good as an empty one.
        parse: What makes a value of its text.
    """

    def __init__(self, path: str | os.PathLike[str], parse: Callable[[str], T]) -> None:
        self._path = Path(path)
        self._parse = parse
        self._seen: object = None
        self._value: T | None = None

    async def value(self) -> T:
        """What it says now.

        Raises:
            ConfigurationError: It is too large.
            OSError: It is there and cannot be read.
        """
        return await anyio.to_thread.run_sync(self._read)

    def _read(self) -> T:
        try:
            stat = self._path.stat()
            signature: object = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if self._value is None or signature != self._seen:
                if stat.st_size > LARGEST:
                    raise ConfigurationError(f"{self._path} has {stat.st_size} bytes; the limit is {LARGEST}")
                value = self._parse(self._path.read_text("utf-8", "replace"))
                self._value, self._seen = value, signature
        except (FileNotFoundError, NotADirectoryError):
            if self._value is None or self._seen != "missing":
                self._value, self._seen = self._parse(""), "missing"
        return self._value
