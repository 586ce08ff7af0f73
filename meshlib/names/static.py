"""Names that are their own addresses: ``host:port,host:port`` and ``unix:///path``.

An address may have settings: ``10.0.0.1:80?weight=2&zone=eu-1,10.0.0.2:80?zone=eu-2``. ``weight`` is its share of the
traffic relative to others; others are kept as metadata, of which balancers know ``zone``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import ClassVar

from ..core.errors import ConfigurationError
from .addr import Addr, Address, Bound
from .target import Target

__all__ = ["StaticResolver", "UnixResolver", "parse", "parse_address"]


class StaticResolver:
    """``host:port[,host:port…]``. Host names are looked up when connecting."""

    settle: ClassVar[float] = 0.0

    async def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yields once."""
        yield parse(target)

    def check(self, target: Target) -> None:
        """Raises `ConfigurationError` for what is no list of addresses."""
        parse(target)


class UnixResolver(StaticResolver):
    """``unix:///path``."""


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
    return Bound.of(parse_address(part) for part in parts)


def parse_address(text: str) -> Address:
    """An address with its settings: ``host:port?weight=2&zone=eu-1``.

    Raises:
        ConfigurationError: It is malformed.
    """
    where, _, rest = text.partition("?")
    settings: dict[str, str] = {}
    for word in rest.split("&") if rest else ():
        key, equals, value = word.partition("=")
        if not (key and equals and value) or key in settings:
            raise ConfigurationError(
                f"address {text!r}: {word!r} is no setting; expected host:port?key=value&key=value, such as weight=2"
            )
        settings[key] = value
    weight = settings.pop("weight", "1")
    try:
        return Address.parse(where, float(weight), tuple(sorted(settings.items())))
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"address {text!r}: weight={weight} is no number") from error
