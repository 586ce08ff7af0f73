"""``file:///path``: addresses in a file, followed as it changes.

One address a line, with optional settings and comments::

    10.0.0.1:9000
    10.0.0.2:9000  weight=2 zone=eu-1   # twice the traffic

or JSON: a list of such texts, or of objects ``{"host": …, "port": …, "weight": …, "zone": …}``, or an object whose
``endpoints`` is such a list. Write a new file and rename it over the old one, and no half of it is ever read.

A path that ends with a slash is a directory of members, which announce themselves there; see `members`.

The file is looked at every half second: portable, right on network file systems and container volumes, where change
notices are not, and cheap (one ``stat`` in a worker thread).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread

from ..core.errors import ConfigurationError
from .addr import Addr, Address, Bound, Failed
from .target import Target

__all__ = ["FileResolver", "parse_endpoints"]

logger = logging.getLogger("meshlib.names")

POLL: Final = 0.5
LARGEST: Final = 16 * 1024 * 1024


class FileResolver:
    """Follows a file."""

    async def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yields the file's addresses whenever it has changed, and `Failed` when it cannot be read or understood."""
        path = anyio.Path(path_of(target))
        if target.rest.endswith("/"):
            async for state in _members(Path(target.rest)):
                yield state
        seen: object = None
        while True:
            try:
                stat = await path.stat()
                signature: object = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
                if signature != seen:
                    if stat.st_size > LARGEST:
                        raise ConfigurationError(f"{path} has {stat.st_size} bytes; the limit is {LARGEST}")
                    addr: Addr = Bound.of(parse_endpoints(await path.read_text("utf-8"), str(path)))
                    seen = signature
                    yield addr
            except (OSError, ValueError) as error:
                # Once for each way of being broken. A broken file is read again every time, until it is whole.
                broken = str(error)
                if seen != broken:
                    seen = broken
                    yield Failed(broken)
            await anyio.sleep(POLL)

    def check(self, target: Target) -> None:
        """Raises `ConfigurationError` for what is no absolute path."""
        path_of(target)


async def _members(directory: Path) -> AsyncIterator[Addr]:
    """The living members of a directory, whenever they are others."""
    from .members import read_members  # which stands on this module

    seen: object = None
    told: list[str] = []
    while True:
        try:
            addr, problems = await anyio.to_thread.run_sync(read_members, directory)
            for problem in problems:
                if problem not in told:
                    logger.warning("%s: left out: %s", directory, problem)
            told = problems
            now: object = tuple((a, a.weight, a.metadata) for a in addr.addresses) if isinstance(addr, Bound) else addr
        except OSError as error:
            addr, now = Failed(str(error)), str(error)
        if now != seen:
            seen = now
            yield addr
        await anyio.sleep(POLL)


def path_of(target: Target) -> str:
    """The path in a file target.

    Raises:
        ConfigurationError: It is not absolute.
    """
    if not target.rest.startswith("/"):
        raise ConfigurationError(f"target {target.text!r}: expected file:///absolute/path")
    return target.rest


def parse_endpoints(text: str, source: str = "endpoints") -> list[Address]:
    """The addresses in ``text``, JSON or lines.

    Raises:
        ConfigurationError: It is malformed; says where.
    """
    if text.lstrip()[:1] in ("[", "{"):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{source}: not JSON: {error}") from error
        items = data.get("endpoints") if isinstance(data, dict) else data
        if not isinstance(items, list):
            raise ConfigurationError(f"{source}: expected a list, or an object with a list of endpoints")
        return [_entry(item, f"{source}: endpoint {i}") for i, item in enumerate(items)]
    addresses = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            where = f"{source}, line {number}"
            settings = dict(_setting(word, where) for word in words[1:])
            addresses.append(_address(words[0], settings, where))
    return addresses


def _setting(word: str, where: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise ConfigurationError(f"{where}: {word!r} is no setting; expected key=value, such as weight=2")
    return key, value


def _entry(item: Any, where: str) -> Address:
    if isinstance(item, str):
        return _address(item, {}, where)
    if not (isinstance(item, dict) and isinstance(item.get("host"), str) and type(item.get("port")) is int):
        raise ConfigurationError(f'{where}: {item!r}: expected "host:port" or {{"host": "…", "port": 9000}}')
    host = f"[{item['host']}]" if ":" in item["host"] else item["host"]
    settings = {str(k): str(v) for k, v in item.items() if k not in ("host", "port")}
    return _address(f"{host}:{item['port']}", settings, where)


def _address(text: str, settings: dict[str, str], where: str) -> Address:
    weight = settings.pop("weight", "1")
    try:
        return Address.parse(text, float(weight), tuple(sorted(settings.items())))
    except ValueError as error:
        raise ConfigurationError(f"{where}: {error}") from error
