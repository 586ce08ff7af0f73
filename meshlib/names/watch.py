"""A resolver is one async generator; the hard part around it is here.

A resolver yields each new state of a name and raises when it is broken. `Watch` runs it in the background, and

- keeps the last good addresses while it is broken, and runs it again after jittered waits. So a blip at the source
  never empties a client that had endpoints: only an explicit "no such name" or "no endpoints" does (Finagle lets a
  failed DNS lookup do it; see AddrLifecycle.scala);
- takes states that come in a burst for one, the last: what moves from one list to another is never missed;
- runs it anew now and then, if it says so (``relist``): a watch that fell silent looks like a name that is stable;
- runs it anew when a connect has failed, if that asks the source again (``refreshable``).

Running it anew changes nothing until it has said what there is now; then that takes the place of what was, as one
difference.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final, Protocol

import anyio

from ..core.env import Env
from ..core.errors import ConfigurationError
from ..core.supervisor import Job
from ..core.var import Var
from .addr import Addr, Address, Bound, Failed, Neg, Pending
from .target import Target

__all__ = ["RESTART_FIRST", "RESTART_LAST", "Resolver", "Watch"]

logger = logging.getLogger("meshlib.names")

RESTART_FIRST, RESTART_LAST = 0.1, 30.0
"""Seconds before a broken resolver is run again: doubling from the first to the last, each wait jittered by half."""
SETTLE: Final = 0.1
"""Seconds without a further state after which the last one counts. A deployment changes several lists at once."""
SETTLE_LAST: Final = 1.0
"""Seconds after which one counts in any case: who changes all the time must be followed all the same."""
REFRESH: Final = 1.0
"""Seconds between two questions that failed connects give rise to: connects fail by the dozen."""
NEVER: Final = float("inf")


class Resolver(Protocol):
    """How a scheme is resolved.

    Besides it may have these attributes: ``refreshable = True`` (asked anew when a connect fails), ``relist = 300.0``
    (seconds after which it is run anew in any case), ``settle = 0.0`` (its states count at once), and a method
    ``check(target)``, which raises `ConfigurationError` for a target that makes no sense when the client is made.
    """

    def watch(self, target: Target) -> AsyncIterator[Addr]:
        """Yield each new state of ``target``; raise when broken."""
        ...


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
        self._settling: Job | None = None
        self._next: Addr | None = None
        self._since: float | None = None
        self._began = -NEVER
        self._scope: anyio.CancelScope | None = None
        self._settle: float = getattr(resolver, "settle", SETTLE)
        self._relist: float | None = getattr(resolver, "relist", None)
        self._refreshable: bool = getattr(resolver, "refreshable", False)
        metrics = env.metrics.scope("name")
        metrics.gauge("endpoints", lambda: len(self.endpoints))
        metrics.gauge("age_s", lambda: self.age or 0.0)
        self._failures, self._updates = metrics.counter("failures"), metrics.counter("updates")
        self._refreshes = metrics.counter("refreshes")

    @property
    def endpoints(self) -> tuple[Address, ...]:
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
        for job in (self._job, self._settling):
            if job is not None:
                job.cancel()

    def refresh(self) -> None:
        """A connect to one of the addresses has failed: ask the source anew, if that helps and was not just done."""
        now = self._env.clock.now()
        if self._refreshable and self._scope is not None and now - self._began >= REFRESH:
            self._began = now
            self._refreshes.value += 1
            self._scope.cancel()

    async def _run(self) -> None:
        wait = RESTART_FIRST
        while True:
            self._began = self._env.clock.now()
            try:
                with anyio.CancelScope(deadline=anyio.current_time() + self._patience()) as self._scope:
                    source: Any = self._resolver.watch(self.target)
                    async with aclosing(source) if hasattr(source, "aclose") else _nothing_to_close():
                        async for addr in source:
                            wait = RESTART_FIRST
                            self._take(addr)
                    return  # a name that never changes: its resolver has said all there is to say
                continue  # it was time to ask anew
            except Exception as error:
                known = isinstance(error, ConfigurationError)
                self._broken(str(error) if known else f"{type(error).__name__}: {error}")
            finally:
                self._scope = None
            await anyio.sleep(wait * self._env.rng.uniform(0.5, 1.0))
            wait = min(wait * 2, RESTART_LAST)

    def _patience(self) -> float:
        return NEVER if self._relist is None else self._relist * self._env.rng.uniform(0.8, 1.2)

    # --- states -------------------------------------------------------------------------------------------------------

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
        known = isinstance(self.addr.value, Bound | Neg)
        if not known or not self._settle:
            self._set(addr)
            return
        self._next = addr
        if self._settling is None:
            self._settling = self._env.supervisor.start(self._settle_down, name=f"settle {self.target}")

    async def _settle_down(self) -> None:
        """Wait until no further state has come for a while."""
        try:
            latest = self._env.clock.now() + SETTLE_LAST
            seen: object = None
            while self._next is not seen and (left := latest - self._env.clock.now()) > 0:
                seen = self._next
                await anyio.sleep(min(self._settle, left))
            if self._next is not None:
                self._set(self._next)
        finally:
            self._settling = self._next = None

    def _set(self, addr: Addr) -> None:
        self._updates.value += 1
        if addr != self.addr.value or isinstance(addr, Bound):  # of equal addresses the weights may differ
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


class _nothing_to_close:  # noqa: N801 - a context manager, as `aclosing` is
    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc: object) -> None:
        pass
