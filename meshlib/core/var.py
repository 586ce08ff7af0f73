"""A value that changes, and those who wait for it.

Finagle's Var, cut to what a single event loop needs: the current value is always there to read, watchers are told
after each change, and a slow watcher skips states in between but never misses the last one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

import anyio

__all__ = ["Var"]

T = TypeVar("T")


class Var(Generic[T]):
    """A value that changes."""

    __slots__ = ("_changed", "_value", "_watchers", "version")

    def __init__(self, value: T) -> None:
        self._value = value
        self._watchers: list[Callable[[T], None]] = []
        self._changed: anyio.Event | None = None
        self.version = 0

    @property
    def value(self) -> T:
        """The current value."""
        return self._value

    def set(self, value: T) -> None:
        """Change the value and tell every watcher, in the order in which they came."""
        self._value = value
        self.version += 1
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        for watcher in tuple(self._watchers):
            watcher(value)

    def watch(self, watcher: Callable[[T], None]) -> Callable[[], None]:
        """Call ``watcher`` with the current value, and after each change. Returns the function that ends it."""
        self._watchers.append(watcher)
        watcher(self._value)

        def unwatch() -> None:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

        return unwatch

    async def changed(self, since: int) -> int:
        """Wait until the version is past ``since``; return the new version. Returns at once if it already is."""
        while self.version <= since:
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()
        return self.version

    async def wait_for(self, predicate: Callable[[T], bool]) -> T:
        """Wait until the value satisfies ``predicate``, and return it."""
        while not predicate(self._value):
            await self.changed(self.version)
        return self._value

    async def states(self) -> AsyncIterator[T]:
        """The current value, then each later one; a slow reader gets the latest and skips those in between."""
        while True:
            seen = self.version
            yield self._value
            await self.changed(seen)

    def __repr__(self) -> str:
        return f"Var({self._value!r}, version={self.version})"
