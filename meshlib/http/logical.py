"""Which hosts are logical names: those that a Dtab, the base's or the local one, has an entry for.

A base Dtab that is followed may not have been read yet. Then nobody knows whether a host is a name, and to ask DNS for
one that is might send the request somewhere else altogether. So requests wait for it as they do for a first endpoint:
for 3 s in all and no longer, less if they are less patient or their time runs out; then they fail.
"""

from __future__ import annotations

from typing import Any, Final

import anyio

from ..core.clock import Clock
from ..core.deadlines import kept, patience_of
from ..core.env import Env
from ..core.errors import ConfigurationError, ResolutionError
from ..core.supervisor import Supervisor
from ..names.base import BaseDtab
from ..names.dtab import Dtab
from ..names.path import Path

__all__ = ["LogicalNames"]

PATIENCE: Final = 3.0
"""Seconds to wait for a base Dtab that has not been read yet, as for a first endpoint; from the first who asked on."""


class LogicalNames:
    """Looks hosts up.

    Args:
        prefix: Of the paths that they are looked up under.
        base: The base Dtab.
        clock: The transport's.
        supervisor: Where the base Dtab is followed.
    """

    def __init__(self, prefix: Path, base: BaseDtab, clock: Clock, supervisor: Supervisor) -> None:
        self._prefix, self._base, self._clock, self._supervisor = prefix, base, clock, supervisor
        self._unknown_since: float | None = None
        self._waiting: set[anyio.CancelScope] = set()
        self._closed = False

    @property
    def any(self) -> bool:
        """May the base Dtab have an entry?"""
        return self._base.target is not None or bool(self._base.current.value)

    async def has(self, host: str, local: tuple[tuple[str, str], ...], request: Any, until: float | None) -> bool:
        """Is ``host`` a name?

        Args:
            host: Of the request's URL.
            local: The request's own Dtab.
            request: Which says how patient it is.
            until: When its time is over, on the clock.

        Raises:
            ResolutionError: The base Dtab has not been read, and the request waits for it no longer.
            DeadlineExceeded: Its time is over.
        """
        try:
            path = Path.parse(f"{self._prefix}/{host}")
        except ConfigurationError:
            return False
        if local and Dtab.of_pairs(local)[0].matches(path):
            return True
        base = self._base
        if base.current.value is None:
            await self._wait(path, request, until)
        return bool(base.current.value and base.current.value.matches(path))

    async def _wait(self, path: Path, request: Any, until: float | None) -> None:
        """Until the base Dtab has been read, or somebody has closed the transport."""
        base, now = self._base, self._clock.now()
        base.start(Env(supervisor=self._supervisor))
        if self._unknown_since is None:
            self._unknown_since = now
        usual, own = self._unknown_since + PATIENCE, now + patience_of(request, PATIENCE)
        patient = min(usual, own)
        last = patient if until is None else min(patient, until)
        if last > now and not self._closed:
            scope = anyio.CancelScope(deadline=anyio.current_time() + last - now)
            self._waiting.add(scope)
            try:
                with scope:
                    await base.current.wait_for(lambda dtab: dtab is not None)
            finally:
                self._waiting.discard(scope)
        if base.current.value is not None or self._closed:
            return
        problem = base.problem or "nothing was read from it"
        if until is not None and until < patient:
            raise kept(f"the base Dtab {base.target}, which is not known yet: {problem}")
        error = ResolutionError(
            f"nobody knows yet whether {path} is a name, as there is no base Dtab yet: {base.target}: {problem}"
        )
        error.impatient = own < usual
        raise error

    def close(self) -> None:
        """Nobody waits any more."""
        self._closed = True
        for scope in self._waiting:
            scope.cancel()
