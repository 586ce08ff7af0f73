"""The base Dtab of a client: what its logical names mean where the request itself says nothing else.

It is given as a Dtab, as its text, or as a target whose text is a Dtab and is followed while it changes
(``sources.py``). Each new one is applied whole, between two requests. One that cannot be read is refused, with line and
column, and the last good one stays, as it does while there is no text to be had. A text of nothing but space is refused
as well where it would take the place of a Dtab with entries: it is what a file looks like that somebody else is writing
at this moment. Who wants none writes a comment.

Where a client is given none, the environment variable ``MESHLIB_DTAB`` says, so that whoever runs a process decides
where its names go.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Final

import anyio

from ..core.env import Env, Metrics
from ..core.errors import ConfigurationError, DtabError
from ..core.supervisor import Job
from ..core.var import Var
from .dtab import EMPTY_DTAB, Dtab
from .sources import DtabSource, source_for
from .target import Target, redacted

__all__ = ["VARIABLE", "BaseDtab"]

logger = logging.getLogger("meshlib.names")

VARIABLE: Final = "MESHLIB_DTAB"
RESTART_FIRST, RESTART_LAST = 0.1, 2.0
"""Seconds before a broken source is asked again: doubling from the first to the last, each wait jittered by half. It is
one small text, so there is no need to wait for half a minute, as resolvers do."""
_FOLLOWED: Final = re.compile(r"[a-z][a-z0-9+.-]*://\S+")


class BaseDtab:
    """A base Dtab, and what follows it if it may change.

    Args:
        source: A Dtab, its text, or a target to follow; ``None`` for what the environment says.

    Attributes:
        current: The Dtab; ``None`` until the first one was read.
        target: What is followed; ``None`` for a Dtab that does not change.
        problem: What is wrong with the source now; empty when nothing is.

    Raises:
        ConfigurationError: It is none of these, or a package is missing.
        DtabError: The text cannot be read.
    """

    def __init__(self, source: Dtab | str | None = None) -> None:
        given = os.environ.get(VARIABLE, "") if source is None else source
        self.target: Target | None = None
        self.problem = ""
        self.refused = self.updates = 0
        self._source: DtabSource | None = None
        self._job: Job | None = None
        fixed: Dtab | None = None
        try:
            if isinstance(given, Dtab):
                fixed = given
            elif not isinstance(given, str):
                raise ConfigurationError(
                    f"{given!r} is no Dtab: give one, or its text, or where to follow it: 'file:///etc/mesh/dtab'"
                )
            elif _FOLLOWED.fullmatch(given.strip()):
                self.target = Target.parse(given.strip())
                self._source = source_for(self.target)
            else:
                fixed = Dtab(given)
        except DtabError as error:
            raise DtabError(f"{_where(source)}: {error.message}", line=error.line, column=error.column) from error
        except ConfigurationError as error:
            raise ConfigurationError(f"{_where(source)}: {error.message}") from error
        self.current: Var[Dtab | None] = Var(fixed)

    def show(self, metrics: Metrics) -> None:
        """Export how its source fares."""
        metrics.gauge("dtab_entries", lambda: len(self.current.value or EMPTY_DTAB))
        metrics.gauge("dtab_broken", lambda: int(bool(self.problem)))
        metrics.gauge("dtab_refused", lambda: self.refused)
        metrics.gauge("dtab_updates", lambda: self.updates)

    def start(self, env: Env) -> None:
        """Begin to follow it, if it may change. Twice is the same as once."""
        if self._source is not None and self.target is not None and self._job is None:
            self._job = env.supervisor.start(
                self._follow, self._source, self.target, env, name=f"follow the Dtab {self.target}"
            )

    async def _follow(self, source: DtabSource, target: Target, env: Env) -> None:
        wait = RESTART_FIRST
        while True:
            try:
                async for text in source.texts(target):
                    wait = RESTART_FIRST
                    self._take(text)
                return  # one that never changes: its source has said all there is to say
            except ConfigurationError as error:
                self._broken(error.message)
            except Exception as error:
                self._broken(f"{type(error).__name__}: {error}")
            await anyio.sleep(wait * env.rng.uniform(0.5, 1.0))
            wait = min(wait * 2, RESTART_LAST)

    def _take(self, text: str) -> None:
        before = self.current.value
        try:
            if before and not text.strip():
                raise DtabError("it is empty; if that is meant, write a comment into it: # no entries")
            dtab = Dtab(text)
        except DtabError as error:
            self.refused += 1
            self._broken(error.message)
            return
        if self.problem:
            logger.info("%s: the Dtab can be read again", self.target)
        self.problem = ""
        if before is None or dtab != before:
            if before is not None:
                logger.info("%s: the base Dtab is now %s", self.target, redacted(str(dtab)))
            self.updates += 1
            self.current.set(dtab)

    def _broken(self, problem: str) -> None:
        if problem != self.problem:
            kept = "the last good one stays" if self.current.value is not None else "there is none yet"
            logger.warning("%s: this base Dtab cannot be used, and %s: %s", self.target, kept, problem)
        self.problem = problem

    def __repr__(self) -> str:
        text = "not read yet" if self.current.value is None else str(self.current.value) or "an empty Dtab"
        shown = text if len(text) <= 200 else f"{text[:200]}…"
        where = f" from {self.target}" if self.target is not None else ""
        problem = f", source broken: {self.problem.splitlines()[0]}" if self.problem else ""
        return f"<{shown}{where}{problem}>"


def _where(source: object) -> str:
    return VARIABLE if source is None else "base_dtab(…)"
