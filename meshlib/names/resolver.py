"""A resolver is one async generator; the hard part around it is here.

A resolver yields each new state of a name and raises when it is broken. `Watch` runs it in the background and keeps
the last good addresses while it is broken, restarting it with jittered backoff. So a blip at the source never empties
a client that had endpoints: only an explicit "no such name" or "no endpoints" does (Finagle lets a failed DNS lookup
do it; see AddrLifecycle.scala).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import anyio

from ..core.env import Env
from ..core.errors import ConfigurationError
from ..core.supervisor import Job
from ..core.var import Var
from .addr import Addr, Bound, Failed, Neg, Pending
from .file import FileResolver
from .static import StaticResolver, UnixResolver
from .target import Target

__all__ = ["Resolver", "Watch", "resolver_for"]

logger = logging.getLogger("meshlib.names")

RESTART_FIRST, RESTART_LAST = 0.1, 30.0
"""Seconds before a broken resolver is run again: doubling from the first to the last, each wait jittered by half."""


class Resolver(Protocol):
    """How a scheme is resolved."""

    def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yield each new state of ``target``; raise when broken."""
        ...


_BUILT_IN: dict[str, Callable[[], Resolver]] = {
    "static": StaticResolver,
    "unix": UnixResolver,
    "file": FileResolver,
}


def resolver_for(target: Target) -> Resolver:
    """The resolver of the target's scheme.

    Raises:
        ConfigurationError: There is none; the message lists those there are.
    """
    make = _BUILT_IN.get(target.scheme)
    if make is not None:
        return make()
    from importlib.metadata import entry_points  # 10 ms, which those who stay with the built-in ones are spared

    found = entry_points(group="meshlib.resolvers")
    for entry in found:
        if entry.name == target.scheme:
            resolver: Resolver = entry.load()()
            return resolver
    known = sorted({*_BUILT_IN, *found.names})
    raise ConfigurationError(
        f"target {target.text!r}: no resolver for {target.scheme}://; there are {', '.join(known)}"
    )


class Watch:
    """One name, watched.

    Args:
        target: The name.
        resolver: How it is resolved.
        env: Whose clock, chance, metrics and background this uses.

    Attributes:
        addr: The name's state, with the last good addresses kept while its source is broken.
        problem: What is wrong with the source now; empty when nothing is.
    """

    def __init__(self, target: Target, resolver: Resolver, env: Env) -> None:
        self.target = target
        self.addr: Var[Addr] = Var(Pending())
        self.problem = ""
        self._resolver = resolver
        self._env = env
        self._job: Job | None = None
        self._since: float | None = None
        env.metrics.gauge("name/endpoints", lambda: len(self.endpoints))
        env.metrics.gauge("name/age_s", lambda: self.age or 0.0)
        self._failures = env.metrics.counter("name/failures")

    @property
    def endpoints(self) -> tuple[object, ...]:
        """The addresses in use."""
        return self.addr.value.addresses if isinstance(self.addr.value, Bound) else ()

    @property
    def age(self) -> float | None:
        """Seconds since the source last said anything; ``None`` if it never has."""
        return None if self._since is None else self._env.clock.now() - self._since

    def start(self) -> None:
        """Begin to watch. Starting twice is the same as starting once."""
        if self._job is None:
            self._job = self._env.supervisor.start(self._run, name=f"watch {self.target}")

    def close(self) -> None:
        """Stop watching; the last state stays."""
        if self._job is not None:
            self._job.cancel()

    async def _run(self) -> None:
        wait = RESTART_FIRST
        while True:
            try:
                async for addr in self._resolver.watch(self.target):
                    wait = RESTART_FIRST
                    self._take(addr)
                return  # a name that never changes: its resolver has said all there is to say
            except Exception as error:
                self._broken(
                    f"{type(error).__name__}: {error}" if not isinstance(error, ConfigurationError) else str(error)
                )
            await anyio.sleep(wait * self._env.rng.uniform(0.5, 1.0))
            wait = min(wait * 2, RESTART_LAST)

    def _take(self, addr: Addr) -> None:
        if isinstance(addr, Failed):
            self._broken(addr.cause)
            return
        if isinstance(addr, Pending):
            return
        if self.problem:
            logger.info("%s: resolved again: %s", self.target, addr)
        self.problem = ""
        self._since = self._env.clock.now()
        if addr != self.addr.value or isinstance(addr, Bound):
            self.addr.set(addr)

    def _broken(self, cause: str) -> None:
        self._failures.value += 1
        keeps = isinstance(self.addr.value, Bound | Neg)
        if cause != self.problem:
            kept = f"; keeping {self.addr.value}" if keeps else ""
            logger.warning("%s: %s%s", self.target, cause, kept)
        self.problem = cause
        if not keeps:
            self.addr.set(Failed(cause))

    def __repr__(self) -> str:
        age = "" if self.age is None else f", {self.age:.0f} s old"
        problem = f", source broken: {self.problem}" if self.problem else ""
        return f"<{self.target}: {self.addr.value}{age}{problem}>"
