"""What a name stands for at one moment: addresses, nothing, not known yet, or broken. Finagle: Address, Addr."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..core.errors import ConfigurationError

__all__ = ["Addr", "Address", "Bound", "Failed", "Neg", "Pending", "parse_hostport"]


def parse_hostport(text: str, what: str = "address") -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``, as a pair.

    Raises:
        ConfigurationError: It is neither.
    """
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigurationError(f"{what} {text!r}: write an IPv6 address in brackets, [::1]:9000")
    if not (colon and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536):
        raise ConfigurationError(f"{what} {text!r}: expected host:port, with a port from 0 to 65535")
    return host, int(port)


@dataclass(frozen=True, slots=True)
class Address:
    """One endpoint. Its identity is where it is; weight and metadata may change without making it another.

    Attributes:
        host: A host name or IP address; empty for a Unix socket.
        port: The TCP port.
        path: The Unix socket's path, if that is what it is.
        weight: Its share of traffic relative to others.
        metadata: What its source says of it (zone, shard, …).
    """

    host: str = ""
    port: int = 0
    path: str = ""
    weight: float = field(default=1.0, compare=False)
    metadata: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, weight: float = 1.0, metadata: tuple[tuple[str, str], ...] = ()) -> Address:
        """``host:port``, ``[v6]:port`` or ``unix:///path``.

        Raises:
            ConfigurationError: It is none of these, or the weight is no positive number.
        """
        if not 0 < weight < float("inf"):
            raise ConfigurationError(f"address {text!r}: its weight is {weight!r}, and must be a number above 0")
        if text.startswith("unix://"):
            if not text.startswith("unix:///"):
                raise ConfigurationError(f"address {text!r}: expected unix:///absolute/path")
            return cls(path=text.removeprefix("unix://"), weight=weight, metadata=metadata)
        host, port = parse_hostport(text)
        return cls(host or "127.0.0.1", port, weight=weight, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Bound:
    """The name stands for these addresses (perhaps none)."""

    addresses: tuple[Address, ...]

    @classmethod
    def of(cls, addresses: Iterable[Address]) -> Bound:
        """Without repetitions, in the order in which they came."""
        return cls(tuple(dict.fromkeys(addresses)))

    def __str__(self) -> str:
        return ", ".join(map(str, self.addresses)) or "no endpoints"


@dataclass(frozen=True, slots=True)
class Neg:
    """There is no such name.

    Attributes:
        why: What its source found instead, if it says so.
        settled: The source will not look again for a while, so that there is nothing to wait for.
    """

    why: str = field(default="", compare=False)
    settled: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"no such name: {self.why}" if self.why else "no such name"


@dataclass(frozen=True, slots=True)
class Failed:
    """Its source is broken."""

    cause: str

    def __str__(self) -> str:
        return f"failed: {self.cause}"


@dataclass(frozen=True, slots=True)
class Pending:
    """Not known yet."""

    def __str__(self) -> str:
        return "not resolved yet"


Addr = Bound | Neg | Failed | Pending
