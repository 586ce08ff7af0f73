"""One watch for all who want to know the same: clients of one event loop that have the same target share it.

Each has a `SharedWatch` of its own, which looks like any other `Watch` and has its client's metrics; behind it one
`Watch` runs for all of them, from when the first starts until the last has closed. It lives in a `Supervisor` of its
own, since no client owns it, and a client that comes later knows at once what the others know.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import anyio.lowlevel

from ..core.clock import Clock
from ..core.env import Env
from ..core.supervisor import Supervisor
from .addr import Addr
from .resolver import Resolver, resolver_for
from .target import Target
from .watch import Watch

__all__ = ["SharedWatch", "watch_of"]

ALONE: Final = frozenset({"static", "unix"})
"""Schemes that have nothing to share: they say at once all that they will ever say."""


def watch_of(target: Target, env: Env) -> Watch:
    """A watch of ``target``, which is no path.

    Raises:
        ConfigurationError: The target makes no sense.
    """
    resolver = resolver_for(target)
    return Watch(target, resolver, env) if target.scheme in ALONE else SharedWatch(target, resolver, env)


class _Source(Watch):
    """The watch that runs, and those whom it tells."""

    def __init__(self, target: Target, resolver: Resolver) -> None:
        self.users: list[SharedWatch] = []
        env = Env(name=str(target), clock=Clock(), rng=random.Random(), supervisor=Supervisor(f"watch {target}"))
        super().__init__(target, resolver, env)

    def _set(self, addr: Addr) -> None:
        for user in self.users:
            user._updates.value += 1
        super()._set(addr)

    def _broken(self, cause: str) -> None:
        for user in self.users:
            user._failures.value += 1
        super()._broken(cause)


_SOURCES: anyio.lowlevel.RunVar[dict[str, _Source]] = anyio.lowlevel.RunVar("meshlib watches")


class SharedWatch(Watch):
    """A client's part in a watch that others may share."""

    def __init__(self, target: Target, resolver: Resolver, env: Env) -> None:
        self._source: _Source | None = None
        self._unwatch: Callable[[], None] | None = None
        super().__init__(target, resolver, env)

    @property
    def problem(self) -> str:
        """What is wrong with the source now; empty when nothing is."""
        return "" if self._source is None else self._source.problem

    @problem.setter
    def problem(self, value: str) -> None:
        """The source's own is what counts."""

    @property
    def age(self) -> float | None:
        """Seconds since the source last said anything; ``None`` if it never has."""
        return None if self._source is None else self._source.age

    def start(self) -> None:
        """Begin to watch, or join those who do."""
        if self._source is not None:
            return
        sources = _SOURCES.get({})
        _SOURCES.set(sources)
        source = sources.get(self.target.text)
        if source is None:
            source = sources[self.target.text] = _Source(self.target, self._resolver)
        self._source = source
        source.users.append(self)
        source.start()
        self._unwatch = source.addr.watch(self.addr.set)

    def close(self) -> None:
        """Leave it; the last who leaves ends it. The last state stays."""
        source, unwatch = self._source, self._unwatch
        if source is None or unwatch is None:
            return
        self._unwatch = None
        unwatch()
        source.users.remove(self)
        if not source.users:
            sources = _SOURCES.get({})
            if sources.get(self.target.text) is source:
                del sources[self.target.text]
            source.close()

    def refresh(self) -> None:
        """As for any watch; if several ask at once, once."""
        if self._source is not None:
            self._refreshes.value += 1
            self._source.refresh()
