"""Where the text of a Dtab comes from, when it is to be followed while it changes.

A source is one async generator of texts, found by the scheme of a target as resolvers are: ``file:///path``,
``zk://host/path`` (the data of a node), ``k8s://namespace/configmap:key``, and what third parties have registered as
entry points ``meshlib.dtab_sources``. It yields the text at once, and again whenever it has changed, and raises when it
cannot be had; it is then run again. It may have a method ``check``, which is asked when a client is made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, Protocol

import anyio

from ..core.errors import ConfigurationError
from .file import LARGEST, POLL, path_of
from .resolver import Room, load
from .target import Target

__all__ = ["DtabSource", "FileTexts", "source_for"]


class DtabSource(Protocol):
    """How the text of a Dtab is followed."""

    def texts(self, target: Target) -> AsyncIterator[str]:
        """Yield the text, and again whenever it has changed; raise when it cannot be had."""
        ...


class FileTexts:
    """The text of a file, looked at every half second (see ``file.py`` for why)."""

    def check(self, target: Target) -> None:
        """Is the target well formed?

        Raises:
            ConfigurationError: Its path is not absolute.
        """
        path_of(target)

    async def texts(self, target: Target) -> AsyncIterator[str]:
        """Yields the text whenever the file has changed."""
        path = anyio.Path(path_of(target))
        seen: object = None
        while True:
            stat = await path.stat()
            signature = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if signature != seen:
                if stat.st_size > LARGEST:
                    raise ConfigurationError(f"{path} has {stat.st_size} bytes; the limit is {LARGEST}")
                text = await path.read_text("utf-8")
                seen = signature
                yield text
            await anyio.sleep(POLL)


_ROOMS: Final = {
    "file": Room("sources", "FileTexts"),
    "zk": Room("zookeeper", "ZooKeeperTexts", "kazoo", "zookeeper"),
    "k8s": Room("kubernetes", "ConfigMapTexts", "httpx", "kubernetes"),
}


def source_for(target: Target) -> DtabSource:
    """Who follows the text that ``target`` names.

    Raises:
        ConfigurationError: Nobody does, or its package is not installed, or the target makes no sense; says what would.
    """
    room = _ROOMS.get(target.scheme)
    source: DtabSource = load(room, target.scheme) if room is not None else _of_others(target)
    check = getattr(source, "check", None)
    if check is not None:
        check(target)
    return source


def _of_others(target: Target) -> DtabSource:
    from importlib.metadata import entry_points  # 10 ms, which those who stay with the built-in ones are spared

    found = entry_points(group="meshlib.dtab_sources")
    for entry in found:
        if entry.name == target.scheme:
            source: DtabSource = entry.load()()
            return source
    known = ", ".join(f"{scheme}://" for scheme in sorted({*_ROOMS, *found.names}))
    raise ConfigurationError(f"no Dtab can be followed at {target.text!r}: there are {known}")
