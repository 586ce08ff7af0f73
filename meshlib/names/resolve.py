"""``meshlib.resolve``: watch a name without calling anybody.

::

    async with meshlib.resolve("zk://zk1:2181/services/users") as addrs:
        async for addr in addrs:
            print(addr)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import anyio

from ..core.env import Env
from ..core.errors import ConfigurationError
from ..core.supervisor import Supervisor
from .addr import Addr, Pending
from .target import Target
from .watches import watch_of

__all__ = ["Resolution", "resolve"]


class Resolution:
    """A name being watched: an async iterator of what it stands for. See `resolve`."""

    def __init__(self, target: Target) -> None:
        self._env = Env(label=str(target), name=str(target), supervisor=Supervisor(f"resolve {target}"))
        self._watch = watch_of(target, self._env)
        self._seen = -1

    @property
    def addr(self) -> Addr:
        """What the name stands for now."""
        return self._watch.addr.value

    @property
    def problem(self) -> str:
        """What is wrong with its source now; empty when nothing is."""
        return self._watch.problem

    async def __aenter__(self) -> Self:
        self._watch.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watch.close()
        with anyio.CancelScope(shield=True):
            await self._env.supervisor.aclose()

    def __aiter__(self) -> AsyncIterator[Addr]:
        return self

    async def __anext__(self) -> Addr:
        """The next state; at first the present one, as soon as there is one. Whoever is slow gets the latest."""
        while True:
            self._seen = await self._watch.addr.changed(self._seen)
            addr = self._watch.addr.value
            if not isinstance(addr, Pending):
                return addr

    def __repr__(self) -> str:
        return f"<resolution of {self._watch!r}>"


def resolve(target: str) -> Resolution:
    """Watch a name: an async context manager, and within it an async iterator of `Addr`.

    Each state is a `Bound` with addresses (perhaps none), a `Neg` if there is no such name, or a `Failed` while nothing
    is known because its source is broken. Once something is known it stays while the source is broken;
    `Resolution.problem` tells of that.

    Args:
        target: As for a client. A logical path has no one state; `delegate` shows what it comes to.

    Raises:
        ConfigurationError: The target makes no sense, or its package is not installed.
    """
    parsed = Target.parse(target)
    if parsed.scheme == "path":
        raise ConfigurationError(
            f"resolve({target!r}): what a logical path comes to depends on Dtabs; meshlib.delegate({target!r}) shows "
            "it, and resolve() watches the targets"
        )
    return Resolution(parsed)
