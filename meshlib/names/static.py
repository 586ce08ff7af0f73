"""Names that are their own addresses: ``host:port,host:port`` and ``unix:///path``."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..core.errors import ConfigurationError
from .addr import Addr, Address, Bound
from .target import Target

__all__ = ["StaticResolver", "UnixResolver"]


class StaticResolver:
    """``host:port[,host:port…]``. Host names are looked up when connecting."""

    async def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yields once."""
        yield parse(target)


class UnixResolver:
    """``unix:///path``."""

    async def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yields once."""
        yield parse(target)


def parse(target: Target) -> Bound:
    """The addresses in a static or Unix target.

    Raises:
        ConfigurationError: It is malformed.
    """
    if target.scheme == "unix":
        if not target.rest.startswith("/"):
            raise ConfigurationError(f"target {target.text!r}: expected unix:///absolute/path")
        return Bound((Address(path=target.rest),))
    parts = [part.strip() for part in target.rest.split(",")]
    if not all(parts):
        raise ConfigurationError(f"target {target.text!r}: an address is missing beside a comma")
    return Bound.of(Address.parse(part) for part in parts)
