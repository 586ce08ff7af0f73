"""``zk://host[,host]/path``: the text in one node, followed. What a base Dtab is kept in.

The node is read when it is made, changed, or when the connection comes back. One that is not there is an error, told
after a moment in which it may be made. One that is deleted later leaves the last text in force, with a warning: who
wants an empty text writes one.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Final

import anyio
from kazoo.exceptions import ConnectionClosedError, ConnectionLoss, NoNodeError, SessionExpiredError

from ...core.errors import ConfigurationError
from ..target import Target
from .place import Place
from .session import Session, shared

__all__ = ["ZooKeeperTexts"]

logger = logging.getLogger("meshlib.names.zookeeper")

LARGEST: Final = 1024 * 1024
"""Bytes of a node, which is ZooKeeper's own limit by default."""
PATIENCE: Final = 1.0
"""Seconds that a node which is not there is waited for."""
CALM: Final = 0.05
"""Seconds between two readings."""


class ZooKeeperTexts:
    """Follows the text in a node."""

    def check(self, target: Target) -> None:
        """Is the target well formed?

        Raises:
            ConfigurationError: It is not; says what would be right.
        """
        if Place.parse(target).endpoint:
            raise ConfigurationError(
                f"target {Place.parse(target)}: a text has no endpoints; leave out what follows '!'"
            )

    async def texts(self, target: Target) -> AsyncIterator[str]:
        """Yields the node's text, and each other one that it comes to hold.

        Raises:
            ConfigurationError: There is no such node, or it holds no text, or too much of it.
            kazoo.exceptions.KazooException: It cannot be read.
        """
        place = Place.parse(target)
        with shared(place.ensemble) as session:
            wake = _Wake()
            unwatch = session.state.watch(lambda state: wake.set())
            try:
                with session.follow(place.path, wake.set):
                    last: str | None = None
                    missing = False
                    while True:
                        wake.clear()
                        data = await _read(session, place.path)
                        if data is None:
                            if last is None:
                                with anyio.move_on_after(PATIENCE):
                                    await wake.wait()
                                    continue
                                raise ConfigurationError(f"{place}: there is no such node")
                            if not missing:
                                logger.warning("%s: the node was deleted; its last text stays in force", place)
                            missing = True
                        else:
                            missing = False
                            text = _decoded(data, place)
                            if text != last:
                                last = text
                                yield text
                        await wake.wait()
                        await anyio.sleep(CALM)
            finally:
                unwatch()


class _Wake:
    """A flag to wait for, which may be set at any time."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        if self._event.is_set():
            self._event = anyio.Event()

    async def wait(self) -> None:
        await self._event.wait()


async def _read(session: Session, path: str) -> bytes | None:
    """The node's data, with a watch on it; ``None``, with a watch too, when there is no node."""
    while True:
        try:
            data: bytes = (await session.call("get", path, watch=session.fired))[0]
            return data
        except NoNodeError:
            try:
                if await session.call("exists", path, watch=session.fired) is None:
                    return None
            except (ConnectionLoss, ConnectionClosedError, SessionExpiredError):
                pass
        except (ConnectionLoss, ConnectionClosedError, SessionExpiredError):
            pass
        await anyio.sleep(CALM)


def _decoded(data: bytes, place: Place) -> str:
    if len(data) > LARGEST:
        raise ConfigurationError(f"{place} holds {len(data)} bytes; the limit is {LARGEST}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{place} holds no text: {error}") from error
