"""What a ``zk://`` target says: which ensemble, which node, which endpoint of its members.

::

    zk://[user:password@]host[:port][,host[:port]…]/path[!endpoint][?setting=value[&setting=value…]]

The user and password are ZooKeeper's digest authentication; write ``%40`` for an ``@`` in them. Settings: ``tls=true``,
``ca=``, ``cert=`` and ``key=`` (paths of PEM files; any of them means TLS), and ``timeout=`` (of the session, seconds).
A chroot is nothing special: it is the beginning of the path.

The password is in `Ensemble.secret` alone. No ``repr``, message or log line shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from ...core.errors import ConfigurationError
from ..addr import parse_hostport
from ..target import Target, redacted

__all__ = ["Ensemble", "Place"]

PORT: Final = 2181
"""Where ZooKeeper listens by default."""
TIMEOUT: Final = 4.0
"""Seconds until a silent session ends, as Finagle's announcers have it: the least that servers grant by default
(2 ticks of 2 s). Shorter means that crashed members leave sooner, and that a peer that hangs is given up sooner."""


@dataclass(frozen=True)
class Ensemble:
    """The servers of one ZooKeeper, and how to speak to them. Sessions are shared by those for whom all of it is equal.

    Attributes:
        hosts: ``(host, port)`` pairs, sorted: the order in which they are written makes no difference.
        secret: ``user:password`` of the digest authentication, or empty.
        tls: Speak TLS; certificates and host names are verified.
        ca: PEM file of the authorities that are trusted; by default the system's.
        cert: PEM file of the client's certificate.
        key: PEM file of its key; by default it is in ``cert``.
        timeout: Seconds until a silent session ends, as asked for; the servers have the last word.
    """

    hosts: tuple[tuple[str, int], ...]
    secret: str = field(default="", repr=False)
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    timeout: float = TIMEOUT

    @property
    def connect_string(self) -> str:
        """The hosts as ZooKeeper's clients write them."""
        return ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)

    def __str__(self) -> str:
        return f"zk://{'…@' if self.secret else ''}{self.connect_string}"


@dataclass(frozen=True)
class Place:
    """A target, read.

    Attributes:
        ensemble: Where.
        path: The node, absolute, without a slash at its end.
        endpoint: Which of its members' additional endpoints; empty for the main one.
    """

    ensemble: Ensemble
    path: str
    endpoint: str = ""

    @classmethod
    def parse(cls, target: Target) -> Place:
        """Read a target.

        Raises:
            ConfigurationError: It is malformed, or names a file that is not there; says what would be right.
        """
        where = f"target {redacted(target.text)!r}"
        body, _, query = target.rest.partition("?")
        authority, slash, rest = body.partition("/")
        userinfo, at, hosts = authority.rpartition("@")
        path, bang, endpoint = (slash + rest).partition("!")
        if at and not all(userinfo.partition(":")):
            raise ConfigurationError(f"{where}: expected user:password@ before the hosts")
        if bang and not endpoint:
            raise ConfigurationError(f"{where}: the name of an endpoint is missing after '!'")
        settings = _settings(query, where)
        files = {name: settings.get(name, "") for name in ("ca", "cert", "key")}
        return cls(
            Ensemble(
                hosts=tuple(sorted({_host(host.strip(), where) for host in hosts.split(",")})),
                secret=unquote(userinfo),
                tls=_flag(settings, "tls", any(files.values()), where),
                timeout=_seconds(settings, "timeout", TIMEOUT, where),
                **files,
            ),
            _path(path, where),
            endpoint,
        )

    def __str__(self) -> str:
        return f"{self.ensemble}{self.path}{'!' * bool(self.endpoint)}{self.endpoint}"


def _host(text: str, where: str) -> tuple[str, int]:
    if not text:
        raise ConfigurationError(f"{where}: a host is missing; expected zk://host[:port][,host[:port]…]/path")
    bare = text.startswith("[") and text.endswith("]")
    if bare or ":" not in text:
        text = f"{text}:{PORT}"
    try:
        host, port = parse_hostport(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    if not host or not port:
        raise ConfigurationError(f"{where}: {text!r}: expected a host, and a port above 0")
    return host, port


def _path(path: str, where: str) -> str:
    path = path.rstrip("/")
    if not path:
        raise ConfigurationError(f"{where}: the path is missing; expected zk://host/path/of/the/service")
    parts = path.split("/")[1:]
    if not all(parts) or {".", ".."} & set(parts) or not path.isprintable():
        raise ConfigurationError(f"{where}: {path!r} is no path of ZooKeeper (no empty, '.' or '..' parts)")
    return path


def _settings(query: str, where: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, equals, value = part.partition("=")
        if name not in ("tls", "ca", "cert", "key", "timeout") or not equals:
            raise ConfigurationError(f"{where}: {part!r}: the settings are tls=, ca=, cert=, key= and timeout=")
        settings[name] = unquote(value)
    for name in ("ca", "cert", "key"):
        if name in settings and not Path(settings[name]).is_file():
            raise ConfigurationError(f"{where}: {name}={settings[name]}: there is no such file")
    if "key" in settings and "cert" not in settings:
        raise ConfigurationError(f"{where}: key= needs cert=")
    return settings


def _flag(settings: dict[str, str], name: str, default: bool, where: str) -> bool:
    value = settings.get(name)
    if value not in (None, "true", "false"):
        raise ConfigurationError(f"{where}: {name}={value}: expected true or false")
    if value == "false" and default:
        raise ConfigurationError(f"{where}: tls=false, and certificates are given")
    return default if value is None else value == "true"


def _seconds(settings: dict[str, str], name: str, default: float, where: str) -> float:
    try:
        value = float(settings.get(name, default))
    except ValueError:
        value = -1.0
    if not 0.5 <= value <= 600:
        raise ConfigurationError(f"{where}: {name}={settings[name]}: expected seconds, from 0.5 to 600")
    return value
