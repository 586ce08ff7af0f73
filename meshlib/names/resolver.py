"""The resolvers there are: those of the house by scheme, and those of other distributions by entry point.

A room of the house is entered when its scheme is first asked for, so that nobody pays for packages that they do not
use; if its package is not installed, the error says what to install. A scheme of the house cannot be taken by another
distribution: a target must mean the same in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from ..core.errors import ConfigurationError
from .target import Target
from .watch import RESTART_FIRST, RESTART_LAST, Resolver, Watch

__all__ = ["RESTART_FIRST", "RESTART_LAST", "Resolver", "Watch", "load", "resolver_for"]

GROUP: Final = "meshlib.resolvers"


@dataclass(frozen=True, slots=True)
class Room:
    """Where something of the house is, and what it needs.

    Attributes:
        module: In `meshlib.names`.
        name: Of the class.
        package: What it imports, if it needs a package that not everybody has.
        extra: The extra that installs it.
    """

    module: str
    name: str
    package: str = ""
    extra: str = ""


_ROOMS: Final[dict[str, Room]] = {
    "static": Room("static", "StaticResolver"),
    "unix": Room("static", "UnixResolver"),
    "file": Room("file", "FileResolver"),
    "dns": Room("dns", "DnsResolver", "dns", "dns"),
    "srv": Room("dns", "SrvResolver", "dns", "dns"),
    "zk": Room("zookeeper", "ZooKeeperResolver", "kazoo", "zookeeper"),
    "k8s": Room("kubernetes", "KubernetesResolver", "httpx", "kubernetes"),
}
_PACKAGES: Final = {"dns": "dnspython"}


def load(room: Room, scheme: str) -> Any:
    """What is in the room, made.

    Raises:
        ConfigurationError: Its package is not installed.
    """
    if room.package and find_spec(room.package) is None:
        package = _PACKAGES.get(room.package, room.package)
        raise ConfigurationError(f"{scheme}:// needs {package}: pip install 'meshlib-rpc[{room.extra}]'")
    return getattr(import_module(f"meshlib.names.{room.module}"), room.name)()


def resolver_for(target: Target) -> Resolver:
    """The resolver of the target's scheme. Whatever it can tell of a wrong target without asking anybody is told now.

    Raises:
        ConfigurationError: There is none, its package is missing, or the target makes no sense.
    """
    room = _ROOMS.get(target.scheme)
    resolver: Resolver = load(room, target.scheme) if room is not None else _of_others(target)
    check = getattr(resolver, "check", None)
    if check is not None:
        check(target)
    return resolver


def _of_others(target: Target) -> Resolver:
    from importlib.metadata import entry_points  # 10 ms, which those who stay with the built-in ones are spared

    found = entry_points(group=GROUP)
    for entry in found:
        if entry.name == target.scheme:
            resolver: Resolver = entry.load()()
            return resolver
    known = sorted({*_ROOMS, *found.names})
    raise ConfigurationError(
        f"target {target.text!r}: no resolver for {target.scheme}://; there are {', '.join(known)}"
    )
